"""How long an image takes: prefill, decoding and the VQGAN, against the floor of the machine and the reference's loop.

    python bench/latency.py                                             # the embedded model, at its own size
    python bench/latency.py --dummy-weights 7b --layers 8 --size 256x256 --quantization int4 --baseline reference
    python bench/latency.py --speculation off                           # one draw a step
    python bench/latency.py --device cuda --dummy-weights 7b            # on a GPU
    python bench/latency.py --compare before.json after.json

Decoding reads every weight once a step, whatever the number of rows, so the floor of a step is its bytes over the
memory's bandwidth, or its multiplications over the rate of the processor, whichever is longer. On a GPU the bandwidth
is that of a copy; on a CPU both rates are measured anew around each image. The last line of stdout is one JSON object.
"""

import argparse
import gc
import importlib.util
import itertools
import json
import math
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import machine
import torch
from lumina_rt.kernels.quantization import BITS
from tqdm import tqdm

from lumina_rt import Engine, ImageRow, dummy, hub, prompts, weights
from lumina_rt.tokenizer import Tokenizer
from lumina_rt.vqgan import VQGANConfig

PROMPT = "a red circle left of a blue star"
SHAPES = {
    "7b": {
        "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 32, "swin_norm": False,
    },
    "34b": {
        "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 48, "num_attention_heads": 64,
        "num_key_value_heads": 8, "swin_norm": True, "model_parallel_size": 8,
    },
}  # fmt: skip
PUBLISHED_VQGAN = VQGANConfig()


def checkpoint(args, folder: Path) -> Path:
    """The folder of the model that is asked for; random weights are written into `folder`."""
    if args.dummy_weights in (None, "demo"):
        return hub.find_model(args.dummy_weights or args.model)
    values = {**dummy.TINY_MODEL, **SHAPES[args.dummy_weights], "torch_dtype": "bfloat16"}
    values["num_hidden_layers"] = args.layers or values["num_hidden_layers"]
    targets = sorted({round((width * height) ** 0.5) for width, height in args.size or [(768, 768)]})
    return dummy.write_checkpoint(
        folder, values, PUBLISHED_VQGAN, vocab_size=65536, generation={"target_sizes": targets}
    )


class Watch:
    """Counts what the steps of an Engine feed and draw, and how full its pages are.

    n_image_steps: steps of each image in which it drew codes, in sum.  n_held: codes that they gave.
    pages: (tokens in the pages of running requests, pages taken, pages taken or promised), a step each.
    seconds: that counting took, a hundredth of a step with a hundred rows of many pages; throughput.py leaves them out.
    """

    def __init__(self, engine: Engine):
        self.scheduler, self._commit = engine.scheduler, engine.scheduler.commit
        self.scheduler.commit = self._count
        self.begin()

    def begin(self) -> None:
        self.n_steps = self.n_tokens = self.n_image_steps = self.n_held = self.seconds = 0
        self.pages: list[tuple[int, int, int]] = []

    @property
    def acceptance(self) -> float:
        """Draws of an image that held a step."""
        return self.n_held / self.n_image_steps

    def _count(self, plan, drawn):
        draws_codes = [work.sample.layout is not None and bool(work.indices) for work in plan]
        held = self._commit(plan, drawn)
        begun, n_steps = time.perf_counter(), plan[0].n_steps
        self.n_steps += n_steps
        self.n_tokens += sum(work.n_cond + work.n_uncond + (n_steps - 1) * len(work.rows()) for work in plan)
        self.n_image_steps += n_steps * sum(draws_codes)
        self.n_held += sum(len(tokens) for tokens, of_image in zip(held, draws_codes, strict=True) if of_image)
        self.pages.append(self._pages())
        self.seconds += time.perf_counter() - begun
        return held

    def _pages(self) -> tuple[int, int, int]:
        size, filled = self.scheduler.config.page_size, {}
        for request in self.scheduler.running:
            for row in (row for sample in request.samples for row in (sample.cond, sample.uncond) if row):
                for block, page in enumerate(row.pages):
                    filled[page] = max(filled.get(page, 0), min(size, row.n_cached - block * size))
        n_promised = sum(request.lease.n_left for request in self.scheduler.running)
        return sum(filled.values()), len(filled), len(filled) + n_promised


def floor_of_step(engine: Engine, floor: machine.Floor, rows: int, n_cached: float, n_tokens: float) -> float:
    """Seconds that a step takes at least: `n_tokens` in `rows` rows, each with `n_cached` tokens before them."""
    model = engine.model
    matrices = [
        model.image_head,
        *(m for layer in model.layers for m in (layer.qkv, layer.o, layer.gate_up, layer.down)),
    ]
    n_bytes = rows * n_cached * engine.kv_bytes_a_token + sum(map(machine.n_bytes, matrices))
    shapes = weights.tensor_shapes(model.config).items()
    n_weights = sum(math.prod(shape) for name, shape in shapes if name.endswith("_proj.weight"))
    n_weights += len(engine.tokenizer.vocab.image_ids) * model.config.hidden
    # On a CPU a packed weight tells in how many bits it is multiplied; on a GPU it is 16 at least, whatever it is in.
    return floor.seconds(n_bytes, n_tokens * n_weights, getattr(matrices[-1], "bits", 16))


