"""Weights in int8 and int4: symmetric, with one bf16 scale for each 64 inputs of an output. Keys and values in int8."""

from typing import NamedTuple

import torch
from torch import Tensor

GROUP = 64  # inputs that share a scale
BITS = {"int8": 8, "int4": 4}
# Clipping a group's largest weights makes the steps for all others finer; the best of these is taken for each group.
INT4_SHRINKS = (1.0, 0.92, 0.84, 0.76)
ROWS_AT_ONCE = 256  # so that what is in work stays in the caches: 22,016 x 4,096 to int4 in 0.35 s in place of 2.1


class QuantizedWeight(NamedTuple):
    """A matrix [outputs, inputs]; a weight is (value - zero point) times the scale of its group.

    values: uint8 [outputs, inputs] with the zero point 128, or uint8 [outputs, inputs / 2] with 8: of eight inputs,
    byte j holds input j in its low bits and input j + 4 in its high ones.  scales: bfloat16 [outputs, inputs / GROUP].
    """

    values: Tensor
    scales: Tensor

    @property
    def bits(self) -> int:
        return 8 * self.values.shape[1] // (GROUP * self.scales.shape[1])


class QuantizedPages(NamedTuple):
    """Keys or values in int8, with a scale for each head of each token.

    values: int8 [pages, page_size, kv_heads, head_dim].  scales: float32 [pages, page_size, kv_heads].
    """

    values: Tensor
    scales: Tensor


def pages_and_scales(pages: Tensor | QuantizedPages) -> tuple[Tensor, Tensor]:
    """Values, and their scales; pages in a float dtype stand for both, for a kernel that then reads no scales."""
    return pages if isinstance(pages, QuantizedPages) else (pages, pages)


def quantize(weight: Tensor, bits: int) -> QuantizedWeight:
    """Round a matrix to int8 or int4.

    weight: [outputs, inputs], a float dtype.  bits: 8 or 4.  Raises ValueError where inputs are no multiple of GROUP.
    """
    inputs = weight.shape[1]
    if inputs % GROUP:
        raise ValueError(f"a weight has {inputs} inputs; quantizing expects a multiple of {GROUP}")
    rounded = _int8 if bits == 8 else _int4
    parts = [rounded(rows.float().unflatten(1, (-1, GROUP))) for rows in weight.split(ROWS_AT_ONCE)]
    return QuantizedWeight(*(torch.cat(part) for part in zip(*parts, strict=True)))


def _int8(groups: Tensor) -> tuple[Tensor, Tensor]:
    """groups: float32 [outputs, n, GROUP]. Returns values and scales as in QuantizedWeight."""
    scales = (groups.abs().amax(-1) / 127).bfloat16()
    return (_steps(groups, scales, 127) + 128).to(torch.uint8).flatten(1), scales


def _int4(groups: Tensor) -> tuple[Tensor, Tensor]:
    """As _int8."""
    # The largest weight of a group, whatever its sign, falls on -8, which has no counterpart of the other sign.
    lowest, highest = groups.aminmax(dim=-1)
    largest = torch.where(highest > -lowest, -highest, -lowest)
    scales, least = torch.empty_like(largest, dtype=torch.bfloat16), torch.full_like(largest, float("inf"))
    for shrink in INT4_SHRINKS:
        tried = (largest * (shrink / 8)).bfloat16()
        error = (_steps(groups, tried, 7) * tried.float().unsqueeze(-1) - groups).square_().sum(-1)
        scales, least = torch.where(error < least, tried, scales), torch.minimum(error, least)
    low, high = (_steps(groups, scales, 7) + 8).to(torch.uint8).view(len(groups), -1, 2, 4).unbind(2)
    return (low | high << 4).flatten(1), scales


def dequantize(weight: QuantizedWeight) -> Tensor:
    """The weights as float32 [outputs, inputs]; exact."""
    values, zero = weight.values, 128
    if weight.bits == 4:
        fours = values.unflatten(1, (-1, 1, 4))
        values, zero = torch.cat((fours & 15, fours >> 4), dim=2).flatten(1), 8
    return ((values.float() - zero).unflatten(1, (-1, GROUP)) * weight.scales.float().unsqueeze(-1)).flatten(1)


def _steps(groups: Tensor, scales: Tensor, highest: int) -> Tensor:
    """The whole steps nearest to each weight: up to `highest`, down to -127 in int8 and -8 in int4."""
    scales = scales.float()
    scales = torch.where(scales == 0, 1.0, scales).unsqueeze(-1)
    return (groups / scales).round_().clamp_(-127 if highest == 127 else -8, highest)
