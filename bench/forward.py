"""One forward pass of the 7B shape with its full head, each row a token of its own: milliseconds, and the floor.

    python bench/forward.py [--formats int4] [--rows 1 2 16] [--layers 8] [--cached 16] [--device cuda]

This is a step of the Engine without its draw and its Python, over the whole vocabulary, as other runtimes have it: what
llama.cpp and its like are to be compared with. The floor is the time of the bytes of weights, keys and values, or of
the multiplications, whichever is longer; on a CPU it is measured anew around each pass. The last line of stdout is one
JSON object.
"""

import argparse
import gc
import itertools
import statistics
import time
from dataclasses import asdict
from pathlib import Path
from types import ModuleType

import machine
import torch
from lumina_rt.kernels import quantization
from ops import CODES, FORMATS, HEAD_DIM, HEADS, HIDDEN, INTERMEDIATE, MATRICES

from lumina_rt import EngineConfig
from lumina_rt.backend import choose_ops
from lumina_rt.kv_cache import KVCache
from lumina_rt.model import Layer, Model, ModelConfig, Step

VOCAB, PAGE_SIZE, MAX_POSITIONS = 65536, 256, 4096


def random_model(ops: ModuleType, n_layers: int, bits: int, device: str) -> Model:
    """Random weights in the shape of 7B, each layer in memory of its own; the head in int8 at most, as on loading."""

    def matrix(outputs: int, inputs: int, bits: int):
        weight = torch.randn(outputs, inputs, dtype=torch.bfloat16, device=device) * inputs**-0.5
        return ops.pack(weight if bits == 16 else quantization.quantize(weight, bits))

    def full(value: float, *shape: int):
        return torch.full(shape, value, dtype=torch.bfloat16, device=device)

    norm = full(1, 1, HEAD_DIM), full(0, 1, HEAD_DIM)
    layers = []
    for _ in range(n_layers):
        qkv, o, gate_up, down = (matrix(*MATRICES[name], bits) for name in ("qkv", "o", "gate_up", "down"))
        layers.append(Layer(qkv, norm, norm, o, full(1, HIDDEN), gate_up, down, full(1, HIDDEN)))
    head = matrix(VOCAB, HIDDEN, max(bits, 8))
    embed = torch.randn(1, HIDDEN, dtype=torch.bfloat16, device=device).expand(VOCAB, HIDDEN)
    config = ModelConfig(VOCAB, HIDDEN, INTERMEDIATE, n_layers, HEADS, HEADS, HEAD_DIM, (1, 1))
    return Model(config, ops, embed, layers, full(1, HIDDEN), head, head, full(0.7, MAX_POSITIONS, HEAD_DIM))


def one_token_each(rows: int, n_cached: int, device: str) -> Step:
    """A step that feeds a token to each row, all of which hold `n_cached` before it, in pages of their own."""
    int32, blocks = {"dtype": torch.int32, "device": device}, n_cached // PAGE_SIZE + 1
    each = torch.arange(rows, device=device)
    return Step(
        tokens=CODES + each,
        positions=torch.full((rows,), n_cached, device=device),
        slots=(each * blocks + blocks - 1) * PAGE_SIZE + n_cached % PAGE_SIZE,
        block_tables=torch.arange(rows * blocks, **int32).view(rows, blocks),
        cu_seqlens=torch.arange(rows + 1, **int32),
        seq_lens=torch.full((rows,), n_cached + 1, **int32),
    )


def measure(model: Model, rows: int, floor: machine.Floor, args) -> dict:
    """Medians over `iters` passes."""
    n_layers, device = len(model.layers), args.device
    step = one_token_each(rows, args.cached, device)
    cache = KVCache(n_layers, step.block_tables.numel(), PAGE_SIZE, HEADS, HEAD_DIM, torch.bfloat16, device)
    cache.k.fill_(0.5), cache.v.fill_(0.5)

    @torch.inference_mode()
    def forward():
        model.ops.linear(model.forward(step, cache), model.lm_head)

    matrices = [matrix for layer in model.layers for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    n_bytes = sum(map(machine.n_bytes, [*matrices, model.lm_head])) + rows * args.cached * n_layers * 4 * HIDDEN
    layer_shapes = [shape for name, shape in MATRICES.items() if name != "image_head"]
    n_weights = n_layers * sum(outputs * inputs for outputs, inputs in layer_shapes) + VOCAB * HIDDEN
    bits = getattr(matrices[0], "bits", 16)  # of products: on a GPU 16, whatever weights are in
    times, floors = timed(forward, floor, args)
    least = [machine.between(*pair).seconds(n_bytes, rows * n_weights, bits) for pair in itertools.pairwise(floors)]
    return {
        "rows": rows,
        "ms": 1000 * statistics.median(times),
        "gb_s": n_bytes / statistics.median(times) / 1e9,
        "read_gb_s": statistics.median(floor.read_gb_s for floor in floors),
        "floor_percent": 100 * statistics.median(a / b for a, b in zip(least, times, strict=True)),
    }


def timed(run, floor: machine.Floor, args) -> tuple[list[float], list[machine.Floor]]:
    """Seconds of each run, and the floors before, between and after them."""
    if args.device == "cuda":
        times = machine.gpu_times(machine.recorded(run), args.iters)
        return times, [floor] * (len(times) + 1)
    run()
    times, floors = [], [machine.measure_again(floor, args.device)]
    for _ in range(args.iters):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
        floors.append(machine.measure_again(floor, args.device))
    return times, floors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=list(FORMATS))
    parser.add_argument("--rows", type=machine.count, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--layers", type=machine.count, default=8, help="(default: 8)")
    parser.add_argument("--cached", type=machine.count, default=16, help="tokens of each row before (default: 16)")
    parser.add_argument("--iters", type=machine.count, default=9, help="(default: 9)")
    parser.add_argument("--device", type=machine.checked_device, default="cpu", metavar="cpu|cuda")
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    ops, attention = choose_ops(EngineConfig().on(args.device), args.device, torch.bfloat16, HEAD_DIM)
    env, floor = {**machine.environment(args.device), "attention": attention}, machine.measure(args.device)
    print(machine.card(env, floor))
    print(f"\n{'format':8}{'rows':>5}{'ms':>10}{'GB/s':>8}{'of':>8}{'% floor':>9}")
    results = []
    for name in args.formats:
        model = random_model(ops, args.layers, FORMATS[name], args.device)
        for rows in args.rows:
            result = {"format": name, **measure(model, rows, floor, args)}
            results.append(result)
            print(
                f"{name:8}{rows:5}{result['ms']:10.2f}{result['gb_s']:8.1f}{result['read_gb_s']:8.1f}"
                f"{result['floor_percent']:9.1f}",
                flush=True,
            )
        del model
        gc.collect()
    machine.tell({"env": env, "floor": asdict(floor), "results": results}, args.output_json)


if __name__ == "__main__":
    main()
