"""LayerNorm of each head of q and k, then RoPE, in fp32 and rounded once; k and v go to their slots of the pages.

    h    = (x - mean) / sqrt(var + 1e-5) * weight + bias
    q, k = (h1 * cos - h2 * sin, h2 * cos + h1 * sin)     h1, h2: the halves of a head

A program takes four heads of a token, all of q, all of k or all of v, in one warp; the halves are loaded apart, so
that a rotation stays inside a thread. One launch does all three; a processor holds as many programs as it allows at
all, 24 or 32. Bytes: qkv once read and once written; norms and RoPE's row come from the cache. In int8 a head of k or
v is its largest magnitude over 127, and the nearest steps of it. Nothing checks that slots and positions lie inside
their tensors: that would read them on the host.
"""

import triton
import triton.language as tl
from lumina_rt.kernels.quantization import QuantizedPages, pages_and_scales
from torch import Tensor

BLOCK_HEADS = 4  # with one warp a thread has eight elements of each half, 16 bytes in 16 bits; not yet measured


@triton.jit
def _load_halves(x_ptr, offsets, mask, HALF: tl.constexpr):
    first = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + offsets + HALF, mask=mask, other=0.0).to(tl.float32)
    return first, second


@triton.jit
def _norm_rope(
    first, second, weight_ptr, bias_ptr, rope_ptr, position, heads, cols, mask,
    HEADS: tl.constexpr, NORM_ROWS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    mean = (tl.sum(first, axis=1) + tl.sum(second, axis=1)) / (2 * HALF)
    first = tl.where(mask, first - mean[:, None], 0.0)
    second = tl.where(mask, second - mean[:, None], 0.0)
    variance = (tl.sum(first * first, axis=1) + tl.sum(second * second, axis=1)) / (2 * HALF)
    scale = tl.rsqrt(variance + 1e-5)[:, None]  # QK_NORM_EPS of the reference

    offsets = (heads * NORM_ROWS // HEADS * 2 * HALF)[:, None] + cols[None, :]
    weight_first, weight_second = _load_halves(weight_ptr, offsets, mask, HALF)
    bias_first, bias_second = _load_halves(bias_ptr, offsets, mask, HALF)
    first = first * scale * weight_first + bias_first
    second = second * scale * weight_second + bias_second

    in_half = cols < HALF
    cos = tl.load(rope_ptr + position * 2 * HALF + cols, mask=in_half, other=0.0).to(tl.float32)[None, :]
    sin = tl.load(rope_ptr + position * 2 * HALF + HALF + cols, mask=in_half, other=0.0).to(tl.float32)[None, :]
    return first * cos - second * sin, second * cos + first * sin


@triton.jit
def _keep(first, second, pages_ptr, scales_ptr, places, in_heads, cols, mask, HALF: tl.constexpr):
    """Write heads to their places of the pages: rounded to the model's dtype, or in int8 with a scale."""
    dtype: tl.constexpr = pages_ptr.dtype.element_ty
    if dtype == tl.int8:
        largest = tl.maximum(tl.max(tl.abs(first), axis=1), tl.max(tl.abs(second), axis=1))
        # A maximum drops NaN, which must reach the logits to be noticed; a sum carries it.
        scales = largest / 127 + 0 * (tl.sum(first, axis=1) + tl.sum(second, axis=1))
        tl.store(scales_ptr + places, scales, mask=in_heads)
        safe = tl.where(scales > 0, scales, 1.0)[:, None]
        # Adding 1.5 * 2^23 and taking it away rounds to the nearest whole number, ties to even.
        first = (first / safe + 12582912.0) - 12582912.0
        second = (second / safe + 12582912.0) - 12582912.0
    offsets = places[:, None] * (2 * HALF) + cols[None, :]
    tl.store(pages_ptr + offsets, first.to(dtype), mask=mask)
    tl.store(pages_ptr + offsets + HALF, second.to(dtype), mask=mask)


# A step's numbers lie where they come to lie: no kernel is compiled again for those at multiples of 16 bytes.
@triton.jit(do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"])
def _qk_norm_rope_kernel(
    qkv_ptr, q_weight_ptr, q_bias_ptr, k_weight_ptr, k_bias_ptr, rope_ptr, positions_ptr, slots_ptr,
    q_ptr, k_ptr, k_scales_ptr, v_ptr, v_scales_ptr,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, Q_ROWS: tl.constexpr, K_ROWS: tl.constexpr,
    HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr, BLOCK_HALF: tl.constexpr,
):  # fmt: skip
    Q_BLOCKS: tl.constexpr = (HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    KV_BLOCKS: tl.constexpr = (KV_HEADS + BLOCK_HEADS - 1) // BLOCK_HEADS
    token = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    cols = tl.arange(0, BLOCK_HALF)
    qkv_ptr += token * (HEADS + 2 * KV_HEADS) * 2 * HALF

    if block < Q_BLOCKS:
        heads = block * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        mask = (heads < HEADS)[:, None] & (cols < HALF)[None, :]
        offsets = heads[:, None] * (2 * HALF) + cols[None, :]
        first, second = _load_halves(qkv_ptr, offsets, mask, HALF)
        first, second = _norm_rope(
            first, second, q_weight_ptr, q_bias_ptr, rope_ptr, tl.load(positions_ptr + token), heads, cols, mask,
            HEADS, Q_ROWS, HALF,
        )  # fmt: skip
        q_ptr += token * HEADS * 2 * HALF
        tl.store(q_ptr + offsets, first.to(q_ptr.dtype.element_ty), mask=mask)
        tl.store(q_ptr + offsets + HALF, second.to(q_ptr.dtype.element_ty), mask=mask)
    else:
        is_key = block < Q_BLOCKS + KV_BLOCKS
        heads = (block - Q_BLOCKS) % KV_BLOCKS * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
        in_heads = heads < KV_HEADS
        mask = in_heads[:, None] & (cols < HALF)[None, :]
        places = tl.load(slots_ptr + token) * KV_HEADS + heads
        offsets = (tl.where(is_key, HEADS, HEADS + KV_HEADS) + heads)[:, None] * (2 * HALF) + cols[None, :]
        first, second = _load_halves(qkv_ptr, offsets, mask, HALF)
        if is_key:
            first, second = _norm_rope(
                first, second, k_weight_ptr, k_bias_ptr, rope_ptr, tl.load(positions_ptr + token), heads, cols, mask,
                KV_HEADS, K_ROWS, HALF,
            )  # fmt: skip
            _keep(first, second, k_ptr, k_scales_ptr, places, in_heads, cols, mask, HALF)
        else:
            _keep(first, second, v_ptr, v_scales_ptr, places, in_heads, cols, mask, HALF)


def qk_norm_rope(
    qkv: Tensor,
    q_norm: tuple[Tensor, Tensor],
    k_norm: tuple[Tensor, Tensor],
    rope: Tensor,
    positions: Tensor,
    slots: Tensor,
    k_pages: Tensor | QuantizedPages,
    v_pages: Tensor | QuantizedPages,
) -> Tensor:
    """Write the keys and values of this step into the pages; return its queries.

    qkv: [n, (heads + 2 * kv_heads) * head_dim].  q_norm, k_norm: (weight, bias), each [mp, head_dim].
    rope: [max_positions, head_dim].  positions, slots: int64 [n].
    k_pages, v_pages: [pages, page_size, kv_heads, head_dim], or QuantizedPages of such.
    Returns [n, heads, head_dim].
    """
    (k, k_scales), (v, v_scales) = pages_and_scales(k_pages), pages_and_scales(v_pages)
    n, (_, _, kv_heads, head_dim) = len(qkv), k.shape
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    assert qkv.shape[1] == (heads + 2 * kv_heads) * head_dim
    assert head_dim % 2 == 0
    assert all(t.is_contiguous() for t in (qkv, *q_norm, *k_norm, rope, positions, slots))
    assert all(t.is_contiguous() for t in (k, k_scales, v, v_scales))
    assert v.shape == k.shape
    assert v.dtype == k.dtype
    assert heads % len(q_norm[0]) == 0
    assert kv_heads % len(k_norm[0]) == 0
    assert all(t.shape[1] == head_dim and t.dtype == qkv.dtype for t in (*q_norm, *k_norm, rope))
    assert len(positions) == len(slots) == n
    assert k.dtype == qkv.dtype or isinstance(k_pages, QuantizedPages)

    q = qkv.new_empty(n, heads, head_dim)
    grid = (n, triton.cdiv(heads, BLOCK_HEADS) + 2 * triton.cdiv(kv_heads, BLOCK_HEADS))
    _qk_norm_rope_kernel[grid](
        qkv, *q_norm, *k_norm, rope, positions, slots, q, k, k_scales, v, v_scales,
        HEADS=heads, KV_HEADS=kv_heads, Q_ROWS=len(q_norm[0]), K_ROWS=len(k_norm[0]), HALF=head_dim // 2,
        BLOCK_HEADS=BLOCK_HEADS, BLOCK_HALF=triton.next_power_of_2(head_dim // 2), num_warps=1,
    )  # fmt: skip
    return q
