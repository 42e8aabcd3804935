"""Every op at the shapes of a 7B layer, at 1 to 64 rows: microseconds, GB/s, the share of the floor, and the reference.

    python bench/ops.py [--rows 1 2 16] [--ops linear] [--output-json FILE]

The floor of an op is the time in which this machine reads and writes its bytes, or does its multiplications, whichever
is longer. Weights are too large for the caches; activations are not. The last line of stdout is one JSON object.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import machine
import torch
from lumina_rt.kernels import OPS, Controls, NoiseKeys, cpu, quantization, reference

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


def cases(rows: int, ops: list[str]):
    """All cases of some ops at a number of rows."""
    x = torch.randn(rows, HIDDEN, dtype=torch.bfloat16)
    row = 2 * rows * HIDDEN  # bytes of one tensor of activations
    weight = torch.randn(HIDDEN, dtype=torch.bfloat16)

    def case(
        op: str, args: tuple, n_bytes: float, n_mac: float = 0, name: str = "", slow: tuple | None = None, bits=16
    ):
        fast_op, slow_op = getattr(cpu, op), getattr(reference, op)
        return Case(
            op, name or op, rows, lambda: fast_op(*args), lambda: slow_op(*(slow or args)), n_bytes, n_mac, bits
        )

    if "rms_norm" in ops:
        yield case("rms_norm", (x, weight, 1e-5), 2 * row)
    if "add_rms_norm" in ops:
        yield case("add_rms_norm", (x, x, weight, 1e-5), 4 * row)
    if "silu_mul" in ops:
        gate_up = torch.randn(rows, 2 * INTERMEDIATE, dtype=torch.bfloat16)
        yield case("silu_mul", (gate_up,), 3 * 2 * rows * INTERMEDIATE)
    n_blocks = CACHED // 256
    pages = torch.randn(2, rows * n_blocks, 256, HEADS, HEAD_DIM, dtype=torch.bfloat16)
    if "qk_norm_rope" in ops:
        norm = (torch.ones(1, HEAD_DIM, dtype=torch.bfloat16), torch.zeros(1, HEAD_DIM, dtype=torch.bfloat16))
        rope, places = torch.randn(CACHED, HEAD_DIM, dtype=torch.bfloat16), torch.arange(rows)
        qkv = torch.randn(rows, 3 * HIDDEN, dtype=torch.bfloat16)
        yield case("qk_norm_rope", (qkv, norm, norm, rope, places, places, *pages), 6 * row)
    if "paged_attention" in ops:
        q = torch.randn(rows, HEADS, HEAD_DIM, dtype=torch.bfloat16)
        tables = torch.arange(rows * n_blocks, dtype=torch.int32).view(rows, n_blocks)
        bounds, lengths = torch.arange(rows + 1, dtype=torch.int32), torch.full((rows,), CACHED, dtype=torch.int32)
        n_mac = 2 * rows * CACHED * HIDDEN
        yield case("paged_attention", (q, *pages, tables, bounds, lengths), 2 * n_mac, n_mac)
    if "guided_sample" in ops:
        logits, ids = torch.randn(2 * rows, CODES, dtype=torch.bfloat16), torch.arange(CODES)
        full = (4.0, 1.0, 2000, 1.0, 0.0)
        dtypes = (torch.float32, torch.float32, torch.int64, torch.float32, torch.float32)
        controls = Controls(*(torch.full((rows,), v, dtype=d) for v, d in zip(full, dtypes, strict=True)))
        each = torch.arange(rows)
        args = (logits, each, each + rows, ids, controls, NoiseKeys(each, each, each))
        yield case("guided_sample", args, 2 * 2 * rows * CODES)
    if "linear" in ops:
        for name, (outputs, inputs) in MATRICES.items():
            plain = torch.randn(outputs, inputs, dtype=torch.bfloat16) * inputs**-0.5
            x = torch.randn(rows, inputs, dtype=torch.bfloat16)
            for format, bits in FORMATS.items():
                packed = cpu.pack(plain if bits == 16 else quantization.quantize(plain, bits))
                n_bytes = packed.panels.numel() + 2 * packed.scales.numel() + 2 * rows * (inputs + outputs)
                n_mac = rows * inputs * outputs
                yield case("linear", (x, packed), n_bytes, n_mac, f"{name} {format}", (x, plain), bits)


def seconds(run: Callable, least: float = 0.2) -> float:
    """The median of runs that take `least` seconds together, three at least."""
    run()
    times: list[float] = []
    while len(times) < 3 or sum(times) < least:
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--ops", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    env, floor = machine.environment(), machine.measure()
    print(machine.card(env, floor))
    print(f"\n{'op':24}{'rows':>5}{'us':>10}{'GB/s':>8}{'% floor':>9}{'reference':>11}")
    results = []
    for rows in args.rows:
        for case in cases(rows, list(args.ops)):
            took, slow = seconds(case.run), seconds(case.slow, 0.1)
            least = floor.seconds(case.n_bytes, case.n_mac, case.bits)
            result = {
                "op": case.op, "case": case.name, "rows": rows, "us": 1e6 * took, "gb_s": case.n_bytes / took / 1e9,
                "floor_percent": 100 * least / took, "times_reference": slow / took,
            }  # fmt: skip
            results.append(result)
            print(
                f"{case.name:24}{rows:5}{result['us']:10.1f}{result['gb_s']:8.1f}{result['floor_percent']:9.1f}"
                f"{result['times_reference']:10.2f}x",
                flush=True,
            )
    report = json.dumps({"env": env, "floor": asdict(floor), "results": results})
    if args.output_json:
        args.output_json.write_text(report + "\n")
    print(report)


if __name__ == "__main__":
    main()
