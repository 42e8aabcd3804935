"""The op list of the model: one set of names and signatures, one implementation a backend.

`reference` is the specification, in plain PyTorch, and works on every device; `cpu` is in C++. The Engine picks a
backend once; this file holds only what all of them share, and imports none of them. Beside the ops each backend has
`pack`, which puts a weight matrix into the form that its `linear` reads, once, while loading.
"""

from typing import NamedTuple

from torch import Tensor

OPS = (
    "rms_norm",
    "add_rms_norm",
    "rms_norm_add",
    "qk_norm_rope",
    "paged_attention",
    "silu_mul",
    "linear",
    "guided_sample",
)


class Controls(NamedTuple):
    """How each of m draws is made. Every field is a tensor [m].

    guidance: float32, 1 for none.  temperature: float32, 0 takes the largest.  top_k: int64, 0 for all.
    top_p: float32 in (0, 1].  min_p: float32 in [0, 1].
    """

    guidance: Tensor
    temperature: Tensor
    top_k: Tensor
    top_p: Tensor
    min_p: Tensor


class NoiseKeys(NamedTuple):
    """What the noise of each of m draws is keyed by. Every field is an int64 tensor [m].

    seed: in [0, 2^63).  image: index of the sample in its request.  position: of the token that is drawn.
    """

    seed: Tensor
    image: Tensor
    position: Tensor
