"""The reference ops against independent arithmetic: what the other backends are held to must itself be right."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from lumina_rt.kernels import Controls, NoiseKeys, reference

from lumina_rt import kernels


def test_every_op_of_the_list_exists_and_documents_its_shapes():
    for name in kernels.OPS:
        op = getattr(reference, name)
        assert "[n" in op.__doc__ or "[m" in op.__doc__, name
        assert list(inspect.signature(op).parameters)


def test_rms_norm_rounds_before_the_weight():
    x = torch.randn(5, 48, dtype=torch.bfloat16)
    weight = torch.randn(48, dtype=torch.bfloat16)
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert torch.equal(reference.rms_norm(x, weight, 1e-5), weight * exact.bfloat16())


def test_add_rms_norm_returns_the_sum_and_its_norm():
    x, residual, weight = torch.randn(3, 7, 32).unbind()
    out, total = reference.add_rms_norm(x[:, :32], residual, weight[0], 1e-5)
    assert torch.equal(total, x + residual)
    assert torch.equal(out, reference.rms_norm(total, weight[0], 1e-5))


def test_rms_norm_add_rounds_the_norm_before_the_sum():
    torch.manual_seed(0)
    x, residual, weight = torch.randn(3, 5, 48).bfloat16().unbind()
    exact = x.double() / (x.double().pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    expected = (residual.double() + (weight[0] * exact.bfloat16()).double()).bfloat16()
    assert torch.equal(reference.rms_norm_add(x, residual, weight[0], 1e-5), expected)


def test_silu_mul_gates_the_second_half_by_the_first():
    x = torch.randn(4, 10, dtype=torch.float64)
    expected = x[:, :5] / (1 + (-x[:, :5]).exp()) * x[:, 5:]
    torch.testing.assert_close(reference.silu_mul(x), expected)


def test_paged_attention_matches_dense_attention_of_each_row():
    torch.manual_seed(0)
    heads, kv_heads, head_dim, page_size = 6, 2, 8, 16
    k_pages, v_pages = torch.randn(2, 12, page_size, kv_heads, head_dim)
    tables = torch.tensor([[3, 7, 0], [11, 2, 5], [9, 0, 0]], dtype=torch.int32)
    seq_lens, n_queries = [40, 33, 1], [5, 1, 1]
    cu = torch.tensor([0, 5, 6, 7], dtype=torch.int32)
    q = torch.randn(7, heads, head_dim)
    out = reference.paged_attention(q, k_pages, v_pages, tables, cu, torch.tensor(seq_lens, dtype=torch.int32))
    for row, (seq_len, n) in enumerate(zip(seq_lens, n_queries, strict=True)):
        k = k_pages[tables[row].long()].flatten(0, 1)[:seq_len].transpose(0, 1)
        v = v_pages[tables[row].long()].flatten(0, 1)[:seq_len].transpose(0, 1)
        queries = q[cu[row] : cu[row + 1]].transpose(0, 1)
        mask = torch.ones(n, seq_len, dtype=torch.bool).tril(seq_len - n)
        dense = F.scaled_dot_product_attention(queries[None], k[None], v[None], attn_mask=mask, enable_gqa=True)[0]
        torch.testing.assert_close(out[cu[row] : cu[row + 1]], dense.transpose(0, 1).flatten(1))


def test_qk_norm_rope_writes_only_its_slots():
    torch.manual_seed(0)
    heads, kv_heads, head_dim = 4, 2, 8
    k_pages, v_pages = torch.full((2, 3, 16, kv_heads, head_dim), 7.0)
    qkv = torch.randn(2, (heads + 2 * kv_heads) * head_dim)
    norm = (torch.ones(1, head_dim), torch.zeros(1, head_dim))
    rope = torch.cat((torch.ones(4, head_dim // 2), torch.zeros(4, head_dim // 2)), dim=-1)  # no rotation
    slots = torch.tensor([20, 5])
    q = reference.qk_norm_rope(qkv, norm, norm, rope, torch.tensor([0, 3]), slots, k_pages, v_pages)
    assert q.shape == (2, heads, head_dim)
    per_head = qkv.view(2, -1, head_dim)
    torch.testing.assert_close(q, F.layer_norm(per_head[:, :heads], (head_dim,), eps=1e-5))
    k, v = k_pages.view(-1, kv_heads, head_dim), v_pages.view(-1, kv_heads, head_dim)
    torch.testing.assert_close(k[slots], F.layer_norm(per_head[:, heads : heads + kv_heads], (head_dim,), eps=1e-5))
    assert torch.equal(v[slots], per_head[:, heads + kv_heads :])
    others = torch.ones(len(k), dtype=torch.bool)
    others[slots] = False
    assert (k[others] == 7).all()
    assert (v[others] == 7).all()


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_known_answers(counter, key, expected):
    words = reference.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [int(word) for word in words] == expected


def keys(n, seed=0):
    return NoiseKeys(torch.full((n,), seed), torch.zeros(n, dtype=torch.int64), torch.arange(n))


def test_the_noise_depends_on_each_part_of_its_key_and_on_nothing_else():
    ids = torch.arange(1000)
    one = reference.gumbel_noise(NoiseKeys(*(torch.tensor([v]) for v in (5, 2, 9))), ids)
    assert torch.equal(
        one[:, 123:], reference.gumbel_noise(NoiseKeys(*(torch.tensor([v]) for v in (5, 2, 9))), ids[123:])
    )
    for other in ((6, 2, 9), (5 + 2**40, 2, 9), (5, 3, 9), (5, 2, 10)):
        noise = reference.gumbel_noise(NoiseKeys(*(torch.tensor([v]) for v in other)), ids)
        assert (noise != one).float().mean() > 0.99


def test_the_noise_is_gumbel():
    noise = reference.gumbel_noise(keys(200, seed=11), torch.arange(5000)).flatten().double()
    assert noise.isfinite().all()
    assert noise.mean() == pytest.approx(0.5772156649, abs=0.005)
    assert noise.var() == pytest.approx(math.pi**2 / 6, abs=0.01)
    for x in (-1.0, 0.0, 1.0, 3.0, 8.0):
        assert (noise <= x).double().mean() == pytest.approx(math.exp(-math.exp(-x)), abs=0.002)


def oracle(cond, uncond, guidance, temperature, top_k, top_p, min_p):
    """Probabilities by the plain text: CFG, keep scores >= the k-th, temperature, softmax, then nucleus and min-p."""
    scores = [u + guidance * (c - u) for c, u in zip(cond, uncond, strict=True)]
    if top_k:
        kth = sorted(scores, reverse=True)[min(top_k, len(scores)) - 1]
        scores = [s if s >= kth else -math.inf for s in scores]
    top = max(scores)
    weights = [math.exp((s - top) / temperature) for s in scores]
    if top_p < 1:
        ordered = sorted(weights, reverse=True)
        ordered = ordered[: min(top_k or len(ordered), len(ordered))]
        mass, last = 0.0, ordered[0]
        for weight in ordered:
            if mass >= top_p * sum(ordered):
                break
            mass, last = mass + weight, weight
        weights = [w if w >= last else 0.0 for w in weights]
    weights = [w if w >= min_p * max(weights) else 0.0 for w in weights]
    return torch.tensor([w / sum(weights) for w in weights], dtype=torch.float64)


def controls(n, guidance=1.0, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0):
    return Controls(
        torch.full((n,), float(guidance)),
        torch.full((n,), float(temperature)),
        torch.full((n,), top_k, dtype=torch.int64),
        torch.full((n,), float(top_p)),
        torch.full((n,), float(min_p)),
    )


def probabilities(logits, **chosen):
    scores = reference.guided_scores(logits, torch.tensor([0]), torch.tensor([1]), controls(1, **chosen))
    return scores[0].double().softmax(-1)


@settings(max_examples=300, deadline=None)
@given(
    # Halves, so that there are ties, and every sum is exact in fp32: the oracle's kept set must be ours.
    cond=st.lists(st.integers(-8, 8).map(lambda i: i / 2), min_size=12, max_size=12),
    uncond=st.lists(st.integers(-8, 8).map(lambda i: i / 2), min_size=12, max_size=12),
    guidance=st.sampled_from([0.0, 1.0, 3.0, 4.5]),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    top_k=st.integers(0, 14),
    top_p=st.sampled_from([0.123, 0.517, 0.9013, 1.0]),
    min_p=st.sampled_from([0.0, 0.0101, 0.317]),
)
def test_guided_scores_keep_what_the_oracle_keeps_with_its_probabilities(cond, uncond, **chosen):
    expected = oracle(cond, uncond, **chosen)
    ours = probabilities(torch.tensor([cond, uncond]), **chosen)
    assert torch.equal(ours > 0, expected > 0)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("chosen", [{"min_p": m / 100 + 0.003} for m in range(0, 99, 9)])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_min_p_is_a_share_of_the_largest_probability_at_every_place(chosen, temperature):
    logits = [-i / 16 for i in range(100)]
    chosen = {"guidance": 1.0, "temperature": temperature, "top_k": 0, "top_p": 1.0, **chosen}
    expected = oracle(logits, logits, **chosen)
    assert torch.equal(probabilities(torch.tensor([logits] * 2), **chosen) > 0, expected > 0)


def test_ties_at_the_border_of_top_k_are_all_kept():
    ours = probabilities(torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0]] * 2), top_k=2)
    assert (ours > 0).tolist() == [True, True, True, True, False]


def test_masked_logits_stay_masked_without_guidance():
    one = torch.tensor([0])
    scores = reference.guided_scores(torch.tensor([[0.0, -math.inf, 1.0]]), one, one, controls(1, guidance=4.0))
    assert scores[0].tolist() == [0.0, -math.inf, 1.0]


def chi_square(counts, expected):
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("chosen", [{}, {"guidance": 3.0, "top_k": 12, "temperature": 1.5}, {"top_p": 0.8}])
def test_100_000_draws_pass_a_chi_square_test(chosen):
    n, columns = 100_000, 20
    logits = torch.randn(2, columns, generator=torch.Generator().manual_seed(4)) * 1.5
    expected = oracle(
        *logits.double().tolist(),
        **{"guidance": 1.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, **chosen},
    )
    ids = torch.arange(columns) * 3 + 50
    cond, uncond = torch.zeros(n, dtype=torch.int64), torch.ones(n, dtype=torch.int64)
    drawn = reference.guided_sample(logits, cond, uncond, ids, controls(n, **chosen), keys(n, seed=17))
    counts = torch.bincount((drawn - 50) // 3, minlength=columns).double()
    assert counts[expected == 0].sum() == 0
    kept = expected > 0
    # 99.99 % point of chi-square by the Wilson-Hilferty approximation.
    freedom = int(kept.sum()) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.719 * math.sqrt(2 / (9 * freedom))) ** 3
    assert chi_square(counts[kept], n * expected[kept]) < limit
    # The test can fail: a distribution one percent off is told apart.
    wrong = expected[kept] * (1 + 0.05 * (-1.0) ** torch.arange(freedom + 1))
    assert chi_square(counts[kept], n * wrong / wrong.sum()) > limit


def test_a_draw_does_not_depend_on_the_others():
    logits = torch.randn(12, 300)
    cond, uncond = torch.arange(6), torch.arange(6, 12)
    ids = torch.arange(300)
    chosen = controls(6, guidance=3.0, top_k=50)
    together = reference.guided_sample(logits, cond, uncond, ids, chosen, keys(6))
    for i in (5, 0, 3):
        alone = reference.guided_sample(
            logits[[i, 6 + i]], torch.tensor([0]), torch.tensor([1]), ids,
            Controls(*(c[i : i + 1] for c in chosen)), NoiseKeys(*(k[i : i + 1] for k in keys(6))),
        )  # fmt: skip
        assert alone[0] == together[i]


def test_zero_temperature_takes_the_largest_and_of_ties_the_first():
    logits = torch.tensor([[0.0, 5.0, 5.0, 1.0]])
    zero = torch.tensor([0])
    drawn = reference.guided_sample(logits, zero, zero, torch.tensor([9, 8, 7, 6]), controls(1, temperature=0), keys(1))
    assert drawn.tolist() == [8]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_give_minus_one(bad):
    logits = torch.tensor([[0.0, bad, 1.0], [0.0, 1.0, 2.0], [-math.inf] * 3])
    each = torch.arange(3)
    drawn = reference.guided_sample(logits, each, each, torch.arange(3), controls(3), keys(3))
    assert drawn[0] == -1
    assert drawn[1] >= 0
    assert drawn[2] == -1
