"""The tasks of FP-SFT and Omni-SFT as conversations over the procedural world (paper, section 2.2.2).

Each task draws a scene and returns the turns of one dialog, the last of them the assistant's. Its prompts are those of
the runtime, `lumina_rt.prompts`, so that what is trained is what is asked.
"""

import math
from collections.abc import Callable
from random import Random

from lumina_rt.sft import captions, world
from lumina_rt.sft.edits import edit
from lumina_rt.sft.world import Scene
from PIL import Image

from lumina_rt import prompts
from lumina_rt.prompts import IMAGE_MARK, Message

Turns = tuple[Message, ...]
MAPS = {
    "segmentation": (prompts.segmentation(), world.segmentation),
    "depth": (prompts.depth(), world.depth),
    "normals": (prompts.surface_normal(), world.surface_normals),
}
VIEWS = (2, 4)
VIEW_SIZE = 64


def scene_for(rng: Random, size: tuple[int, int], training: bool = True) -> Scene:
    """A scene, one time in four of equal things."""
    aspect = size[0] / size[1]
    if rng.random() < 0.25:
        return world.counted_scene(rng, rng.randint(2, 4), aspect, training)
    return world.random_scene(rng, None, aspect, training)


def scene_to_tell_apart(rng: Random, size: tuple[int, int]) -> Scene:
    """A training scene for words that mean one of its things: half of the time all share their colours and shapes.

    Of 240 edits of a model that had seen none of these, 30 had changed another thing of the colour or the shape.
    """
    if rng.random() < 0.5:
        return world.mixed_scene(rng, rng.choice((2, 3, 4)), size[0] / size[1])
    return scene_for(rng, size)


def text_to_image(rng: Random, size: tuple[int, int]) -> Turns:
    """A caption and its picture. Four equal things and two different ones are what is hardest to draw from words alone,
    and come more often than in the other tasks.
    """
    aspect = size[0] / size[1]
    if rng.random() < 0.4:
        scene = world.counted_scene(rng, rng.choice((2, 3, 4, 4)), aspect)
    else:
        scene = world.random_scene(rng, rng.choice((1, 2, 2, 2, 3, 4)), aspect)
    words = prompts.text_to_image(captions.caption(rng, scene), *size)
    return Message("user", words), _drawn(world.picture(scene, *size))


def describe(rng: Random, size: tuple[int, int]) -> Turns:
    scene = scene_for(rng, size)
    return _shown(prompts.description(), world.picture(scene, *size)), _said(captions.description(scene))


def questions(rng: Random, size: tuple[int, int]) -> Turns:
    """Several turns about one picture, some with a word on something else between."""
    scene = scene_to_tell_apart(rng, size)
    turns: list[Message] = []
    for i in range(rng.randint(2, 8)):
        asked, answer = captions.talk(rng) if i and rng.random() < 0.1 else captions.question(rng, scene)
        # The runtime puts an image that comes without a mark before the words.
        first = Message("user", f"{IMAGE_MARK} {asked}", (world.picture(scene, *size),))
        turns += [Message("user", asked) if i else first, _said(answer)]
    return tuple(turns)


def talk(rng: Random, size: tuple[int, int]) -> Turns:
    """Text alone, several turns. The size is not looked at."""
    turns = [captions.talk(rng) for _ in range(rng.randint(1, 4))]
    return tuple(message for asked, answer in turns for message in (Message("user", asked), _said(answer)))


def labels(kind: str) -> Callable[[Random, tuple[int, int]], Turns]:
    """The task of drawing one of MAPS for a picture."""
    words, draw = MAPS[kind]

    def task(rng: Random, size: tuple[int, int]) -> Turns:
        scene = scene_for(rng, size)
        return _shown(words, world.picture(scene, *size)), _drawn(draw(scene, *size))

    return task


def detection(rng: Random, size: tuple[int, int]) -> Turns:
    while (thing := captions.detection_target(rng, scene := scene_to_tell_apart(rng, size))) is None:
        pass
    question = _shown(prompts.detection(thing.name), world.picture(scene, *size))
    return question, _drawn(world.detection(scene, thing, *size))


def editing(rng: Random, size: tuple[int, int]) -> Turns:
    """One edit, or two in turn; the second speaks of the picture that the first gave."""
    scene = scene_to_tell_apart(rng, size)
    words, after = edit(rng, scene)
    turns = [_shown(prompts.editing(words), world.picture(scene, *size)), _drawn(world.picture(after, *size))]
    if rng.random() < 0.3:
        words, after = edit(rng, after)
        turns += [Message("user", words), _drawn(world.picture(after, *size))]
    return tuple(turns)


def from_condition(rng: Random, size: tuple[int, int]) -> Turns:
    scene = scene_for(rng, size)
    _, draw = MAPS[rng.choice(("segmentation", "depth"))]
    question = _shown(prompts.from_condition(captions.caption(rng, scene)), draw(scene, *size))
    return question, _drawn(world.picture(scene, *size))


def multiview(rng: Random, size: tuple[int, int]) -> Turns:
    """Views of a scene from all around, in one answer; always of VIEW_SIZE."""
    scene, n_views = turntable_scene(rng), rng.choice(VIEWS)
    words = prompts.multiview(captions.caption(rng, scene, related=True), n_views, VIEW_SIZE)
    views = [world.picture(world.view(scene, 2 * math.pi * i / n_views), VIEW_SIZE, VIEW_SIZE) for i in range(n_views)]
    return Message("user", words), Message("assistant", IMAGE_MARK * n_views, tuple(views))


def turntable_scene(rng: Random, training: bool = True) -> Scene:
    """Two different things that stay in the picture while it turns."""
    while True:
        scene = world.random_scene(rng, 2, training=training)
        reach = (math.hypot(thing.x - 0.5, thing.y - 0.5) + world.SIZES[thing.size] / 2 for thing in scene.things)
        views = (world.view(scene, i * math.pi / 2) for i in range(max(VIEWS)))
        if max(reach) < 0.49 and not (training and any(any(world.held_out_triples(view)) for view in views)):
            return scene


Task = Callable[[Random, tuple[int, int]], Turns]
TASKS: dict[str, Task] = {
    "text_to_image": text_to_image,
    "describe": describe,
    "questions": questions,
    "talk": talk,
    "segmentation": labels("segmentation"),
    "depth": labels("depth"),
    "normals": labels("normals"),
    "detection": detection,
    "editing": editing,
    "from_condition": from_condition,
    "multiview": multiview,
}


def _shown(words: str, image: Image.Image) -> Message:
    mark = "" if IMAGE_MARK in words else f"{IMAGE_MARK} "
    return Message("user", mark + words, (image,))


def _drawn(image: Image.Image) -> Message:
    return Message("assistant", IMAGE_MARK, (image,))


def _said(words: str) -> Message:
    return Message("assistant", words)
