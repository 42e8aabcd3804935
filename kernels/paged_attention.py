"""Causal attention of ragged queries over pages, with an online softmax in base two.

    out = softmax(q k^T / sqrt(head_dim)) v     of the keys up to the query's own place

A line is a query of one of the heads that share a key; a tile is 16 lines of one row and key-value head, which is
what a tensor core takes at least. A program takes a tile and the splits of 256 keys that fall to it: one split each
where tiles are few, with a second kernel that joins them in order, and all splits of its row where tiles are many. Both
do the same sums in the same order, and a line's sums know nothing of its neighbours: a query's result is the same bits
whatever else is in the step. The grid is made from shapes alone; a program finds its row by a search in cu_seqlens.

Bytes: keys and values of a row once for each of its tiles, from the cache but for the first; n * heads * head_dim read
and written. With splits 4 * (head_dim + 2) bytes a line and split on top, 1/250 of the keys and values in a decode
step of a 7B model. The products run on tensor cores in 16 bits; in fp32 they do not. A processor holds three programs
at once, two where it has 100 KB of shared memory and pages are in 16 bits; in fp32, with heads of 128, one there.
"""

import math

import torch
import triton
import triton.language as tl
from lumina_rt.kernels.quantization import QuantizedPages, pages_and_scales
from torch import Tensor

TILE = 16  # lines; fixed, since another shape of tile may sum in another order
SPLIT = 256  # keys; fixed for the same reason. Ten programs a head at 2,356 tokens; not yet measured
# Keys at a time, and registers a thread: two times 16 KB of keys and values of 128 in 16 bits are on their way while
# one is worked on, and three programs fit on a processor. With 64 keys, or where it takes 128 registers as it likes to,
# ptxas spills on one target or another; in fp32 it spills where it is told how many. Not yet measured.
BLOCK_KEYS, NUM_STAGES, MAX_REGISTERS = 32, 5, 168
ENOUGH_PROGRAMS = 512  # from here on the tiles alone fill a GPU of about 130 processors; not yet measured


