"""The op list of `cuda`, with flash-attn's attention for rows that feed one token each: a plain decode step.

    out = softmax(q k^T / sqrt(head_dim)) v     over the same pages, which flash-attn reads through the same tables

Other steps, chunks of prompts and windows of guesses, go to our own kernel: which rows are of equal length stands in
cu_seqlens on the device, and only that every row has one token can be told by shapes. Imported only where flash-attn
is; it wants 16 bits and pages of a multiple of 256 tokens. Release 2.8.3 is meant: 2.8.4 reads the lengths on the
host, which makes it wait and cannot be captured in a graph. How flash-attn splits the keys depends on the whole step,
so its results are not batch-invariant.
"""

from flash_attn import flash_attn_with_kvcache
from lumina_rt.kernels import paged_attention as own
from lumina_rt.kernels.cuda import (
    add_rms_norm,
    guided_sample,
    linear,
    pack,
    qk_norm_rope,
    rms_norm,
    rms_norm_add,
    silu_mul,
)
from torch import Tensor

__all__ = [
    "add_rms_norm",
    "guided_sample",
    "linear",
    "pack",
    "paged_attention",
    "qk_norm_rope",
    "rms_norm",
    "rms_norm_add",
    "silu_mul",
]


def paged_attention(
    q: Tensor, k_pages: Tensor, v_pages: Tensor, block_tables: Tensor, cu_seqlens: Tensor, seq_lens: Tensor
) -> Tensor:
    """Attend from each row's queries to everything cached of that row up to the query's own place.

    q: [n, heads, head_dim], in 16 bits; every row has one query at least.  k_pages, v_pages: [pages, page_size,
    kv_heads, head_dim] in q's dtype.  block_tables: int32 [rows, max_blocks].  cu_seqlens: int32 [rows + 1].
    seq_lens: int32 [rows].  Returns [n, heads * head_dim].
    """
    if len(q) > len(seq_lens):
        return own.paged_attention(q, k_pages, v_pages, block_tables, cu_seqlens, seq_lens)
    out = flash_attn_with_kvcache(
        q.unsqueeze(1), k_pages, v_pages, cache_seqlens=seq_lens, block_table=block_tables, causal=True
    )
    return out.flatten(1)
