"""Edits of a scene: the instruction and what has changed tell the same, and nothing else has."""

import re
from collections import Counter
from random import Random

import pytest
from lumina_rt.sft import world
from lumina_rt.sft.edits import edit
from lumina_rt.sft.world import BACKGROUNDS, COLORS, SHAPES, SIZES

NAME = f"({'|'.join(COLORS)}) ({'|'.join(SHAPES)})"


KINDS = {
    "recolor": f"(?:Make the|Change the color of the) {NAME} (?:to )?({'|'.join(COLORS)})\\.",
    "reshape": f"Turn the {NAME} into a ({'|'.join(SHAPES)})\\.",
    "remove": f"Remove the {NAME}\\.",
    "add": f"Add a ({'|'.join(SIZES)}) {NAME}\\.",
    "background": f"(?:Make the background|Change the background to) ({'|'.join(BACKGROUNDS)})\\.",
}


def edited(kind, n=400, training=False):
    """(scene, what the words name, scene after) of those of `n` edits that are of a kind."""
    n_found = 0
    for seed in range(n):
        rng = Random(seed)
        scene = world.random_scene(rng, rng.randint(1, 3), rng.choice((0.5, 1.0, 3.0)), training=training)
        words, after = edit(rng, scene, training=training)
        if match := re.fullmatch(KINDS[kind], words):
            yield scene, match.groups(), after
            n_found += 1
    assert n_found > 0.04 * n


def named(scene, color, shape):
    (thing,) = (thing for thing in scene.things if (thing.color, thing.shape) == (color, shape))
    return thing


def assert_one_thing_changed(scene, after, old, attributes):
    """All but one thing stay, in their order, and of that one all but the attributes."""
    assert (after.background, after.aspect) == (scene.background, scene.aspect)
    assert len(after.things) == len(scene.things)
    for before, now in zip(scene.things, after.things, strict=True):
        changed = {name for name, value in vars(before).items() if value != getattr(now, name)}
        assert changed == (attributes if before is old else set())


def test_a_recolored_thing_has_the_new_color_and_all_else_stays():
    for scene, told, after in edited("recolor"):
        old = named(scene, *told[:2])
        assert_one_thing_changed(scene, after, old, {"color"})
        assert after.things[scene.things.index(old)].color == told[2]


def test_a_reshaped_thing_has_the_new_shape_and_all_else_stays():
    for scene, told, after in edited("reshape"):
        old = named(scene, *told[:2])
        assert_one_thing_changed(scene, after, old, {"shape"})
        assert after.things[scene.things.index(old)].shape == told[2]


def test_a_removed_thing_is_gone_and_the_others_stay():
    for scene, told, after in edited("remove"):
        gone = named(scene, *told)
        assert after.things == tuple(thing for thing in scene.things if thing is not gone)
        assert (after.background, after.aspect) == (scene.background, scene.aspect)


def test_an_added_thing_is_new_has_its_size_and_touches_none():
    for scene, told, after in edited("add"):
        *others, thing = after.things
        assert tuple(others) == scene.things
        assert (after.background, after.aspect) == (scene.background, scene.aspect)
        assert (thing.size, thing.color, thing.shape) == told
        assert thing.name not in {other.name for other in others}
        reach = [SIZES[t.size] / 2 for t in after.things]
        width, height = scene.aspect**0.5, scene.aspect**-0.5
        for other, radius in zip(others, reach, strict=False):
            apart = ((other.x - thing.x) * width) ** 2 + ((other.y - thing.y) * height) ** 2
            assert apart > (radius + reach[-1]) ** 2
        assert reach[-1] < thing.x * width < width - reach[-1]
        assert reach[-1] < thing.y * height < height - reach[-1]


def test_a_new_background_is_plain_and_another_and_the_things_stay():
    for scene, told, after in edited("background"):
        assert after.background == told != scene.background
        assert (after.things, after.aspect) == (scene.things, scene.aspect)


def test_a_name_stays_the_name_of_one_thing():
    for kind in KINDS:
        for _, _, after in edited(kind):
            assert len({thing.name for thing in after.things}) == len(after.things)


@pytest.mark.parametrize("kind", KINDS)
def test_training_never_shows_what_is_held_out_and_others_do(kind):
    for scene, _, after in edited(kind, training=True):
        assert not any(world.held_out_triples(scene))
        assert not any(world.held_out_triples(after))
    assert any(any(world.held_out_triples(after)) for _, _, after in edited(kind))


def test_every_kind_is_drawn_and_follows_the_seed():
    seen = Counter()
    for seed in range(300):
        scene = world.random_scene(Random(seed), 2)
        words, after = edit(Random(seed), scene)
        assert (words, after) == edit(Random(seed), scene)
        (kind,) = (kind for kind, pattern in KINDS.items() if re.fullmatch(pattern, words))
        seen[kind] += 1
    assert seen.keys() == KINDS.keys()
    assert min(seen.values()) > 10


def test_equal_things_are_never_spoken_of_as_if_they_were_told_apart():
    for seed in range(60):
        rng = Random(seed)
        scene = world.counted_scene(rng, 3)
        words, after = edit(rng, scene)
        assert scene.things[0].name not in words
        assert after.things[:3] == scene.things


def test_the_last_thing_is_never_removed():
    scene = world.random_scene(Random(1), 1)
    for seed in range(60):
        words, after = edit(Random(seed), scene)
        assert "Remove" not in words
        assert after.things


def test_training_asks_for_a_new_background_seldom():
    scene = world.random_scene(Random(0), 2)

    def n_backgrounds(training):
        return sum("background" in edit(Random(seed), scene, training)[0] for seed in range(1000))

    assert n_backgrounds(training=True) < 120, "one in thirteen"
    assert n_backgrounds(training=False) > 150, "one in five"
