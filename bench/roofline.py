"""The floor of a decode step on GPUs, from shapes alone: bytes over bandwidth, operations over the peak of bf16.

    python bench/roofline.py [--model 7B] [--gpus H100 "RTX 4090"] [--rows 2 32] [--output-json FILE]

Computed, not measured: nothing here has run on a GPU, and nothing can be faster. Bandwidths and peaks (dense bf16 with
sums in fp32; quantized weights are multiplied in bf16 too) are those of the makers' sheets. A step reads the weights of
all layers and the image rows of the head once, and the keys and values of each row, in bf16. Rows are two an image, one
for one row; s/image is the floor of all draws of a 768 x 768 image, divided by the images in flight. The last line of
stdout is one JSON object.
"""

import argparse
import json
import math
from pathlib import Path

import torch
from lumina_rt.kernels.quantization import GROUP

from lumina_rt import weights
from lumina_rt.kv_cache import bytes_a_token
from lumina_rt.model import ModelConfig

GPUS = {  # GB of memory, GB/s, TFLOP/s
    "RTX 4090": (24, 1008, 165), "A100": (80, 2039, 312), "H100": (80, 3350, 989), "H200": (141, 4800, 989),
    "B200": (180, 8000, 2250),
}  # fmt: skip
MODELS = {
    "7B": ModelConfig(65536, 4096, 11008, 32, 32, 32, 128, (1, 1)),
    "34B": ModelConfig(65536, 8192, 22016, 48, 64, 8, 128, (8, 8), post_norm=True),
}
FORMATS = {"bf16": None, "int8": "int8", "int4": "int4"}
ROWS = (1, 2, 4, 8, 16, 32, 64, 128)
CODES = 8192  # rows of the head that an image needs
DRAWS = 48 * 48
CACHED = 1200  # tokens of a row, the mean over an image


def weights_of(config: ModelConfig, quantization: str | None) -> tuple[float, int]:
    """Bytes and elements of what a step inside an image reads of the weights."""
    n_bytes, n_elements = 0.0, 0
    for name, shape in weights.tensor_shapes(config).items():
        if "embed" in name:
            continue
        n = CODES * shape[1] if name == "lm_head.weight" else math.prod(shape)
        is_rounded = quantization and weights.is_matrix(name)
        n_bytes += n * (weights.bits_of(name, quantization) / 8 + 2 / GROUP if is_rounded else 2)
        n_elements += n
    return n_bytes, n_elements


def floor(config: ModelConfig, format: str, rows: int, gpu: str) -> dict:
    """Bytes, operations and the least time of a step of one token a row."""
    n_bytes, n_elements = weights_of(config, FORMATS[format])
    kv_bytes = rows * CACHED * bytes_a_token(config.n_layers, config.kv_heads, config.head_dim, torch.bfloat16)
    n_bytes += kv_bytes
    n_flop = rows * (2 * n_elements + 4 * config.n_layers * config.heads * config.head_dim * CACHED)
    gb, gb_s, tflop_s = GPUS[gpu]
    memory_ms, compute_ms = n_bytes / gb_s / 1e6, n_flop / tflop_s / 1e9
    floor_ms = max(memory_ms, compute_ms)
    return {
        "gpu": gpu, "format": format, "rows": rows, "gb": n_bytes / 1e9, "gflop": n_flop / 1e9, "floor_ms": floor_ms,
        "bound": "memory" if memory_ms >= compute_ms else "compute",
        "fits": (n_bytes + kv_bytes) / 1e9 < gb,  # at its end an image has twice the mean
        "s_per_image": floor_ms / 1e3 * DRAWS / max(1, rows // 2),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="7B")
    parser.add_argument("--gpus", nargs="+", choices=GPUS, default=list(GPUS))
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--output-json", type=Path)
    args = parser.parse_args()
    print(f"{args.model}, one token a row, {CACHED} tokens cached of each: computed, not measured\n")
    print(f"{'GPU':10}{'format':>7}{'rows':>5}{'GB':>8}{'GFLOP':>8}{'floor ms':>10}  {'bound':8}{'s/image':>9}  fits")
    cases = [(format, rows, gpu) for gpu in args.gpus for format in FORMATS for rows in args.rows]
    results = [floor(MODELS[args.model], *case) for case in cases]
    for r in results:
        print(
            f"{r['gpu']:10}{r['format']:>7}{r['rows']:5}{r['gb']:8.2f}{r['gflop']:8.0f}{r['floor_ms']:10.3f}"
            f"  {r['bound']:8}{r['s_per_image']:9.3f}  {'yes' if r['fits'] else 'no'}"
        )
    report = json.dumps({"measured": False, "model": args.model, "cached": CACHED, "results": results})
    if args.output_json:
        args.output_json.write_text(report + "\n")
    print(report)


if __name__ == "__main__":
    main()
