"""How good a model of the procedural world is: text to image in the manner of GenEval, and a figure for each Omni task.

Everything is asked about compositions that training never showed, and judged from pixels and words by `checker.py`.
`python -m lumina_rt.sft.evaluate` prints a table and, as its last line, one JSON object.
"""

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from random import Random

import numpy as np
from lumina_rt.sft import captions, checker, tasks, vq, world
from lumina_rt.sft.edits import edit
from lumina_rt.sft.world import Scene, Thing
from PIL import Image

from lumina_rt import Engine, Message, SamplingParams, prompts
from lumina_rt.checkpoint import CheckpointError
from lumina_rt.engine import IMAGE_TO_IMAGE

CATEGORIES = ("single_object", "two_object", "counting", "colors", "position", "color_attribution")
NEAR = 0.1  # of the picture's side: how far from its place a thing may be drawn


@dataclass(frozen=True)
class Case:
    """A prompt of text to image, its size in pixels, and a scene that it tells."""

    category: str
    caption: str
    size: tuple[int, int]
    scene: Scene


def text_to_image_cases(engine: Engine, n: int, seed: str = "test") -> list[Case]:
    """Draw `n` cases, as many of each category; half of them square, a quarter each wide and tall."""
    sizes = _sizes(engine)
    cases: list[Case] = []
    for i in range(n):
        rng, category = Random(f"{seed} {i}"), CATEGORIES[i % len(CATEGORIES)]
        size = sizes[(0, 1, 0, 2)[i // len(CATEGORIES) % 4]]
        while len(cases) == i:
            scene = held_out_scene(rng, category, size[0] / size[1])
            case = Case(category, captions.caption(rng, scene, related=category == "position"), size, scene)
            if is_right(case, world.picture(scene, *size)):  # equal things that the lattice has joined are one to see
                cases.append(case)
    return cases


def held_out_scene(rng: Random, category: str, aspect: float) -> Scene:
    """A scene whose prompt asks for what training never showed."""
    while True:
        if category == "counting":
            scene = world.counted_scene(rng, rng.randint(2, 4), aspect, training=False)
        else:
            scene = world.random_scene(rng, 1 if category in ("single_object", "colors") else 2, aspect, training=False)
        if category == "position":
            fits = len({thing.name for thing in scene.things}) == 2 and any(
                related for *_, related in world.held_out_triples(scene)
            )
        else:  # where no relation is told, a thing whose kind is held out alone
            fits = any(world.is_held_out(thing.color, thing.shape, None) for thing in scene.things)
        if fits:
            return scene


def is_right(case: Case, image: Image.Image) -> bool:
    """Whether a picture shows what the case asks for, and nothing else.

    single_object, two_object: the shapes.  counting, colors, color_attribution: shapes with their colours.  position:
    these, and the relation between them.
    """
    found, wanted = checker.find_things(image), case.scene.things
    if case.category in ("single_object", "two_object"):
        return Counter(thing.shape for thing in found) == Counter(thing.shape for thing in wanted)
    if Counter(thing.name for thing in found) != Counter(thing.name for thing in wanted):
        return False
    if case.category != "position":
        return True
    by_name = {thing.name: thing for thing in found}
    a, b = wanted
    aspect = image.width / image.height
    return world.relation(by_name[a.name], by_name[b.name], aspect) == world.relation(a, b, case.scene.aspect)


def draw(engine: Engine, cases: Sequence[Case], **controls) -> list[Image.Image]:
    """One picture for each case. controls: fields of SamplingParams, the model's defaults where left out."""
    texts = [prompts.text_to_image(case.caption, *case.size) for case in cases]
    params = [engine.params(num_images=1, size=case.size, seed=i, **controls) for i, case in enumerate(cases)]
    return [output.images[0] for output in engine.generate(texts, params)]


def text_to_image(engine: Engine, n: int, **controls) -> dict:
    """The share that is right: {overall, categories, sizes}."""
    cases = text_to_image_cases(engine, n)
    right = [is_right(case, image) for case, image in zip(cases, draw(engine, cases, **controls), strict=True)]
    groups: dict[str, list[bool]] = {}
    for case, value in zip(cases, right, strict=True):
        groups.setdefault(case.category, []).append(value)
        groups.setdefault("{}x{}".format(*case.size), []).append(value)
    shares = {name: float(np.mean(values)) for name, values in groups.items()}
    by_category = {category: shares.pop(category) for category in CATEGORIES}
    return {"overall": float(np.mean(list(by_category.values()))), "categories": by_category, "sizes": shares}


# The Omni tasks. Each takes the engine and a number of cases, and returns a figure.


def segmentation(engine: Engine, n: int) -> float:
    """Mean intersection over union of the classes that a picture shows, the background among them."""
    scenes = _scenes(engine, n, "segmentation")
    drawn = _label(engine, scenes, prompts.segmentation())
    values = []
    for (scene, size), image in zip(scenes, drawn, strict=True):
        wanted, got = checker.classes(world.segmentation(scene, *size)), checker.classes(image)
        shown = np.unique(wanted)
        values.append(np.mean([((wanted == c) & (got == c)).sum() / ((wanted == c) | (got == c)).sum() for c in shown]))
    return float(np.mean(values))


def depth(engine: Engine, n: int) -> float:
    """Mean absolute error over the full range of depth; less is better."""
    scenes = _scenes(engine, n, "depth")
    drawn = _label(engine, scenes, prompts.depth())
    errors = [_pixels(image) - _pixels(world.depth(*s)) for s, image in zip(_flat(scenes), drawn, strict=True)]
    return float(np.mean([np.abs(error).mean() / 255 for error in errors]))


def surface_normals(engine: Engine, n: int) -> float:
    """Mean angle in degrees between the normals where there is a thing; less is better."""
    scenes = _scenes(engine, n, "normals")
    drawn = _label(engine, scenes, prompts.surface_normal())
    angles = []
    for s, image in zip(_flat(scenes), drawn, strict=True):
        wanted, got = _directions(world.surface_normals(*s)), _directions(image)
        cosine = (wanted * got).sum(-1)[wanted[..., 2] < 0.99]
        angles.append(np.degrees(np.arccos(cosine.clip(-1, 1))).mean())
    return float(np.mean(angles))


def detection(engine: Engine, n: int) -> float:
    """The share of boxes whose intersection over union with the true one is above a half."""
    scenes = _scenes(engine, n, "detection", lambda scene: captions.detection_target(Random(0), scene) is not None)
    targets = [captions.detection_target(Random(i), scene) for i, (scene, _) in enumerate(scenes)]
    questions = [
        _shown(prompts.detection(thing.name), scene, size) for (scene, size), thing in zip(scenes, targets, strict=True)
    ]
    drawn = _draw(engine, questions, scenes)
    hits = [
        (box := checker.find_box(image)) is not None and _box_iou(box, _outer_box(thing, size)) > 0.5
        for (_, size), thing, image in zip(scenes, targets, drawn, strict=True)
    ]
    return float(np.mean(hits))


def editing(engine: Engine, n: int) -> float:
    """The share of single edits after which the picture shows just what it should, where it should."""
    scenes = _scenes(engine, n, "editing")
    edits = [edit(Random(f"edit {i}"), scene, training=False) for i, (scene, _) in enumerate(scenes)]
    questions = [_shown(prompts.editing(words), *scene) for (words, _), scene in zip(edits, scenes, strict=True)]
    drawn = _draw(engine, questions, scenes, IMAGE_TO_IMAGE | engine.editing)
    rows = zip(edits, scenes, drawn, strict=True)
    return float(np.mean([_shows(image, after, _n_added(before, after)) for (_, after), (before, _), image in rows]))


def editing_in_two_turns(engine: Engine, n: int) -> float:
    """The share of dialogs of two edits whose second picture is right, the first being the model's own."""
    scenes = _scenes(engine, n, "two edits")
    rngs = [Random(f"two edits {i}") for i in range(n)]
    first = [edit(rng, scene, training=False) for rng, (scene, _) in zip(rngs, scenes, strict=True)]
    second = [edit(rng, after, training=False) for rng, (_, after) in zip(rngs, first, strict=True)]
    questions = [_shown(prompts.editing(words), *scene) for (words, _), scene in zip(first, scenes, strict=True)]
    params = _image_params(engine, scenes, IMAGE_TO_IMAGE | engine.editing)
    outputs = engine.generate(questions, params)
    dialogs = [
        [question, output.answers[0].message(), Message("user", words)]
        for question, output, (words, _) in zip(questions, outputs, second, strict=True)
    ]
    drawn = [output.images[0] for output in engine.generate(dialogs, params)]
    rows = zip(drawn, scenes, first, second, strict=True)
    return float(np.mean([_shows(image, b, _n_added(before, a, b)) for image, (before, _), (_, a), (_, b) in rows]))


def from_condition(engine: Engine, n: int) -> float:
    """The share of pictures, drawn from a segmentation or a depth map, with every thing as told and in its place.

    The words tell the background, which no map shows.
    """
    scenes = _scenes(engine, n, "condition")
    questions = []
    for i, (scene, size) in enumerate(scenes):
        draw_map = (world.segmentation, world.depth)[i % 2]
        words = prompts.from_condition(captions.caption(Random(i), scene, background=True))
        questions.append(Message("user", words, (draw_map(scene, *size),)))
    drawn = _draw(engine, questions, scenes)
    return float(np.mean([_shows(image, scene) for image, (scene, _) in zip(drawn, scenes, strict=True)]))


def questions(engine: Engine, n: int) -> float:
    """The share of questions about a picture that are answered in the very words."""
    scenes = _scenes(engine, n, "questions")
    asked = [captions.question(Random(f"question {i}"), scene) for i, (scene, _) in enumerate(scenes)]
    messages = [
        Message("user", f"{prompts.IMAGE_MARK} {words}", (world.picture(*scene),))
        for (words, _), scene in zip(asked, _flat(scenes), strict=True)
    ]
    answers = _say(engine, messages)
    return float(np.mean([said == wanted for said, (_, wanted) in zip(answers, asked, strict=True)]))


def descriptions(engine: Engine, n: int) -> float:
    """The share of captions that tell every thing with size and colour, in order, and the background."""
    scenes = _scenes(engine, n, "descriptions")
    answers = _say(engine, [_shown(prompts.description(), *scene) for scene in scenes])
    return float(
        np.mean([said == captions.description(scene) for said, (scene, _) in zip(answers, scenes, strict=True)])
    )


def multiview(engine: Engine, n: int, n_views: int = 4) -> float:
    """The share of answers whose every view shows the two things where the first view, turned, has them."""
    side, right = tasks.VIEW_SIZE, []
    scenes = [tasks.turntable_scene(Random(f"views {i}"), training=False) for i in range(n)]
    texts = [
        prompts.multiview(captions.caption(Random(i), scene, related=True), n_views, side)
        for i, scene in enumerate(scenes)
    ]
    params = [engine.params(num_images=n_views, size=(side, side), seed=i) for i in range(n)]
    for scene, output in zip(scenes, engine.generate(texts, params), strict=True):
        found = checker.find_things(output.images[0])
        first = Scene(tuple(Thing(thing.shape, thing.color, "small", thing.x, thing.y) for thing in found), ())
        names = Counter(thing.name for thing in found) == Counter(thing.name for thing in scene.things)
        turned = (world.view(first, 2 * math.pi * i / n_views) for i in range(n_views))
        pairs = zip(output.images, turned, strict=True)
        right.append(names and all(_places_agree(checker.find_things(view), expected) for view, expected in pairs))
    return float(np.mean(right))


TASKS: dict[str, Callable[[Engine, int], float]] = {
    "segmentation_miou": segmentation,
    "depth_error": depth,
    "normals_degrees": surface_normals,
    "box_iou_above_half": detection,
    "edits": editing,
    "edits_in_two_turns": editing_in_two_turns,
    "from_condition": from_condition,
    "answers": questions,
    "descriptions": descriptions,
    "view_consistency": multiview,
}


def _sizes(engine: Engine) -> tuple[tuple[int, int], ...]:
    """The default size, and those of the same area nearest to 3:2 and 2:3."""
    return engine.default_size, *(
        min(engine.input_sizes, key=lambda size: abs(math.log(size[0] / size[1] / aspect))) for aspect in (1.5, 1 / 1.5)
    )


def _scenes(
    engine: Engine, n: int, seed: str, fits: Callable[[Scene], bool] = lambda scene: True
) -> list[tuple[Scene, tuple[int, int]]]:
    """Held-out scenes with the sizes to draw them in."""
    sizes, scenes = _sizes(engine), []
    for i in range(n):
        rng, size = Random(f"{seed} {i}"), sizes[i % len(sizes)]
        while True:
            scene = tasks.scene_for(rng, size, training=False)
            if any(world.held_out_triples(scene)) and fits(scene):
                break
        scenes.append((scene, size))
    return scenes


def _flat(scenes) -> list[tuple[Scene, int, int]]:
    return [(scene, *size) for scene, size in scenes]


def _shown(words: str, scene: Scene, size: tuple[int, int]) -> Message:
    return Message("user", words, (world.picture(scene, *size),))


def _image_params(engine: Engine, scenes, controls: dict = IMAGE_TO_IMAGE) -> list[SamplingParams]:
    return [engine.params(num_images=1, size=size, seed=i, **controls) for i, (_, size) in enumerate(scenes)]


def _draw(engine: Engine, questions: list, scenes, controls: dict = IMAGE_TO_IMAGE) -> list[Image.Image]:
    return [output.images[0] for output in engine.generate(questions, _image_params(engine, scenes, controls))]


def _label(engine: Engine, scenes, words: str) -> list[Image.Image]:
    return _draw(engine, [_shown(words, *scene) for scene in scenes], scenes)


def _say(engine: Engine, messages: list[Message]) -> list[str]:
    params = SamplingParams(num_images=0, max_tokens=64, text_temperature=0.0, seed=0)
    return [output.text for output in engine.generate(messages, params)]


def _shows(image: Image.Image, scene: Scene, n_free: int = 0) -> bool:
    """Whether a picture shows a scene: its background, and its things in their places but for `n_free` of them."""
    found = checker.find_things(image)
    if Counter(thing.name for thing in found) != Counter(thing.name for thing in scene.things):
        return False
    if checker.find_background(image) != scene.background:
        return False
    away = sum(not _is_near(thing, [f for f in found if f.name == thing.name]) for thing in scene.things)
    return away <= n_free


def _n_added(*turns: Scene) -> int:
    """How many things edits have added, whose places no words told."""
    return sum(max(0, len(b.things) - len(a.things)) for a, b in pairwise(turns))


def _is_near(thing, candidates) -> bool:
    return any(abs(thing.x - other.x) <= NEAR and abs(thing.y - other.y) <= NEAR for other in candidates)


def _places_agree(found, expected: Scene) -> bool:
    if Counter(thing.name for thing in found) != Counter(thing.name for thing in expected.things):
        return False
    return all(_is_near(thing, [f for f in found if f.name == thing.name]) for thing in expected.things)


def _outer_box(thing: Thing, size: tuple[int, int]) -> tuple[int, int, int, int]:
    left, top, right, bottom = thing.box(*size)
    return left - world.BOX_LINE, top - world.BOX_LINE, right + world.BOX_LINE, bottom + world.BOX_LINE


def _box_iou(a: Sequence[float], b: Sequence[float]) -> float:
    width, height = (min(a[i + 2], b[i + 2]) - max(a[i], b[i]) for i in (0, 1))
    shared = max(width, 0) * max(height, 0)
    areas = sum((box[2] - box[0]) * (box[3] - box[1]) for box in (a, b))
    return shared / (areas - shared)


def _pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=np.float32)


def _directions(image: Image.Image) -> np.ndarray:
    vectors = _pixels(image) / 127.5 - 1
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True).clip(1e-6)