def measure(engine: Engine, watch: Watch, floor: machine.Floor, size: tuple[int, int], args) -> dict:
    """Medians over `iters` images, or batches of them. Of the first size the peak is that of loading as well."""
    runs, floors, peaks = [], [floor], []
    for seed in tqdm(range(args.iters + 1), desc="{}x{}".format(*size), leave=False):
        rows: list[float] = []
        if seed == 1:  # the first touches memory for the first time
            watch.begin()
        params = engine.params(
            num_images=1, size=size, n=args.batch_size, guidance_scale=args.guidance_scale, seed=seed
        )
        start = time.perf_counter()

        def note(event, start=start, rows=rows):
            if isinstance(event, ImageRow):
                rows.append(time.perf_counter() - start)

        text = prompts.text_to_image(PROMPT, *size)
        (output,) = engine.generate([text], params, progress=False, callback=note)
        runs.append((time.perf_counter() - start, rows[0], output.timings))
        peaks.append(machine.peak_gib(args.device))
        floors.append(machine.measure_again(floor, args.device))
        machine.reset_peak(args.device)  # measuring takes memory of its own
    runs = runs[1:]

    def median(read):
        return statistics.median(read(*run) for run in runs)

    timings = runs[0][2]
    n_rows = args.batch_size * (1 if args.guidance_scale == 1 else 2)
    step_times = [t.decode_s / t.n_steps for _, _, t in runs]
    n_cached = timings.n_answer_tokens / args.batch_size / 2
    step = n_rows, n_cached, watch.n_tokens / watch.n_steps
    leasts = [floor_of_step(engine, machine.between(*pair), *step) for pair in itertools.pairwise(floors[1:])]
    total = median(lambda total, first, t: total)
    return {
        "size": "{}x{}".format(*size),
        "batch_size": args.batch_size,
        "guidance_scale": args.guidance_scale,
        "prefill_s": median(lambda total, first, t: t.prefill_s),
        "decode_s": median(lambda total, first, t: t.decode_s),
        "vq_s": median(lambda total, first, t: t.vq_s),
        "first_row_s": median(lambda total, first, t: first),
        "s_per_image": total / args.batch_size,
        "n_steps": median(lambda total, first, t: t.n_steps),
        "acceptance": watch.acceptance,
        "ms_per_step": 1000 * statistics.median(step_times),
        "tokens_per_s": timings.n_answer_tokens / total,
        "floor_ms_per_step": 1000 * statistics.median(leasts),
        "floor_percent": 100 * statistics.median(least / took for least, took in zip(leasts, step_times, strict=True)),
        "peak_gib": max(peaks),
    }


def reference(tokenizer: Tokenizer, factor: int, folder: Path, size: tuple[int, int], args) -> dict:
    """The reference's loop on the same weights: a whole image where that is short, else some steps of one."""
    import reference_loop

    model, vocab = reference_loop.load(folder, args.device)
    latents = size[0] // factor, size[1] // factor
    text = prompts.text_to_image(PROMPT, *size)
    prompt = [vocab.bos, *tokenizer.encode(text), vocab.end_of_turn]
    n_tokens = latents[1] * (latents[0] + 1) + 1
    _, times = reference_loop.decode(
        model, vocab, prompt, latents, args.guidance_scale, 2000, min(n_tokens, args.baseline_steps)
    )
    ms_per_step = 1000 * statistics.median(times[1:])
    return {
        "size": "{}x{}".format(*size),
        "ms_per_step": ms_per_step,
        "n_steps_timed": len(times),
        "s_per_image": times[0] + (n_tokens - 1) * ms_per_step / 1000,
    }


def table(results: list[dict]) -> str:
    columns = {
        "size": "", "batch_size": "", "prefill_s": ".3f", "first_row_s": ".3f", "decode_s": ".3f", "vq_s": ".3f",
        "s_per_image": ".3f", "n_steps": "", "acceptance": ".2f", "ms_per_step": ".2f",
        "tokens_per_s": ".1f", "floor_percent": ".1f", "peak_gib": ".2f",
    }  # fmt: skip
    lines = ["  ".join(f"{name:>13}" for name in columns)]
    lines += ["  ".join(f"{format(r[name], spec):>13}" for name, spec in columns.items()) for r in results]
    return "\n".join(lines)


