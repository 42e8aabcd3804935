"""Which device, and which op list for it: chosen once, when an Engine is made."""

import importlib.metadata
import importlib.util
from types import ModuleType

import torch

from lumina_rt.kernels import cpu
from lumina_rt.params import EngineConfig

# The next one reads the lengths on the host, which makes it wait and cannot be captured in a graph.
FLASH_VERSION = "2.8.3"


def default_device() -> str:
    """A GPU where torch finds one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def checked_device(device: str | None) -> str:
    """The device "cpu" or "cuda"; None takes a GPU where there is one. Raises ValueError for what cannot be had."""
    device = device or default_device()
    if device not in ("cpu", "cuda"):
        raise ValueError(f"device is {device!r}; expected 'cpu' or 'cuda'")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device is 'cuda', and torch finds no NVIDIA GPU here; use device='cpu'")
    return device


def choose_ops(config: EngineConfig, device: str, dtype: torch.dtype, head_dim: int) -> tuple[ModuleType, str]:
    """The op list for a model, chosen once, and whose attention that is and why.

    device: "cpu" or "cuda". Raises ValueError for an attn_backend that cannot be had.
    """
    asked = config.attn_backend
    if device == "cpu":
        if asked != "auto":
            raise ValueError(f"attn_backend is {asked!r}; expected 'auto' on a CPU, which has one of its own")
        return cpu, "C++, as on every CPU"
    refusal = flash_refusal(config, dtype, head_dim)
    if asked == "flash" and refusal:
        raise ValueError(f"attn_backend is 'flash'; {refusal}")
    # These need Triton, and flash-attn, which a machine without a GPU need not have.
    if asked == "triton" or refusal:
        from lumina_rt.kernels import cuda

        return cuda, "Triton, as asked for" if asked == "triton" else f"Triton; {refusal}"
    from lumina_rt.kernels import flash_attention

    return flash_attention, "flash-attn for one token a row, Triton for more"


def flash_refusal(config: EngineConfig, dtype: torch.dtype, head_dim: int) -> str | None:
    """Why flash-attn cannot be had, or None."""
    if importlib.util.find_spec("flash_attn") is None:
        return "flash-attn is not installed"
    if not (version := importlib.metadata.version("flash_attn")).startswith(FLASH_VERSION):
        return f"flash-attn wants to be of version {FLASH_VERSION}, it is {version}"
    if dtype not in (torch.bfloat16, torch.float16):
        return f"flash-attn wants a model in 16 bits, this one is in {str(dtype).removeprefix('torch.')}"
    if config.kv_cache_dtype:
        return f"flash-attn wants keys and values in the model's dtype, kv_cache_dtype is {config.kv_cache_dtype!r}"
    if config.page_size % 256:
        return f"flash-attn wants a page_size of a multiple of 256, it is {config.page_size}"
    if head_dim % 8 or head_dim > 256:
        return f"flash-attn wants heads of a multiple of 8 up to 256, they have {head_dim}"
    return None
