"""The trainer: a step is what it says, a run that was killed goes on as if it had not been, and its checkpoint runs."""

import copy
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from lumina_rt.kernels.quantization import dequantize, quantize
from lumina_rt.sft import __main__ as command
from lumina_rt.sft import train
from lumina_rt.sft.train import LOG, Trainer, TrainingConfig
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from safetensors.torch import save_file as save_tensors
from test_data import save

from lumina_rt import Engine, SamplingParams, dummy, weights
from lumina_rt.tokenizer import Tokenizer

SMALL = {"batch_tokens": 60, "dtype": "float32", "lr": 1e-2, "min_lr": 1e-3, "warmup_steps": 2, "save_every": 3}
PLAIN = {"dropout": 0.0, "context_drop": 0.0}  # nothing is drawn at random


def write_dialogs(path, vocab, n=30, seed=0, extra=()):
    """Random tokens of several lengths; some dialogs draw an image, so that the words before may be dropped."""
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(n):
        tokens = rng.integers(4, 300, rng.integers(6, 20))
        learned = np.arange(len(tokens)) >= rng.integers(2, 5)
        if i % 2:
            tokens[5] = vocab.image_start
        rows.append((tokens, learned))
    rows += [(np.array(tokens), np.ones(len(tokens))) for tokens in extra]
    return save(path, rows)


@pytest.fixture(scope="module")
def vocab(checkpoint):
    return Tokenizer.from_file(checkpoint / "tokenizer.json").vocab


@pytest.fixture(scope="module")
def data(vocab, tmp_path_factory):
    return write_dialogs(tmp_path_factory.mktemp("data") / "dialogs.safetensors", vocab)


@pytest.fixture
def trainer(checkpoint, data, tmp_path, monkeypatch):
    """Make a Trainer on the tiny checkpoint; it writes into the folder `name` of this test."""
    monkeypatch.setattr(train, "draw_loss", lambda folder: None)  # slower than all else here; it has a test

    def make(name="run", model=checkpoint, paths=None, **options):
        return Trainer(model, paths or [data], tmp_path / name, TrainingConfig(**SMALL | {"steps": 7} | options))

    return make


def copy_without(folder, names, target):
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(*names))
    return target


def losses(output):
    return [json.loads(line) for line in (output / LOG).read_text().splitlines()]


def stop_at(trainer, step, error=KeyboardInterrupt):
    """Let a run be killed as a step begins."""
    take = trainer.train_step

    def train_step(group):
        if trainer.step == step:
            raise error
        return take(group)

    trainer.train_step = train_step
    return trainer


