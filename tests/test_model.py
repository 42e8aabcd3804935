"""The transformer against transformers' Chameleon: same weights, same logits, however the tokens are split in steps."""

import json

import pytest
import torch
from lumina_rt.kernels import cpu, reference
from safetensors.torch import save_file
from transformers import ChameleonConfig, ChameleonForConditionalGeneration

from lumina_rt import dummy, weights
from lumina_rt.kv_cache import KVCache
from lumina_rt.model import Step, rope_table

PAGE_SIZE = 16
VOCAB = 300
OPS = [pytest.param(ops, id=ops.__name__.rsplit(".", 1)[1]) for ops in (reference, cpu)]
KINDS = {
    "7b": {"num_key_value_heads": 4, "model_parallel_size": 1, "swin_norm": False},
    "7b-mp4": {"num_key_value_heads": 4, "model_parallel_size": 4, "swin_norm": False},
    "7b-gqa": {"num_key_value_heads": 2, "model_parallel_size": 1, "swin_norm": False},
    "34b": {"num_key_value_heads": 4, "model_parallel_size": 4, "swin_norm": True},
    "34b-gqa": {"num_key_value_heads": 2, "model_parallel_size": 1, "swin_norm": True},
    "34b-gqa-mp2": {"num_key_value_heads": 2, "model_parallel_size": 2, "swin_norm": True},
    "heads": {
        "num_key_value_heads": 4,
        "model_parallel_size": 8,
        "num_attention_heads": 8,
        "swin_norm": False,
    },
}


