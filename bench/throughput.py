"""How many images a minute, against how many are in flight.

    python bench/throughput.py                                          # the embedded model, at its own size
    python bench/throughput.py --in-flight 1 16 64 --page-size 8 --speculation off --plot throughput.png
    python bench/throughput.py --dummy-weights 7b --layers 2 --size 128x128 --quantization int4 --images 4

Images of different prompts come and go; as soon as one is finished the next begins. Rounds of all numbers follow one
another, and the median of each number is told: a machine that slows meanwhile slows them all. The floor is that of
latency.py, for the steps that were run. The last line of stdout is one JSON object.
"""

import tempfile
import time
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path

import latency
import machine
import torch
from tqdm import tqdm

from lumina_rt import Engine, prompts

COLORS, SHAPES = ("red", "green", "blue", "yellow"), ("circle", "square", "triangle", "star")
THINGS = [f"a {color} {shape}" for color, shape in product(COLORS, SHAPES)]
PROMPTS = [f"{one} left of {other}" for one, other in product(THINGS, THINGS) if one != other]


def measure(engine: Engine, watch: latency.Watch, floor: machine.Floor, n_in_flight: int, n_images: int, args) -> dict:
    """Draw images, `n_in_flight` at a time, of prompts that are not known from before."""
    while len(engine.scheduler.prefixes):
        engine.scheduler.prefixes.drop_oldest()
    sizes = args.size or [engine.default_size]
    n_rows = n_in_flight * (1 if args.guidance_scale == 1 else 2)
    engine.scheduler.config = replace(engine.config, max_num_seqs=max(2, n_rows))
    of_size = [sizes[i % len(sizes)] for i in range(n_images)]
    texts = [prompts.text_to_image(PROMPTS[i % len(PROMPTS)], *size) for i, size in enumerate(of_size)]
    params = [
        engine.params(num_images=1, size=size, guidance_scale=args.guidance_scale, seed=i)
        for i, size in enumerate(of_size)
    ]
    watch.begin()
    begun = time.perf_counter()
    outputs = engine.generate(texts, params, progress=False)
    seconds = time.perf_counter() - begun - watch.seconds
    n_answer = sum(output.timings.n_answer_tokens for output in outputs) / n_images
    n_tokens = watch.n_tokens / watch.n_steps
    least = watch.n_steps * latency.floor_of_step(engine, floor, n_rows, n_answer / 2, n_tokens)
    filled, taken, reserved = (sum(column) for column in zip(*watch.pages, strict=True))
    return {
        "in_flight": n_in_flight,
        "n_images": n_images,
        "images_per_min": 60 * n_images / seconds,
        "n_steps": watch.n_steps,
        "tokens_per_step": n_tokens,
        "ms_per_step": 1000 * seconds / watch.n_steps,
        "acceptance": watch.acceptance,
        "page_use": filled / (taken * engine.config.page_size),
        "page_use_reserved": filled / (reserved * engine.config.page_size),
        "floor_percent": 100 * least / seconds,
        "peak_gib": machine.peak_gib(args.device),
    }


def median(runs: tuple[dict, ...]) -> dict:
    """The run of the middle pace, whole; of two the slower."""
    return sorted(runs, key=lambda run: run["images_per_min"])[(len(runs) - 1) // 2]


def table(results: list[dict]) -> str:
    columns = {
        "in_flight": "", "images_per_min": ".1f", "n_steps": "", "tokens_per_step": ".1f", "ms_per_step": ".2f",
        "acceptance": ".2f", "page_use": ".2f", "page_use_reserved": ".2f", "floor_percent": ".1f", "peak_gib": ".2f",
    }  # fmt: skip
    lines = ["  ".join(f"{name:>17}" for name in columns)]
    lines += ["  ".join(f"{format(r[name], spec):>17}" for name, spec in columns.items()) for r in results]
    return "\n".join(lines)


def plot(results: list[dict], path: Path) -> None:
    """Images a minute by images in flight, and what the floor of the same steps would allow."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4))
    axis = figure.subplots()
    in_flight = [result["in_flight"] for result in results]
    pace = [result["images_per_min"] for result in results]
    axis.plot(in_flight, pace, marker="o", label="measured")
    floors = [100 * result["images_per_min"] / result["floor_percent"] for result in results]
    axis.plot(in_flight, floors, linestyle=":", color="gray", label="floor of these steps")
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("images in flight")
    axis.set_ylabel("images a minute")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120, bbox_inches="tight")


def main() -> None:
    parser = latency.model_parser(__doc__)
    parser.add_argument("--in-flight", type=machine.count, nargs="+", default=[1, 2, 4, 8, 16, 32, 64], metavar="N")
    parser.add_argument("--images", type=machine.count, help="for each of these (default: twice as many, 8 at least)")
    parser.add_argument("--page-size", type=machine.count, help="tokens (default: that of the device)")
    parser.add_argument("--iters", type=machine.count, default=3, help="rounds of all of these (default: 3)")
    args = parser.parse_args()
    latency.check_imports(parser, matplotlib=args.plot)

    env, floor = machine.environment(args.device), machine.measure(args.device)
    print(machine.card(env, floor))
    with tempfile.TemporaryDirectory() as temporary:
        folder = latency.checkpoint(args, Path(temporary))
        engine, config = latency.load(args, folder, page_size=args.page_size, max_num_seqs=2 * max(args.in_flight))
        watch = latency.Watch(engine)
        measure(engine, watch, floor, 1, 1, args)  # touches memory for the first time
        rounds = [
            [measure(engine, watch, floor, n, args.images or max(8, 2 * n), args) for n in args.in_flight]
            for _ in tqdm(range(args.iters), leave=False)
        ]
        results = [median(of_one_number) for of_one_number in zip(*rounds, strict=True)]
    print(f"{'load':16} {config['load_s']:.2f} s\n\n{table(results)}")
    config["page_size"] = engine.config.page_size
    report = {"env": env, "config": config, "floor": asdict(floor), "results": results}
    if args.plot:
        plot(results, args.plot)
    machine.tell(report, args.output_json)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    main()