@triton.jit
def _find_row(cu_seqlens_ptr, rows, tile, GROUP: tl.constexpr, TILE: tl.constexpr):
    """The row of a tile, and the tile's place in it. A row's tiles begin at cu_seqlens * GROUP // TILE + row.

    That leaves room for all of them, and for none twice, as floor(a + b) >= floor(a) + ceil(b) - 1.
    """
    row = tl.zeros((), dtype=tl.int32)
    end = rows
    while end - row > 1:
        middle = (row + end) // 2
        is_before = tl.load(cu_seqlens_ptr + middle) * GROUP // TILE + middle <= tile
        row = tl.where(is_before, middle, row)
        end = tl.where(is_before, end, middle)
    return row, tile - (tl.load(cu_seqlens_ptr + row) * GROUP // TILE + row)


@triton.jit
def _find_lines(
    cu_seqlens_ptr, seq_lens_ptr, row, tile_of_row, kv_head,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Which lines of q and out a tile has, [TILE], whether there is such a line, and how many keys it sees."""
    GROUP: tl.constexpr = HEADS // KV_HEADS
    begin = tl.load(cu_seqlens_ptr + row)
    n_queries = tl.load(cu_seqlens_ptr + row + 1) - begin
    places = tile_of_row * TILE + tl.arange(0, TILE)
    queries = places // GROUP
    is_line = queries < n_queries
    ends = tl.where(is_line, tl.load(seq_lens_ptr + row) - n_queries + 1 + queries, 0)
    lines = (begin + queries).to(tl.int64) * HEADS + kv_head * GROUP + places % GROUP
    return lines, is_line, ends


@triton.jit
def _join(top, total, sums, part_top, part_total, part_sums):
    """Join the softmax over some keys with that over the next. A part without keys changes no bit."""
    joined = tl.maximum(top, part_top)
    finite = tl.where(joined > float("-inf"), joined, 0.0)
    shrink, grow = tl.exp2(top - finite), tl.exp2(part_top - finite)
    total = tl.fma(total, shrink, part_total * grow)
    sums = tl.fma(sums, tl.broadcast_to(shrink[:, None], sums.shape), part_sums * grow[:, None])
    return joined, total, sums


@triton.jit
def _attend_split(
    q, k_ptr, k_scales_ptr, v_ptr, v_scales_ptr, table_ptr, kv_head, ends, begin, end, dims, scale,
    KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr, BLOCK_KEYS: tl.constexpr,
):  # fmt: skip
    """The softmax of a tile over keys `begin` to `end`: largest score, sum of weights, weighted sum of values."""
    top = tl.full((q.shape[0],), float("-inf"), dtype=tl.float32)
    total = tl.zeros((q.shape[0],), dtype=tl.float32)
    sums = tl.zeros(q.shape, dtype=tl.float32)
    is_int8: tl.constexpr = k_ptr.dtype.element_ty == tl.int8

    for first in range(begin, end, BLOCK_KEYS):
        keys = first + tl.arange(0, BLOCK_KEYS)
        is_key = keys < end
        pages = tl.load(table_ptr + keys // PAGE_SIZE, mask=is_key, other=0).to(tl.int64)
        places = (pages * PAGE_SIZE + keys % PAGE_SIZE) * KV_HEADS + kv_head
        offsets = places[:, None] * HEAD_DIM + dims[None, :]
        mask = is_key[:, None] & (dims < HEAD_DIM)[None, :]

        k = tl.load(k_ptr + offsets, mask=mask, other=0).to(q.dtype)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if is_int8:
            scores *= tl.load(k_scales_ptr + places, mask=is_key, other=0.0)[None, :]
        scores = tl.where(keys[None, :] < ends[:, None], scores, float("-inf"))

        now = tl.maximum(top, tl.max(scores, axis=1))
        finite = tl.where(now > float("-inf"), now, 0.0)  # -inf minus -inf is no number
        weights = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(top - finite)
        total = tl.fma(total, shrink, tl.sum(weights, axis=1))
        top = now
        if is_int8:
            weights *= tl.load(v_scales_ptr + places, mask=is_key, other=0.0)[None, :]
        # Whatever lies beyond the row is not read: a weight of zero times NaN would be NaN.
        v = tl.load(v_ptr + offsets, mask=mask, other=0).to(q.dtype)
        sums = tl.dot(weights.to(q.dtype), v, sums * shrink[:, None], input_precision="ieee")
    return top, total, sums


@triton.jit(do_not_specialize=["rows", "max_blocks", "splits_each"])
def _paged_attention_kernel(
    q_ptr, k_ptr, k_scales_ptr, v_ptr, v_scales_ptr, tables_ptr, cu_seqlens_ptr, seq_lens_ptr,
    out_ptr, tops_ptr, totals_ptr, sums_ptr, rows, max_blocks, splits_each, scale,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr, BLOCK_KEYS: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    kv_head, first_split = tl.program_id(1), tl.program_id(2) * splits_each
    row, tile_of_row = _find_row(cu_seqlens_ptr, rows, tl.program_id(0), HEADS // KV_HEADS, TILE)
    lines, is_line, ends = _find_lines(
        cu_seqlens_ptr, seq_lens_ptr, row, tile_of_row, kv_head, HEADS, KV_HEADS, TILE
    )  # fmt: skip
    last = tl.max(ends, axis=0)
    if first_split * SPLIT >= last:
        return

    dims = tl.arange(0, BLOCK_DIM)
    offsets = lines[:, None] * HEAD_DIM + dims[None, :]
    mask = is_line[:, None] & (dims < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + offsets, mask=mask, other=0.0)
    top = tl.full((TILE,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((TILE,), dtype=tl.float32)
    sums = tl.zeros((TILE, BLOCK_DIM), dtype=tl.float32)

    for split in range(first_split, tl.minimum(first_split + splits_each, tl.cdiv(last, SPLIT))):
        part_top, part_total, part_sums = _attend_split(
            q, k_ptr, k_scales_ptr, v_ptr, v_scales_ptr, tables_ptr + row.to(tl.int64) * max_blocks, kv_head, ends,
            split * SPLIT, tl.minimum((split + 1) * SPLIT, last), dims, scale,
            KV_HEADS, HEAD_DIM, PAGE_SIZE, BLOCK_KEYS,
        )  # fmt: skip
        top, total, sums = _join(top, total, sums, part_top, part_total, part_sums)

    n_parts = tl.num_programs(2)
    if n_parts == 1:
        tl.store(out_ptr + offsets, (sums / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)
    else:
        parts = lines * n_parts + first_split
        tl.store(tops_ptr + parts, top, mask=is_line)
        tl.store(totals_ptr + parts, total, mask=is_line)
        tl.store(sums_ptr + parts[:, None] * HEAD_DIM + dims[None, :], sums, mask=mask)


@triton.jit(do_not_specialize=["rows", "n_splits"])
def _join_splits_kernel(
    tops_ptr, totals_ptr, sums_ptr, cu_seqlens_ptr, seq_lens_ptr, out_ptr, rows, n_splits,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    TILE: tl.constexpr, SPLIT: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    row, tile_of_row = _find_row(cu_seqlens_ptr, rows, tl.program_id(0), HEADS // KV_HEADS, TILE)
    lines, is_line, ends = _find_lines(
        cu_seqlens_ptr, seq_lens_ptr, row, tile_of_row, tl.program_id(1), HEADS, KV_HEADS, TILE
    )  # fmt: skip
    last = tl.max(ends, axis=0)
    if last <= 0:
        return

    dims = tl.arange(0, BLOCK_DIM)
    mask = is_line[:, None] & (dims < HEAD_DIM)[None, :]
    top = tl.full((TILE,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((TILE,), dtype=tl.float32)
    sums = tl.zeros((TILE, BLOCK_DIM), dtype=tl.float32)
    for split in range(tl.cdiv(last, SPLIT)):
        parts = lines * n_splits + split
        part_top = tl.load(tops_ptr + parts, mask=is_line, other=float("-inf"))
        part_total = tl.load(totals_ptr + parts, mask=is_line, other=0.0)
        part_sums = tl.load(sums_ptr + parts[:, None] * HEAD_DIM + dims[None, :], mask=mask, other=0.0)
        top, total, sums = _join(top, total, sums, part_top, part_total, part_sums)
    offsets = lines[:, None] * HEAD_DIM + dims[None, :]
    tl.store(out_ptr + offsets, (sums / total[:, None]).to(out_ptr.dtype.element_ty), mask=mask)


def paged_attention(
    q: Tensor,
    k_pages: Tensor | QuantizedPages,
    v_pages: Tensor | QuantizedPages,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
) -> Tensor:
    """Attend from each row's queries to everything cached of that row up to the query's own place.

    q: [n, heads, head_dim].  k_pages, v_pages: [pages, page_size, kv_heads, head_dim], or QuantizedPages of such.
    block_tables: int32 [rows, max_blocks].  cu_seqlens: int32 [rows + 1].  seq_lens: int32 [rows].
    Returns [n, heads * head_dim].
    """
    (k, k_scales), (v, v_scales) = pages_and_scales(k_pages), pages_and_scales(v_pages)
    (n, heads, head_dim), (_, page_size, kv_heads, _) = q.shape, k.shape
    rows, max_blocks = block_tables.shape
    assert k.shape == v.shape
    assert k.shape[3] == head_dim
    assert heads % kv_heads == 0
    assert k.dtype == v.dtype
    assert k.dtype == q.dtype or isinstance(k_pages, QuantizedPages)
    assert len(cu_seqlens) == rows + 1
    assert len(seq_lens) == rows
    assert all(t.dtype == torch.int32 for t in (block_tables, cu_seqlens, seq_lens))
    assert all(t.is_contiguous() for t in (q, k, k_scales, v, v_scales, block_tables, cu_seqlens, seq_lens))

    tiles = n * (heads // kv_heads) // TILE + rows
    n_splits = triton.cdiv(max_blocks * page_size, SPLIT)
    is_split = n_splits > 1 and tiles * kv_heads < ENOUGH_PROGRAMS
    out = q.new_empty(n, heads * head_dim)
    lines = n * heads if is_split else 0
    tops, totals = (q.new_empty(lines, n_splits, dtype=torch.float32) for _ in range(2))
    sums = q.new_empty(lines, n_splits, head_dim, dtype=torch.float32)
    block_dim = max(triton.next_power_of_2(head_dim), 16)
    sizes = {"HEADS": heads, "KV_HEADS": kv_heads, "HEAD_DIM": head_dim, "TILE": TILE, "SPLIT": SPLIT}
    # No products joined with sums but where the kernels ask for it, so that every shape rounds alike.
    sizes |= {"BLOCK_DIM": block_dim, "enable_fp_fusion": False}
    _paged_attention_kernel[tiles, kv_heads, n_splits if is_split else 1](
        q, k, k_scales, v, v_scales, block_tables, cu_seqlens, seq_lens, out, tops, totals, sums,
        rows, max_blocks, 1 if is_split else n_splits, head_dim**-0.5 * math.log2(math.e),
        PAGE_SIZE=page_size, BLOCK_KEYS=BLOCK_KEYS, num_warps=4, num_stages=NUM_STAGES,
        maxnreg=MAX_REGISTERS if q.itemsize == 2 else None, **sizes,
    )  # fmt: skip
    if is_split:
        _join_splits_kernel[tiles, kv_heads](
            tops, totals, sums, cu_seqlens, seq_lens, out, rows, n_splits, num_warps=4, **sizes
        )
    return out
