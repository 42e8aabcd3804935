"""Words about a scene: captions, and questions with their answers. Varied, but drawn from the scene's truth alone."""

from collections.abc import Callable
from random import Random

from lumina_rt.sft.world import BACKGROUNDS, COLORS, SHAPES, Scene, Thing, relation

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")


def caption(rng: Random, scene: Scene, related: bool | None = None, background: bool | None = None) -> str:
    """What a user might ask for to get this scene.

    related: whether two things are told with the relation between them.  background: whether it is told. Both are
    drawn where they are None.
    """
    words = _things(rng, scene, rng.random() < 0.6 if related is None else related)
    if rng.random() < 0.6 if background is None else background:
        words += rng.choice((" on ", " before ")) + _background(scene)
    return rng.choice(("{}", "{}", "{}", "a picture of {}", "an image of {}", "{}.")).format(words)


def description(scene: Scene) -> str:
    """Everything about a scene in one fixed form, its things from left to right."""
    things = sorted(scene.things, key=lambda thing: thing.x)
    if len(things) > 1 and len({thing.name for thing in things}) == 1:
        words = f"{NUMBERS[len(things)]} {things[0].size} {plural(things[0].name)}"
    else:
        words = _list([f"a {thing.size} {thing.name}" for thing in things])
    return f"The picture shows {words} on {_background(scene)}."


def detection_target(rng: Random, scene: Scene) -> Thing | None:
    """One thing of the scene that its name alone tells apart; None where there is none."""
    names = [thing.name for thing in scene.things]
    unique = [thing for thing in scene.things if names.count(thing.name) == 1]
    return rng.choice(unique) if unique else None


def question(rng: Random, scene: Scene) -> tuple[str, str]:
    """A question about the scene and its one right answer, a word or two."""
    while True:
        asked = rng.choice(_QUESTIONS)(rng, scene)
        if asked:
            return asked


def talk(rng: Random) -> tuple[str, str]:
    """A question that needs no picture, and its answer."""
    kind = rng.randrange(3)
    if kind == 0:
        a, b = rng.randint(0, 4), rng.randint(0, 5)
        return f"What is {NUMBERS[a]} plus {NUMBERS[b]}?", NUMBERS[a + b]
    if kind == 1:
        opposites = {"left": "right", "right": "left", "above": "below", "below": "above", "small": "large"}
        word = rng.choice(list(opposites))
        return f"What is the opposite of {word}?", opposites[word]
    n = rng.randint(2, 9)
    return f"Count to {NUMBERS[n]}.", ", ".join(NUMBERS[1 : n + 1])


def _things(rng: Random, scene: Scene, related: bool) -> str:
    things = rng.sample(scene.things, len(scene.things))
    names = {thing.name for thing in things}
    if len(things) > 1 and len(names) == 1:
        return f"{NUMBERS[len(things)]} {plural(_sized(rng, things[0]))}"
    if len(things) == 2 and related and (between := relation(*things, scene.aspect)):
        to_the = "to the " if between in ("left of", "right of") and rng.random() < 0.4 else ""
        return f"{_one(rng, things[0])} {to_the}{between} {_one(rng, things[1])}"
    return _list([_one(rng, thing) for thing in things])


def _sized(rng: Random, thing: Thing) -> str:
    return f"{thing.size} {thing.name}" if rng.random() < 0.3 else thing.name


def _one(rng: Random, thing: Thing) -> str:
    return with_article(_sized(rng, thing))


def with_article(words: str) -> str:
    return ("an " if words[0] in "aeiou" else "a ") + words


def plural(words: str) -> str:
    return words + ("es" if words.endswith("s") else "s")


def _list(names: list[str]) -> str:
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def _background(scene: Scene) -> str:
    if len(scene.background) == 1:
        return f"a {scene.background[0]} background"
    return "a background from {} to {}".format(*scene.background)


def _ask_count(rng: Random, scene: Scene) -> tuple[str, str]:
    if rng.random() < 0.5:
        return "How many things are there?", NUMBERS[len(scene.things)]
    thing = rng.choice(scene.things)
    count = sum(other.name == thing.name for other in scene.things)
    if rng.random() < 0.2:
        shape, color = rng.choice(SHAPES), rng.choice(list(COLORS))
        count = sum(other.name == f"{color} {shape}" for other in scene.things)
        return f"How many {color} {plural(shape)} are there?", NUMBERS[count]
    return f"How many {plural(thing.name)} are there?", NUMBERS[count]


def _ask_color(rng: Random, scene: Scene) -> tuple[str, str] | None:
    thing = rng.choice(scene.things)
    colors = {other.color for other in scene.things if other.shape == thing.shape}
    return (f"What color is the {thing.shape}?", thing.color) if len(colors) == 1 else None


def _ask_shape(rng: Random, scene: Scene) -> tuple[str, str] | None:
    thing = rng.choice(scene.things)
    shapes = {other.shape for other in scene.things if other.color == thing.color}
    return (f"What shape is the {thing.color} thing?", thing.shape) if len(shapes) == 1 else None


def _ask_size(rng: Random, scene: Scene) -> tuple[str, str] | None:
    thing = detection_target(rng, scene)
    return (f"Is the {thing.name} small or large?", thing.size) if thing else None


def _ask_presence(rng: Random, scene: Scene) -> tuple[str, str]:
    names = {thing.name for thing in scene.things}
    if rng.random() < 0.5:
        return f"Is there {with_article(rng.choice(sorted(names)))}?", "yes"
    thing = rng.choice(scene.things)
    near = (f"{thing.color} {rng.choice(SHAPES)}", f"{rng.choice(list(COLORS))} {thing.shape}")
    name = rng.choice(near)
    return f"Is there {with_article(name)}?", "yes" if name in names else "no"


def _ask_relation(rng: Random, scene: Scene) -> tuple[str, str] | None:
    if len({thing.name for thing in scene.things}) < 2:
        return None
    a, b = rng.sample(scene.things, 2)
    between = relation(a, b, scene.aspect)
    return (f"Where is the {a.name}, seen from the {b.name}?", between.removesuffix(" of")) if between else None


def _ask_background(rng: Random, scene: Scene) -> tuple[str, str]:
    return "What is the background?", " to ".join(scene.background)


_QUESTIONS: tuple[Callable[[Random, Scene], tuple[str, str] | None], ...] = (
    _ask_count, _ask_color, _ask_shape, _ask_size, _ask_presence, _ask_relation, _ask_background,
)  # fmt: skip
assert set(BACKGROUNDS).isdisjoint(COLORS)
