"""What the machine is, and what it can do at most: the card that every benchmark shows first. And a clock for GPUs."""

import argparse
import json
import os
import platform
import re
import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, astuple, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lumina_rt import _C, backend

L2_BYTES = 256 << 20  # twice the largest L2 cache there is, the 126 MB of a B200
SIDE = 8192  # of the products that a GPU is measured by


@dataclass(frozen=True)
class Floor:
    """The rates that no step can beat, measured here. A multiplication and an addition count as one mac, two flop.

    On a GPU read_gb_s is the rate of a copy, its bytes read and written; what only reads may be a little faster.
    """

    read_gb_s: float
    int8_gmac_s: float
    bf16_gflop_s: float

    def seconds(self, n_bytes: float, n_mac: float, bits: int) -> float:
        """The least time of moving so many bytes and multiplying so often, if both overlap entirely."""
        gmac_s = self.bf16_gflop_s / 2 if bits >= 16 else self.int8_gmac_s
        return max(n_bytes / self.read_gb_s, n_mac / gmac_s) / 1e9


def checked_device(name: str) -> str:
    """The device of an option, "cpu" or "cuda". Where it cannot be had, the program ends with the Engine's words."""
    try:
        return backend.checked_device(name)
    except ValueError as error:
        raise SystemExit(str(error)) from None


def count(text: str) -> int:
    """The number of an option of which there must be one at least."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}; expected a whole number from 1 on")
    return int(text)


def measure(device: str) -> Floor:
    """The best of some runs: what else the machine does makes a run slower, never faster."""
    return _measure_cpu() if device == "cpu" else _measure_gpu()


def measure_again(floor: Floor, device: str) -> Floor:
    """The floor as it is now: a CPU that others share reads memory at other rates within minutes, a GPU does not."""
    return _measure_cpu(repeats=2) if device == "cpu" else floor


def between(first: Floor, second: Floor) -> Floor:
    """The floor between two measurements of it: the mean of each rate."""
    return Floor(*(sum(rates) / 2 for rates in zip(astuple(first), astuple(second), strict=True)))


def reset_peak(device: str) -> None:
    """Have `peak_gib` tell of what comes from here on, not of measuring nor of making weights. On a CPU: of Linux."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def _measure_cpu(repeats: int = 5) -> Floor:
    threads, buffer = torch.get_num_threads(), torch.ones(1 << 30, dtype=torch.uint8)
    rates = {
        "read_gb_s": lambda: _C.read_gb_s(buffer, threads),
        "int8_gmac_s": lambda: _C.int8_gmac_s(threads),
        "bf16_gflop_s": lambda: _C.bf16_gflop_s(threads),
    }
    return Floor(**{name: max(rate() for _ in range(repeats)) for name, rate in rates.items()})


def _measure_gpu() -> Floor:
    source = torch.ones(1 << 30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    # Random numbers, and the second matrix transposed as a weight is: zeros would be multiplied at a higher clock.
    left, right = torch.randn(2, SIDE, SIDE, dtype=torch.bfloat16, device="cuda")
    left8, right8 = torch.randint(-127, 128, (2, SIDE, SIDE), dtype=torch.int8, device="cuda")
    return Floor(
        read_gb_s=2 * source.nbytes / min(gpu_times(lambda: target.copy_(source))) / 1e9,
        int8_gmac_s=SIDE**3 / min(gpu_times(lambda: torch._int_mm(left8, right8.t()))) / 1e9,
        bf16_gflop_s=2 * SIDE**3 / min(gpu_times(lambda: left @ right.t())) / 1e9,
    )


def gpu_times(run: Callable, repeats: int = 30) -> list[float]:
    """Seconds of each of some runs, before which nothing that it reads is in the L2 cache.

    Nothing waits between them: while the cache is flushed the host launches the run, so what it takes for that does
    not count where it is shorter than the flush. A microsecond or more of starting the launches does.
    """
    flush = l2_flush()
    run()  # sets up libraries and compiles kernels
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for begin, end in events:
        flush()
        begin.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return [begin.elapsed_time(end) / 1000 for begin, end in events]


def l2_flush() -> Callable:
    """What writes more than an L2 cache holds."""
    return torch.empty(L2_BYTES, dtype=torch.uint8, device="cuda").zero_


def recorded(run: Callable) -> Callable:
    """What replays the launches of a run as one CUDA graph."""
    run()  # sets up libraries and compiles kernels, which cannot be recorded
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def n_bytes(weight: Tensor | tuple) -> int:
    """Bytes of a weight matrix, values and scales, as the `pack` of any backend has made it."""
    parts = weight if isinstance(weight, tuple) else (weight,)
    return sum(part.nbytes for part in parts if isinstance(part, Tensor))


def peak_gib(device: str) -> float:
    """The most memory that was in use: of the process, or of a GPU, its pages included, which take what is left."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def environment(device: str) -> dict:
    """Processor, threads, instruction set and versions, and the GPU where that is the device."""
    names = [line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "instruction_set": _C.isa(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        **(_gpu() if device == "cuda" else {}),
    }


def _gpu() -> dict:
    gpu = torch.cuda.get_device_properties()
    driver = re.search(r"\d+\.[\d.]+", "\n".join(_lines("/proc/driver/nvidia/version")))
    return {
        "gpu": gpu.name,
        "capability": f"{gpu.major}.{gpu.minor}",
        "gpu_gib": round(gpu.total_memory / 2**30, 1),
        "driver": driver.group() if driver else None,
        "cuda": torch.version.cuda,
    }


def card(env: dict, floor: Floor) -> str:
    facts = {**env, **{name: f"{value:.1f}" for name, value in asdict(floor).items()}}
    return "\n".join(f"{name:16} {value}" for name, value in facts.items())


def tell(report: dict, path: Path | None) -> None:
    """Print a report as one line of JSON, the last of a benchmark, and write it to `path` if there is one."""
    line = json.dumps(report)
    if path:
        path.write_text(line + "\n")
    print(line)


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []
