"""What the machine is, and what it can do at most: the card that every benchmark shows first."""

import os
import platform
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from lumina_rt import _C


@dataclass(frozen=True)
class Floor:
    """The rates that no step can beat, measured here. A multiplication and an addition count as one mac, two flop."""

    read_gb_s: float
    int8_gmac_s: float
    bf16_gflop_s: float

    def seconds(self, n_bytes: float, n_mac: float, bits: int) -> float:
        """The least time of reading so many bytes and multiplying so often, if both overlap entirely."""
        gmac_s = self.bf16_gflop_s / 2 if bits >= 16 else self.int8_gmac_s
        return max(n_bytes / self.read_gb_s, n_mac / gmac_s) / 1e9


def measure(repeats: int = 5) -> Floor:
    """The best of some runs: what else the machine does makes a run slower, never faster."""
    threads, buffer = torch.get_num_threads(), torch.ones(1 << 30, dtype=torch.uint8)
    rates = {
        "read_gb_s": lambda: _C.read_gb_s(buffer, threads),
        "int8_gmac_s": lambda: _C.int8_gmac_s(threads),
        "bf16_gflop_s": lambda: _C.bf16_gflop_s(threads),
    }
    return Floor(**{name: max(rate() for _ in range(repeats)) for name, rate in rates.items()})


def environment() -> dict:
    """Processor, threads, instruction set and versions."""
    names = [line.split(":")[1].strip() for line in _cpuinfo() if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": _C.isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def card(env: dict, floor: Floor) -> str:
    facts = {**env, **{name: f"{value:.1f}" for name, value in asdict(floor).items()}}
    return "\n".join(f"{name:16} {value}" for name, value in facts.items())


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []
