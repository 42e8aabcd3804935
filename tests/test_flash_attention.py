"""The adapter to flash-attn, over a stand-in that holds to its documented contract: when it is taken, and what it gets.

flash-attn itself needs a GPU to build and to run.
"""

import inspect

import pytest
import torch
from lumina_rt.kernels import OPS, cpu, reference
from op_inputs import attention_inputs

from lumina_rt import Engine, EngineConfig
from lumina_rt.backend import choose_ops

pytest.importorskip("triton", reason="Triton is not installed; it is on Linux with the extra `test`")
from lumina_rt.kernels import cuda

BF16 = torch.bfloat16


@pytest.fixture
def without_flash(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)


def test_all_ops_but_attention_are_those_of_cuda(flash):
    for name in (*OPS, "pack"):
        ours, theirs = getattr(flash, name), getattr(reference, name)
        assert list(inspect.signature(ours).parameters) == list(inspect.signature(theirs).parameters), name
        assert (ours is getattr(cuda, name)) == (name != "paged_attention"), name


@pytest.mark.parametrize("dtype", [BF16, torch.float16])
def test_rows_of_one_token_go_to_flash_attn(flash, dtype):
    args = attention_inputs(dtype, 8, 2, 32, 256, [(700, 1), (1, 1), (256, 1), (257, 1)])
    assert torch.equal(flash.paged_attention(*args), reference.paged_attention(*args))
    assert len(flash.calls) == 1


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy tells of what the kernels mask away
@pytest.mark.usefixtures("patched_once")
@pytest.mark.parametrize("rows", [[(40, 3), (260, 1)], [(40, 2), (260, 2)], [(9, 9)]])
def test_all_other_rows_go_to_our_own_kernel(flash, rows):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args = [x.to(device) for x in attention_inputs(torch.float16, 4, 2, 32, 256, rows)]
    torch.testing.assert_close(flash.paged_attention(*args), reference.paged_attention(*args), rtol=2e-3, atol=2e-3)
    assert not flash.calls


def choose(dtype=BF16, head_dim=128, device="cuda", **options):
    return choose_ops(EngineConfig(**options).on(device), device, dtype, head_dim)


def test_auto_takes_flash_attn_where_its_rules_hold(flash):
    assert choose() == (flash, "flash-attn for one token a row, Triton for more")
    assert choose(attn_backend="flash")[0] is flash
    assert choose(attn_backend="triton") == (cuda, "Triton, as asked for")


BROKEN_RULES = [
    ({"dtype": torch.float32}, "a model in 16 bits, this one is in float32"),
    ({"kv_cache_dtype": "int8"}, "kv_cache_dtype is 'int8'"),
    ({"page_size": 128}, "a page_size of a multiple of 256, it is 128"),
    ({"head_dim": 36}, "they have 36"),
    ({"head_dim": 264}, "they have 264"),
]


@pytest.mark.parametrize(("options", "reason"), BROKEN_RULES, ids=[str(options) for options, _ in BROKEN_RULES])
def test_where_a_rule_is_broken_auto_takes_triton_and_flash_is_refused(flash, options, reason):
    ops, why = choose(**options)
    assert ops is cuda
    assert why.startswith("Triton; flash-attn wants ")
    assert reason in why
    with pytest.raises(ValueError, match=f"^attn_backend is 'flash'; flash-attn wants .*{reason}"):
        choose(**options, attn_backend="flash")


def test_another_release_of_flash_attn_is_not_taken(flash, monkeypatch):
    monkeypatch.setattr("importlib.metadata.version", lambda name: "2.8.4")
    assert choose() == (cuda, "Triton; flash-attn wants to be of version 2.8.3, it is 2.8.4")


def test_without_flash_attn_auto_takes_triton_and_flash_is_refused(without_flash):
    assert choose() == (cuda, "Triton; flash-attn is not installed")
    with pytest.raises(ValueError, match=r"^attn_backend is 'flash'; flash-attn is not"):
        choose(attn_backend="flash")


def test_a_cpu_has_attention_of_its_own(checkpoint):
    assert choose(device="cpu") == (cpu, "C++, as on every CPU")
    for asked in ("flash", "triton"):
        with pytest.raises(ValueError, match=f"^attn_backend is '{asked}'; expected 'auto' on a CPU"):
            Engine.from_pretrained(checkpoint, device="cpu", attn_backend=asked)
