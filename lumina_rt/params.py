"""What a caller decides: SamplingParams for a request, EngineConfig for an Engine. Both are checked on construction.

Whether a size is one the model was trained on is not known here; the Engine checks that.
"""

from dataclasses import dataclass, fields, replace
from numbers import Integral, Real

from lumina_rt.speculative import WINDOWS


@dataclass(frozen=True)
class SamplingParams:
    """How one answer is made. The names are those of diffusers and vLLM.

    num_images: the answer is exactly this many images and no text, 0 is text alone; None lets the model decide.
    size: (width, height) in pixels of every image of the answer; None lets the model choose among its sizes.
    n: how many answers to draw for one prompt.
    seed: of the noise; answer i of a seed is the same whatever n is. None draws a seed, which the result tells.
    max_tokens: the most tokens an answer may have; images that were asked for by number always fit.
    guidance_scale: logits are uncond + guidance_scale * (cond - uncond) inside images (the code's convention, one
        more than the paper's); 1 runs no unconditional stream.
    temperature, top_k, top_p, min_p: inside images; text_*: in text. A temperature of 0 takes the likeliest token,
        a top_k of 0 keeps all.

    Raises ValueError that names the value and what was expected.
    """

    num_images: int | None = None
    size: tuple[int, int] | None = None
    n: int = 1
    seed: int | None = None
    max_tokens: int = 8192
    guidance_scale: float = 4.0
    temperature: float = 1.0
    top_k: int = 2000
    top_p: float = 1.0
    min_p: float = 0.0
    text_temperature: float = 1.0
    text_top_k: int = 10
    text_top_p: float = 1.0
    text_min_p: float = 0.0

    def __post_init__(self):
        if self.size is not None:
            if not isinstance(self.size, (tuple, list)) or len(self.size) != 2 or not all(map(_is_side, self.size)):
                raise ValueError(f"size is {self.size!r}; expected (width, height) in whole pixels")
            object.__setattr__(self, "size", tuple(map(int, self.size)))
        if self.num_images is not None:
            _take_int(self, "num_images", 0)
        if self.seed is not None:
            _take_int(self, "seed", 0, 2**63 - 1)
        _take_int(self, "n", 1)
        _take_int(self, "max_tokens", 1)
        _take_float(self, "guidance_scale", 0, 100)
        for prefix in ("", "text_"):
            _take_float(self, prefix + "temperature", 0, 100)
            _take_int(self, prefix + "top_k", 0, 2**31 - 1)
            _take_float(self, prefix + "top_p", 0, 1, above=True)
            _take_float(self, prefix + "min_p", 0, 1)


@dataclass(frozen=True)
class EngineConfig:
    """How an Engine uses its machine.

    page_size: tokens a page of the KV cache, a power of two from 8; None takes 16 on a CPU, so that few slots stay
        empty, and 256 on a GPU, as flash-attn wants.
    num_pages: pages of the pool; None takes as many as fit.
    kv_cache_gib: GiB for the pool on a CPU when num_pages is None; memory is touched only as pages are used.
    gpu_memory_utilization: the share of a GPU's memory that weights and pool may take, other programs' counted; what is
        left is for the work of a step and for drawing pictures.
    max_num_seqs: the most rows of one step; a guided image takes two.
    max_num_batched_tokens: the most tokens of one step; a longer prompt is prefilled in chunks.
    max_model_len: the most tokens of one row, prompt and answer; 16 views of 384 x 384 and their prompt fit.
    kv_cache_dtype: "int8" halves what the keys and values take in bf16; None keeps the model's own.
    speculation: draws an image tries a step, up to 64; on a CPU the pictures are the same whatever it is. "auto" takes
        what is fastest by the steps so far, "off" is one.
    attn_backend: on a GPU "flash" is flash-attn, "triton" our own attention; "auto" takes flash-attn where it is
        installed and its rules hold. `lumina-rt info` tells which and why.
    enforce_eager: launch every op of a step on a GPU, in place of a CUDA graph recorded at start-up; a step is then
        never run on to the end of a row of latents.

    Raises ValueError that names the value and what was expected.
    """

    page_size: int | None = None
    num_pages: int | None = None
    kv_cache_gib: float = 4.0
    max_num_seqs: int = 64
    max_num_batched_tokens: int = 1024
    max_model_len: int = 10240
    kv_cache_dtype: str | None = None
    speculation: str | int = "auto"
    attn_backend: str = "auto"
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False

    def __post_init__(self):
        if self.page_size is not None:
            _take_int(self, "page_size", 8)
            if self.page_size & (self.page_size - 1):
                raise ValueError(f"page_size is {self.page_size}; expected a power of two from 8")
        if self.num_pages is not None:
            _take_int(self, "num_pages", 1)
        _take_float(self, "kv_cache_gib", 0, 1 << 20, above=True)
        if self.kv_cache_dtype not in (None, "int8"):
            raise ValueError(f"kv_cache_dtype is {self.kv_cache_dtype!r}; expected 'int8' or None")
        _take_float(self, "gpu_memory_utilization", 0, 1, above=True)
        if not isinstance(self.enforce_eager, bool):
            raise ValueError(f"enforce_eager is {self.enforce_eager!r}; expected True or False")
        if self.attn_backend not in ("auto", "flash", "triton"):
            raise ValueError(f"attn_backend is {self.attn_backend!r}; expected 'auto', 'flash' or 'triton'")
        if self.speculation not in ("auto", "off"):
            if isinstance(self.speculation, str):
                raise ValueError(f"speculation is {self.speculation!r}; expected 'auto', 'off' or a number of draws")
            _take_int(self, "speculation", 1, WINDOWS[-1])
        _take_int(self, "max_num_seqs", 2)
        _take_int(self, "max_num_batched_tokens", 16)
        _take_int(self, "max_model_len", 16)

    def on(self, device: str) -> "EngineConfig":
        """Itself, with what None leaves to the device, "cpu" or "cuda"."""
        return self if self.page_size else replace(self, page_size=256 if device == "cuda" else 16)


def from_options(kind: type, options: dict):
    """A SamplingParams or EngineConfig of keyword arguments. Raises ValueError for one that it does not have."""
    known = [field.name for field in fields(kind)]
    for name in options:
        if name not in known:
            raise ValueError(f"unknown option {name!r}; expected one of {', '.join(known)}")
    return kind(**options)


def _is_side(value) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and value > 0


def _take_int(params, name: str, least: int, most: int | None = None) -> None:
    """Check a field and make it a plain int, as numpy's count as well."""
    object.__setattr__(params, name, checked_int(name, getattr(params, name), least, most))


def checked_int(name: str, value, least: int, most: int | None = None) -> int:
    """`value` as a plain int. Raises ValueError unless it is a whole number within the bounds."""
    whole = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole or value < least or (most is not None and value > most):
        bound = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise ValueError(f"{name} is {value!r}; expected a whole number {bound}")
    return int(value)


def _take_float(params, name: str, least: float, most: float, above: bool = False) -> None:
    """Check a field and make it a plain float."""
    value = getattr(params, name)
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not least <= value <= most or (above and value == least):  # NaN lies between no two numbers
        expected = f"above {least}, at most {most}" if above else f"from {least} to {most}"
        raise ValueError(f"{name} is {value!r}; expected a number {expected}")
    object.__setattr__(params, name, float(value))