def build(kind, tmp_path, ops=reference):
    """One set of random weights as our Model and as transformers' Chameleon."""
    values = {**dummy.TINY_MODEL, **KINDS[kind], "vocab_size": VOCAB}
    config = weights.config_from_json(values)
    tensors = dummy.random_tensors(values, seed=1)
    if kind == "heads":  # upstream's own layout: one row a head, so fewer for k than for q
        for part in ("weight", "bias"):
            for i in range(config.n_layers):
                name = f"model.layers.{i}.self_attn.k_norm.{part}"
                tensors[name] = tensors[name][::2].contiguous()
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file(tensors, tmp_path / "model.safetensors")
    model = weights.load(tmp_path, ops, torch.arange(4, 68), 256, torch.float32, "cpu")

    vq = {
        "base_channels": 32,
        "channel_multiplier": [1],
        "num_res_blocks": 1,
        "resolution": 8,
        "attn_resolutions": [],
    }
    theirs = ChameleonForConditionalGeneration(
        ChameleonConfig(
            **{key: value for key, value in values.items() if key != "torch_dtype"},
            vq_config=vq,
            vocabulary_map={"<image>": 5, "IMGIMGAZ": 4},
            attn_implementation="eager",
        )
    ).eval()
    for name, tensor in tensors.items():
        if ".q_norm." in name or ".k_norm." in name:
            heads = config.heads if ".q_norm." in name else config.kv_heads
            tensors[name] = tensor.repeat_interleave(heads // len(tensor), dim=0)
    missing, unexpected = theirs.load_state_dict(tensors, strict=False)
    assert not unexpected
    assert all("vqmodel" in name for name in missing)
    return model, theirs


def expected_logits(theirs, tokens):
    with torch.no_grad():
        hidden = theirs.model(input_ids=torch.tensor([tokens])).last_hidden_state
        return theirs.lm_head(hidden)[0]


class Rows:
    """Rows of a cache that are fed by hand, each on pages of its own."""

    def __init__(self, model, n_rows, blocks=8):
        shape = model.config
        self.model = model
        self.cache = KVCache(
            shape.n_layers, n_rows * blocks, PAGE_SIZE, shape.kv_heads, shape.head_dim, torch.float32, "cpu"
        )
        # Scattered on purpose: no row may rely on its pages being neighbours.
        self.tables = torch.randperm(n_rows * blocks, generator=torch.Generator().manual_seed(0))
        self.tables = self.tables.view(n_rows, blocks).int()
        self.lengths = [0] * n_rows

    def feed(self, pieces):
        """pieces: {row: tokens}. Returns {row: logits [len(tokens), vocab]}."""
        tokens, positions, slots, bounds, seq_lens = [], [], [], [0], []
        for row, piece in pieces.items():
            places = torch.arange(self.lengths[row], self.lengths[row] + len(piece))
            tokens += piece
            positions.append(places)
            slots.append(self.tables[row][places // PAGE_SIZE] * PAGE_SIZE + places % PAGE_SIZE)
            bounds.append(bounds[-1] + len(piece))
            self.lengths[row] += len(piece)
            seq_lens.append(self.lengths[row])
        step = Step(
            tokens=torch.tensor(tokens),
            positions=torch.cat(positions),
            slots=torch.cat(slots).long(),
            block_tables=self.tables[list(pieces)],
            cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
            seq_lens=torch.tensor(seq_lens, dtype=torch.int32),
        )
        logits = self.model.ops.linear(self.model.forward(step, self.cache), self.model.lm_head)
        return dict(zip(pieces, logits.split([len(piece) for piece in pieces.values()]), strict=True))


def assert_close(ours, theirs):
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def random_tokens(n, seed=0):
    return torch.randint(VOCAB, (n,), generator=torch.Generator().manual_seed(seed)).tolist()


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("kind", KINDS)
def test_whole_prefill_chunks_and_single_tokens_match_transformers(kind, ops, tmp_path):
    model, theirs = build(kind, tmp_path, ops)
    tokens = random_tokens(50)
    expected = expected_logits(theirs, tokens)
    assert_close(Rows(model, 1).feed({0: tokens})[0], expected)
    for sizes in ([17, 1, 16, 16], [1] * 50):
        rows, logits, start = Rows(model, 1), [], 0
        for size in sizes:
            logits.append(rows.feed({0: tokens[start : start + size]})[0])
            start += size
        assert start == 50
        assert_close(torch.cat(logits), expected)


@pytest.mark.parametrize("ops", OPS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_of_prefill_and_decode_rows_matches_separate_runs(kind, ops, tmp_path):
    model, theirs = build(kind, tmp_path, ops)
    long, short, late = random_tokens(40, 1), random_tokens(9, 2), random_tokens(21, 3)
    rows = Rows(model, 3)
    rows.feed({0: long[:39], 1: short[:7]})
    mixed = rows.feed({1: short[7:], 2: late, 0: long[39:]})
    assert_close(mixed[0], expected_logits(theirs, long)[39:])
    assert_close(mixed[1], expected_logits(theirs, short)[7:])
    assert_close(mixed[2], expected_logits(theirs, late))


@pytest.mark.parametrize("ops", OPS)
def test_a_model_in_bf16_stays_near_the_one_in_fp32(ops, tmp_path):
    model, theirs = build("7b", tmp_path, ops)
    half = weights.load(tmp_path, ops, torch.arange(4, 68), 256, torch.bfloat16, "cpu")
    tokens = random_tokens(30)
    rows = Rows(model, 1)
    rows.model = half
    rows.cache.k, rows.cache.v = rows.cache.k.bfloat16(), rows.cache.v.bfloat16()
    ours, exact = rows.feed({0: tokens})[0].float(), expected_logits(theirs, tokens)
    with torch.no_grad():
        rounded = theirs.bfloat16().model(input_ids=torch.tensor([tokens])).last_hidden_state
        rounded = theirs.lm_head(rounded)[0].float()
    # The rule of all op tests: no further from the exact result than twice the same model in the same dtype.
    eps = torch.finfo(torch.bfloat16).eps
    assert (ours - exact).abs().max() <= 2 * (rounded - exact).abs().max() + eps * exact.abs().max()


def test_the_rope_table_is_rounded_to_the_models_dtype():
    table = rope_table(100, 8, 10000.0, torch.bfloat16)
    exact = rope_table(100, 8, 10000.0, torch.float32)
    assert table.dtype == torch.bfloat16
    assert torch.equal(table, exact.bfloat16())
    assert torch.allclose(exact[7, :4], torch.cos(7 * 10000.0 ** (-torch.arange(4) / 4)))
    assert torch.allclose(exact[7, 4:], torch.sin(7 * 10000.0 ** (-torch.arange(4) / 4)))
