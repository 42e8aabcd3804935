"""The Triton ops against the reference: parity, batch invariance, nothing touched beyond the tensors.

Without a GPU they run in Triton's interpreter, which cannot do bf16; with one the same tests run compiled.
"""

import inspect
import math
import subprocess
import sys
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lumina_rt.kernels import Controls, NoiseKeys, reference
from lumina_rt.kernels.quantization import GROUP, QuantizedPages, QuantizedWeight, dequantize, quantize
from op_inputs import assert_close, assert_parity, attention_inputs, double, draw_inputs, int8_pages, randn

from lumina_rt import dummy, kernels, weights
from lumina_rt.kv_cache import KVCache
from lumina_rt.model import Step

pytest.importorskip("triton", reason="Triton is not installed; it is on Linux with the extra `test`")
from lumina_rt.kernels import cuda, paged_attention

# NumPy tells of what the kernels mask away.
pytestmark = [pytest.mark.filterwarnings("ignore::RuntimeWarning"), pytest.mark.usefixtures("patched_once")]
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16) if ON_GPU else (torch.float32, torch.float16)
BAND = 64  # elements


def place(value):
    """The same tensors where the kernels run."""
    if isinstance(value, torch.Tensor):
        return value.to(DEVICE)
    if hasattr(value, "_fields"):
        return type(value)(*map(place, value))
    return tuple(map(place, value)) if isinstance(value, tuple | list) else value


@pytest.fixture(autouse=True)
def guarded(monkeypatch):
    """Outputs of the ops lie between bands of sevens, which must still be there when a test ends."""
    buffers, plain = [], torch.Tensor.new_empty

    def new_empty(self, *shape, dtype=None, **others):
        if others:  # the interpreter's own
            return plain(self, *shape, dtype=dtype, **others)
        size = plain(self, *shape).shape
        buffer = torch.full((size.numel() + 2 * BAND,), 7, dtype=dtype or self.dtype, device=self.device)
        inner = buffer[BAND:-BAND].view(size)
        inner.fill_(math.nan if buffer.is_floating_point() else -77)
        buffers.append(buffer)
        return inner

    monkeypatch.setattr(torch.Tensor, "new_empty", new_empty)
    yield
    for buffer in buffers:
        assert (buffer[:BAND] == 7).all(), "something was written in front of an output"
        assert (buffer[-BAND:] == 7).all(), "something was written behind an output"


def fence(x):
    """The same tensor between bands of NaN, or of numbers that are no index: what is read there does not go unseen."""
    buffer = torch.full((x.numel() + 2 * BAND,), 99, dtype=x.dtype, device=x.device)
    if x.is_floating_point():
        buffer.fill_(math.nan)
    buffer[BAND:-BAND] = x.flatten()
    return buffer[BAND:-BAND].view(x.shape)


@pytest.fixture
def in_order(monkeypatch):
    """Products whose sums have one order. NumPy's round by where a row lies in its tile, tensor cores do not."""
    if ON_GPU:
        return
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, d, *_):
        out = d.data.copy()
        for k in range(a.data.shape[-1]):
            out += a.data[..., k, None].astype(out.dtype) * b.data[..., None, k, :].astype(out.dtype)
        return TensorHandle(out, d.dtype.scalar)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", create_dot)


def test_every_op_has_the_signature_of_the_reference():
    for name in (*kernels.OPS, "pack"):
        ours, theirs = (inspect.signature(getattr(module, name)) for module in (cuda, reference))
        assert list(ours.parameters) == list(theirs.parameters), name


def test_nothing_else_imports_triton():
    code = "import sys, lumina_rt.cli, lumina_rt.engine; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("n", "hidden"), [(2, 4096), (1, 8192), (1, 192), (3, 100), (5, 17), (1, 1)])
def test_norms_and_silu_match_the_reference(dtype, n, hidden):
    x, residual, weight = (place(randn(n, hidden, seed=i, dtype=dtype)) for i in range(3))
    weight = fence(weight[0])
    assert_parity(cuda, "rms_norm", fence(x), weight, 1e-5, dtype=dtype)
    assert_parity(cuda, "rms_norm", fence(x / 300), weight, 1e-5, dtype=dtype)  # eps counts
    assert_parity(cuda, "add_rms_norm", fence(x), fence(residual), weight, 1e-5, dtype=dtype)
    assert_parity(cuda, "rms_norm_add", fence(x), fence(residual), weight, 1e-5, dtype=dtype)
    assert_parity(cuda, "silu_mul", fence(place(3 * randn(n, 2 * hidden, dtype=dtype))), dtype=dtype)


