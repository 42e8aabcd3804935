"""What only a GPU can tell: bf16, whole images, that nothing waits inside a step, and that graphs change nothing."""

import json

import numpy as np
import pytest
import torch
from lumina_rt.kernels import OPS, reference
from lumina_rt.kernels.quantization import dequantize, quantize
from op_inputs import assert_close, assert_parity, attention_inputs, double, draw_inputs, int8_pages, randn
from test_bench import module, run
from torch.utils._pytree import tree_map

from lumina_rt import Engine, SamplingParams, engine, hub, runner
from lumina_rt.kv_cache import KVCache
from lumina_rt.model import Model
from lumina_rt.multi_step import MultiStep
from lumina_rt.sampler import Sampler
from lumina_rt.vqgan import VQGAN, to_uint8

pytest.importorskip("triton", reason="Triton is not installed; it is on Linux with the extra `test`")
from lumina_rt.kernels import cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no NVIDIA GPU here"),
    pytest.mark.timeout(600),  # the first run of a kernel compiles it
]
BF16 = torch.bfloat16
HIDDEN, HEADS, HEAD_DIM, INTERMEDIATE = 4096, 32, 128, 11008  # of 7B
SMALL = {"device": "cuda", "page_size": 16, "num_pages": 256, "max_model_len": 1024, "max_num_seqs": 8}


def on_gpu(*values):
    return tree_map(lambda x: x.cuda(), values)


@pytest.mark.parametrize("n", [1, 2, 33])
def test_norms_and_silu_in_bf16_match_the_reference(n):
    x, residual, weight = on_gpu(*(randn(n, HIDDEN, seed=i, dtype=BF16) for i in range(3)))
    assert_parity(cuda, "rms_norm", x, weight[0], 1e-5, dtype=BF16)
    assert_parity(cuda, "add_rms_norm", x, residual, weight[0], 1e-5, dtype=BF16)
    assert_parity(cuda, "rms_norm_add", x, residual, weight[0], 1e-5, dtype=BF16)
    assert_parity(cuda, "silu_mul", *on_gpu(randn(n, 2 * INTERMEDIATE, dtype=BF16)), dtype=BF16)


def test_qk_norm_rope_in_bf16_matches_the_reference():
    n, pages = 5, (2, 256, HEADS, HEAD_DIM)
    norms = [(randn(1, HEAD_DIM, seed=i, dtype=BF16), randn(1, HEAD_DIM, seed=i + 9, dtype=BF16)) for i in range(2)]
    inputs = on_gpu(
        randn(n, 3 * HIDDEN, dtype=BF16), *norms, randn(300, HEAD_DIM, seed=5).cos().to(BF16),
        torch.tensor([0, 7, 299, 31, 32]), torch.tensor([0, 511, 255, 256, 3]),
    )  # fmt: skip
    results = []
    for ops, widen in ((cuda, lambda x: x), (reference, lambda x: x), (reference, double)):
        cached = [widen(torch.zeros(pages, dtype=BF16, device="cuda")) for _ in range(2)]
        results.append((ops.qk_norm_rope(*map(widen, inputs), *cached), *cached))
    for out, torch_out, truth in zip(*results, strict=True):
        assert_close(out, torch_out, truth, BF16)


@pytest.mark.parametrize("rows", [[(700, 1), (1500, 1)], [(700, 16), (16, 16)], [(300, 300), (2356, 1), (65, 64)]])
@pytest.mark.parametrize("keep", [torch.clone, int8_pages])
@pytest.mark.parametrize("kv_heads", [32, 8])
def test_attention_in_bf16_matches_the_reference(kv_heads, keep, rows):
    q, k_pages, v_pages, *rest = attention_inputs(BF16, HEADS, kv_heads, HEAD_DIM, 256, rows)
    args = on_gpu(q, keep(k_pages), keep(v_pages), *rest)
    assert_parity(cuda, "paged_attention", *args, dtype=BF16)


