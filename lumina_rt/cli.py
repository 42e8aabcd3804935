"""The command line: lumina-rt generate | edit | label | multiview | chat | convert | reconstruct | info.

Its options are the fields of SamplingParams and EngineConfig, with their defaults and their words. It writes files
and lines; how an answer is made is the Engine's business.
"""

import argparse
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from types import NoneType
from typing import get_args

import numpy as np
import torch
from PIL import Image

from lumina_rt import _C, convert, hub, images, quantized, unirep, vqgan, weights
from lumina_rt.backend import choose_ops, default_device
from lumina_rt.checkpoint import CheckpointError
from lumina_rt.engine import IMAGE_TO_IMAGE, Engine
from lumina_rt.generation_config import TARGET_SIZES, target_sizes_of
from lumina_rt.kernels.quantization import BITS
from lumina_rt.outputs import RequestOutput, TextDelta
from lumina_rt.params import EngineConfig, SamplingParams, checked_int
from lumina_rt.prompts import Message
from lumina_rt.terminal import GrowingSheet

VERSION = importlib.metadata.version("lumina_rt")
DEMO_NOTE = "note: the embedded model knows colored shapes only, such as a red circle left of a blue star"
LABELS = {
    "segmentation": Engine.segment,
    "depth": Engine.depth,
    "normals": Engine.normals,
    "pose": Engine.pose,
    "detect": Engine.detect,
}

