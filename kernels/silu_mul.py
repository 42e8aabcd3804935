"""SwiGLU: silu of the first half of each token times its second half.

    out = gate / (1 + exp(-gate)) * up

A program takes 1024 columns of a token. Bytes: 3 * n * intermediate elements, two read and one written.
A processor is filled: 12 or 16 programs.
"""

import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # with four warps a thread has eight columns, one load of 16 bytes in 16 bits; not yet measured


@triton.jit
def _silu_mul_kernel(gate_up_ptr, out_ptr, INTERMEDIATE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < INTERMEDIATE
    dtype: tl.constexpr = out_ptr.dtype.element_ty

    gate = tl.load(gate_up_ptr + row * 2 * INTERMEDIATE + cols, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + (row * 2 + 1) * INTERMEDIATE + cols, mask=mask, other=0.0).to(tl.float32)
    gate = gate / (1 + tl.exp(-gate))
    gate = gate.to(dtype).to(tl.float32)  # the checkpoint's model rounds the silu
    tl.store(out_ptr + row * INTERMEDIATE + cols, (gate * up).to(dtype), mask=mask)


def silu_mul(gate_up: Tensor) -> Tensor:
    """gate_up: [n, 2 * intermediate].  Returns [n, intermediate]."""
    n, intermediate = gate_up.shape[0], gate_up.shape[1] // 2
    assert gate_up.is_contiguous()
    assert gate_up.shape[1] % 2 == 0

    out = gate_up.new_empty(n, intermediate)
    grid = (n, triton.cdiv(intermediate, BLOCK))
    _silu_mul_kernel[grid](gate_up, out, INTERMEDIATE=intermediate, BLOCK=BLOCK, num_warps=4)
    return out