@pytest.mark.parametrize("n", [1, 8, 9, 17, 64])
@pytest.mark.parametrize("bits", [8, 4])
def test_quantized_linear_in_bf16_matches_the_reference_and_is_batch_invariant(bits, n):
    x, weight = on_gpu(randn(n, HIDDEN, dtype=BF16), quantize(randn(1000, HIDDEN, seed=1), bits))
    packed = cuda.pack(weight)
    out = cuda.linear(x, packed)
    assert_close(out, reference.linear(x, weight), x.double() @ dequantize(weight).double().T, BF16)
    assert torch.equal(cuda.linear(x[-1:].contiguous(), packed), out[-1:])


@pytest.mark.parametrize("chosen", [{"top_k": 2000}, {"top_k": 700, "top_p": 0.9}, {"min_p": 0.02}, {}])
def test_draws_from_bf16_logits_are_those_of_the_reference(chosen):
    args = on_gpu(*draw_inputs(64, 8192, 5, BF16, **chosen))
    same = cuda.guided_sample(*args) == reference.guided_sample(*args)
    assert same.sum() >= 63  # logarithms differ in the last place, which may move a near tie


def codes_of(made):
    """The codes of four images of two prompts, guided, which share steps and pages."""
    outputs = made.generate_image(["a dog", "a cat in the rain"], 64, 64, 2, seed=7, progress=False)
    return np.stack([answer.codes[0] for output in outputs for answer in output.answers])


@pytest.mark.parametrize("quantization", [None, "int8", "int4"])
def test_images_are_those_of_the_reference_ops(checkpoint, monkeypatch, quantization):
    options = SMALL | {"dtype": "float32", "quantization": quantization, "speculation": "off", "enforce_eager": True}
    ours = codes_of(Engine.from_pretrained(checkpoint, **options))
    monkeypatch.setattr(engine, "choose_ops", lambda *_: (reference, "as a test wants"))
    assert np.array_equal(ours, codes_of(Engine.from_pretrained(checkpoint, **options)))


def test_a_picture_decoded_in_bf16_is_that_of_fp32():
    """By the rule of the CPU: within 2 % of the spread of the pixels, and one of 255 in the mean."""
    folder = hub.find_vqgan(hub.find_model("demo"), None)
    on_cpu, plain, fast = (VQGAN.from_pretrained(folder, device=device) for device in ("cpu", "cuda", "cuda"))
    fast.decode_in(BF16)
    codes = torch.randint(fast.config.n_embed, (2, 10, 12), generator=torch.Generator().manual_seed(2))
    exact, drawn = on_cpu.decode(codes), [vqgan.decode(codes) for vqgan in (plain, fast)]
    assert all(pixels.dtype == torch.float32 and pixels.is_cuda for pixels in drawn)
    errors = [float((pixels.cpu() - exact).square().mean().sqrt() / exact.std()) for pixels in drawn]
    assert errors[0] < errors[1] < 0.02
    steps = (to_uint8(drawn[1]).cpu().int() - to_uint8(exact).int()).abs()
    assert steps.float().mean() < 1


def without_waiting(function):
    def run(*args):
        torch.cuda.set_sync_debug_mode("error")
        try:
            return function(*args)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    return run


