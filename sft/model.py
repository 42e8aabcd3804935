"""The transformer as a trainable module. Parameters have the published names, so a checkpoint is its state dict."""

import torch
import torch.nn.functional as F
from lumina_rt.kernels import reference
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lumina_rt.model import ModelConfig, rope_table

# Tokens up to which scores are written out. Forward and backward of 4,096 tokens, 6 heads of 32, bf16, two AVX-512
# cores, written out and by PyTorch's kernel: 7 and 30 ms in rows of 140 tokens, 12 and 26 of 290, 46 and 40 of 580.
SHORT = 384


def long_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention. q: [b, heads, n, head_dim].  k, v: [b, kv_heads, n, head_dim]. Returns as q."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def short_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """As `long_attention`, with all scores in memory; as many heads of k and v as of q."""
    n, (q_rows, k_rows, v_rows) = q.shape[2], (heads.flatten(0, 1) for heads in (q, k, v))
    mask = torch.full((n, n), float("-inf"), dtype=q.dtype, device=q.device).triu(1)
    scores = torch.baddbmm(mask.expand(len(q_rows), n, n), q_rows, k_rows.mT, alpha=q.shape[-1] ** -0.5)
    return (scores.softmax(-1) @ v_rows).view_as(q)


class _RMSNorm(nn.Module):
    def __init__(self, hidden: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return reference.rms_norm(x, self.weight, self.eps)


class _HeadNorm(nn.Module):
    """LayerNorm of each head; row g of the parameters holds for the g-th group of heads."""

    def __init__(self, rows: int, head_dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(rows, head_dim))
        self.bias = nn.Parameter(torch.zeros(rows, head_dim))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        normed = reference.head_norm(x, self.weight, self.bias)
        return reference.rotate(normed, cos, sin).to(x.dtype)


class _Attention(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.q_proj = nn.Linear(c.hidden, c.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, c.hidden, bias=False)
        self.q_norm = _HeadNorm(c.qk_norm_rows[0], c.head_dim)
        self.k_norm = _HeadNorm(c.qk_norm_rows[1], c.head_dim)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (linear(x).unflatten(-1, (-1, self.head_dim)) for linear in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q, cos, sin), self.k_norm(k, cos, sin)
        q, k, v = (heads.transpose(1, 2) for heads in (q, k, v))
        attend = short_attention if q.shape[1] == k.shape[1] and q.shape[2] <= SHORT else long_attention
        return self.o_proj(attend(q, k, v).transpose(1, 2).flatten(2))


class _MLP(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden, c.intermediate, bias=False)
        self.up_proj = nn.Linear(c.hidden, c.intermediate, bias=False)
        self.down_proj = nn.Linear(c.intermediate, c.hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class _Layer(nn.Module):
    def __init__(self, c: ModelConfig, dropout: float):
        super().__init__()
        self.post_norm = c.post_norm
        self.input_layernorm = _RMSNorm(c.hidden, c.norm_eps)
        self.self_attn = _Attention(c)
        self.post_attention_layernorm = _RMSNorm(c.hidden, c.norm_eps)
        self.mlp = _MLP(c)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # Dropout is on what each block adds to the residual stream, not on attention weights (spec, section 7.2).
        if self.post_norm:
            x = x + self.dropout(self.input_layernorm(self.self_attn(x, cos, sin)))
            return x + self.dropout(self.post_attention_layernorm(self.mlp(x)))
        x = x + self.dropout(self.self_attn(self.input_layernorm(x), cos, sin))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))


class _Body(nn.Module):
    def __init__(self, c: ModelConfig, dropout: float):
        super().__init__()
        self.embed_tokens = nn.Embedding(c.vocab_size, c.hidden)
        self.layers = nn.ModuleList(_Layer(c, dropout) for _ in range(c.n_layers))
        self.norm = _RMSNorm(c.hidden, c.norm_eps)


class TrainableModel(nn.Module):
    """dropout: residual dropout.  recompute: keep no activations inside layers, compute them again going back."""

    def __init__(self, config: ModelConfig, dropout: float = 0.0, recompute: bool = False):
        super().__init__()
        self.config, self.recompute = config, recompute
        self.model = _Body(config, dropout)
        self.lm_head = nn.Linear(config.hidden, config.vocab_size, bias=False)

    def init_weights(self, seed: int) -> None:
        """Draw all weights anew: 1 / sqrt(inputs) for products, less where a block ends; embeddings are as large as
        what the first blocks add to them, or tokens would be lost there.
        """
        generator = torch.Generator().manual_seed(seed)
        for name, weight in self.named_parameters():
            if "norm" in name:
                continue
            std = 0.3 if "embed" in name else 0.02 if "lm_head" in name else weight.shape[1] ** -0.5
            if "o_proj" in name or "down_proj" in name:
                std /= (2 * self.config.n_layers) ** 0.5
            with torch.no_grad():
                weight.copy_(torch.randn(weight.shape, generator=generator) * std)

    def forward(self, tokens: Tensor, places: Tensor | None = None) -> Tensor:
        """tokens: int64 [b, n]. Returns logits [b, n, vocab], or [m, vocab] of the m places that `places` marks."""
        c = self.config
        cos, sin = rope_table(tokens.shape[1], c.head_dim, c.rope_theta, torch.float32).chunk(2, dim=-1)
        cos, sin = (part.to(tokens.device)[:, None] for part in (cos, sin))  # [n, 1, head_dim / 2]
        x = self.model.embed_tokens(tokens)
        for layer in self.model.layers:
            x = checkpoint(layer, x, cos, sin, use_reentrant=False) if self.recompute else layer(x, cos, sin)
        x = self.model.norm(x)
        return self.lm_head(x if places is None else x[places])


def loss_of(model: nn.Module, tokens: Tensor, labels: Tensor, z_weight: float) -> tuple[Tensor, Tensor]:
    """Cross entropy and z-loss of each place that is learned, summed (spec, section 7.2).

    tokens, labels: int64 [b, n]; a label is the token at its place, or -100 where it is not learned. Place i is
    predicted from place i - 1, and the head is computed where something is. Returns (sum of cross entropy +
    z_weight * logsumexp^2, number of places).
    """
    targets = labels[:, 1:]
    learned = targets != -100
    logits = model(tokens[:, :-1], learned).float()
    log_z = logits.logsumexp(-1)
    entropy = log_z - logits.gather(-1, targets[learned][:, None]).squeeze(-1)
    return (entropy + z_weight * log_z.square()).sum(), learned.sum()
