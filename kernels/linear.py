"""Products with weights in int8 and int4, dequantized in registers; float weights go to cuBLAS.

    out[row, output] = sum over groups of scale[output, group] * (sum over the group of x[row, i] * w[output, i])

Whole numbers up to 127 are exact in 16 bits, so that only sums round. A program takes 16 or 32 outputs and 8 to 32
rows. It walks eight groups of 64 inputs at a time, one group a warp: inputs are split over the warps of a program and
not over programs, so that one launch does, and the eight sums are joined in a fixed order. The weights are what
tensor cores take 16 of, so few rows waste little: they are padded to 8. A row's result is the same bits for any number
of rows; torch does not promise that of the product with float weights.

Bytes: the weights once for each 32 rows, from memory the first time (1 or 1/2 byte each, and 2 for each 64); from the
cache x once a program. From some 64 rows on x is the most of it: larger tiles would pay there. `pack` puts what a
program reads at a time side by side: 16 outputs x 64 inputs, a group after another. In 16 bits a processor holds two
programs at least up to 16 rows (three or more on an A100, H100 or B200), at 32 one.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from lumina_rt.kernels.quantization import GROUP, QuantizedWeight
from torch import Tensor

PANEL = 16  # outputs that lie together, as many as a tensor core takes
SPLITS = 8  # groups at a time, one a warp; fixed, since it decides the order of the sums


class PackedWeight(NamedTuple):
    """A quantized matrix in the order in which `linear` reads it, with zeros up to whole panels and splits.

    values: int8 [panels, groups, PANEL, 64]; or uint8 [panels, groups, PANEL, 32] with a zero point of 8, where byte j
    of a group holds input j in its low bits and input j + 32 in its high ones.
    scales: bfloat16 [panels, groups, PANEL].
    """

    values: Tensor
    scales: Tensor
    outputs: int


@triton.jit
def _load_inputs(x_ptr, rows, inputs, n, INPUTS: tl.constexpr):
    """Some inputs of each split, [splits, k], for all rows: [splits, k, rows]."""
    offsets = rows.to(tl.int64)[None, None, :] * INPUTS + inputs[:, :, None]
    return tl.load(x_ptr + offsets, mask=(rows < n)[None, None, :] & (inputs < INPUTS)[:, :, None], other=0.0)


@triton.jit
def _sum_of_pairs(x, n: tl.constexpr, OUT: tl.constexpr, ROWS: tl.constexpr):
    """[n, OUT, ROWS] -> [n / 2, OUT, ROWS]. Sums are spelled out in pairs: tl.sum does not promise an order."""
    first, second = tl.split(tl.permute(tl.reshape(x, (2, n // 2, OUT, ROWS)), (1, 2, 3, 0)))
    return first + second


@triton.jit(do_not_specialize=["n"])
def _linear_kernel(
    x_ptr, values_ptr, scales_ptr, out_ptr, n,
    INPUTS: tl.constexpr, OUTPUTS: tl.constexpr, GROUPS: tl.constexpr, IS_INT4: tl.constexpr,
    GROUP: tl.constexpr, PANEL: tl.constexpr, SPLITS: tl.constexpr, BLOCK_OUT: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    outputs = tl.program_id(1) * BLOCK_OUT + tl.arange(0, BLOCK_OUT)
    splits = tl.arange(0, SPLITS)
    BYTES: tl.constexpr = GROUP // 2 if IS_INT4 else GROUP
    inputs = tl.arange(0, BYTES)[None, :]
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    sums = tl.zeros((SPLITS, BLOCK_OUT, BLOCK_ROWS), dtype=tl.float32)

    for first in range(0, GROUPS, SPLITS):
        groups = first + splits
        places = ((outputs // PANEL)[None, :] * GROUPS + groups[:, None]) * PANEL + (outputs % PANEL)[None, :]
        scales = tl.load(scales_ptr + places).to(tl.float32)
        values = tl.load(values_ptr + places.to(tl.int64)[:, :, None] * BYTES + inputs[None, :, :])
        x = _load_inputs(x_ptr, rows, groups[:, None] * GROUP + inputs, n, INPUTS)
        if IS_INT4:
            low = ((values & 15).to(tl.int8) - 8).to(dtype)
            high = ((values >> 4).to(tl.int8) - 8).to(dtype)
            part = tl.dot(low, x, input_precision="ieee")
            x = _load_inputs(x_ptr, rows, groups[:, None] * GROUP + inputs + BYTES, n, INPUTS)
            part = tl.dot(high, x, part, input_precision="ieee")
        else:
            part = tl.dot(values.to(dtype), x, input_precision="ieee")
        sums = tl.fma(part, tl.broadcast_to(scales[:, :, None], part.shape), sums)

    sums = _sum_of_pairs(sums, 8, BLOCK_OUT, BLOCK_ROWS)
    sums = _sum_of_pairs(sums, 4, BLOCK_OUT, BLOCK_ROWS)
    sums = _sum_of_pairs(sums, 2, BLOCK_OUT, BLOCK_ROWS)
    sums = tl.trans(tl.reshape(sums, (BLOCK_OUT, BLOCK_ROWS)))
    offsets = rows.to(tl.int64)[:, None] * OUTPUTS + outputs[None, :]
    mask = (rows < n)[:, None] & (outputs < OUTPUTS)[None, :]
    tl.store(out_ptr + offsets, sums.to(dtype), mask=mask)


def pack(weight: Tensor | QuantizedWeight) -> Tensor | PackedWeight:
    """Put a weight matrix, [outputs, inputs], into the order that `linear` wants; floats stay as they are."""
    if isinstance(weight, Tensor):
        return weight
    (values, scales), (outputs, groups) = weight, weight.scales.shape
    if weight.bits == 8:
        values = (values ^ 128).view(torch.int8)  # less the zero point, in two's complement
    else:
        fours = values.unflatten(1, (groups, GROUP // 8, 1, 4))
        low, high = torch.cat((fours & 15, fours >> 4), dim=3).view(outputs, groups, 2, GROUP // 2).unbind(2)
        values = low | high << 4
    padding = 0, -groups % SPLITS, 0, -outputs % (2 * PANEL)
    return PackedWeight(
        _panels(F.pad(values.view(outputs, groups, -1), (0, 0, *padding))), _panels(F.pad(scales, padding)), outputs
    )


def _panels(matrix: Tensor) -> Tensor:
    """[outputs, groups, ...] -> [panels, groups, PANEL, ...]."""
    return matrix.unflatten(0, (-1, PANEL)).transpose(1, 2).contiguous()


def linear(x: Tensor, weight: Tensor | PackedWeight) -> Tensor:
    """Multiply by a weight matrix. x: [n, inputs].  weight: from `pack`.  Returns [n, outputs].

    With quantized weights the results are batch-invariant. With float weights they are those of cuBLAS, which may
    choose another order of sums for another number of rows.
    """
    if isinstance(weight, Tensor):
        return F.linear(x, weight)
    values, scales, outputs = weight
    (n, inputs), (panels, groups, _) = x.shape, scales.shape
    assert x.is_contiguous()
    assert triton.cdiv(inputs, GROUP * SPLITS) * SPLITS == groups
    assert inputs % GROUP == 0

    out = x.new_empty(n, outputs)
    tile = _tile(n, x.itemsize)
    grid = (triton.cdiv(n, tile["BLOCK_ROWS"]), panels * PANEL // tile["BLOCK_OUT"])
    _linear_kernel[grid](
        x, values, scales, out, n, INPUTS=inputs, OUTPUTS=outputs, GROUPS=groups,
        IS_INT4=values.dtype == torch.uint8, GROUP=GROUP, PANEL=PANEL, SPLITS=SPLITS,
        num_warps=SPLITS, enable_fp_fusion=False, **tile,
    )  # fmt: skip
    return out


def _tile(n: int, itemsize: int) -> dict[str, int]:
    """Outputs and rows of a program. More rows share the weights, more outputs share x; not yet measured."""
    if itemsize == 4:  # for tests and the embedded model: x takes twice the shared memory, of which an sm_89 has 99 KB
        return {"BLOCK_OUT": 16, "BLOCK_ROWS": 8 if n <= 8 else 16, "num_stages": 2}
    if n <= 8:
        return {"BLOCK_OUT": 16, "BLOCK_ROWS": 8, "num_stages": 4}
    if n <= 16:
        return {"BLOCK_OUT": 16, "BLOCK_ROWS": 16, "num_stages": 3}
    # As much as the 99 KB of an sm_89 hold. Left to itself ptxas takes 128 registers on sm_90, and spills two.
    return {"BLOCK_OUT": 32, "BLOCK_ROWS": 32, "num_stages": 3, "maxnreg": 168}