def evaluate(engine: Engine, n: int, n_task: int, names: Sequence[str] = tuple(TASKS), **controls) -> dict:
    """All figures. n: prompts of text to image.  n_task: cases of each task.  controls: of text to image."""
    result = text_to_image(engine, n, **controls)
    result["tasks"] = {name: TASKS[name](engine, n_task) for name in names}
    result["tasks"]["vq_psnr_db"] = vq.psnr(engine.vqgan)
    params = engine.params(**controls)
    settings = {name: getattr(params, name) for name in ("guidance_scale", "temperature", "top_k", "top_p", "min_p")}
    return {**result, "n": n, "settings": settings | {"n_task": n_task, "editing": engine.editing}}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lumina_rt.sft.evaluate", description=__doc__)
    parser.add_argument("--model", default="demo", help="a folder, or demo")
    parser.add_argument("-n", type=int, default=540, help="prompts of text to image")
    parser.add_argument("--n-task", type=int, default=100, help="cases of each task")
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS), metavar="TASK")
    for name in ("guidance_scale", "temperature", "top_p", "min_p"):
        parser.add_argument("--" + name.replace("_", "-"), type=float, default=argparse.SUPPRESS)
    parser.add_argument("--top-k", type=int, default=argparse.SUPPRESS)
    args = vars(parser.parse_args(argv))
    for name, least in (("n", len(CATEGORIES)), ("n_task", 1)):
        if args[name] < least:
            parser.error(f"{name} is {args[name]}; expected at least {least}")
    try:
        engine = Engine.from_pretrained(args.pop("model"))
        result = evaluate(engine, args.pop("n"), args.pop("n_task"), args.pop("tasks"), **args)
    except (CheckpointError, ValueError) as error:
        raise SystemExit(f"error: {error}") from None
    rows = {"text to image, overall": result["overall"]}
    rows |= {f"  {name}": value for part in ("categories", "sizes") for name, value in result[part].items()}
    for name, value in (rows | result["tasks"]).items():
        print(f"{name:28} {value:8.3f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
