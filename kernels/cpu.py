"""The op list in C++ (csrc/), with the signatures of `reference`. Contracts are told there; all checks are in C++.

Every op raises ValueError for tensors that are not on the CPU, not contiguous, or of another dtype or shape.
Results are batch-invariant: a row's are the same bits whatever else is in the step.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from lumina_rt.kernels import Controls, NoiseKeys
from lumina_rt.kernels.quantization import QuantizedPages, QuantizedWeight
from torch import Tensor, get_num_threads

from lumina_rt import _C

PANEL = 32  # outputs that lie together
_NO_SCALES = torch.empty(0)


class PackedWeight(NamedTuple):
    """A weight matrix in the order in which `linear` reads it, see csrc/linear.h.

    panels: uint8 [panels, vectors, 4 * PANEL].  scales: bfloat16 [panels, groups, PANEL].
    """

    panels: Tensor
    scales: Tensor
    bits: int
    outputs: int


def pack(weight: Tensor | QuantizedWeight) -> PackedWeight:
    """Put a weight matrix, float32, bfloat16 or quantized, into the order that `linear` wants."""
    if isinstance(weight, QuantizedWeight):
        (values, scales), bits = weight, weight.bits
    else:
        values, scales, bits = weight, weight.new_empty(len(weight), 0, dtype=torch.bfloat16), 8 * weight.itemsize
    words = F.pad(values, (0, values.shape[1] * values.itemsize % 4 // values.itemsize)).view(torch.int32)
    return PackedWeight(_panels(words).view(torch.uint8), _panels(scales), bits, len(values))


def _panels(matrix: Tensor) -> Tensor:
    """[outputs, n] -> [panels, n, PANEL], with zeros up to whole panels."""
    padded = F.pad(matrix, (0, 0, 0, -len(matrix) % PANEL))
    return padded.view(len(padded) // PANEL, PANEL, matrix.shape[1]).transpose(1, 2).contiguous()


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    out = torch.empty_like(x)
    _C.rms_norm(x, weight, eps, out, get_num_threads())
    return out


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    out, total = torch.empty_like(x), torch.empty_like(x)
    _C.add_rms_norm(x, residual, weight, eps, out, total, get_num_threads())
    return out, total


def rms_norm_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    total = torch.empty_like(x)
    _C.rms_norm_add(x, residual, weight, eps, total, get_num_threads())
    return total


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
    pages = *_parts(k_pages), *_parts(v_pages)
    kv_heads, head_dim = pages[0].shape[2:]
    q = qkv.new_empty(qkv.shape[0], qkv.shape[1] // head_dim - 2 * kv_heads, head_dim)
    _C.qk_norm_rope(qkv, (*q_norm, *k_norm), rope, positions, slots, pages, q, get_num_threads())
    return q


def paged_attention(
    q: Tensor,
    k_pages: Tensor | QuantizedPages,
    v_pages: Tensor | QuantizedPages,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
) -> Tensor:
    out = q.new_empty(q.shape[0], q.shape[1] * q.shape[2])
    pages = *_parts(k_pages), *_parts(v_pages)
    _C.paged_attention(q, pages, block_tables, cu_seqlens, seq_lens, out, get_num_threads())
    return out


def _parts(pages: Tensor | QuantizedPages) -> tuple[Tensor, Tensor]:
    """Values, and scales or none."""
    return pages if isinstance(pages, QuantizedPages) else (pages, _NO_SCALES)


def silu_mul(gate_up: Tensor) -> Tensor:
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    _C.silu_mul(gate_up, out, get_num_threads())
    return out


def linear(x: Tensor, weight: PackedWeight) -> Tensor:
    """Multiply by a weight matrix that `pack` has made. Quantized weights round `x` to int8, by groups of 64."""
    out = x.new_empty(x.shape[0], weight.outputs)
    _C.linear(x, weight.panels, weight.scales, weight.bits, out, get_num_threads())
    return out


def guided_sample(
    logits: Tensor, cond: Tensor, uncond: Tensor, token_ids: Tensor, controls: Controls, keys: NoiseKeys
) -> Tensor:
    out = torch.empty_like(cond)
    _C.guided_sample(logits, cond, uncond, token_ids, tuple(controls), tuple(keys), out, get_num_threads())
    return out
