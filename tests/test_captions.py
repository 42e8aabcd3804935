"""Words about a scene say what is true of it; right answers are worked out here a second time, from the scene."""

import re
from collections import Counter
from random import Random

import pytest
from lumina_rt.sft import captions, tasks, world
from lumina_rt.sft.captions import NUMBERS
from lumina_rt.sft.world import COLORS, SHAPES, Scene, Thing

NAME = f"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"
KINDS = f"({'|'.join(COLORS)}) ({'|'.join(SHAPES)}|crosse)s"
ONE = f"an? (?:(small|large) )?{NAME}"
MANY = f"({'|'.join(NUMBERS)}) (?:(small|large) )?{KINDS}"
RELATION = r"(?: to the)? (left of|right of)| (above|below)"


def scenes(n):
    """Scenes as the tasks draw them, of every aspect; one in four of equal things."""
    for seed in range(n):
        rng = Random(seed)
        width, height = rng.choice(((96, 96), (192, 48), (64, 128)))
        yield rng, tasks.scene_for(rng, (width, height), training=False)


def singular(shape):
    return "cross" if shape == "crosse" else shape


def expected_background(scene):
    if len(scene.background) == 1:
        return f"a {scene.background[0]} background"
    return f"a background from {scene.background[0]} to {scene.background[1]}"


def assert_says_the_things(words, scene):
    """Every thing is named once, no other is, and a size is the thing's own."""
    left = list(scene.things)
    many = re.fullmatch(MANY, words)
    if many:
        number, size, color, shape = many.groups()
        assert len(left) == NUMBERS.index(number) > 1
        assert {(thing.color, thing.shape) for thing in left} == {(color, singular(shape))}
        assert size is None or {thing.size for thing in left} == {size}
        return
    found = list(re.finditer(ONE, words))
    for match in found:
        size, color, shape = match.groups()
        (thing,) = (thing for thing in left if (thing.color, thing.shape) == (color, shape))
        assert size in (None, thing.size)
        assert match[0].startswith("an ") == (match[0].split()[1][0] in "aeiou")
        left.remove(thing)
    assert not left
    between = re.sub(ONE, "#", words)
    if related := re.fullmatch(f"#(?:{RELATION}) #", between):
        a, b = (next(t for t in scene.things if (t.color, t.shape) == match.groups()[1:]) for match in found)
        assert (related[1] or related[2]) == true_relation(a, b, scene.aspect)
    else:
        assert between in ("#", "# and #", "#, # and #", "#, #, # and #")


def true_relation(a, b, aspect):
    """By pixels of a large picture: the axis on which they are at least half as far apart again as on the other."""
    width, height = 1000 * aspect**0.5, 1000 / aspect**0.5
    right, down = (a.x - b.x) * width, (a.y - b.y) * height
    if abs(right) > 1.5 * abs(down):
        return "right of" if right > 0 else "left of"
    if abs(down) > 1.5 * abs(right):
        return "below" if down > 0 else "above"
    return None


def test_captions_name_all_things_their_relation_and_the_background():
    for rng, scene in scenes(600):
        words = captions.caption(rng, scene).removesuffix(".")
        words = re.sub("^(a picture of|an image of) ", "", words)
        things, *background = re.split(r" (?:on|before) (?=a (?:\w+ )?background)", words)
        assert background in ([], [expected_background(scene)])
        assert_says_the_things(things, scene)


def test_captions_tell_relation_and_background_when_asked_to():
    scene = Scene((Thing("ring", "red", "small", 0.2, 0.5), Thing("star", "orange", "large", 0.7, 0.5)), ("white",))
    seen = Counter()
    for seed in range(100):
        words = captions.caption(Random(seed), scene, related=True, background=True)
        assert re.search(" (on|before) a white background", words)
        seen[re.search("left of|right of", words)[0]] += 1
        assert not re.search("left|right|background", captions.caption(Random(seed), scene, False, False))
    assert len(seen) == 2


def test_captions_vary():
    scene = Scene((Thing("ring", "red", "small", 0.2, 0.5), Thing("star", "blue", "large", 0.7, 0.5)), ("white",))
    assert len({captions.caption(Random(seed), scene) for seed in range(200)}) > 60


def test_a_description_tells_everything_from_left_to_right():
    for _, scene in scenes(300):
        words = re.fullmatch(r"The picture shows (.*) on (a .*background.*)\.", captions.description(scene))
        assert words[2] == expected_background(scene)
        assert_says_the_things(words[1], scene)
        told = re.findall(f"(small|large) {NAME}", words[1])
        if not re.fullmatch(MANY, words[1]):
            ordered = sorted(scene.things, key=lambda thing: thing.x)
            assert told == [(thing.size, thing.color, thing.shape) for thing in ordered]
        else:
            assert scene.things[0].size in words[1].split()
    things = Thing("star", "orange", "large", 0.7, 0.5), Thing("ring", "red", "small", 0.2, 0.5)
    scene = Scene(things, ("black", "gray"))
    assert captions.description(scene) == (
        "The picture shows a small red ring and a large orange star on a background from black to gray."
    )


