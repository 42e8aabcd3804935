"""The transformer on one page. It knows tokens, positions and pages; what they mean is not its business."""

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor

from lumina_rt.kv_cache import KVCache


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a checkpoint; names as in its config.json where they are the same thing.

    qk_norm_rows: rows of the QK-norm parameters, the model-parallel size of training (or the number of heads).
    post_norm: norms after attention and MLP (34B, "swin_norm") in place of before them (7B).
    """

    vocab_size: int
    hidden: int
    intermediate: int
    n_layers: int
    heads: int
    kv_heads: int
    head_dim: int
    qk_norm_rows: tuple[int, int]  # of q, of k
    post_norm: bool = False
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0


@dataclass
class Step:
    """One ragged batch: for each row, the tokens it feeds now.

    tokens, positions, slots: int64 [n]; a slot is page * page_size + offset.  cu_seqlens: int32 [rows + 1].
    block_tables: int32 [rows, max_blocks].  seq_lens: int32 [rows], cached tokens after this step.
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    block_tables: Tensor
    cu_seqlens: Tensor
    seq_lens: Tensor


def upload(values: list, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of numbers of the host. To a GPU they go from pinned memory, by a copy that nobody waits for.

    values: a list, or one of lists; torch pins nothing that it makes from an array.
    """
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


@dataclass
class Layer:
    """The weights of one layer; matrices as `ops.pack` has made them.

    The two join norms are those at the residual additions: with pre-norm layers the norm that follows each sum (the
    next layer's input norm, or the model's last), with post-norm layers the norm of what is added.
    """

    qkv: Tensor  # [(heads + 2 * kv_heads) * head_dim, hidden]
    q_norm: tuple[Tensor, Tensor]  # weight, bias, each [mp, head_dim]
    k_norm: tuple[Tensor, Tensor]
    o: Tensor  # [hidden, heads * head_dim]
    attention_join: Tensor  # [hidden]
    gate_up: Tensor  # [2 * intermediate, hidden]
    down: Tensor  # [hidden, intermediate]
    mlp_join: Tensor  # [hidden]


@dataclass
class Model:
    """Weights and the op list that runs them. No autograd, no modes.

    edge_norm: [hidden], the norm that no join holds: the first one (pre-norm) or the last one (post-norm).
    image_head: the rows of `lm_head` for the image tokens, ascending by token.
    """

    config: ModelConfig
    ops: ModuleType
    embed: Tensor  # [vocab, hidden]
    layers: list[Layer]
    edge_norm: Tensor
    lm_head: Tensor  # [vocab, hidden]
    image_head: Tensor  # [n_codes, hidden]
    rope: Tensor  # [max_positions, head_dim]

    @torch.inference_mode()
    def forward(self, step: Step, cache: KVCache) -> Tensor:
        """Hidden states of `step.tokens`, which attend to everything cached of their row up to themselves.

        Writes the keys and values of the step into `cache`. Returns [n, hidden], normalized, ready for a head.
        """
        ops, eps = self.ops, self.config.norm_eps
        join = self._norm_then_add if self.config.post_norm else self._add_then_norm

        residual = F.embedding(step.tokens, self.embed)
        x = residual if self.config.post_norm else ops.rms_norm(residual, self.edge_norm, eps)
        for layer, (k_pages, v_pages) in zip(self.layers, cache.layers(), strict=True):
            q = ops.qk_norm_rope(
                ops.linear(x, layer.qkv), layer.q_norm, layer.k_norm, self.rope, step.positions, step.slots,
                k_pages, v_pages,
            )  # fmt: skip
            attended = ops.paged_attention(q, k_pages, v_pages, step.block_tables, step.cu_seqlens, step.seq_lens)
            x, residual = join(ops.linear(attended, layer.o), residual, layer.attention_join)
            mlp = ops.linear(ops.silu_mul(ops.linear(x, layer.gate_up)), layer.down)
            x, residual = join(mlp, residual, layer.mlp_join)
        return ops.rms_norm(x, self.edge_norm, eps) if self.config.post_norm else x

    def _add_then_norm(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        return self.ops.add_rms_norm(x, residual, weight, self.config.norm_eps)

    def _norm_then_add(self, x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        residual = self.ops.rms_norm_add(x, residual, weight, self.config.norm_eps)
        return residual, residual


def rope_table(max_positions: int, head_dim: int, theta: float, dtype: torch.dtype) -> Tensor:
    """Cosines, then sines, of every position: [max_positions, head_dim].

    Angles in fp32, the results rounded to the model's dtype, as the checkpoint's own model does.
    """
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    angles = torch.arange(max_positions, dtype=torch.float32)[:, None] * frequencies
    return torch.cat((angles.cos(), angles.sin()), dim=-1).to(dtype)