def assert_same(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert torch.equal(tensor, second[name]), name


def test_the_learning_rate_grows_in_line_then_falls_by_half_a_cosine(trainer):
    lr = trainer(steps=14, warmup_steps=4, lr=1.0, min_lr=0.2).lr
    assert [lr(step) for step in range(4)] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert [lr(step) for step in (4, 9, 14)] == pytest.approx([1.0, 0.6, 0.2])
    assert lr(6) == pytest.approx(0.2 + 0.4 * (1 + math.cos(0.2 * math.pi)))
    constant = trainer(steps=14, warmup_steps=0, lr=2e-5, min_lr=2e-5).lr
    assert {constant(step) for step in range(14)} == {2e-5}


def test_each_step_is_taken_with_the_rate_of_its_number(trainer, tmp_path):
    run = trainer(steps=5)
    run.run()
    assert [(line["step"], line["lr"]) for line in losses(tmp_path / "run")] == [(i, run.lr(i)) for i in range(5)]
    assert run.optimizers[0].param_groups[0]["lr"] == run.lr(4)


def test_muon_learns_the_matrices_of_layers_and_follows_the_schedule(trainer, tmp_path):
    run = trainer(steps=5, lr=1e-3, min_lr=1e-4, muon_lr=1e-2)
    adam, muon = (sum(p.numel() for p in opt.param_groups[0]["params"]) for opt in run.optimizers)
    matrices = {name: p for name, p in run.model.named_parameters() if name.endswith("proj.weight")}
    assert muon == sum(p.numel() for p in matrices.values())
    assert adam + muon == sum(p.numel() for p in run.model.parameters())
    run.run()
    assert run.optimizers[1].param_groups[0]["lr"] == pytest.approx(10 * run.lr(4))
    assert len(trainer(steps=5).optimizers) == 1


def test_a_run_with_muon_that_was_killed_ends_with_the_same_bits(trainer, tmp_path):
    trainer("whole", muon_lr=1e-2).run()
    with pytest.raises(KeyboardInterrupt):
        stop_at(trainer("killed", muon_lr=1e-2), 5).run()
    trainer("killed", muon_lr=1e-2).run()
    assert_same(*(load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")))


def test_a_compiled_run_is_the_same_but_for_rounding(trainer, tmp_path):
    for name in ("plain", "compiled"):
        run = trainer(name, steps=3, compile=name == "compiled", **PLAIN)
        assert all((layer._compiled_call_impl is None) == (name == "plain") for layer in run.model.model.layers)
        run.run()
    plain, compiled = (losses(tmp_path / name) for name in ("plain", "compiled"))
    for line, other in zip(plain, compiled, strict=True):
        assert other["loss"] == pytest.approx(line["loss"], rel=1e-5)
        assert other["grad_norm"] == pytest.approx(line["grad_norm"], rel=1e-4)
    tensors = load_file(tmp_path / "compiled" / "model.safetensors")
    assert tensors.keys() == load_file(tmp_path / "plain" / "model.safetensors").keys()


def test_training_lowers_the_loss_of_what_it_has_seen(trainer, tmp_path):
    trainer(steps=20, batch_tokens=600, save_every=20, **PLAIN).run()
    lines = losses(tmp_path / "run")
    assert lines[-1]["loss"] < lines[0]["loss"] - 2


@pytest.mark.parametrize("n", [1, 2, 120])
def test_the_losses_of_a_run_become_a_picture(tmp_path, n):
    (tmp_path / LOG).write_text("".join(json.dumps({"step": i, "loss": 7 / (i + 1)}) + "\n" for i in range(n)))
    train.draw_loss(tmp_path)
    assert np.ptp(np.asarray(Image.open(tmp_path / "loss.png").convert("L"))) > 100


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_every_other_step_is_by_rounded_matrices_and_leaves_them_as_they_were(
    trainer, checkpoint, tmp_path, quantization, dtype
):
    run, plain = trainer(quantization=quantization, dtype=dtype, **PLAIN), trainer(dtype=dtype, **PLAIN)
    before = copy.deepcopy(run.model.state_dict())
    run.save()
    stored = weights.read_state(tmp_path / "run", weights.stored_config(checkpoint))  # as an Engine would read it
    rounded = {
        name: dequantize(quantize(stored[name], weights.bits_of(name, quantization))) if weights.is_matrix(name) else p
        for name, p in before.items()
    }
    for trained in (run, plain):
        trained.optimizers[0].step = trained.optimizers[0].zero_grad = lambda: None
    group = next(run.batches.groups(1, 0))
    for state in (before, rounded):
        plain.model.load_state_dict(state)
        run.model.zero_grad()
        plain.model.zero_grad()
        assert run.train_step(group) == plain.train_step(group)
        for (name, p), other in zip(run.model.named_parameters(), plain.model.parameters(), strict=True):
            assert torch.equal(p.grad, other.grad), name
        assert_same(run.model.state_dict(), before)


def test_a_run_that_was_killed_ends_with_the_same_bits(trainer, tmp_path):
    options = {"dropout": 0.2, "context_drop": 0.5}
    trainer("whole", **options).run()
    with pytest.raises(KeyboardInterrupt):
        stop_at(trainer("killed", **options), 5).run()  # saved after three steps; two more are lost
    assert len(losses(tmp_path / "killed")) == 5
    again = trainer("killed", **options)
    again.resume()
    assert again.step == 3
    again = trainer("killed", **options)
    again.run()
    assert again.step == 7
    whole, killed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert_same(whole, killed)
    assert losses(tmp_path / "whole") == losses(tmp_path / "killed")
    assert not torch.equal(whole["lm_head.weight"], load_file(again.source / "model.safetensors")["lm_head.weight"])


def test_a_run_does_not_go_on_over_other_data_than_it_began_with(trainer, data, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        stop_at(trainer(), 5).run()
    with pytest.raises(ValueError, match=r"run holds a run over \d+ dialogs of \d+ tokens, not over \d+ dialogs"):
        trainer(paths=[data, data]).run()
    trainer().run()
    assert len(losses(tmp_path / "run")) == 7


def test_a_finished_run_that_is_started_again_changes_nothing(trainer, tmp_path):
    trainer().run()
    before = load_file(tmp_path / "run" / "model.safetensors")
    trainer().run()
    assert_same(before, load_file(tmp_path / "run" / "model.safetensors"))
    assert len(losses(tmp_path / "run")) == 7


def test_a_run_that_was_killed_between_its_last_state_and_its_checkpoint_writes_it(trainer, tmp_path, monkeypatch):
    trainer("whole").run()
    with monkeypatch.context() as patch:
        patch.setattr(train, "write_checkpoint", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            trainer("killed", save_every=100).run()
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    trainer("killed", save_every=100).run()
    assert_same(*(load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed")))


def test_a_run_that_was_killed_while_it_replaced_its_state_loses_none(trainer, tmp_path, monkeypatch):
    """Twice: first where there was a state, then where the killed run has left but the one before."""
    with monkeypatch.context() as patch:
        rename, n_renamed = type(tmp_path).rename, 0

        def killed(path, target):
            nonlocal n_renamed
            n_renamed += path.name == "state.partial"
            if path.name == "state.partial" and n_renamed >= 2:
                raise KeyboardInterrupt
            return rename(path, target)

        patch.setattr(type(tmp_path), "rename", killed)
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                trainer().run()
            again = trainer()
            again.resume()
            assert again.step in (3, 6)


def test_accumulated_batches_are_one_step_over_all_their_dialogs(trainer):
    """Batches of unequal length: each learned token weighs the same, whichever batch it came in.

    Rule: the weights differ by less than a thousandth of the way that they went, by L2 norm.
    """
    parts, whole = trainer(warmup_steps=0, **PLAIN), trainer(warmup_steps=0, **PLAIN)
    order = np.argsort(parts.batches.dialogs.lengths)
    batches = [order[:9].tolist(), order[9:12].tolist(), order[12:].tolist()]
    records = parts.train_step(batches), whole.train_step([order.tolist()])
    assert records[0]["tokens"] == records[1]["tokens"]
    for key in ("loss", "grad_norm"):
        assert records[0][key] == pytest.approx(records[1][key], rel=1e-5)
    start = weights.read_state(parts.source, parts.model.config)
    for name, weight in parts.model.state_dict().items():
        way, error = weight - start[name], weight - whole.model.state_dict()[name]
        assert way.norm() > 0
        assert error.norm() <= 1e-3 * way.norm(), name


def test_the_loss_and_the_gradient_are_means_over_learned_tokens(trainer):
    run = trainer(z_loss=0.01, clip=1e9, **PLAIN)
    rows = [run.batches.dialogs.rows[i] for i in (0, 1, 2)]
    n_learned = sum(int(learned[1:].sum()) for _, learned in rows)
    total = 0.0
    for tokens, learned in rows:
        tokens = torch.from_numpy(tokens).long()
        logits = run.model(tokens[None])[0, :-1]
        terms = torch.nn.functional.cross_entropy(logits, tokens[1:], reduction="none")
        terms = terms + 0.01 * logits.logsumexp(-1) ** 2
        total = total + terms[torch.from_numpy(learned[1:])].sum()
    gradients = torch.autograd.grad(total / n_learned, list(run.model.parameters()))
    norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
    record = run.train_step([[0, 1], [2]])
    assert record["tokens"] == n_learned
    assert record["loss"] == pytest.approx(float(total.detach() / n_learned), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(float(norm), rel=1e-4)


def test_a_step_is_adamw_on_the_clipped_gradient(trainer):
    """The first step of AdamW, by hand: every weight decays, then goes by lr along the sign of its gradient."""
    run = trainer(warmup_steps=0, weight_decay=0.1, lr=1e-2, clip=1e-3, **PLAIN)
    before = {name: weight.detach().clone() for name, weight in run.model.named_parameters()}
    clipped = {}

    def keep(optimizer, *_):
        clipped.update({name: weight.grad.clone() for name, weight in run.model.named_parameters()})

    run.optimizers[0].register_step_pre_hook(keep)
    run.train_step([[0, 1, 2]])
    norm = torch.stack([gradient.norm() for gradient in clipped.values()]).norm()
    assert float(norm) == pytest.approx(1e-3, rel=1e-3)
    for name, weight in run.model.named_parameters():
        expected = before[name] * (1 - 1e-3) - 1e-2 * clipped[name] / (clipped[name].abs() + 1e-8)
        assert torch.allclose(weight, expected, atol=1e-6), name
        assert weight.grad is None


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_run_and_the_last_state_stays(trainer, tmp_path, monkeypatch, value):
    trainer("whole").run()
    broken, loss_of = trainer(), train.loss_of

    def loss_at_step_4(*args):
        loss, n = loss_of(*args)
        return loss * (value if broken.step == 4 else 1), n

    with monkeypatch.context() as patch:
        patch.setattr(train, "loss_of", loss_at_step_4)
        with pytest.raises(FloatingPointError, match=r"step 4 is (nan|inf); the state of the last save is kept"):
            broken.run()
    again = trainer()
    again.resume()
    assert again.step == 3
    assert_same(load_file(tmp_path / "run" / "model.safetensors"), again.model.state_dict())
    trainer().run()
    assert_same(*(load_file(tmp_path / name / "model.safetensors") for name in ("whole", "run")))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_checkpoint_has_the_published_layout_and_the_engine_runs_it(trainer, tmp_path, dtype):
    run, output = trainer(steps=2, dtype=dtype), tmp_path / "run"
    run.run()
    with safe_open(output / "model.safetensors", framework="pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    assert shapes == weights.tensor_shapes(run.model.config)
    assert json.loads((output / "config.json").read_text()) == {
        **json.loads((run.source / "config.json").read_text()),
        "torch_dtype": dtype,
    }
    for name in ("tokenizer.json", "generation_config.json", "vqgan.json", "vqgan.safetensors"):
        assert (output / name).read_bytes() == (run.source / name).read_bytes()
    engine = Engine.from_pretrained(output, device="cpu", num_pages=8)
    assert engine.model.embed.dtype == getattr(torch, dtype)
    assert torch.equal(engine.model.embed, run.model.model.embed_tokens.weight.to(engine.model.embed.dtype))
    drawn = engine.generate(["a"], SamplingParams(num_images=1, size=(64, 64), seed=0), progress=False)[0]
    assert drawn.images[0].size == (64, 64)


def test_the_config_of_the_checkpoint_names_its_dtype_however_the_source_spells_it(trainer, checkpoint, tmp_path):
    source = copy_without(checkpoint, [], tmp_path / "source")
    values = json.loads((source / "config.json").read_text())
    del values["torch_dtype"]
    (source / "config.json").write_text(json.dumps({**values, "dtype": "bfloat16"}))
    trainer(model=source, steps=1).run()
    engine = Engine.from_pretrained(tmp_path / "run", device="cpu", num_pages=8)
    assert engine.model.embed.dtype == torch.float32


def test_training_begins_with_the_weights_of_the_checkpoint(trainer, checkpoint):
    assert_same(dict(trainer().model.state_dict()), load_file(checkpoint / "model.safetensors"))


def test_a_folder_without_weights_begins_with_those_of_the_seed(trainer, checkpoint, tmp_path):
    source = copy_without(checkpoint, ["model.safetensors"], tmp_path / "source")
    first, same, other = (dict(trainer(model=source, seed=seed).model.state_dict()) for seed in (1, 1, 2))
    assert_same(first, same)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])


def test_the_tensor_decides_how_many_rows_a_head_norm_has_as_in_the_runtime(trainer, checkpoint, tmp_path):
    source = copy_without(checkpoint, [], tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    norms = [name for name in tensors if "q_norm" in name or "k_norm" in name]
    tensors |= {name: tensors[name].repeat(4, 1) + torch.arange(4)[:, None] for name in norms}
    save_tensors(tensors, source / "model.safetensors")
    trainer(model=source, steps=1).run()
    written = load_file(tmp_path / "run" / "model.safetensors")
    assert {written[name].shape for name in norms} == {(4, 16)}
    assert Engine.from_pretrained(tmp_path / "run", device="cpu", num_pages=8)


def test_data_with_a_token_outside_the_vocabulary_is_refused(trainer, vocab, tmp_path):
    size = vocab.size
    path = write_dialogs(tmp_path / "far.safetensors", vocab, extra=[[5, 6, size, 7]])
    with pytest.raises(ValueError, match=f"^the data holds token {size}; the model has {size} tokens$"):
        trainer(paths=[path])
    path = write_dialogs(tmp_path / "near.safetensors", vocab, extra=[[5, 6, size - 1, 7]])
    trainer(paths=[path])


def test_the_defaults_are_the_papers():
    config = TrainingConfig(steps=1)
    assert (config.lr, config.min_lr, config.weight_decay) == (2e-5, 2e-5, 0.1)
    assert (config.z_loss, config.dropout, config.context_drop, config.clip) == (1e-5, 0.05, 0.1, 4.0)
    assert config.dtype == "bfloat16"


def arguments(output, model, data, **options):
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in (SMALL | {"steps": 2} | options).items()]
    return [str(output), "--model", str(model), "--data", str(data), *flags]


def run_command(launcher, argv, cwd):
    """Run a module as users do, in a process of its own."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", *launcher, *argv], cwd=cwd, env=environment, capture_output=True, text=True
    )


def test_the_command_trains_as_the_trainer_does_and_exits_with_0(trainer, checkpoint, data, tmp_path):
    done = run_command(["lumina_rt.sft"], arguments("command", checkpoint, data), tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    trainer(steps=2).run()
    assert_same(*(load_file(tmp_path / name / "model.safetensors") for name in ("command", "run")))
    files = {path.name for path in (tmp_path / "command").iterdir()}
    copied = {"config.json", "generation_config.json", "tokenizer.json", "vqgan.json", "vqgan.safetensors"}
    assert files == copied | {"model.safetensors", "state", LOG, "loss.png"}


def test_every_field_of_the_config_is_an_option(checkpoint, data, tmp_path, monkeypatch):
    options = {
        "steps": 3, "batch_tokens": 70, "accumulate": 2, "lr": 0.5, "min_lr": 0.25, "warmup_steps": 4,
        "weight_decay": 0.3, "clip": 2.5, "z_loss": 0.125, "dropout": 0.75, "context_drop": 0.0625,
        "dtype": "float32", "save_every": 11, "seed": 12, "quantization": "int8",
    }  # fmt: skip
    seen = []
    monkeypatch.setattr(command.Trainer, "run", lambda self: seen.append(self.config))
    assert command.main([*arguments(tmp_path, checkpoint, data, **options), "--recompute"]) == 0
    assert seen == [TrainingConfig(**options, recompute=True)]


def test_bad_input_ends_the_command_with_1_and_one_line(checkpoint, data, vocab, tmp_path, capsys):
    far = write_dialogs(tmp_path / "far.safetensors", vocab, extra=[[5, vocab.size, 7]])
    text = tmp_path / "text.safetensors"
    text.write_text("a dialog")
    broken = copy_without(checkpoint, ["tokenizer.json"], tmp_path / "broken")
    narrow = dummy.write_checkpoint(tmp_path / "narrow", dummy.TINY_MODEL | {"intermediate_size": 96})
    cases = (
        ((checkpoint, far), {}, f"the data holds token {vocab.size}"),
        ((checkpoint, tmp_path / "none.safetensors"), {}, "none.safetensors cannot be read"),
        ((checkpoint, text), {}, "text.safetensors cannot be read"),
        ((tmp_path / "nowhere", data), {}, "no tokenizer at"),
        ((broken, data), {}, "no tokenizer at"),
        ((checkpoint, data), {"batch_tokens": 10}, "batches hold 10 tokens; the longest dialog has"),
        ((checkpoint, data), {"accumulate": 1000}, "a step needs 1000"),
        ((checkpoint, data), {"dtype": "float16"}, "float16"),
        ((narrow, data), {"quantization": "int4"}, "the model is 96 wide; quantization expects a multiple of 64"),
        ((checkpoint, data), {"quantization": "int3"}, "quantization is 'int3'; expected int8, int4 or nothing"),
    )
    for places, options, expected in cases:
        assert command.main(arguments(tmp_path / "output", *places, **options)) == 1
        out, err = capsys.readouterr()
        lines = [line for line in err.splitlines() if "step/s" not in line and line]
        assert out == ""
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
        assert expected in lines[0]
    assert not (tmp_path / "output" / "model.safetensors").exists()


@pytest.mark.timeout(300)
def test_two_processes_under_torchrun_are_one_with_twice_the_batches(trainer, checkpoint, data, tmp_path):
    """Rule: the weights differ by less than a thousandth of the way that they went, by L2 norm.

    Two processes begin, and one goes on from the state that they left.
    """
    options = {**PLAIN, "min_lr": SMALL["lr"], "save_every": 2, "quantization": "int8"}
    launcher = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "lumina_rt.sft"]
    done = run_command(launcher, arguments("two", checkpoint, data, steps=2, **options), tmp_path)
    assert done.returncode == 0, done.stderr
    two = load_file(tmp_path / "two" / "model.safetensors")
    trainer("two", steps=4, accumulate=2, **options).run()
    one = trainer("one", steps=4, accumulate=2, **options)
    stop_at(one, 2)
    with pytest.raises(KeyboardInterrupt):
        one.run()
    after_two = load_file(tmp_path / "one" / "model.safetensors")
    trainer("one", steps=4, accumulate=2, **options).run()
    start = load_file(checkpoint / "model.safetensors")
    last = [load_file(tmp_path / name / "model.safetensors") for name in ("one", "two")]
    for expected, found in ((after_two, two), last):
        assert found.keys() == start.keys()
        for name, tensor in found.items():
            way = (expected[name] - start[name]).norm()
            assert (tensor - expected[name]).norm() <= 1e-3 * way, name
    for ours, theirs in zip(losses(tmp_path / "one"), losses(tmp_path / "two"), strict=True):
        assert ours["tokens"] == theirs["tokens"]
        for key in ("loss", "grad_norm"):
            assert theirs[key] == pytest.approx(ours[key], rel=1e-4)