def test_several_crosses_are_spelled_as_such():
    things = tuple(Thing("cross", "red", "small", x, 0.5) for x in (0.2, 0.5, 0.8))
    scene = Scene(things, ("white",))
    assert captions.description(scene) == "The picture shows three small red crosses on a white background."
    for seed in range(100):
        words = captions.caption(Random(seed), scene, background=False) + captions.question(Random(seed), scene)[0]
        assert "crosss" not in words
        assert "three" in words


def test_a_detection_target_is_told_apart_by_its_name():
    a, b, c = (Thing(shape, "red", "small", x, 0.5) for shape, x in (("ring", 0.2), ("star", 0.5), ("star", 0.8)))
    assert {captions.detection_target(Random(seed), Scene((a, b, c), ("white",))) for seed in range(20)} == {a}
    assert {captions.detection_target(Random(seed), Scene((a, b), ("white",))) for seed in range(20)} == {a, b}
    assert captions.detection_target(Random(0), Scene((b, c), ("white",))) is None


def true_answer(asked, scene):
    """(kind of question, its answer), from the scene alone."""
    things = scene.things
    if asked == "How many things are there?":
        return "all", NUMBERS[len(things)]
    if match := re.fullmatch(f"How many {KINDS} are there\\?", asked):
        color, shape = match[1], singular(match[2])
        return "some", NUMBERS[sum(thing.color == color and thing.shape == shape for thing in things)]
    if match := re.fullmatch(r"What color is the (\w+)\?", asked):
        (answer,) = {thing.color for thing in things if thing.shape == match[1]}
        return "color", answer
    if match := re.fullmatch(r"What shape is the (\w+) thing\?", asked):
        (answer,) = {thing.shape for thing in things if thing.color == match[1]}
        return "shape", answer
    if match := re.fullmatch(f"Is the {NAME} small or large\\?", asked):
        (answer,) = (thing.size for thing in things if (thing.color, thing.shape) == match.groups())
        return "size", answer
    if match := re.fullmatch(f"Is there (an?) {NAME}\\?", asked):
        assert (match[1] == "an") == (match[2][0] in "aeiou")
        return "presence", "yes" if match.groups()[1:] in {(thing.color, thing.shape) for thing in things} else "no"
    if match := re.fullmatch(f"Where is the {NAME}, seen from the {NAME}\\?", asked):
        (a,), (b,) = (
            [thing for thing in things if (thing.color, thing.shape) == name]
            for name in (match.groups()[:2], match.groups()[2:])
        )
        return "relation", true_relation(a, b, scene.aspect).split()[0]
    assert asked == "What is the background?"
    return "background", " to ".join(scene.background)


def test_every_question_has_the_one_right_answer():
    seen = Counter()
    for rng, scene in scenes(1500):
        asked, answer = captions.question(rng, scene)
        kind, expected = true_answer(asked, scene)
        assert answer == expected, asked
        seen[kind, answer if kind == "presence" else ""] += 1
    assert len(seen) == 9
    assert min(seen.values()) > 40
    yes, no = seen["presence", "yes"], seen["presence", "no"]
    assert 0.3 < yes / (yes + no) < 0.8


def test_talk_needs_no_picture_and_is_right():
    opposites = {frozenset(pair) for pair in (("left", "right"), ("above", "below"), ("small", "large"))}
    seen = Counter()
    for seed in range(300):
        asked, answer = captions.talk(Random(seed))
        if match := re.fullmatch(r"What is (\w+) plus (\w+)\?", asked):
            seen["sum"] += 1
            assert NUMBERS.index(answer) == NUMBERS.index(match[1]) + NUMBERS.index(match[2])
        elif match := re.fullmatch(r"What is the opposite of (\w+)\?", asked):
            seen["opposite"] += 1
            assert frozenset((match[1], answer)) in opposites
        else:
            seen["count"] += 1
            match = re.fullmatch(r"Count to (\w+)\.", asked)
            assert [NUMBERS.index(word) for word in answer.split(", ")] == [*range(1, NUMBERS.index(match[1]) + 1)]
    assert min(seen[kind] for kind in ("sum", "opposite", "count")) > 50


@pytest.mark.parametrize("make", [captions.caption, captions.question, captions.detection_target])
def test_a_seed_gives_the_same_words(make):
    scene = world.random_scene(Random(2), 4)
    assert len({make(Random(5), scene) for _ in range(3)}) == 1
    assert len({make(Random(seed), scene) for seed in range(30)}) > 2
