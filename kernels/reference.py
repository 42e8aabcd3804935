"""The op list in plain PyTorch: the specification that every other backend is tested against.

Slow and obvious. Each op computes in fp32 (float64 for float64 inputs, which the tests call "exact") and rounds to
the input's dtype where the checkpoint's own model rounds. Nothing here knows of requests or of layers.
"""

import torch
import torch.nn.functional as F
from lumina_rt.kernels import Controls, NoiseKeys
from lumina_rt.kernels.quantization import QuantizedPages, QuantizedWeight, dequantize
from torch import Tensor

QK_NORM_EPS = 1e-5  # hard-coded in the model, whatever rms_norm_eps says


def _widen(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize each token by its root mean square, round, then multiply by the weight.

    x: [n, hidden].  weight: [hidden].  Returns [n, hidden] in x's dtype.
    """
    h = _widen(x)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Add `x` into the residual stream and normalize the sum.

    x, residual: [n, hidden].  weight: [hidden].  Returns (normalized, new residual), both [n, hidden].
    """
    residual = residual + x
    return rms_norm(residual, weight, eps), residual


def rms_norm_add(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize each token, then add it into the residual stream.

    x, residual: [n, hidden].  weight: [hidden].  Returns the new residual, [n, hidden].
    """
    return residual + rms_norm(x, weight, eps)


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

    Queries and keys are layer-normalized per head (mean, bias, eps 1e-5), then rotated, all in fp32, and rounded
    once. Values are stored as they are.

    qkv: [n, (heads + 2 * kv_heads) * head_dim].  q_norm, k_norm: (weight, bias), each [mp, head_dim]; row g holds
    for the g-th contiguous group of heads.  rope: [max_positions, head_dim], cosines then sines, in qkv's dtype.
    positions: int64 [n].  slots: int64 [n], page * page_size + offset.
    k_pages, v_pages: [pages, page_size, kv_heads, head_dim], written in place; or QuantizedPages of such, which get
    the nearest of 255 steps of a head's largest magnitude.
    Returns [n, heads, head_dim] in qkv's dtype.
    """
    _, _, kv_heads, head_dim = _shape(k_pages)
    heads = qkv.shape[1] // head_dim - 2 * kv_heads
    q, k, v = qkv.view(len(qkv), -1, head_dim).split((heads, kv_heads, kv_heads), dim=1)
    cos, sin = _widen(rope[positions]).unsqueeze(1).chunk(2, dim=-1)  # each [n, 1, head_dim / 2]
    q = rotate(head_norm(q, *q_norm), cos, sin).to(qkv.dtype)
    _write(k_pages, slots, rotate(head_norm(k, *k_norm), cos, sin))
    _write(v_pages, slots, v)
    return q


def _shape(pages: Tensor | QuantizedPages) -> torch.Size:
    return (pages.values if isinstance(pages, QuantizedPages) else pages).shape


def _write(pages: Tensor | QuantizedPages, slots: Tensor, x: Tensor) -> None:
    """Put x, [n, kv_heads, head_dim], into slots of the pages."""
    if isinstance(pages, QuantizedPages):
        scales = _widen(x).abs().amax(-1) / 127
        pages.scales.view(-1, x.shape[1])[slots] = scales.to(pages.scales.dtype)
        x, pages = torch.where(scales[..., None] > 0, _widen(x) / scales[..., None], 0.0).round(), pages.values
    pages.view(-1, *x.shape[1:])[slots] = x.to(pages.dtype)


def _read(pages: Tensor | QuantizedPages, blocks: Tensor, n: int) -> Tensor:
    """The first n tokens of some pages, [n, kv_heads, head_dim], in fp32."""
    if isinstance(pages, QuantizedPages):
        return _read(pages.values, blocks, n) * _read(pages.scales, blocks, n)[..., None]
    return _widen(pages[blocks].flatten(0, 1)[:n])


def head_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm of each head, in fp32. x: [..., heads, head_dim].  weight, bias: [mp, head_dim]."""
    repeats = x.shape[-2] // len(weight)
    weight, bias = (p.repeat_interleave(repeats, dim=0) for p in (weight, bias))
    return F.layer_norm(_widen(x), x.shape[-1:], eps=QK_NORM_EPS) * weight + bias


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply RoPE. x: [..., head_dim].  cos, sin: [..., head_dim / 2]."""
    # The halves are paired (i, i + head_dim / 2), not the neighbours.
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def paged_attention(
    q: Tensor,
    k_pages: Tensor | QuantizedPages,
    v_pages: Tensor | QuantizedPages,
    block_tables: Tensor,
    cu_seqlens: Tensor,
    seq_lens: Tensor,
) -> Tensor:
    """Attend from each row's queries to everything cached of that row up to the query's own place.

    q: [n, heads, head_dim]; row i owns queries cu_seqlens[i] to cu_seqlens[i + 1], the last of its seq_lens[i]
    tokens.  k_pages, v_pages: [pages, page_size, kv_heads, head_dim], or QuantizedPages of such.
    block_tables: int32 [rows, max_blocks].  cu_seqlens: int32 [rows + 1].  seq_lens: int32 [rows].
    Returns [n, heads * head_dim] in q's dtype. Scale is head_dim ** -0.5; heads / kv_heads queries share a key.
    """
    _, heads, head_dim = q.shape
    _, page_size, kv_heads, _ = _shape(k_pages)
    out = torch.empty_like(q)
    bounds, lengths = cu_seqlens.tolist(), seq_lens.tolist()
    for row, seq_len in enumerate(lengths):
        begin, end = bounds[row], bounds[row + 1]
        pages = block_tables[row, : -(-seq_len // page_size)].long()
        keys, values = _read(k_pages, pages, seq_len), _read(v_pages, pages, seq_len)
        queries = _widen(q[begin:end]).view(end - begin, kv_heads, heads // kv_heads, head_dim)

        scores = torch.einsum("qhgd,khd->hgqk", queries, keys) * head_dim**-0.5
        ends = torch.arange(seq_len - (end - begin), seq_len, device=q.device)
        future = torch.arange(seq_len, device=q.device) > ends[:, None]
        weights = scores.masked_fill(future, float("-inf")).softmax(-1)
        attended = torch.einsum("hgqk,khd->qhgd", weights, values)
        out[begin:end] = attended.reshape(end - begin, heads, head_dim).to(q.dtype)
    return out.flatten(1)


def silu_mul(gate_up: Tensor) -> Tensor:
    """SwiGLU: silu of the first half times the second half.

    gate_up: [n, 2 * intermediate].  Returns [n, intermediate].
    """
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def pack(weight: Tensor | QuantizedWeight) -> Tensor | QuantizedWeight:
    """Put a weight matrix, [outputs, inputs], into the form that `linear` reads: here, as it is. No op of a step."""
    return weight


def linear(x: Tensor, weight: Tensor | QuantizedWeight) -> Tensor:
    """Multiply by a weight matrix.

    x: [n, inputs].  weight: [outputs, inputs], from `pack`.  Returns [n, outputs] in x's dtype.
    """
    if isinstance(weight, QuantizedWeight):
        return F.linear(_widen(x), dequantize(weight).to(_widen(x).dtype)).to(x.dtype)
    return F.linear(x, weight)


def guided_sample(
    logits: Tensor, cond: Tensor, uncond: Tensor, token_ids: Tensor, controls: Controls, keys: NoiseKeys
) -> Tensor:
    """Draw one token for each of m pairs of logits rows, without any state.

    The draw is argmax(log p + G): p from `guided_scores`, G Gumbel noise keyed by (seed, image, position, token),
    so that it depends on nothing else in the step. A temperature of 0 takes the largest logit, ties to the first
    column.

    logits: [rows, columns], any float dtype.  cond, uncond: int64 [m], rows of `logits`; equal where there is no
    guidance.  token_ids: int64 [columns], the token that each column stands for.
    Returns int64 [m]; -1 where the logits of a draw are not finite (NaN, +inf, or -inf throughout).
    """
    scores = guided_scores(logits, cond, uncond, controls)
    noise = gumbel_noise(keys, token_ids) * (controls.temperature > 0)[:, None]
    scores, columns = (scores + noise).max(dim=-1)
    return torch.where(scores.isfinite(), token_ids[columns], -1)


def guided_scores(logits: Tensor, cond: Tensor, uncond: Tensor, controls: Controls) -> Tensor:
    """Unnormalized log-probabilities of each draw, -inf for what is not kept.

    Guides by uncond + guidance * (cond - uncond), divides by the temperature, then keeps the top_k largest (ties at
    the border all kept), of these the fewest whose probabilities reach top_p (ties all kept), and of these the ones
    with at least min_p times the largest probability. Arguments as `guided_sample`. Returns float32 [m, columns].
    """
    guidance, temperature, top_k, top_p, min_p = (control[:, None] for control in controls)
    cond_logits, uncond_logits = logits[cond].float(), logits[uncond].float()
    guided = uncond_logits + guidance * (cond_logits - uncond_logits)
    guided = torch.where((cond == uncond)[:, None], cond_logits, guided)  # -inf minus -inf is no number
    scores = guided / torch.where(temperature > 0, temperature, 1.0)

    columns = scores.shape[-1]
    top_k = torch.where(top_k > 0, top_k.clamp(max=columns), columns)
    ordered = scores.sort(dim=-1, descending=True).values
    ordered = ordered.masked_fill(torch.arange(columns, device=scores.device) >= top_k, float("-inf"))
    before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)  # the mass in front of each place
    # A top_p of 1 keeps all, even where the sum of the probabilities rounds to 1 early.
    n_kept = torch.where(top_p < 1, (before < top_p).sum(-1, keepdim=True), top_k).clamp(min=1)
    threshold = ordered.gather(-1, torch.minimum(n_kept, top_k) - 1)
    threshold = torch.maximum(threshold, ordered[:, :1] + min_p.log())
    return scores.masked_fill(scores < threshold, float("-inf"))


def gumbel_noise(keys: NoiseKeys, token_ids: Tensor) -> Tensor:
    """Gumbel noise of each (draw, token), the same on every backend but for the last bits of the logarithm.

    keys: fields int64 [m].  token_ids: int64 [columns].  Returns float32 [m, columns].
    """
    seed, image, position = (key[:, None] for key in keys)
    counter = (token_ids >> 2, position, image, torch.zeros_like(token_ids))
    words = torch.stack(philox(torch.broadcast_tensors(*counter), (seed & _WORD, seed >> 32)), dim=-1)
    lane = (token_ids & 3)[None, :, None].expand(*words.shape[:2], 1)
    bits = words.gather(-1, lane).squeeze(-1)
    # An exponential from 1 - u keeps its resolution where it is small, which is where large Gumbels come from.
    u = (bits.float() * 2.0**-32 + 2.0**-33).clamp(max=1 - 2.0**-24)
    return -(-(-u).log1p()).log()


_WORD = 0xFFFFFFFF


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011).

    counter: four, key: two int64 tensors of 32-bit words, broadcastable. Returns four of the same.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # The products wrap around int64; their low 64 bits are right all the same.
        left, right = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1 = (right >> 32 & _WORD) ^ c1 ^ k0, right & _WORD
        c2, c3 = (left >> 32 & _WORD) ^ c3 ^ k1, left & _WORD
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return c0, c1, c2, c3
