"""The trainable transformer: its loss and gradients are those of transformers' Chameleon on the same weights."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from lumina_rt.sft.model import SHORT, TrainableModel, long_attention, loss_of, short_attention
from test_model import KINDS, VOCAB, Rows, build, random_tokens

from lumina_rt import weights

LENGTHS = (23, 40, 9)


def trainable(folder, config, **options):
    """The checkpoint that test_model's `build` wrote, as a TrainableModel, ready for inference."""
    tensors = weights.Checkpoint(folder).tensors
    norms = (f"model.layers.0.self_attn.{part}_norm.weight" for part in "qk")
    config = replace(config, qk_norm_rows=tuple(tensors[name].shape[0] for name in norms))
    model = TrainableModel(config, **options)
    model.load_state_dict(weights.read_state(folder, config))
    return model.eval()


def padded_batch():
    """Rows of several lengths, padded with token 0 on the right; about half of their places are learned."""
    generator = torch.Generator().manual_seed(3)
    tokens = torch.zeros(len(LENGTHS), max(LENGTHS), dtype=torch.int64)
    labels = torch.full_like(tokens, -100)
    for row, length in enumerate(LENGTHS):
        tokens[row, :length] = torch.tensor(random_tokens(length, seed=row))
        learned = torch.rand(length, generator=generator) < 0.5
        learned[0] = True  # no place predicts the first token, learned or not
        labels[row, :length] = torch.where(learned, tokens[row, :length], -100)
    return tokens, labels


def expected_loss(theirs, tokens, labels, z_weight):
    """Row by row and without padding, from the whole logits of transformers' model."""
    total, n_places = 0.0, 0
    for row, length in enumerate(LENGTHS):
        hidden = theirs.model(input_ids=tokens[row : row + 1, :length]).last_hidden_state
        logits, targets = theirs.lm_head(hidden)[0, :-1], labels[row, 1:length]
        total = total + F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum")
        for place in range(length - 1):
            if targets[place] != -100:
                total = total + z_weight * logits[place].exp().sum().log() ** 2
                n_places += 1
    return total, n_places


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("z_weight", [0.0, 1e-5, 0.1])
def test_the_loss_of_a_padded_batch_is_that_of_transformers_row_by_row(kind, z_weight, tmp_path):
    ours, theirs = build(kind, tmp_path)
    tokens, labels = padded_batch()
    model = trainable(tmp_path, ours.config)
    with torch.no_grad():
        loss, n_places = loss_of(model, tokens, labels, z_weight)
        expected, n_expected = expected_loss(theirs, tokens, labels, z_weight)
    assert int(n_places) == n_expected < (labels != -100).sum()
    assert float(loss / n_places) == pytest.approx(float(expected / n_expected), rel=1e-5)


@pytest.mark.parametrize("kind", ["7b-mp4", "7b-gqa", "34b-gqa-mp2", "heads"])
def test_gradients_are_those_of_transformers(kind, tmp_path):
    ours, theirs = build(kind, tmp_path)
    tokens, labels = padded_batch()
    model = trainable(tmp_path, ours.config)
    loss_of(model, tokens, labels, 0.1)[0].backward()
    expected_loss(theirs, tokens, labels, 0.1)[0].backward()
    gradients = {name: weight.grad for name, weight in theirs.named_parameters() if "vqmodel" not in name}
    assert gradients.keys() == dict(model.named_parameters()).keys()
    for name, weight in model.named_parameters():
        expected = gradients[name]
        if "q_norm" in name or "k_norm" in name:  # a row that is repeated to heads gets the sum of theirs
            expected = expected.unflatten(0, (len(weight), -1)).sum(1)
        assert (weight.grad - expected).abs().max() <= 1e-4 * expected.abs().max(), name


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_runtimes_model(kind, tmp_path):
    ours, _ = build(kind, tmp_path)
    tokens = random_tokens(50)
    with torch.no_grad():
        logits = trainable(tmp_path, ours.config)(torch.tensor([tokens]))[0]
    expected = Rows(ours, 1).feed({0: tokens})[0]
    assert (logits - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("n", [1, 2, 37, SHORT])
def test_attention_is_the_same_with_its_scores_written_out(n):
    generator = torch.Generator().manual_seed(n)
    q, k, v, upstream = (torch.randn(2, 3, n, 8, generator=generator, dtype=torch.float64) for _ in range(4))
    results = []
    for attend in (long_attention, short_attention):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attend(*inputs)
        results.append((out, *torch.autograd.grad(out, inputs, upstream)))
    for long, short in zip(*results, strict=True):
        assert (long - short).abs().max() <= 1e-12 * long.abs().max().clamp(min=1)


def test_padding_changes_nothing_and_rows_count_by_themselves(tmp_path):
    ours, _ = build("7b", tmp_path)
    model = trainable(tmp_path, ours.config)
    tokens, labels = padded_batch()
    filled, alone, others = tokens.clone(), labels.clone(), labels.clone()
    for row, length in enumerate(LENGTHS):
        filled[row, length:] = 11
    alone[[0, 2]], others[1] = -100, -100
    with torch.no_grad():
        loss, n_places = loss_of(model, tokens, labels, 1e-5)
        wider = loss_of(model, F.pad(filled, (0, 7), value=11), F.pad(labels, (0, 7), value=-100), 1e-5)
        parts = [loss_of(model, tokens, part, 1e-5) for part in (alone, others)]
    assert wider[1] == n_places == sum(n for _, n in parts)
    assert float(wider[0]) == pytest.approx(float(loss), rel=1e-6)
    assert float(sum(part for part, _ in parts)) == pytest.approx(float(loss), rel=1e-6)


def test_places_give_the_same_rows_as_the_full_logits(tmp_path):
    ours, _ = build("34b-gqa", tmp_path)
    model = trainable(tmp_path, ours.config)
    tokens, labels = padded_batch()
    places = labels != -100
    with torch.no_grad():
        rows, logits = model(tokens, places), model(tokens)
    assert logits.shape == (*tokens.shape, VOCAB)
    assert rows.shape == (places.sum(), VOCAB)
    assert (rows - logits[places]).abs().max() <= 1e-6 * logits.abs().max()


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_recomputing_gives_the_same_gradients_with_dropout_too(dropout, tmp_path):
    ours, _ = build("7b", tmp_path)
    tokens, labels = padded_batch()
    gradients = []
    for recompute in (False, True):
        model = trainable(tmp_path, ours.config, dropout=dropout, recompute=recompute).train()
        torch.manual_seed(5)
        loss_of(model, tokens, labels, 1e-5)[0].backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]), name


