"""RMSNorm, alone, with the residual addition before it (7B), and with the addition behind it (34B).

    norm(h)  = h / sqrt(mean(h^2) + eps) * weight
    residual = residual + x,  out = norm(residual)
    residual = residual + norm(x)

A program takes one token and holds it in registers. Bytes: x once read and once written; with the addition before it x
and the residual once each way, 4 * n * hidden elements; with the addition behind it 3. The weight comes from the cache.
A processor holds three programs at least. Does not touch its inputs.
"""

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _normalize(h, weight_ptr, cols, mask, eps, HIDDEN: tl.constexpr, dtype: tl.constexpr):
    h = h * tl.rsqrt(tl.sum(h * h, axis=0) / HIDDEN + eps)
    h = h.to(dtype).to(tl.float32)  # the checkpoint's model rounds before the weight
    return h * tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _rms_norm_kernel(x_ptr, weight_ptr, out_ptr, eps, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    mask = cols < HIDDEN
    offsets = tl.program_id(0).to(tl.int64) * HIDDEN + cols
    dtype: tl.constexpr = out_ptr.dtype.element_ty

    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    out = _normalize(x, weight_ptr, cols, mask, eps, HIDDEN, dtype)
    tl.store(out_ptr + offsets, out.to(dtype), mask=mask)


@triton.jit
def _add_rms_norm_kernel(
    x_ptr, residual_ptr, weight_ptr, out_ptr, total_ptr, eps, HIDDEN: tl.constexpr, BLOCK: tl.constexpr
):
    cols = tl.arange(0, BLOCK)
    mask = cols < HIDDEN
    offsets = tl.program_id(0).to(tl.int64) * HIDDEN + cols
    dtype: tl.constexpr = out_ptr.dtype.element_ty

    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    total = (residual + x).to(dtype)  # the residual stream is kept in the model's dtype, and normalized as kept
    tl.store(total_ptr + offsets, total, mask=mask)

    out = _normalize(total.to(tl.float32), weight_ptr, cols, mask, eps, HIDDEN, dtype)
    tl.store(out_ptr + offsets, out.to(dtype), mask=mask)


@triton.jit
def _rms_norm_add_kernel(x_ptr, residual_ptr, weight_ptr, total_ptr, eps, HIDDEN: tl.constexpr, BLOCK: tl.constexpr):
    cols = tl.arange(0, BLOCK)
    mask = cols < HIDDEN
    offsets = tl.program_id(0).to(tl.int64) * HIDDEN + cols
    dtype: tl.constexpr = total_ptr.dtype.element_ty

    x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    residual = tl.load(residual_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
    out = _normalize(x, weight_ptr, cols, mask, eps, HIDDEN, dtype).to(dtype)  # rounded before it is added
    tl.store(total_ptr + offsets, (residual + out.to(tl.float32)).to(dtype), mask=mask)


def _launch(hidden: int) -> dict[str, int]:
    # A thread has eight elements, one load of 16 bytes in 16 bits, up to 4096 columns. Not yet measured.
    block = triton.next_power_of_2(hidden)
    return {"HIDDEN": hidden, "BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize each token. x: [n, hidden].  weight: [hidden].  Returns [n, hidden]."""
    n, hidden = x.shape
    assert x.is_contiguous()
    assert weight.is_contiguous()
    assert weight.shape == (hidden,)
    assert weight.dtype == x.dtype

    out = x.new_empty(x.shape)
    _rms_norm_kernel[(n,)](x, weight, out, eps, **_launch(hidden))
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add `x` into the residual stream and normalize the sum.

    x, residual: [n, hidden].  weight: [hidden].  Returns (normalized, new residual), both [n, hidden].
    """
    n, hidden = x.shape
    assert x.is_contiguous()
    assert residual.is_contiguous()
    assert weight.is_contiguous()
    assert residual.shape == x.shape
    assert weight.shape == (hidden,)
    assert residual.dtype == weight.dtype == x.dtype

    out, total = x.new_empty(x.shape), x.new_empty(x.shape)
    _add_rms_norm_kernel[(n,)](x, residual, weight, out, total, eps, **_launch(hidden))
    return out, total


def rms_norm_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize each token, then add it into the residual stream.

    x, residual: [n, hidden].  weight: [hidden].  Returns the new residual, [n, hidden].
    """
    n, hidden = x.shape
    assert x.is_contiguous()
    assert residual.is_contiguous()
    assert weight.is_contiguous()
    assert residual.shape == x.shape
    assert weight.shape == (hidden,)
    assert residual.dtype == weight.dtype == x.dtype

    total = x.new_empty(x.shape)
    _rms_norm_add_kernel[(n,)](x, residual, weight, total, eps, **_launch(hidden))
    return total