def test_norms_round_before_the_weight_and_before_a_sum():
    x, weight = (place(randn(2, 192, seed=i, dtype=torch.float16)) for i in range(2))
    assert torch.equal(cuda.rms_norm(x, weight[0], 1e-5), reference.rms_norm(x, weight[0], 1e-5))
    out, total = cuda.add_rms_norm(x, x.flip(0), weight[0], 1e-5)
    assert torch.equal(total, x + x.flip(0))
    assert torch.equal(out, reference.rms_norm(total, weight[0], 1e-5))
    added = cuda.rms_norm_add(x, x.flip(0), weight[0], 1e-5)
    assert torch.equal(added, reference.rms_norm_add(x, x.flip(0), weight[0], 1e-5))


def test_silu_is_right_where_exp_leaves_the_range_of_floats():
    gate = torch.tensor([[-1e30, -200.0, -88.5, -87.0, 0.0, 87.0, 88.5, 200.0, math.inf, math.nan]])
    gate_up = place(torch.cat((gate, torch.ones_like(gate)), dim=1))
    expected = reference.silu_mul(gate_up)
    torch.testing.assert_close(cuda.silu_mul(gate_up), expected, rtol=1e-6, atol=1e-35, equal_nan=True)


def qk_inputs(dtype, n, heads, kv_heads, head_dim, mp):
    qkv = randn(n, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    norms = [(randn(rows, head_dim, seed=rows, dtype=dtype), randn(rows, head_dim, seed=9, dtype=dtype)) for rows in mp]
    rope = randn(50, head_dim, seed=5).cos().to(dtype)
    generator = torch.Generator().manual_seed(n)
    positions, slots = torch.randint(50, (n,), generator=generator), torch.randperm(3 * 16, generator=generator)[:n]
    return [place(x) for x in (qkv, *norms, rope, positions, slots)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "heads", "kv_heads", "head_dim", "mp"),
    [
        (2, 32, 32, 128, (1, 1)),
        (2, 16, 2, 128, (4, 1)),
        (3, 8, 8, 32, (4, 4)),
        (5, 6, 2, 80, (3, 2)),
        (1, 4, 4, 18, (4, 4)),
        (3, 8, 1, 256, (8, 1)),
    ],
)
def test_qk_norm_rope_matches_the_reference_and_writes_only_its_slots(dtype, n, heads, kv_heads, head_dim, mp):
    inputs = qk_inputs(dtype, n, heads, kv_heads, head_dim, mp)
    results = []
    for ops, widen in ((cuda, lambda x: x), (reference, lambda x: x), (reference, double)):
        pages = [widen(place(torch.full((3, 16, kv_heads, head_dim), 7.0, dtype=dtype))) for _ in range(2)]
        args = inputs if ops is reference else [fence(x) if isinstance(x, torch.Tensor) else x for x in inputs]
        q = ops.qk_norm_rope(*map(widen, args), *pages)
        results.append((q, *pages))
    for out, torch_out, truth in zip(*results, strict=True):
        assert_close(out, torch_out, truth, dtype)
    assert torch.equal(results[0][2], results[1][2])  # values are copies
    assert torch.equal(results[0][1] == 7, results[1][1] == 7)


def int8_cache(kv_heads, head_dim):
    values, scales = torch.zeros(4, 16, kv_heads, head_dim, dtype=torch.int8), torch.zeros(4, 16, kv_heads)
    return [place(QuantizedPages(values.clone(), scales.clone())) for _ in range(2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(2, 40), (8, 128)])
def test_qk_norm_rope_keeps_int8_as_the_reference_does(dtype, kv_heads, head_dim):
    qkv, *rest = qk_inputs(dtype, 5, 8, kv_heads, head_dim, (1, 1))
    qkv[2, -head_dim:] = 0  # a head without a scale
    kept = []
    for ops in (cuda, reference):
        pages = int8_cache(kv_heads, head_dim)
        ops.qk_norm_rope(qkv, *rest, *pages)
        kept.append(pages)
    for ours, theirs in zip(*kept, strict=True):
        torch.testing.assert_close(ours.scales, theirs.scales, rtol=1e-5, atol=0)
        steps = (ours.values.int() - theirs.values.int()).abs()
        assert steps.max() <= 1  # where a value lies between two steps
        assert steps.float().mean() < 0.001
    assert (kept[0][0].scales.flatten(0, 1)[rest[-1]] > 0).all()


