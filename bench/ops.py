"""Every op at the shapes of a 7B layer, at 1 to 64 rows: microseconds, GB/s, the share of the floor, and the reference.

    python bench/ops.py [--device cuda] [--rows 1 2 16] [--ops linear] [--output-json FILE]

The floor of an op is the time in which this machine reads and writes its bytes, or does its multiplications, whichever
is longer; beside it stands the share of the rate of its memory, on a GPU that of a copy. On a CPU what the last cache
holds from one run to the next is read faster than that, so that shares above 100 % mean nothing else. On a GPU an op is
replayed as a CUDA graph, and nothing is in the L2 cache when it begins; the reference is launched as it is: its
attention reads on the host. The last line of stdout is one JSON object.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import machine
import torch
from lumina_rt.kernels import OPS, Controls, NoiseKeys, quantization, reference

from lumina_rt import EngineConfig
from lumina_rt.backend import choose_ops

HIDDEN, HEADS, HEAD_DIM, INTERMEDIATE, CODES, CACHED = 4096, 32, 128, 11008, 8192, 1024
ROWS = (1, 2, 4, 8, 16, 32, 64)
FORMATS = {"bf16": 16, "int8": 8, "int4": 4}
MATRICES = {
    "qkv": (3 * HIDDEN, HIDDEN), "o": (HIDDEN, HIDDEN), "gate_up": (2 * INTERMEDIATE, HIDDEN),
    "down": (HIDDEN, INTERMEDIATE), "image_head": (CODES, HIDDEN),
}  # fmt: skip


class Case(NamedTuple):
    """An op with its inputs.  n_bytes, n_mac: what it must move and multiply at least.  bits: of its products."""

    op: str
    name: str
    rows: int
    run: Callable
    slow: Callable
    n_bytes: float
    n_mac: float
    bits: int = 16


def cases(rows: int, names: list[str], ops: ModuleType, device: str):
    """All cases of the ops of some names at a number of rows. ops: the op list of the device."""
    bf16, int32 = {"dtype": torch.bfloat16, "device": device}, {"dtype": torch.int32, "device": device}
    x = torch.randn(rows, HIDDEN, **bf16)
    row = 2 * rows * HIDDEN  # bytes of one tensor of activations
    weight = torch.randn(HIDDEN, **bf16)

    def case(
        op: str, args: tuple, n_bytes: float, n_mac: float = 0, name: str = "", slow: tuple | None = None, bits=16
    ):
        fast_op, slow_op = getattr(ops, op), getattr(reference, op)
        return Case(
            op, name or op, rows, lambda: fast_op(*args), lambda: slow_op(*(slow or args)), n_bytes, n_mac, bits
        )

    if "rms_norm" in names:
        yield case("rms_norm", (x, weight, 1e-5), 2 * row)
    if "add_rms_norm" in names:
        yield case("add_rms_norm", (x, x, weight, 1e-5), 4 * row)
    if "rms_norm_add" in names:
        yield case("rms_norm_add", (x, x, weight, 1e-5), 3 * row)
    if "silu_mul" in names:
        gate_up = torch.randn(rows, 2 * INTERMEDIATE, **bf16)
        yield case("silu_mul", (gate_up,), 3 * 2 * rows * INTERMEDIATE)
    n_blocks = CACHED // 256
    pages = torch.randn(2, rows * n_blocks, 256, HEADS, HEAD_DIM, **bf16)
    if "qk_norm_rope" in names:
        norm = (torch.ones(1, HEAD_DIM, **bf16), torch.zeros(1, HEAD_DIM, **bf16))
        rope, places = torch.randn(CACHED, HEAD_DIM, **bf16), torch.arange(rows, device=device)
        qkv = torch.randn(rows, 3 * HIDDEN, **bf16)
        yield case("qk_norm_rope", (qkv, norm, norm, rope, places, places, *pages), 6 * row)
    if "paged_attention" in names:
        q = torch.randn(rows, HEADS, HEAD_DIM, **bf16)
        tables = torch.arange(rows * n_blocks, **int32).view(rows, n_blocks)
        bounds, lengths = torch.arange(rows + 1, **int32), torch.full((rows,), CACHED, **int32)
        n_mac = 2 * rows * CACHED * HIDDEN
        yield case("paged_attention", (q, *pages, tables, bounds, lengths), 2 * n_mac, n_mac)
    if "guided_sample" in names:
        logits, ids = torch.randn(2 * rows, CODES, **bf16), torch.arange(CODES, device=device)
        full = (4.0, 1.0, 2000, 1.0, 0.0)
        dtypes = (torch.float32, torch.float32, torch.int64, torch.float32, torch.float32)
        controls = (torch.full((rows,), v, dtype=d, device=device) for v, d in zip(full, dtypes, strict=True))
        each = torch.arange(rows, device=device)
        args = (logits, each, each + rows, ids, Controls(*controls), NoiseKeys(each, each, each))
        yield case("guided_sample", args, 2 * 2 * rows * CODES)
    if "linear" in names:
        for name, (outputs, inputs) in MATRICES.items():
            plain = torch.randn(outputs, inputs, **bf16) * inputs**-0.5
            x = torch.randn(rows, inputs, **bf16)
            for format, bits in FORMATS.items():
                packed = ops.pack(plain if bits == 16 else quantization.quantize(plain, bits))
                n_bytes = machine.n_bytes(packed) + 2 * rows * (inputs + outputs)
                n_mac, of_products = rows * inputs * outputs, bits if device == "cpu" else 16
                yield case("linear", (x, packed), n_bytes, n_mac, f"{name} {format}", (x, plain), of_products)


def seconds(run: Callable, device: str, least: float = 0.2) -> float:
    """The median of some runs; on a CPU they take `least` seconds together, and are three at least."""
    if device == "cuda":
        return statistics.median(machine.gpu_times(run))
    run()
    times: list[float] = []
    end = time.perf_counter() + least
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=machine.checked_device, default="cpu", metavar="cpu|cuda")
    parser.add_argument("--rows", type=machine.count, nargs="+", default=ROWS)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    device = args.device
    ops, attention = choose_ops(EngineConfig().on(device), device, torch.bfloat16, HEAD_DIM)
    env, floor = {**machine.environment(device), "attention": attention}, machine.measure(device)
    print(machine.card(env, floor))
    print(f"\n{'op':24}{'rows':>5}{'us':>10}{'GB/s':>8}{'% memory':>10}{'% floor':>9}{'reference':>11}")
    results = []
    for rows in args.rows:
        for case in cases(rows, list(args.ops), ops, device):
            took = seconds(machine.recorded(case.run) if device == "cuda" else case.run, device)
            slow = seconds(case.slow, device, 0.1)
            least = floor.seconds(case.n_bytes, case.n_mac, case.bits)
            result = {
                "op": case.op, "case": case.name, "rows": rows, "us": 1e6 * took, "gb_s": case.n_bytes / took / 1e9,
                "memory_percent": 100 * case.n_bytes / took / 1e9 / floor.read_gb_s,
                "floor_percent": 100 * least / took, "times_reference": slow / took,
            }  # fmt: skip
            results.append(result)
            print(
                f"{case.name:24}{rows:5}{result['us']:10.1f}{result['gb_s']:8.1f}"
                f"{result['memory_percent']:10.1f}{result['floor_percent']:9.1f}{result['times_reference']:10.2f}x",
                flush=True,
            )
    machine.tell({"env": env, "floor": asdict(floor), "results": results}, args.output_json)


if __name__ == "__main__":
    main()