def plot(results: list[dict], path: Path) -> None:
    """Seconds an image by size, and what they are spent on."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(2 + 1.5 * len(results), 4))
    axis = figure.subplots()
    below = [0.0] * len(results)
    for part in ("prefill_s", "decode_s", "vq_s"):
        values = [result[part] / result["batch_size"] for result in results]
        axis.bar([result["size"] for result in results], values, bottom=below, label=part.removesuffix("_s"))
        below = [a + b for a, b in zip(below, values, strict=True)]
    axis.set_ylabel("seconds an image")
    axis.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def compare(first: Path, second: Path) -> None:
    """Print two reports beside each other."""
    a, b = (json.loads(path.read_text()) for path in (first, second))
    by_size = {result["size"]: result for result in b["results"]}
    print(f"{'size':>10}{'what':>16}{first.name:>20}{second.name:>20}{'ratio':>9}")
    for result in a["results"]:
        other = by_size.get(result["size"])
        for name in ("s_per_image", "ms_per_step", "first_row_s", "peak_gib") if other else ():
            ratio = result[name] / other[name]
            print(f"{result['size']:>10}{name:>16}{result[name]:20.4f}{other[name]:20.4f}{ratio:8.2f}x")


def _size(text: str) -> tuple[int, int]:
    width, height = text.split("x")
    return int(width), int(height)


def _speculation(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


def model_parser(words: str) -> argparse.ArgumentParser:
    """The options of a benchmark that draws images."""
    parser = argparse.ArgumentParser(description=words, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help='a folder, a hub id, or "demo" (default: demo)')
    parser.add_argument(
        "--dummy-weights", choices=[*SHAPES, "demo"], help="random weights of a released shape, or the embedded model"
    )
    parser.add_argument("--layers", type=machine.count, help="of the dummy weights (default: all)")
    parser.add_argument("--size", type=_size, nargs="+", metavar="WxH", help="default: the model's own")
    parser.add_argument("--guidance-scale", type=float, help="default: the model's own, as its other controls")
    parser.add_argument("--quantization", choices=BITS)
    parser.add_argument(
        "--speculation", type=_speculation, default="auto", metavar="auto|off|N", help="(default: auto)"
    )
    parser.add_argument(
        "--device", type=machine.checked_device, default="cpu", metavar="cpu|cuda", help="(default: cpu)"
    )
    parser.add_argument("--output-json", type=Path)
    parser.add_argument("--plot", type=Path, metavar="PNG")
    return parser


def check_imports(parser: argparse.ArgumentParser, **needed) -> None:
    """End the program at once, and not after minutes of measuring, where a library that an option needs is missing."""
    for name, option in needed.items():
        if option and importlib.util.find_spec(name) is None:
            parser.error(f"this needs {name}, which is not installed; `pip install '.[test]'` brings it")


def load(args, folder: Path, **options) -> tuple[Engine, dict]:
    """The Engine that is asked for, and what a report says of it. options: further fields of EngineConfig."""
    machine.reset_peak(args.device)
    start = time.perf_counter()
    engine = Engine.from_pretrained(
        folder, device=args.device, quantization=args.quantization, speculation=args.speculation, **options
    )
    if args.guidance_scale is None:
        args.guidance_scale = engine.params().guidance_scale
    return engine, {
        "model": args.dummy_weights or args.model, "layers": engine.model.config.n_layers,
        "dtype": str(engine.model.embed.dtype).removeprefix("torch."), "quantization": args.quantization,
        "speculation": args.speculation, "guidance_scale": args.guidance_scale,
        "ops": engine.model.ops.__name__, "load_s": time.perf_counter() - start,
    }  # fmt: skip


def main() -> None:
    parser = model_parser(__doc__)
    parser.add_argument("--batch-size", type=machine.count, default=1, help="images at once (default: 1)")
    parser.add_argument(
        "--iters", type=machine.count, default=3, help="images, or batches, after one to warm up (default: 3)"
    )
    parser.add_argument("--baseline", choices=["reference"])
    parser.add_argument(
        "--baseline-steps", type=machine.count, default=200, help="steps of the baseline at most (default: 200)"
    )
    parser.add_argument("--compare", type=Path, nargs=2, metavar="JSON")
    args = parser.parse_args()
    if args.compare:
        return compare(*args.compare)
    check_imports(parser, transformers=args.baseline, matplotlib=args.plot)

    env, floor = machine.environment(args.device), machine.measure(args.device)
    print(machine.card(env, floor))
    with tempfile.TemporaryDirectory() as temporary:
        folder = checkpoint(args, Path(temporary))
        engine, config = load(args, folder)
        sizes, watch = args.size or [engine.default_size], Watch(engine)
        results = [measure(engine, watch, floor, size, args) for size in sizes]
        print(f"{'load':16} {config['load_s']:.2f} s\n\n{table(results)}")
        report = {"env": env, "config": config, "floor": asdict(floor), "results": results}
        if args.baseline:
            tokenizer, factor = engine.tokenizer, engine.vqgan.config.factor
            del engine, watch
            gc.collect()  # they know each other; a GPU need not hold both models
            report["baseline"] = reference(tokenizer, factor, folder, sizes[0], args)
            report["speedup"] = report["baseline"]["s_per_image"] / results[0]["s_per_image"]
            print(
                f"\nreference loop: {report['baseline']['ms_per_step']:.2f} ms a step, "
                f"{report['baseline']['s_per_image']:.2f} s an image; {report['speedup']:.1f}x"
            )
    if args.plot:
        plot(results, args.plot)
    machine.tell(report, args.output_json)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