def test_int8_pages_do_not_hide_values_that_are_no_numbers():
    qkv, *rest = qk_inputs(torch.float32, 2, 2, 2, 32, (1, 1))
    qkv[1, -3] = math.nan
    k_pages, v_pages = int8_cache(2, 32)
    cuda.qk_norm_rope(qkv, *rest, k_pages, v_pages)
    assert v_pages.scales.flatten(0, 1)[rest[-1]].isnan().tolist() == [[False, False], [False, True]]


ROWS = [(300, 17), (131, 1), (1, 1), (65, 64), (256, 2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "page_size", "rows"),
    [
        (2, 2, 128, 256, [(700, 1), (513, 1)]),
        (2, 2, 32, 16, ROWS),
        (8, 1, 80, 32, [(300, 3), (5, 5), (97, 17)]),
        (16, 2, 128, 64, [(130, 2), (64, 64)]),
        (3, 1, 18, 16, [(257, 64), (16, 1)]),
    ],
)
@pytest.mark.parametrize("keep", [torch.clone, int8_pages])
def test_attention_matches_the_reference(dtype, keep, heads, kv_heads, head_dim, page_size, rows):
    q, k_pages, v_pages, *rest = attention_inputs(dtype, heads, kv_heads, head_dim, page_size, rows)
    q, *rest = (fence(place(x)) for x in (q, *rest))
    assert_parity(cuda, "paged_attention", q, place(keep(k_pages)), place(keep(v_pages)), *rest, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_attention_is_the_same_bits_split_over_programs_or_not(dtype, monkeypatch):
    args = place(attention_inputs(dtype, 4, 2, 32, 16, [(700, 3), (40, 1), (513, 17), (256, 1)]))
    monkeypatch.setattr(paged_attention, "ENOUGH_PROGRAMS", 10**9)
    split = cuda.paged_attention(*args)
    monkeypatch.setattr(paged_attention, "ENOUGH_PROGRAMS", 0)
    assert torch.equal(cuda.paged_attention(*args), split)


@pytest.mark.parametrize("keep", [torch.clone, int8_pages])
@pytest.mark.parametrize("dtype", DTYPES)
def test_each_query_attends_with_the_same_bits_as_alone(dtype, keep, in_order):
    rows = [(300, 17), (131, 1), (16, 16), (258, 5)]
    q, k_pages, v_pages, tables, cu_seqlens, seq_lens = attention_inputs(dtype, 3, 1, 40, 16, rows)
    k_pages, v_pages = place(keep(k_pages)), place(keep(v_pages))
    q, tables = place(q), place(tables)
    together = cuda.paged_attention(q, k_pages, v_pages, tables, place(cu_seqlens), place(seq_lens))
    for row, (length, n) in enumerate(rows):
        for back in range(0, n, 4):  # a query of the window as the only one of its row, in a table as short as can be
            line = int(cu_seqlens[row + 1]) - 1 - back
            table = tables[row : row + 1, : -(-(length - back) // 16)].contiguous()
            one = place(torch.tensor([0, 1], dtype=torch.int32)), place(torch.tensor([length - back]).int())
            alone = cuda.paged_attention(q[line : line + 1], k_pages, v_pages, table, *one)
            assert torch.equal(alone[0], together[line]), (row, back)


def test_attention_does_not_look_at_what_lies_beyond_a_row():
    q, k_pages, v_pages, *rest = attention_inputs(torch.float32, 4, 2, 32, 16, [(20, 3), (33, 1)])
    expected = cuda.paged_attention(*map(place, (q, k_pages, v_pages, *rest)))
    tables, lengths = rest[0], rest[2]
    written = torch.zeros(k_pages.shape[:2], dtype=torch.bool)
    for table, length in zip(tables.tolist(), lengths.tolist(), strict=True):
        for key in range(length):
            written[table[key // 16], key % 16] = True
    k_pages[~written] = v_pages[~written] = math.nan
    assert torch.equal(cuda.paged_attention(*map(place, (q, k_pages, v_pages, *rest))), expected)


def test_rows_without_queries_are_passed_over():
    q, k_pages, v_pages, tables, _, _ = map(place, attention_inputs(torch.float32, 4, 2, 32, 16, [(300, 3), (33, 2)]))
    some = place(torch.tensor([0, 3, 5]).int()), place(torch.tensor([300, 33]).int())
    expected = cuda.paged_attention(q, k_pages, v_pages, tables, *some)
    none = tables[:1] * 0
    tables = torch.cat((none, tables[:1], none, none, tables[1:], none))
    lengths = place(torch.tensor([0, 300, 7, 0, 33, 0]).int())
    bounds = place(torch.tensor([0, 0, 3, 3, 3, 5, 5]).int())
    assert torch.equal(cuda.paged_attention(q, k_pages, v_pages, tables, bounds, lengths), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("n", "inputs", "outputs"), [(1, 192, 100), (2, 4096, 20), (9, 128, 33), (17, 576, 64), (40, 64, 16), (1, 11008, 3)]
)
def test_quantized_linear_matches_the_reference(dtype, bits, n, inputs, outputs):
    x, weight = place(randn(n, inputs, dtype=dtype)), place(quantize(randn(outputs, inputs, seed=1), bits))
    ours = cuda.linear(fence(x), cuda.pack(weight))
    exact = x.double() @ dequantize(weight).double().T
    assert_close(ours, reference.linear(x, weight), exact, dtype)


def test_quantized_linear_is_exact_at_the_ends_of_the_range():
    x = place(torch.full((1, GROUP), 127.0))
    scales = torch.ones(32, 1).bfloat16()
    for value in (127, -127):
        weight = place(QuantizedWeight(torch.full((32, GROUP), 128 + value, dtype=torch.uint8), scales))
        assert (cuda.linear(x, cuda.pack(weight)) == 127 * value * GROUP).all()
    for nibble in (0, 15):
        weight = place(QuantizedWeight(torch.full((32, GROUP // 2), nibble * 17, dtype=torch.uint8), scales))
        assert (cuda.linear(-x, cuda.pack(weight)) == -127 * (nibble - 8) * GROUP).all()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_of_a_quantized_linear_is_the_same_bits_in_any_batch(dtype, bits, in_order):
    x, weight = place(randn(40, 576, dtype=dtype)), cuda.pack(place(quantize(randn(20, 576, seed=4), bits)))
    alone = {i: cuda.linear(x[i : i + 1], weight)[0] for i in (0, 7, 8, 32)}
    for n in (2, 8, 9, 16, 17, 40):
        together = cuda.linear(x[:n], weight)
        assert all(torch.equal(together[i], row) for i, row in alone.items() if i < n), n


def test_a_row_of_the_other_ops_is_the_same_bits_in_any_batch():
    x, residual, weight = (place(randn(5, 192, seed=i, dtype=torch.float16)) for i in range(3))
    total = cuda.add_rms_norm(x, residual, weight[0], 1e-5)
    one = cuda.add_rms_norm(x[3:4], residual[3:4], weight[0], 1e-5)
    assert all(torch.equal(a[3:4], b) for a, b in zip(total, one, strict=True))
    assert torch.equal(cuda.rms_norm(x, weight[0], 1e-5)[3:4], cuda.rms_norm(x[3:4], weight[0], 1e-5))
    added, one = (cuda.rms_norm_add(x[rows], residual[rows], weight[0], 1e-5) for rows in (slice(None), slice(3, 4)))
    assert torch.equal(added[3:4], one)
    assert torch.equal(cuda.silu_mul(x)[3:4], cuda.silu_mul(x[3:4]))
    qkv, q_norm, k_norm, rope, positions, slots = qk_inputs(torch.float16, 5, 4, 2, 32, (2, 1))
    pages = [place(torch.zeros(3, 16, 2, 32, dtype=torch.float16)) for _ in range(4)]
    q = cuda.qk_norm_rope(qkv, q_norm, k_norm, rope, positions, slots, *pages[:2])
    each = [
        cuda.qk_norm_rope(qkv[i : i + 1], q_norm, k_norm, rope, positions[i : i + 1], slots[i : i + 1], *pages[2:])
        for i in range(5)
    ]
    assert torch.equal(torch.cat(each), q)
    assert torch.equal(pages[0], pages[2])
    assert torch.equal(pages[1], pages[3])


def test_float_weights_are_not_packed():
    x, weight = place(randn(3, 100)), place(randn(7, 100, seed=1))
    assert cuda.pack(weight) is weight
    assert torch.equal(cuda.linear(x, weight), torch.nn.functional.linear(x, weight))


@settings(max_examples=12, deadline=None)
@given(
    columns=st.sampled_from([1, 15, 300, 1024, 1189]),
    guidance=st.sampled_from([0.0, 1.0, 4.0]),
    temperature=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 3, 100, 5000]),
    top_p=st.sampled_from([0.1, 0.713, 0.95, 1.0]),
    min_p=st.sampled_from([0.0, 0.03, 0.5]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**40),
)
def test_draws_are_those_of_the_reference(columns, dtype, seed, **chosen):
    args = place(draw_inputs(4, columns, seed, dtype, **chosen))
    assert torch.equal(cuda.guided_sample(*map(fence, args[:4]), *args[4:]), reference.guided_sample(*args))


@pytest.mark.parametrize(
    ("columns", "chosen"),
    [
        (8192, {"top_k": 2000}),
        (8192, {"top_k": 700, "top_p": 0.9}),
        (9001, {}),
        (9001, {"top_k": 700, "top_p": 0.9, "temperature": 3.0}),
        (9001, {"min_p": 0.02}),
        (65536, {"top_k": 10}),
        (65536, {"top_p": 0.7}),
    ],
)
def test_draws_from_many_columns_are_those_of_the_reference(columns, chosen):
    args = place(draw_inputs(1 if columns == 65536 else 4, columns, 5, torch.float16, **chosen))
    assert torch.equal(cuda.guided_sample(*args), reference.guided_sample(*args))


def test_ties_at_the_border_and_masked_logits_are_drawn_as_by_the_reference():
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0, -math.inf]]).expand(24, -1).contiguous()
    for chosen in ({"top_k": 2}, {"top_k": 2, "top_p": 0.95}, {"top_p": 0.5}, {"top_k": 3, "min_p": 0.1}, {}):
        _, cond, _, ids, controls, keys = draw_inputs(24, 6, 3, **chosen)
        args = place((logits, cond, cond, ids, controls, keys))
        ours = cuda.guided_sample(*args)
        assert torch.equal(ours, reference.guided_sample(*args)), chosen
        assert len(set(ours.tolist())) > 1 or chosen == {"top_p": 0.5}


def kept(logits, **chosen):
    """Which columns 24 draws fall on, with logits so flat that all that are kept are met."""
    _, cond, _, ids, controls, keys = draw_inputs(24, logits.shape[1], 3, **chosen)
    args = place((logits.expand(24, -1).contiguous(), cond, cond, ids, controls, keys))
    return {(token - 4) // 3 for token in cuda.guided_sample(*args).tolist()}


def test_exactly_the_top_k_are_drawn_from():
    logits = torch.arange(4.0)[None].flip(1) / 100
    for k in (1, 2, 3, 4, 5):
        assert kept(logits, top_k=k) == set(range(min(k, 4)))


def test_exactly_those_within_min_p_of_the_largest_are_drawn_from():
    logits = torch.arange(4.0)[None].flip(1) / 100
    for n in (1, 2, 3, 4):
        assert kept(logits, min_p=math.exp(-0.01 * n + 0.004)) == set(range(n))


def test_exactly_the_fewest_that_reach_top_p_are_drawn_from():
    logits = torch.arange(4.0)[None].flip(1) / 100
    for n, mass in enumerate(logits[0].softmax(-1).cumsum(-1).tolist()[:3], start=1):
        assert kept(logits, top_p=0.99 * mass) == set(range(n))
        assert kept(logits, top_p=1.01 * mass) == set(range(n + 1))


def test_temperature_zero_takes_the_first_of_the_largest():
    logits = torch.zeros(1, 3000)
    logits[0, [1500, 2500]] = 5
    assert kept(logits, temperature=0.0) == {1500}
    logits[0, 7] = 5
    assert kept(logits, temperature=0.0) == {7}


@pytest.mark.parametrize("columns", [3, 40, 8200])
def test_logits_that_are_not_finite_give_minus_one(columns):
    logits = randn(5, columns)
    logits[0, 1], logits[1, -1], logits[3], logits[4, -1] = math.nan, math.inf, -math.inf, math.nan
    each = torch.arange(5)
    _, _, _, ids, controls, keys = draw_inputs(5, columns, 1)
    for temperature in (0.0, 1.0):
        chosen = controls._replace(temperature=torch.full((5,), temperature))
        drawn = cuda.guided_sample(*place((logits, each, each, ids, chosen, keys)))
        assert (drawn == -1).tolist() == [True, True, False, True, True]


def test_a_draw_does_not_depend_on_the_others():
    args = place(draw_inputs(6, 300, 1, top_k=50))
    together = cuda.guided_sample(*args)
    logits, cond, uncond, ids, controls, keys = args
    for i in (5, 0, 3):
        one = [Controls(*(c[i : i + 1] for c in controls)), NoiseKeys(*(k[i : i + 1] for k in keys))]
        alone = cuda.guided_sample(logits, cond[i : i + 1], uncond[i : i + 1], ids, *one)
        assert alone[0] == together[i]


def small_step(kind, quantization, tmp_path, ops):
    """A step of two rows of a small random model, and the model with its cache: over 256 keys, so attention splits."""
    values = dummy.TINY_MODEL | kind
    checkpoint = dummy.write_checkpoint(tmp_path / "checkpoint", model=values)
    image_ids = torch.arange(4, 68)
    model = weights.load(checkpoint, ops, image_ids, 1024, torch.float32, DEVICE, quantization)
    config = model.config
    cache = KVCache(config.n_layers, 64, 16, config.kv_heads, config.head_dim, torch.float32, DEVICE)
    for part in (cache.k, cache.v):
        part.copy_(randn(*part.shape, seed=3))
    lengths = (400, 21)
    tables = torch.stack((torch.arange(26), torch.arange(26) + 30)).int()
    places = torch.tensor(lengths) - 1
    step = Step(
        tokens=torch.tensor([5, 9]),
        positions=places,
        slots=tables[torch.arange(2), places // 16].long() * 16 + places % 16,
        block_tables=tables,
        cu_seqlens=torch.tensor([0, 1, 2]).int(),
        seq_lens=torch.tensor(lengths).int(),
    )
    return model, Step(**{name: place(value) for name, value in vars(step).items()}), cache


@pytest.fixture
def launches(monkeypatch):
    """Counts launches of kernels, by name, and products of torch."""
    found = Counter()
    if ON_GPU:
        from triton.runtime.jit import JITFunction as Kernel
    else:
        from triton.runtime.interpreter import InterpretedFunction as Kernel
    run, product = Kernel.run, torch.nn.functional.linear

    def counted_run(self, *args, **options):
        found[self.fn.__name__] += 1
        return run(self, *args, **options)

    def counted_product(*args):
        found["linear"] += 1
        return product(*args)

    monkeypatch.setattr(Kernel, "run", counted_run)
    monkeypatch.setattr("torch.nn.functional.linear", counted_product)
    return found


@pytest.mark.parametrize(
    ("kind", "quantization"),
    [({}, None), ({}, "int4"), ({"num_key_value_heads": 2, "model_parallel_size": 2, "swin_norm": True}, "int8")],
    ids=["7b", "7b-int4", "34b-int8"],
)
def test_a_step_of_a_model_is_that_of_the_reference_in_few_launches(kind, quantization, tmp_path, launches):
    hidden = {}
    for ops in (reference, cuda):
        model, step, cache = small_step(kind, quantization, tmp_path, ops)
        launches.clear()
        hidden[ops] = model.forward(step, cache)
        logits = ops.linear(hidden[ops], model.image_head)
        ids = torch.arange(4, 68)
        _, cond, uncond, _, controls, keys = draw_inputs(1, len(ids), 0, top_k=20)
        ops.guided_sample(logits, *place((cond, uncond, ids, controls, keys)))
    torch.testing.assert_close(hidden[cuda], hidden[reference], rtol=1e-4, atol=1e-4)
    assert launches["_join_splits_kernel"] == model.config.n_layers
    assert launches.total() <= 10 * model.config.n_layers + 8, launches
