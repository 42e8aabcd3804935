"""Inputs for the op tests of every backend, and the rule that each is held to."""

import torch
from lumina_rt.kernels import Controls, NoiseKeys, reference
from lumina_rt.kernels.quantization import QuantizedPages


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def double(value):
    if isinstance(value, torch.Tensor):
        return value.double() if value.is_floating_point() else value
    if isinstance(value, QuantizedPages):
        return QuantizedPages(*map(double, value))
    return tuple(map(double, value)) if isinstance(value, tuple) else value


def assert_parity(ops, op, *args, dtype):
    """The rule: no farther from the exact result than twice what torch is in this dtype, plus its epsilon."""
    ours, theirs = getattr(ops, op)(*args), getattr(reference, op)(*args)
    exact = getattr(reference, op)(*map(double, args))
    for out, torch_out, truth in zip(
        *((x if isinstance(x, tuple) else (x,)) for x in (ours, theirs, exact)), strict=True
    ):
        assert_close(out, torch_out, truth, dtype)


def assert_close(out, torch_out, truth, dtype):
    assert out.dtype == dtype
    assert out.shape == truth.shape
    scale = truth.abs().max()
    error, allowed = (out - truth).abs().max() / scale, 2 * (torch_out - truth).abs().max() / scale
    assert error <= allowed + torch.finfo(dtype).eps, (float(error), float(allowed))


def attention_inputs(dtype, heads, kv_heads, head_dim, page_size, rows):
    """rows: pairs (tokens cached, queries)."""
    n_blocks = [-(-length // page_size) for length, _ in rows]
    pages = sum(n_blocks) + 1
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(1)).int()
    tables, used = torch.zeros(len(rows), max(n_blocks), dtype=torch.int32), 0
    for row, n in enumerate(n_blocks):
        tables[row, :n] = order[used : used + n]
        used += n
    cu_seqlens = torch.tensor([0, *(n for _, n in rows)]).cumsum(0).int()
    seq_lens = torch.tensor([length for length, _ in rows], dtype=torch.int32)
    k_pages, v_pages = (randn(pages, page_size, kv_heads, head_dim, seed=i, dtype=dtype) for i in (2, 3))
    return randn(int(cu_seqlens[-1]), heads, head_dim, dtype=dtype), k_pages, v_pages, tables, cu_seqlens, seq_lens


def int8_pages(pages):
    """The same keys or values in int8, as the reference keeps them."""
    scales = pages.float().abs().amax(-1) / 127
    return QuantizedPages((pages / scales[..., None]).round().to(torch.int8), scales)


def draw_inputs(m, columns, seed, dtype=torch.float32, **chosen):
    values = {"guidance": 3.0, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | chosen
    controls = [
        torch.full((m,), values[name], dtype=torch.int64 if name == "top_k" else torch.float32)
        for name in Controls._fields
    ]
    keys = NoiseKeys(torch.arange(m) * (2**33 + 1) + seed, torch.arange(m) % 3, torch.arange(m) + 2**20)
    logits = 3 * randn(2 * m, columns, seed=seed, dtype=dtype)
    return logits, torch.arange(m), torch.arange(m) + m, torch.arange(columns) * 3 + 4, Controls(*controls), keys