def test_recomputing_keeps_no_activations_inside_layers(tmp_path):
    ours, _ = build("7b", tmp_path)
    tokens, labels = padded_batch()
    kept = []
    for recompute in (False, True):
        model = trainable(tmp_path, ours.config, recompute=recompute).train()
        n_kept = 0

        def count(tensor):
            nonlocal n_kept
            n_kept += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            loss_of(model, tokens, labels, 1e-5)
        kept.append(n_kept)
    assert kept[1] < kept[0] / 2


def test_dropout_falls_on_what_a_block_adds_in_training_alone(tmp_path):
    """Every residual sum is either untouched or has grown by a block's output over 1 - p."""
    ours, _ = build("7b", tmp_path)
    tokens = torch.tensor([random_tokens(30)])
    model, plain = trainable(tmp_path, ours.config, dropout=0.25), trainable(tmp_path, ours.config)
    with torch.no_grad():
        assert torch.equal(model(tokens), plain(tokens))
        added = {}

        def keep(name):
            return lambda module, inputs, output: added.__setitem__(name, output)

        layer = model.train().model.layers[0]
        layer.self_attn.register_forward_hook(keep("attention"))
        layer.mlp.register_forward_hook(keep("mlp"))
        layer.post_attention_layernorm.register_forward_pre_hook(lambda _, inputs: added.update(between=inputs[0]))
        layer.register_forward_hook(keep("layer"))
        torch.manual_seed(1)
        model(tokens)
        x = model.model.embed_tokens(tokens)
        for before, block, after in ((x, "attention", "between"), (added["between"], "mlp", "layer")):
            grown = added[after] - before
            dropped = grown == 0
            assert 0.2 < dropped.float().mean() < 0.3
            whole = added[block] / 0.75
            assert torch.allclose(grown[~dropped], whole[~dropped], atol=1e-5)
        # The attention itself is whole: it is what the plain model's gives for the same input.
        normed = plain.model.layers[0].input_layernorm(x)
        cos, sin = torch.ones(30, 1, 8), torch.zeros(30, 1, 8)
        assert torch.equal(layer.self_attn(normed, cos, sin), plain.model.layers[0].self_attn(normed, cos, sin))


def test_a_model_without_dropout_is_the_same_in_training(tmp_path):
    ours, _ = build("34b", tmp_path)
    model, tokens = trainable(tmp_path, ours.config), torch.tensor([random_tokens(30)])
    with torch.no_grad():
        assert torch.equal(model.train()(tokens), model.eval()(tokens))


def test_fresh_weights_follow_the_seed_and_give_an_even_guess(tmp_path):
    ours, _ = build("7b", tmp_path)
    models = []
    for seed in (1, 1, 2):
        model = TrainableModel(ours.config)
        model.init_weights(seed)
        models.append(model)
    first, same, other = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first if "norm" not in name)
    assert all((first[name] == 1).all() for name in first if "norm.weight" in name or "layernorm" in name)
    assert all((first[name] == 0).all() for name in first if name.endswith("bias"))
    tokens, labels = padded_batch()
    with torch.no_grad():
        loss, n_places = loss_of(models[0], tokens, labels, 0.0)
    assert float(loss / n_places) == pytest.approx(math.log(VOCAB), rel=0.02)
