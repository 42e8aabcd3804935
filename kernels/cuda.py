"""The op list in Triton, with the signatures of `reference`. Contracts are told there; each op's file tells its cost.

Imports Triton, so it is imported only where a model runs on CUDA. No op reads a result on the host. Results are
batch-invariant, a row's are the same bits whatever else is in the step, but for `linear` with float weights.
"""

from lumina_rt.kernels.guided_sample import guided_sample
from lumina_rt.kernels.linear import linear, pack
from lumina_rt.kernels.paged_attention import paged_attention
from lumina_rt.kernels.qk_norm_rope import qk_norm_rope
from lumina_rt.kernels.rms_norm import add_rms_norm, rms_norm, rms_norm_add
from lumina_rt.kernels.silu_mul import silu_mul

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
