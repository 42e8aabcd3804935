"""The C++ ops against the reference, on every instruction set: parity, batch invariance, refusal of what is wrong."""

import inspect
import math
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lumina_rt.kernels import cpu, reference
from lumina_rt.kernels.quantization import GROUP, QuantizedPages, QuantizedWeight, dequantize, quantize
from op_inputs import assert_close, assert_parity, attention_inputs, double, draw_inputs, int8_pages, randn

from lumina_rt import _C, kernels

DTYPES = (torch.float32, torch.bfloat16)


@pytest.fixture(params=["portable", "avx2", "avx512", "amx"], autouse=True)
def isa(request):
    before = _C.isa()
    try:
        _C.use_isa(request.param)
    except ValueError:
        pytest.skip(f"this machine has no {request.param}")
    yield request.param
    _C.use_isa(before)


def test_every_op_has_the_signature_of_the_reference():
    for name in (*kernels.OPS, "pack"):
        ours, theirs = (inspect.signature(getattr(module, name)) for module in (cpu, reference))
        assert list(ours.parameters) == list(theirs.parameters), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "hidden"), [(2, 4096), (1, 192), (3, 15), (5, 17), (1, 1)])
def test_norms_and_silu_match_the_reference(dtype, n, hidden):
    x, residual, weight = (randn(n, hidden, seed=i, dtype=dtype) for i in range(3))
    assert_parity(cpu, "rms_norm", x, weight[0], 1e-5, dtype=dtype)
    assert_parity(cpu, "add_rms_norm", x, residual, weight[0], 1e-5, dtype=dtype)
    assert_parity(cpu, "rms_norm_add", x, residual, weight[0], 1e-5, dtype=dtype)
    assert_parity(cpu, "silu_mul", 3 * randn(n, 2 * hidden, dtype=dtype), dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("hidden", [192, 17])
def test_a_norm_is_rounded_before_it_is_added(dtype, hidden):
    x, residual, weight = (randn(3, hidden, seed=i, dtype=dtype) for i in range(3))
    added = cpu.rms_norm_add(x, residual, weight[0], 1e-5)
    assert torch.equal(added, residual + cpu.rms_norm(x, weight[0], 1e-5))


def test_silu_is_right_where_exp_leaves_the_range_of_floats():
    gate = torch.tensor([[-1e30, -200.0, -88.5, -87.0, 0.0, 87.0, 88.5, 200.0, math.inf, math.nan]])
    gate_up = torch.cat((gate, torch.ones_like(gate)), dim=1)
    torch.testing.assert_close(
        cpu.silu_mul(gate_up), reference.silu_mul(gate_up), rtol=1e-6, atol=1e-35, equal_nan=True
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size", "rows"),
    [
        (4, 4, 128, 256, [(700, 1), (513, 1)]),
        (6, 6, 32, 16, [(40, 17), (1, 1), (129, 2), (128, 1)]),
        (8, 1, 40, 32, [(300, 3), (5, 5)]),
        (64, 8, 128, 16, [(130, 2)]),
        (2, 2, 18, 16, [(257, 64)]),
    ],
)
def test_attention_matches_the_reference(dtype, heads, kv_heads, head_dim, page_size, rows):
    args = attention_inputs(dtype, heads, kv_heads, head_dim, page_size, rows)
    assert_parity(cpu, "paged_attention", *args, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size", "rows"),
    [(4, 4, 128, 256, [(700, 1), (513, 2)]), (6, 3, 40, 16, [(40, 17), (1, 1), (128, 1)])],
)
def test_attention_over_int8_pages_matches_the_reference(dtype, heads, kv_heads, head_dim, page_size, rows):
    q, k_pages, v_pages, *rest = attention_inputs(dtype, heads, kv_heads, head_dim, page_size, rows)
    assert_parity(cpu, "paged_attention", q, int8_pages(k_pages), int8_pages(v_pages), *rest, dtype=dtype)


def test_attention_does_not_look_at_what_lies_beyond_a_row():
    q, k_pages, v_pages, *rest = attention_inputs(torch.float32, 4, 2, 32, 16, [(20, 3), (33, 1)])
    expected = cpu.paged_attention(q, k_pages, v_pages, *rest)
    tables, lengths = rest[0], rest[2]
    written = torch.zeros(k_pages.shape[:2], dtype=torch.bool)
    for table, length in zip(tables.tolist(), lengths.tolist(), strict=True):
        for key in range(length):
            written[table[key // 16], key % 16] = True
    k_pages[~written] = v_pages[~written] = math.nan
    assert torch.equal(cpu.paged_attention(q, k_pages, v_pages, *rest), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "heads", "kv_heads", "head_dim", "mp"),
    [(2, 32, 32, 128, (1, 1)), (5, 6, 2, 40, (3, 2)), (1, 4, 4, 18, (4, 4)), (3, 8, 1, 256, (4, 1))],
)
def test_qk_norm_rope_matches_the_reference_and_writes_only_its_slots(dtype, n, heads, kv_heads, head_dim, mp):
    qkv = randn(n, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    norms = [(randn(rows, head_dim, seed=rows, dtype=dtype), randn(rows, head_dim, seed=9, dtype=dtype)) for rows in mp]
    rope = randn(50, head_dim, seed=5).cos().to(dtype)
    positions, slots = torch.randint(50, (n,)), torch.randperm(3 * 16)[:n]
    results = []
    for ops, widen in ((cpu, lambda x: x), (reference, lambda x: x), (reference, double)):
        pages = [widen(torch.full((3, 16, kv_heads, head_dim), 7.0, dtype=dtype)) for _ in range(2)]
        q = ops.qk_norm_rope(widen(qkv), *map(widen, norms), widen(rope), positions, slots, *pages)
        results.append((q, *pages))
    for out, torch_out, truth in zip(*results, strict=True):
        assert_close(out, torch_out, truth, dtype)
    assert torch.equal(results[0][2], results[1][2])  # values are copies
    assert torch.equal(results[0][1] == 7, results[1][1] == 7)


@pytest.mark.parametrize("dtype", DTYPES)
def test_qk_norm_rope_keeps_int8_as_the_reference_does(dtype):
    n, heads, kv_heads, head_dim = 5, 6, 2, 40
    qkv = randn(n, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    qkv[2, -head_dim:] = 0  # a head without a scale
    norm = randn(1, head_dim, seed=7, dtype=dtype), randn(1, head_dim, seed=8, dtype=dtype)
    rope, places = randn(50, head_dim, seed=5).cos().to(dtype), torch.tensor([0, 3, 7, 49, 2])
    kept = []
    for ops in (cpu, reference):
        pages = [
            QuantizedPages(torch.zeros(4, 16, kv_heads, head_dim, dtype=torch.int8), torch.zeros(4, 16, kv_heads))
            for _ in range(2)
        ]
        ops.qk_norm_rope(qkv, norm, norm, rope, places, places, *pages)
        kept.append(pages)
    for ours, theirs in zip(*kept, strict=True):
        torch.testing.assert_close(ours.scales, theirs.scales, rtol=1e-5, atol=0)
        steps = (ours.values.int() - theirs.values.int()).abs()
        assert steps.max() <= 1  # where a value lies between two steps
        assert steps.float().mean() < 0.001
    assert (kept[0][0].scales.flatten(0, 1)[places] > 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "inputs", "outputs"),
    [
        (1, 192, 576),
        (2, 4096, 50),
        (13, 129, 33),
        (64, 300, 31),
        (65, 64, 16),
        (150, 513, 65),
        (3, 1, 1),
        (40, 640, 33),
    ],
)
def test_linear_matches_the_reference(dtype, n, inputs, outputs):
    x, weight = randn(n, inputs, dtype=dtype), randn(outputs, inputs, seed=1, dtype=dtype)
    ours, theirs = cpu.linear(x, cpu.pack(weight)), reference.linear(x, weight)
    assert_close(ours, theirs, x.double() @ weight.double().T, dtype)


def test_bf16_is_rounded_as_torch_does():
    x, residual = randn(40, 64, dtype=torch.bfloat16), randn(40, 64, seed=1, dtype=torch.bfloat16)
    x[0, :6] = torch.tensor([1, 1, -1, math.inf, math.nan, 3e38])
    residual[0, :6] = torch.tensor([2**-8, 3 * 2**-8, 2**-8, 1, 1, 3e38])  # ties to even, down and up, and an overflow
    total = cpu.add_rms_norm(x, residual, torch.ones(64, dtype=torch.bfloat16), 1e-5)[1]
    assert torch.equal(total.isnan(), (x + residual).isnan())
    assert torch.equal(total.nan_to_num(), (x + residual).nan_to_num())


def rounded_inputs(x):
    """What `linear` makes of activations: int8, a scale a group."""
    groups = x.float().unflatten(-1, (-1, GROUP))
    scales = groups.abs().amax(-1, keepdim=True) / 127
    return (torch.where(scales > 0, groups * (1 / scales), 0).round() * scales).flatten(-2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("n", "inputs", "outputs"),
    [
        (1, 192, 576),
        (2, 4096, 50),
        (9, 64, 33),
        (13, 128, 33),
        (16, 64, 33),
        (20, 64, 33),
        (40, 1216, 33),
        (150, 576, 65),
    ],
)
def test_quantized_linear_is_the_product_of_the_rounded_activations(dtype, bits, n, inputs, outputs):
    x, weight = randn(n, inputs, dtype=dtype), quantize(randn(outputs, inputs, seed=1), bits)
    x[0, :GROUP] = 0  # a group without a scale
    ours = cpu.linear(x, cpu.pack(weight))
    exact = rounded_inputs(x).double() @ dequantize(weight).double().T
    as_torch = (rounded_inputs(x) @ dequantize(weight).T).to(dtype)
    assert_close(ours, as_torch, exact, dtype)
    # And rounding activations costs little: half a step of 254 in each input, at most.
    unrounded = x.double() @ dequantize(weight).double().T
    assert (ours - unrounded).norm() / unrounded.norm() < 0.01


@pytest.mark.parametrize("n", [1, 20])
def test_quantized_linear_is_exact_at_the_ends_of_the_range(n):
    x = torch.full((n, GROUP), 127.0)
    for value in (127, -127):
        weight = QuantizedWeight(torch.full((32, GROUP), 128 + value, dtype=torch.uint8), torch.ones(32, 1).bfloat16())
        assert (cpu.linear(x, cpu.pack(weight)) == 127 * value * GROUP).all()
    for nibble in (0, 15):
        weight = QuantizedWeight(
            torch.full((32, GROUP // 2), nibble * 17, dtype=torch.uint8), torch.ones(32, 1).bfloat16()
        )
        assert (cpu.linear(-x, cpu.pack(weight)) == -127 * (nibble - 8) * GROUP).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("format", [torch.bfloat16, 8, 4])
@pytest.mark.parametrize("n", [2, 20])
def test_activations_that_are_not_finite_stay_so_in_their_row(bad, format, n):
    x, weight = inputs_of(format, n, 128), weights_of(format, 32, 128)
    x[1, 100] = bad
    is_finite = cpu.linear(x, weight).isfinite()
    assert not is_finite[1].any()
    assert is_finite.sum() == (n - 1) * 32


@pytest.mark.parametrize("n", [1, 20, 40])
def test_what_lies_behind_a_panel_of_weights_is_not_multiplied(n):
    weight = randn(64, 33, seed=1, dtype=torch.bfloat16)
    weight[32:] = math.nan
    out = cpu.linear(randn(n, 33, dtype=torch.bfloat16), cpu.pack(weight))
    assert out[:, :32].isfinite().all()


def inputs_of(format, n, inputs):
    return randn(n, inputs, dtype=torch.bfloat16 if format == torch.bfloat16 else torch.float32)


def weights_of(format, outputs=70, inputs=192):
    weight = randn(outputs, inputs, seed=4)
    return cpu.pack(quantize(weight, format) if isinstance(format, int) else weight.to(format))


@pytest.mark.parametrize("format", [torch.float32, torch.bfloat16, 8, 4])
@pytest.mark.parametrize("n", [1, 2, 7, 8, 9, 16, 17, 33, 40, 49, 64, 65, 200])
def test_a_row_of_linear_is_the_same_bits_in_any_batch(format, n):
    for inputs in (
        (192, 1216) if isinstance(format, int) else (192, 1157)
    ):  # the second in several chunks, one cut short
        x, weight = inputs_of(format, n, inputs), weights_of(format, inputs=inputs)
        together = cpu.linear(x, weight)
        for row in {0, n // 2, n - 1}:
            assert torch.equal(cpu.linear(x[row : row + 1], weight)[0], together[row])


@pytest.mark.parametrize("keep", [torch.clone, int8_pages])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_last_of_a_window_attends_with_the_same_bits_as_alone(dtype, keep):
    rows = [(300, 16), (131, 1), (17, 17), (260, 5)]
    q, k_pages, v_pages, tables, cu_seqlens, seq_lens = attention_inputs(dtype, 6, 3, 40, 16, rows)
    k_pages, v_pages = keep(k_pages), keep(v_pages)
    together = cpu.paged_attention(q, k_pages, v_pages, tables, cu_seqlens, seq_lens)
    for row, (length, n) in enumerate(rows):
        for back in range(n):  # every query of the window as the only one of its row
            line = int(cu_seqlens[row + 1]) - 1 - back
            alone = cpu.paged_attention(
                q[line : line + 1], k_pages, v_pages, tables[row : row + 1], torch.tensor([0, 1], dtype=torch.int32),
                torch.tensor([length - back], dtype=torch.int32),
            )  # fmt: skip
            assert torch.equal(alone[0], together[line])


@pytest.mark.parametrize("format", [torch.float32, torch.bfloat16, 8, 4])
@pytest.mark.parametrize(
    ("n", "inputs", "outputs"),
    [
        (7, 192, 70),  # few rows: threads share the weights
        (33, 192, 70),  # one or two threads share the rows, three the weights
        (100, 192, 70),
        (100, 2048, 1100),  # many weights: threads share them, whatever the rows
        (100, 2081, 1100),  # and the inputs that are read, in groups, of which the last is cut short
    ],
)
def test_linear_does_not_depend_on_the_number_of_threads(format, n, inputs, outputs):
    if format in (8, 4):
        inputs -= inputs % GROUP
    x, weight = inputs_of(format, n, inputs), weights_of(format, outputs, inputs)

    def run():
        out = cpu.linear(x, weight)
        cpu.linear(-x, weight)  # or the next run would find what it has to read
        return out

    found = with_threads(run)
    assert all(torch.equal(other, found[0]) for other in found[1:])
    assert torch.equal(cpu.linear(x[n - 1 :], weight)[0], found[0][n - 1])


def test_attention_does_not_depend_on_the_number_of_threads():
    inputs = attention_inputs(torch.float32, 6, 6, 32, 16, [(300, 9), (200, 1)])
    found = with_threads(lambda: cpu.paged_attention(*inputs))
    assert all(torch.equal(other, found[0]) for other in found[1:])


def with_threads(run):
    """What `run` gives by one, two and three threads."""
    threads = torch.get_num_threads()
    try:
        return [torch.set_num_threads(n) or run() for n in (1, 2, 3)]
    finally:
        torch.set_num_threads(threads)


@settings(max_examples=60, deadline=None)
@given(
    columns=st.sampled_from([1, 15, 16, 17, 300, 1189]),
    guidance=st.sampled_from([0.0, 1.0, 4.0]),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 100, 5000]),
    top_p=st.sampled_from([0.1, 0.713, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.03, 0.5]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**40),
)
def test_draws_are_those_of_the_reference(columns, dtype, seed, **chosen):
    args = draw_inputs(16, columns, seed, dtype, **chosen)
    assert torch.equal(cpu.guided_sample(*args), reference.guided_sample(*args))


def test_ties_at_the_border_and_masked_logits_are_drawn_as_by_the_reference():
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0, -math.inf]]).expand(512, -1).contiguous()
    for chosen in ({"top_k": 2}, {"top_k": 2, "top_p": 0.95}, {"top_p": 0.5}, {"top_k": 3, "min_p": 0.1}, {}):
        _, cond, _, ids, controls, keys = draw_inputs(512, 6, 3, **chosen)
        args = logits, cond, cond, ids, controls, keys
        ours = cpu.guided_sample(*args)
        assert torch.equal(ours, reference.guided_sample(*args)), chosen
        assert len(set(ours.tolist())) > 1 or chosen == {"top_p": 0.5}


def test_a_token_far_below_the_top_is_still_drawn_where_there_are_many():
    logits = torch.full((4, 1 << 18), -13.0)
    logits[:, 5] = 0
    each = torch.arange(4)
    _, _, _, ids, controls, keys = draw_inputs(4, logits.shape[1], 3, temperature=1.0)
    args = logits, each, each, ids, controls, keys
    ours = cpu.guided_sample(*args)
    assert torch.equal(ours, reference.guided_sample(*args))
    assert 0 < (ours != ids[5]).sum() < 4


@pytest.mark.parametrize("columns", [3, 40])
def test_logits_that_are_not_finite_give_minus_one(columns):
    logits = randn(4, columns)
    logits[0, 1], logits[1, -1], logits[3] = math.nan, math.inf, -math.inf
    each = torch.arange(4)
    _, _, _, ids, controls, keys = draw_inputs(4, columns, 1)
    for temperature in (0.0, 1.0):
        chosen = controls._replace(temperature=torch.full((4,), temperature))
        assert (cpu.guided_sample(logits, each, each, ids, chosen, keys) == -1).tolist() == [True, True, False, True]


def test_wrong_tensors_are_refused_by_name():
    x, weight = randn(2, 64), randn(64)
    with pytest.raises(ValueError, match=r"weight is float32 \[64\]; expected contiguous float32 \[32\]"):
        cpu.rms_norm(x[:, :32].contiguous(), weight, 1e-5)
    with pytest.raises(ValueError, match=r"x is float32 \[2, 32\], not contiguous"):
        cpu.rms_norm(x[:, ::2], weight[:32], 1e-5)
    with pytest.raises(ValueError, match="weight is bfloat16"):
        cpu.rms_norm(x, weight.bfloat16(), 1e-5)
    with pytest.raises(ValueError, match="x is a dtype that no op takes; expected float32 or bfloat16"):
        cpu.rms_norm(x.double(), weight.double(), 1e-5)
    with pytest.raises(ValueError, match="expected one on the CPU"):
        cpu.rms_norm(x.to("meta"), weight.to("meta"), 1e-5)
    with pytest.raises(ValueError, match=r"residual is float32 \[1, 64\]; expected contiguous float32 \[2, 64\]"):
        cpu.rms_norm_add(x, x[:1], weight, 1e-5)
    with pytest.raises(ValueError, match="odd number of columns"):
        cpu.silu_mul(x[:, :63].contiguous())
    with pytest.raises(ValueError, match="another number of inputs"):
        cpu.linear(x, cpu.pack(randn(8, 65)))
    with pytest.raises(ValueError, match="bits of weights"):
        cpu.linear(x.bfloat16(), cpu.pack(randn(8, 64)))
    with pytest.raises(ValueError, match="multiple of 64"):
        quantize(randn(4, 96), 8)


def test_indices_beyond_their_tensors_are_refused():
    args = attention_inputs(torch.float32, 4, 2, 32, 16, [(20, 3), (33, 1)])
    changes = {
        3: (lambda t: t.index_fill(1, torch.tensor([1]), 99), "block_tables holds 99"),
        4: (lambda t: t + torch.tensor([0, 0, 1]).int(), "cu_seqlens does not span"),
        5: (lambda t: t * 0 + 100, "longer than its block table"),
    }
    for place, (change, message) in changes.items():
        wrong = [change(arg) if i == place else arg for i, arg in enumerate(args)]
        with pytest.raises(ValueError, match=message):
            cpu.paged_attention(*wrong)
    norm = (torch.ones(1, 32), torch.zeros(1, 32))
    for positions, slots, message in (([5], [0], "positions holds 5"), ([0], [-1], "slots holds -1")):
        with pytest.raises(ValueError, match=message):
            cpu.qk_norm_rope(
                randn(1, 8 * 32), norm, norm, randn(5, 32), torch.tensor(positions), torch.tensor(slots), *args[1:3]
            )
    logits, cond, uncond, *rest = draw_inputs(3, 20, 0)
    with pytest.raises(ValueError, match="uncond holds 6; expected 0 to 5"):
        cpu.guided_sample(logits, cond, uncond + 1, *rest)


def test_nothing_spins_after_a_step():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)  # one alone has nothing to wait for
        cpu.linear(randn(64, 1024), cpu.pack(randn(1024, 1024)))
    finally:
        torch.set_num_threads(threads)
    time.sleep(0.1)
    before = time.process_time()
    time.sleep(0.3)
    assert time.process_time() - before < 0.03