@pytest.mark.parametrize("speculation", ["off", 3])
@pytest.mark.parametrize("enforce_eager", [True, False])
def test_nothing_waits_for_the_gpu_inside_a_step(checkpoint, monkeypatch, enforce_eager, speculation):
    with pytest.raises(RuntimeError):  # so that a wait would be found
        without_waiting(torch.Tensor.item)(torch.ones(1, device="cuda"))
    monkeypatch.setattr(runner, "build_step", without_waiting(runner.build_step))
    for owner, name in (
        (Model, "forward"), (Sampler, "_draw_group"), (KVCache, "copy_page"), (MultiStep, "run"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, without_waiting(getattr(owner, name)))
    options = SMALL | {"speculation": speculation, "quantization": "int8", "enforce_eager": enforce_eager}
    made = Engine.from_pretrained(checkpoint, **options)
    assert codes_of(made).shape == (4, 4, 4)
    assert made.generate(["a dog"], SamplingParams(num_images=0, max_tokens=5, seed=1), progress=False)
    assert made.generate(["a dog"], SamplingParams(num_images=1, seed=1), progress=False)  # a size of its own


@pytest.mark.parametrize("speculation", ["off", 3])
@pytest.mark.parametrize("kv_cache_dtype", [None, "int8"])
def test_images_by_graphs_are_those_without(checkpoint, speculation, kv_cache_dtype):
    """In int8 weights, whose products are the same bits whatever a step is padded to."""
    options = SMALL | {"quantization": "int8", "speculation": speculation, "kv_cache_dtype": kv_cache_dtype}
    graphed, plain = (Engine.from_pretrained(checkpoint, **options, enforce_eager=eager) for eager in (False, True))
    assert np.array_equal(codes_of(graphed), codes_of(plain))
    assert graphed.runner.graphs
    assert not plain.runner.graphs


def test_the_pool_fits_into_the_share_of_the_gpu(checkpoint):
    options = {"device": "cuda", "max_model_len": 1024, "max_num_seqs": 4, "enforce_eager": True}
    made = Engine.from_pretrained(checkpoint, **options)
    assert made.scheduler.pool.num_pages == 4 * 4
    with pytest.raises(ValueError, match=r"^num_pages takes .* GiB of KV cache; "):
        Engine.from_pretrained(checkpoint, **options, num_pages=10**8)


def test_flash_attn_matches_the_reference_and_can_be_captured(checkpoint):
    pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    from lumina_rt.kernels import flash_attention

    args = on_gpu(*attention_inputs(BF16, HEADS, 8, HEAD_DIM, 256, [(700, 1), (1, 1), (256, 1), (2356, 1)]))
    assert_parity(flash_attention, "paged_attention", *args, dtype=BF16)
    options = SMALL | {"page_size": 256, "num_pages": 32, "dtype": "bfloat16", "attn_backend": "flash"}
    assert codes_of(Engine.from_pretrained(checkpoint, **options)).shape == (4, 4, 4)


def test_a_replayed_copy_takes_the_time_of_its_bytes_at_the_rate_measured():
    machine, ops = module("machine"), module("ops")
    floor, source = machine.measure("cuda"), torch.ones(2**28, dtype=torch.uint8, device="cuda")
    target = torch.zeros_like(source)
    took = ops.seconds(machine.recorded(lambda: target.copy_(source)), "cuda")
    assert torch.equal(target, source)
    assert took == pytest.approx(2 * 2**28 / floor.read_gb_s / 1e9, rel=0.3)
    assert min(floor.int8_gmac_s, floor.bf16_gflop_s / 2) > 1000  # any GPU that has bf16 multiplies as fast


def test_every_op_is_timed_on_a_gpu():
    results = json.loads(run("ops.py", "--device", "cuda", "--rows", 1, 16)[-1])["results"]
    assert {r["op"] for r in results} == set(OPS)
    # What only reads may pass a copy a little.
    assert all(r["us"] > 0 and 0 < r["floor_percent"] < 120 and 0 < r["memory_percent"] < 120 for r in results)


def test_latency_reports_an_image_of_the_embedded_model_and_the_baseline_on_a_gpu():
    report = json.loads(run("latency.py", "--device", "cuda", "--iters", 1, "--baseline", "reference")[-1])
    assert report["env"]["gpu"] == torch.cuda.get_device_name()
    (result,) = report["results"]
    assert 0 < result["prefill_s"] + result["decode_s"] + result["vq_s"] <= 1.01 * result["s_per_image"]
    assert 0 < result["floor_percent"] < 100
    assert 0 < result["peak_gib"] < report["env"]["gpu_gib"]
    assert report["baseline"]["n_steps_timed"] == 10 * 11 + 1
    assert report["speedup"] > 0
