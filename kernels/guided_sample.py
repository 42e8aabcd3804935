"""Guidance, temperature, top-k, top-p, min-p and a draw by Gumbel noise, in one launch and without a sort.

    scores = (uncond + guidance * (cond - uncond)) / temperature
    draw   = argmax over the kept of scores - log(-log(u(seed, image, position, token)))

A program makes one draw. It holds the scores of its first 8192 columns in registers, which are all of an image's codes,
and makes those of further columns anew from the logits in each pass. What is kept is what reaches a threshold, found
by bisection over the 32 bits of a float: 32 sums for top-k, and 32 for top-p where it is below 1. Bytes: two rows of
logits; time goes to the sums, which wait for each other. A processor holds one program.
"""

import triton
import triton.language as tl
from lumina_rt.kernels import Controls, NoiseKeys
from torch import Tensor

BLOCK = 8192  # columns in registers: with 16 warps 16 a thread; not yet measured
SMALL_BLOCK = 1024  # for size tokens and small vocabularies: with 4 warps 8 a thread; not yet measured


@triton.jit
def _load_scores(row, first, BLOCK: tl.constexpr):
    """Scores of BLOCK columns; -inf beyond the last."""
    cond_ptr, uncond_ptr, is_guided, guidance, temperature, columns = row
    cols = first + tl.arange(0, BLOCK)
    mask = cols < columns
    scores = tl.load(cond_ptr + cols, mask=mask, other=float("-inf")).to(tl.float32)
    uncond = tl.load(uncond_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    # Without guidance -inf stays -inf; by the formula it would be no number.
    scores = tl.where(is_guided & mask, uncond + guidance * (scores - uncond), scores)
    return tl.div_rn(scores, temperature)


@triton.jit
def _order(scores):
    """Unsigned integers in the order of the floats."""
    bits = scores.to(tl.uint32, bitcast=True)
    return tl.where(bits >> 31 == 1, ~bits, bits | 0x80000000)


@triton.jit
def _value(order):
    """The float of an integer from `_order`."""
    return tl.where(order >> 31 == 1, order & 0x7FFFFFFF, ~order).to(tl.float32, bitcast=True)


@triton.jit
def _weigh(scores, top, border, share, BY_MASS: tl.constexpr):
    """1 for each score; or its probability times a constant, with a share for ties with `border`, 0 below."""
    if BY_MASS:
        mass = tl.exp(scores - top)
        weights = tl.where(scores > border, mass, tl.where(scores == border, mass * share, 0.0))
    else:
        weights = tl.full(scores.shape, 1.0, tl.float32)
    return weights


@triton.jit
def _weight_from(row, order, weights, tried, top, border, share, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of the weights of all scores from `tried` on; `order` and `weights` are those of the first BLOCK columns."""
    weight = tl.sum(tl.where(order >= tried, weights, 0.0), axis=0)
    MORE: tl.constexpr = BLOCK // 2
    for first in range(BLOCK, row[5], MORE):
        more = _load_scores(row, first, MORE)
        weight += tl.sum(tl.where(_order(more) >= tried, _weigh(more, top, border, share, BY_MASS), 0.0), axis=0)
    return weight


@triton.jit
def _reach(row, order, weights, target, top, border, share, BY_MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest score of which the weights of all as large, or larger, add up to `target`."""
    found = tl.zeros((), dtype=tl.uint32)
    bit = tl.full((), 0x80000000, dtype=tl.uint32)
    for _ in range(32):
        weight = _weight_from(row, order, weights, found | bit, top, border, share, BY_MASS, BLOCK)
        found = tl.where(weight >= target, found | bit, found)
        bit = bit >> 1
    return _value(found)


@triton.jit
def _gumbel(key, tokens):
    """Philox4x32-10 of (token / 4, position, image, 0), word token % 4; made Gumbel as in the reference."""
    seed, image, position = key
    tokens = tokens.to(tl.uint32)
    zero = tokens * 0
    w0, w1, w2, w3 = tl.philox(seed, tokens >> 2, zero + position.to(tl.uint32), zero + image.to(tl.uint32), zero)
    lane = tokens & 3
    bits = tl.where(lane == 0, w0, tl.where(lane == 1, w1, tl.where(lane == 2, w2, w3)))
    u = tl.minimum(bits.to(tl.float32) * 2.0**-32 + 2.0**-33, 1 - 2.0**-24)
    # -log1p(-u) is log(w) * u / (w - 1) for w = 1 - u as rounded, and u where w rounds to 1.
    w = 1 - u
    exponential = tl.where(w == 1, u, tl.log(w) * tl.div_rn(u, tl.where(w == 1, 1.0, w - 1)))
    return -tl.log(exponential)


@triton.jit
def _best(scores, first, columns, threshold, token_ids_ptr, key, is_drawn, BLOCK: tl.constexpr):
    """The largest sum of a kept score and its noise, and its column."""
    cols = first + tl.arange(0, BLOCK)
    noise = _gumbel(key, tl.load(token_ids_ptr + cols, mask=cols < columns, other=0))
    is_kept = (scores >= threshold) & (scores > float("-inf"))
    noisy = tl.where(is_kept, scores + tl.where(is_drawn, noise, 0.0), float("-inf"))
    best, at = tl.max(noisy, axis=0, return_indices=True)
    return best, first + at


# The numbers of a draw lie where they come to lie: no kernel is compiled again for those at multiples of 16 bytes.
@triton.jit(
    do_not_specialize_on_alignment=[
        "cond_ptr", "uncond_ptr", "guidance_ptr", "temperature_ptr", "top_k_ptr", "top_p_ptr", "min_p_ptr",
        "seed_ptr", "image_ptr", "position_ptr",
    ]
)  # fmt: skip
def _guided_sample_kernel(
    logits_ptr, cond_ptr, uncond_ptr, token_ids_ptr, guidance_ptr, temperature_ptr, top_k_ptr, top_p_ptr, min_p_ptr,
    seed_ptr, image_ptr, position_ptr, out_ptr, columns, BLOCK: tl.constexpr,
):  # fmt: skip
    draw = tl.program_id(0)
    cond, uncond = tl.load(cond_ptr + draw), tl.load(uncond_ptr + draw)
    temperature = tl.load(temperature_ptr + draw)
    is_drawn = temperature > 0
    temperature = tl.where(is_drawn, temperature, 1.0)
    row = (
        logits_ptr + cond * columns, logits_ptr + uncond * columns, cond != uncond, tl.load(guidance_ptr + draw),
        temperature, columns,
    )  # fmt: skip
    key = tl.load(seed_ptr + draw), tl.load(image_ptr + draw), tl.load(position_ptr + draw)

    MORE: tl.constexpr = BLOCK // 2  # further columns at a time, and columns to draw from: few, as registers are
    scores = _load_scores(row, 0, BLOCK)
    top = tl.max(scores, axis=0)
    n_bad = tl.sum(tl.where(scores < float("inf"), 0, 1), axis=0)
    for first in range(BLOCK, columns, MORE):
        more = _load_scores(row, first, MORE)
        top = tl.maximum(top, tl.max(more, axis=0))
        n_bad += tl.sum(tl.where(more < float("inf"), 0, 1), axis=0)
    if (n_bad > 0) | (top == float("-inf")):
        tl.store(out_ptr + draw, -1)
        return

    threshold, share = tl.where(is_drawn, float("-inf"), top), top * 0 + 1
    top_k, top_p = tl.load(top_k_ptr + draw), tl.load(top_p_ptr + draw)
    order = _order(scores)
    if is_drawn & (top_k > 0) & (top_k < columns):
        ones = tl.full((BLOCK,), 1.0, tl.float32)
        threshold = _reach(row, order, ones, top_k.to(tl.float32), top, threshold, share, False, BLOCK)
        if top_p < 1:
            # Of what ties with the last of the top k, only as many as fit into k have mass.
            border = _order(threshold)
            above = _weight_from(row, order, ones, border + 1, top, threshold, share, False, BLOCK)
            equal = _weight_from(row, order, ones, border, top, threshold, share, False, BLOCK) - above
            share = (top_k.to(tl.float32) - above) / equal
    if is_drawn & (top_p < 1):
        mass = _weigh(scores, top, threshold, share, True)
        target = top_p * _weight_from(row, order, mass, 0, top, threshold, share, True, BLOCK)
        threshold = tl.maximum(threshold, _reach(row, order, mass, target, top, threshold, share, True, BLOCK))
    threshold = tl.maximum(threshold, top + tl.log(tl.load(min_p_ptr + draw)))

    best, best_col = top * 0 + float("-inf"), tl.zeros((), tl.int32)
    for first in range(0, columns, MORE):
        more = _load_scores(row, first, MORE)
        other, other_col = _best(more, first, columns, threshold, token_ids_ptr, key, is_drawn, MORE)
        best_col = tl.where(other > best, other_col, best_col)
        best = tl.maximum(best, other)
    tl.store(out_ptr + draw, tl.load(token_ids_ptr + best_col))


def guided_sample(
    logits: Tensor, cond: Tensor, uncond: Tensor, token_ids: Tensor, controls: Controls, keys: NoiseKeys
) -> Tensor:
    """Draw one token for each of m pairs of logits rows.

    logits: [rows, columns].  cond, uncond: int64 [m], rows of `logits`.  token_ids: int64 [columns].
    Returns int64 [m]; -1 where the logits of a draw are not finite.
    """
    m, columns = len(cond), logits.shape[1]
    assert len(uncond) == m
    assert token_ids.shape == (columns,)
    assert all(t.shape == (m,) and t.is_contiguous() for t in (*controls, *keys))
    assert logits.is_contiguous()
    assert cond.is_contiguous()
    assert uncond.is_contiguous()
    assert token_ids.is_contiguous()

    out = cond.new_empty(m)
    block, num_warps = (BLOCK, 16) if columns > SMALL_BLOCK else (SMALL_BLOCK, 4)
    # No product joined with a sum: scores are then the same bits as the reference's, and so are ties.
    _guided_sample_kernel[(m,)](
        logits, cond, uncond, token_ids, *controls, *keys, out, columns,
        BLOCK=block, num_warps=num_warps, enable_fp_fusion=False,
    )  # fmt: skip
    return out