_IMAGE_CONTROLS = ("seed", "guidance_scale", "temperature", "top_k", "top_p", "min_p")
_DIALOG_CONTROLS = tuple(field.name for field in fields(SamplingParams) if field.name != "n")
_FLAGS = {"n": ("-n", "--num-images-per-prompt")}  # as diffusers calls it
_ERRORS = (ValueError, RuntimeError, OSError, ArithmeticError, MemoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Returns 0, 1 after an error, 2 for bad usage, 130 when interrupted."""
    try:
        args = _parser().parse_args(argv)
        report, lines = args.run(args)
        for line in [json.dumps(report)] if args.json else lines:
            print(line)
        sys.stdout.flush()
    except SystemExit as end:  # argparse has printed what it is about
        return end.code
    except KeyboardInterrupt:
        print("lumina-rt: interrupted", file=sys.stderr)
        return 130
    except _ERRORS as error:
        print(f"lumina-rt: error: {_message(error)}", file=sys.stderr)
        return 1
    return 0


def _message(error: Exception) -> str:
    """One line, but for a checkpoint with several problems: those are a list."""
    text = str(error) or type(error).__name__
    if isinstance(error, CheckpointError) and len(error.problems) > 1:
        return text
    return " ".join(text.split())


def add_fields(parser, kind: type, names: Sequence[str], defaults: Mapping | None = None) -> None:
    """Add an option for each of the named fields of a dataclass.

    Type and default are the field's, the help is from the docstring of the dataclass. An option that is not given
    is no attribute of the result. defaults: shown where they differ from the field's.
    """
    texts = _field_texts(kind)
    for field in fields(kind):
        if field.name not in names:
            continue
        default = (defaults or {}).get(field.name, field.default)
        words = texts.get(field.name) or texts[field.name.removeprefix("text_")]
        parser.add_argument(
            *_FLAGS.get(field.name, (f"--{field.name.replace('_', '-')}",)),
            dest=field.name,
            default=argparse.SUPPRESS,
            help=f"{words} (default: {default})".replace("%", "%%"),
            **_reading(field.type),
        )


def _field_texts(kind: type) -> dict[str, str]:
    """What the docstring of a dataclass says of its fields: paragraphs "name, name: text", the rest of it indented."""
    texts: dict[str, str] = {}
    for paragraph in re.findall(r"^ {4}([\w, ]+: .*(?:\n {8}.*)*)", kind.__doc__, re.MULTILINE):
        names, text = paragraph.split(": ", 1)
        texts |= dict.fromkeys(names.split(", "), " ".join(text.split()))
    return texts


def _reading(annotation) -> dict:
    """How argparse reads a value of this type."""
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    if annotation is bool:
        return {"action": "store_true"}
    if annotation in (int, float, str):
        kinds = [annotation]
    if kinds == [tuple[int, int]]:
        return {"type": _size, "metavar": "WxH"}
    if kinds == [str, int]:
        return {"type": lambda text: int(text) if text.isdecimal() else text, "metavar": "NAME|N"}
    return {"type": kinds[0], "metavar": {int: "N", float: "X", str: "NAME"}[kinds[0]]}


def _size(text: str) -> tuple[int, int]:
    if not re.fullmatch(r"\d+x\d+", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; expected WIDTHxHEIGHT, such as 768x768")
    width, height = text.split("x")
    return int(width), int(height)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("lumina-rt", description="Lumina-mGPT: text and images in, text and images out.")
    parser.add_argument("--version", action="version", version=f"lumina-rt {VERSION}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    command = _command(commands, "generate", _generate, "make images from text")
    command.add_argument(
        "prompt", nargs="+", metavar="PROMPT", help='what to draw; "-" reads prompts from stdin, one a line'
    )
    command.add_argument("--width", type=int, metavar="N", help="in pixels (default: the model's)")
    command.add_argument("--height", type=int, metavar="N", help="in pixels (default: the model's)")
    guidance, top_k = IMAGE_TO_IMAGE["guidance_scale"], IMAGE_TO_IMAGE["top_k"]
    command.add_argument(
        "--condition",
        metavar="IMAGE",
        help="a depth map, segmentation, normal map or pose to follow; the image gets its size, and unless given, "
        f"guidance_scale is {guidance} and top_k {top_k}",
    )
    _add_options(command, ("n", *_IMAGE_CONTROLS))

    command = _command(commands, "edit", _edit, "edit a picture")
    command.add_argument("image", metavar="IMAGE", help="a PNG, JPEG or WEBP file")
    command.add_argument("instruction", metavar="INSTRUCTION", help="what to change")
    _add_options(command, ("n", *_IMAGE_CONTROLS), IMAGE_TO_IMAGE)

    command = _command(commands, "label", _label, "draw the segmentation, depth, ... of a picture")
    command.add_argument("task", choices=LABELS, help="what to draw")
    command.add_argument("image", metavar="IMAGE", help="a PNG, JPEG or WEBP file")
    command.add_argument("--object", metavar="NAME", help="what to detect")
    _add_options(command, ("n", *_IMAGE_CONTROLS), IMAGE_TO_IMAGE)

    command = _command(commands, "multiview", _multiview, "make pictures of one object from all sides")
    command.add_argument("prompt", metavar="PROMPT", help="the object")
    command.add_argument("--views", type=int, default=16, metavar="N", help="how many (default: 16)")
    command.add_argument(
        "--size", dest="side", type=int, metavar="N", help="pixels a side (default: the smallest that the model knows)"
    )
    _add_options(command, _IMAGE_CONTROLS)

    command = _command(commands, "chat", _chat, "talk about text and pictures; without a MESSAGE, line by line")
    command.add_argument(
        "message", nargs="?", metavar="MESSAGE", help="one question; without it, lines of stdin until /quit"
    )
    command.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="a picture of the first message; may be repeated"
    )
    _add_options(command, _DIALOG_CONTROLS)

    command = _command(commands, "convert", _convert, "convert Meta's VQGAN, or quantize a model")
    command.add_argument(
        "source",
        nargs="+",
        metavar="SOURCE",
        help='vqgan.ckpt and vqgan.yaml; or, with --quantize, a folder, a hub id, or "demo"',
    )
    command.add_argument("--quantize", choices=BITS, help="write the model with its weights in this")
    command.add_argument(
        "--output", metavar="FOLDER", help="default for the VQGAN: where every model finds it; a model needs one"
    )
    command.add_argument("--force", action="store_true", help="replace the files that are there")

    command = _command(commands, "reconstruct", _reconstruct, "pass a picture through the VQGAN, and print the PSNR")
    command.add_argument("image", metavar="IMAGE", help="a PNG, JPEG or WEBP file")
    command.add_argument("--model", default="demo", help='a folder, a hub id, or "demo" (default: demo)')
    command.add_argument(
        "--vqgan", metavar="PATH", help="folder or file of vqgan.safetensors; no model is looked at then"
    )
    command.add_argument(
        "--target-size", type=int, metavar="N",
        help=f"the picture is fitted to an area of N x N pixels (default: the model's, or {TARGET_SIZES[0]})",
    )  # fmt: skip
    _add_output(command)

    command = _command(commands, "info", _info, "tell about this machine, and about a model if one is named")
    _add_engine(command, model=None)
    return parser


def _command(commands, name: str, run, words: str) -> argparse.ArgumentParser:
    command = commands.add_parser(name, help=words, description=words.capitalize() + ".")
    command.set_defaults(run=run, parser=command)
    command.add_argument("--json", action="store_true", help="print one JSON object and nothing else on stdout")
    return command


def _add_options(command, controls: Sequence[str], defaults: Mapping | None = None) -> None:
    """The options of a command that draws: of sampling, of its files, and of the engine."""
    command.set_defaults(controls=controls)
    group = command.add_argument_group("sampling", "a model's generation_config.json may name defaults of its own")
    add_fields(group, SamplingParams, controls, defaults)
    _add_output(command)
    command.add_argument("--quiet", action="store_true", help="show neither a bar, nor previews, nor a summary")
    about = "images as they grow; a terminal of 24-bit colors shows them, one of kitty's protocol in full"
    group = command.add_argument_group("previews", about)
    group.add_argument("--preview-file", metavar="PNG", help="write them here too, each over the one before")
    group.add_argument("--preview-every", type=int, default=4, metavar="N", help="rows of codes (default: 4)")
    group.add_argument("--no-preview", action="store_true", help="show none in the terminal")
    _add_engine(command, model="demo")


def _add_output(command) -> None:
    command.add_argument(
        "--output",
        default="lumina.png",
        metavar="FILE",
        help="several get numbers: lumina-0.png, ... (default: lumina.png)",
    )
    command.add_argument("--force", action="store_true", help="replace files that exist")


def _add_engine(command, model: str | None) -> None:
    group = command.add_argument_group("model and machine")
    group.add_argument("--model", default=model, help=f'a folder, a hub id, or "demo" (default: {model})')
    group.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json, where the model's folder has none")
    group.add_argument("--vqgan", metavar="PATH", help="folder or file of vqgan.safetensors, likewise")
    group.add_argument("--dtype", choices=("bfloat16", "float32"), help="default: the checkpoint's own")
    group.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    group.add_argument("--quantization", choices=BITS, help="weights made so while loading; default: the checkpoint's")
    add_fields(group, EngineConfig, [field.name for field in fields(EngineConfig)])


def _controls(args, defaults: Mapping | None = None, engine: Engine | None = None) -> dict:
    """All sampling options of the command, checked; the model's own defaults are known with its engine.

    Raises ValueError.
    """
    given = {name: value for name, value in vars(args).items() if name in args.controls}
    params = SamplingParams(**{**(engine.defaults if engine else {}), **(defaults or {}), **given})
    return {name: getattr(params, name) for name in args.controls}


def _engine(args) -> Engine:
    names = {field.name for field in fields(EngineConfig)}
    options = {name: value for name, value in vars(args).items() if name in names}
    engine = Engine.from_pretrained(
        args.model,
        tokenizer=args.tokenizer,
        vqgan=args.vqgan,
        dtype=args.dtype,
        device=args.device,
        quantization=args.quantization,
        **options,
    )
    if args.model == "demo":
        print(DEMO_NOTE, file=sys.stderr)
    return engine


def _previews(args, outputs: Sequence[Path], beside_bar: bool = True) -> GrowingSheet:
    """What shows images as they grow; its options are checked before a model is loaded.

    outputs: files of the command. Raises ValueError.
    """
    every = checked_int("--preview-every", args.preview_every, 1)
    file = Path(args.preview_file) if args.preview_file else None
    if file:
        check_outputs([file], args.force)
        if file.resolve() in [path.resolve() for path in outputs]:
            raise ValueError(f"--preview-file is {str(file)!r}, which is also the output; expected another")
    in_terminal = beside_bar and sys.stderr.isatty() and not (args.json or args.quiet or args.no_preview)
    return GrowingSheet(every, file, in_terminal)


def output_paths(output: str, n: int) -> list[Path]:
    """The files of n images: `output` itself for one, else numbered before its suffix."""
    path = Path(output)
    return [path] if n == 1 else [_numbered(path, i) for i in range(n)]


def _numbered(path: Path, i: int) -> Path:
    return path.with_name(f"{path.stem}-{i}{path.suffix}")


def check_outputs(paths: Sequence[Path], force: bool) -> None:
    """Raise ValueError unless every one of these PNG files can be written."""
    for path in paths:
        if path.suffix.lower() != ".png":
            raise ValueError(f"the output is {str(path)!r}; expected a name that ends in .png")
        if not path.parent.is_dir():
            raise ValueError(f"{path.parent} is no folder; expected one for {path.name}")
        if not os.access(path.parent, os.W_OK):
            raise ValueError(f"{path.parent} cannot be written to; expected a folder that can, for {path.name}")
        if path.is_dir():
            raise ValueError(f"{path} is a folder; expected the name of a file")
        if path.exists() and not force:
            raise ValueError(f"{path} exists already; it is replaced only with --force")


def _save(args, output: RequestOutput, paths: Sequence[Path], asked: Mapping, controls: Mapping) -> dict:
    """Write the images of an answer with their settings; return what is to be told of it."""
    for path, (answer, i, image) in zip(paths, _pictures(output), strict=True):
        place = {"answer": answer, "image_of_answer": i, "size": image.size}
        images.save_png(image, path, _settings(args, output, asked, controls) | place, force=args.force)
    return {
        **asked,
        "files": [str(path) for path in paths],
        "seed": output.seed,
        "finish_reason": output.finish_reason,
        "text": output.text,
        "timings": asdict(output.timings),
    }


def _settings(args, output: RequestOutput, asked: Mapping, controls: Mapping) -> dict:
    """What a PNG tells of how it was made."""
    source = {"command": args.command, "model": args.model, "version": VERSION}
    return {**source, **asked, **controls, "seed": output.seed}


def _pictures(output: RequestOutput) -> Iterator[tuple[int, int, Image.Image]]:
    return ((answer.index, i, image) for answer in output.answers for i, image in enumerate(answer.images))


def _report(args, results: list[dict]) -> tuple[dict, list[str]]:
    """What is told of a command that draws: the object of --json, and the lines without it."""
    if not args.quiet:
        for result in results:
            times = result["timings"]
            print(
                f"seed {result['seed']}, {times['n_answer_tokens']} tokens in {times['total_s']:.1f} s", file=sys.stderr
            )
    report = {"command": args.command, "version": VERSION, "model": args.model, "results": results}
    return report, [file for result in results for file in result["files"]]


def _generate(args):
    if args.condition and (args.width or args.height):
        args.parser.error("--width and --height do not go with --condition; the image gets its size")
    texts = [text for prompt in args.prompt for text in (_stdin_lines() if prompt == "-" else [prompt])]
    if not texts:
        raise ValueError("no prompt on stdin; expected one a line")
    defaults = IMAGE_TO_IMAGE if args.condition else None
    controls = _controls(args, defaults)
    paths = output_paths(args.output, len(texts) * controls["n"])
    check_outputs(paths, args.force)
    previews = _previews(args, paths)
    condition = images.open_image(args.condition) if args.condition else None
    engine = _engine(args)
    controls, shown = _controls(args, defaults, engine), _shown(args, previews)
    if condition:
        outputs = [engine.from_condition(condition, text, **shown, **controls) for text in texts]
    else:
        sampling = {name: value for name, value in controls.items() if name != "n"}
        outputs = engine.generate_image(texts, args.width, args.height, controls["n"], **shown, **sampling)
    previews.finish()
    results = []
    for i, (text, output) in enumerate(zip(texts, outputs, strict=True)):
        asked = {"prompt": text} | ({"condition": args.condition} if condition else {})
        of_prompt = paths[i * controls["n"] : (i + 1) * controls["n"]]
        results.append(_save(args, output, of_prompt, asked, controls))
    return _report(args, results)


def _shown(args, previews: GrowingSheet) -> dict:
    """Arguments of the Engine's tasks: what is shown while they run."""
    return {"progress": not args.quiet, "callback": previews, "preview_every": previews.every}


def _stdin_lines() -> list[str]:
    return [line.strip() for line in sys.stdin if line.strip()]


def _edit(args):
    asked = {"prompt": args.instruction, "image": args.image}
    return _image_to_image(args, asked, Engine.edit, args.instruction)


def _label(args):
    if (args.task == "detect") != (args.object is not None):
        args.parser.error("--object names what `detect` looks for; no other task takes one")
    asked = {"prompt": args.task, "image": args.image}
    if args.object is None:
        return _image_to_image(args, asked, LABELS[args.task])
    return _image_to_image(args, asked | {"object": args.object}, LABELS[args.task], args.object)


def _image_to_image(args, asked: dict, task, *words: str):
    controls = _controls(args, IMAGE_TO_IMAGE)
    paths = output_paths(args.output, controls["n"])
    check_outputs(paths, args.force)
    previews = _previews(args, paths)
    picture = images.open_image(args.image)
    engine = _engine(args)
    own = engine.editing if task is Engine.edit else {}
    controls = _controls(args, IMAGE_TO_IMAGE | own, engine)
    output = task(engine, picture, *words, **_shown(args, previews), **controls)
    previews.finish()
    return _report(args, [_save(args, output, paths, asked, controls)])


def _multiview(args):
    _controls(args)
    if args.views < 1:
        args.parser.error(f"--views is {args.views}; expected at least 1")
    sheet = Path(args.output)
    paths = [_numbered(sheet, i) for i in range(args.views)]
    check_outputs([sheet, *paths], args.force)
    previews = _previews(args, [sheet, *paths])
    engine = _engine(args)
    controls = _controls(args, None, engine)
    output = engine.multiview(args.prompt, args.views, args.side, **_shown(args, previews), **controls)
    previews.finish()
    asked = {"prompt": args.prompt, "views": args.views}
    result = _save(args, output, paths, asked, controls)
    settings = _settings(args, output, asked, controls) | {"size": list(output.images[0].size)}
    images.save_png(images.contact_sheet(output.images), sheet, settings, force=args.force)
    return _report(args, [result | {"files": [str(sheet), *result["files"]]}])


def _chat(args):
    if args.json and args.message is None:
        args.parser.error("--json needs a MESSAGE")
    _controls(args)
    first = _numbered(Path(args.output), 0)
    check_outputs([first], force=True)  # names that are taken are passed over
    # A bar or a picture would stand in the middle of the text, so they are shown only where no text comes.
    is_drawn = args.message is not None and bool(getattr(args, "num_images", None))
    previews = _previews(args, [], beside_bar=is_drawn)
    pictures = [images.open_image(path) for path in args.image]
    engine = _engine(args)
    controls = _controls(args, None, engine)

    def show(event) -> None:
        previews(event)
        if not args.json:
            _print_text(event)

    codes = tuple(engine.encode_image(picture) for picture in pictures)
    dialog: list[Message] = []
    results = []
    for text in _questions() if args.message is None else [args.message]:
        question = Message("user", text, codes)
        previews.pictures.clear()
        output = engine.chat(
            [*dialog, question], progress=is_drawn and not args.quiet, callback=show, preview_every=previews.every,
            **controls,
        )  # fmt: skip
        previews.finish()
        answer = output.answers[0]
        paths = _free_paths(Path(args.output), len(answer.images))
        results.append(_save(args, output, paths, {"prompt": text, "images": args.image}, controls))
        if not args.json:
            print("", *paths, sep="\n", flush=True)
        if answer.text.strip():  # an empty turn is no part of a dialog
            dialog += [question, answer.message()]
            codes = ()
    return _report(args, results)[0], []


def _questions() -> Iterator[str]:
    """Lines of stdin that say something, until it ends or one is /quit."""
    while True:
        if sys.stdin.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or line.strip() == "/quit":
            return
        if line.strip():
            yield line.strip()


def _print_text(event) -> None:
    if isinstance(event, TextDelta):
        # A terminal would obey the escape sequences that a model may write.
        print("".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in event.text), end="", flush=True)


def _free_paths(path: Path, n: int) -> list[Path]:
    free = (numbered for i in itertools.count() if not (numbered := _numbered(path, i)).exists())
    return list(itertools.islice(free, n))


def _convert(args):
    if args.quantize:
        if len(args.source) != 1 or not args.output:
            raise ValueError("expected one model and --output FOLDER with --quantize")
        folder = hub.find_model(args.source[0])
        files = quantized.write_checkpoint(folder, Path(args.output), args.quantize, force=args.force)
    else:
        if len(args.source) != 2:
            raise ValueError(f"{len(args.source)} sources; expected two, vqgan.ckpt and vqgan.yaml")
        output = Path(args.output or hub.VQGAN_FOLDER)
        convert.convert_vqgan(*args.source, output, force=args.force)
        files = [output / name for name in (vqgan.WEIGHTS, vqgan.CONFIG)]
    names = list(map(str, files))
    return {"command": args.command, "version": VERSION, "files": names}, names


def _reconstruct(args):
    path = Path(args.output)
    check_outputs([path], args.force)
    picture = images.open_image(args.image)
    folder = Path() if args.vqgan else hub.find_model(args.model)
    model = vqgan.VQGAN.from_pretrained(hub.find_vqgan(folder, args.vqgan))
    own_size = TARGET_SIZES[0] if args.vqgan else target_sizes_of(folder)[0]
    target_size = own_size if args.target_size is None else args.target_size
    sizes = unirep.candidate_sizes(target_size, patch=2 * model.config.factor)
    if not sizes:
        raise ValueError(f"target size is {target_size}; expected at least {2 * model.config.factor}")
    fitted = images.fit(picture, sizes)
    codes = model.encode(torch.from_numpy(images.to_pixels(fitted))[None])
    image = Image.fromarray(vqgan.to_uint8(model.decode(codes))[0].numpy())
    psnr = _psnr(np.asarray(fitted), np.asarray(image))
    if not args.vqgan and args.model == "demo":
        print(DEMO_NOTE, file=sys.stderr)
    images.save_png(image, path, {"command": args.command, "version": VERSION, "image": args.image}, args.force)
    report = {"command": args.command, "version": VERSION, "files": [str(path)], "psnr_db": psnr, "size": image.size}
    return report, [str(path), f"PSNR {psnr:.2f} dB at {image.width}x{image.height}"]


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal to noise ratio of bytes, in dB; equal ones count as one byte off by one."""
    error = max(np.square(a.astype(np.float64) - b).mean(), 1 / a.size)
    return 10 * math.log10(255**2 / error)


def _info(args):
    device = default_device()
    facts = {
        "version": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu ({platform.machine()})",
        "attention": choose_ops(EngineConfig().on(device), device, torch.bfloat16, 128)[1],
        "instruction_set": _C.isa(),
        "threads": torch.get_num_threads(),
    }
    if args.model is not None:
        facts |= _model_facts(args.model, _engine(args))
    return facts, [f"{name:16} {_words(value)}" for name, value in facts.items()]


def _model_facts(name: str, engine: Engine) -> dict:
    shape, embed = engine.model.config, engine.model.embed
    n_kv_bytes = engine.kv_bytes_a_token
    n_pages, page_size = engine.scheduler.pool.num_pages, engine.config.page_size
    return {
        "model": name,
        "model_device": str(embed.device),
        "shape": asdict(shape),
        "dtype": str(embed.dtype).removeprefix("torch."),
        "attention": choose_ops(engine.config, embed.device.type, embed.dtype, shape.head_dim)[1],
        "weights_gib": round(weights.n_bytes(engine.model) / 2**30, 3),
        "kv_bytes_a_token": n_kv_bytes,
        "pool": {
            "pages": n_pages,
            "page_size": page_size,
            "gib": round(n_pages * page_size * n_kv_bytes / 2**30, 3),
        },
        "sizes": [f"{width}x{height}" for width, height in engine.sizes],
    }


def _words(value) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items())
    return " ".join(value) if isinstance(value, list) else str(value)
