"""The procedural world: deterministic, exact, and of every shape that a picture may have."""

import math
from collections import Counter
from random import Random

import numpy as np
import pytest
from lumina_rt.sft import world
from lumina_rt.sft.world import COLORS, LATTICE, RELATIONS, SHAPES, Scene, Thing

from lumina_rt.unirep import candidate_sizes

TARGETS = (64, 80, 96)  # areas of the pictures that are trained on
ASPECTS = (4.0, 2.0, 1.0, 0.5, 0.25)


def pixels(image):
    return np.asarray(image).astype(int)


def alone(shape="circle", color="red", size="large", x=0.5, y=0.5, background=("white",)):
    return Scene((Thing(shape, color, size, x, y),), background)


def test_a_seed_gives_the_same_scene_and_picture_and_another_gives_others():
    scenes = [world.random_scene(Random(seed)) for seed in (5, 5, 6)]
    assert scenes[0] == scenes[1] != scenes[2]
    first, second = (pixels(world.picture(scene, 96, 96)) for scene in scenes[:2])
    assert np.array_equal(first, second)


@pytest.mark.parametrize("aspect", ASPECTS)
@pytest.mark.parametrize("n_things", [1, 2, 3, 4])
def test_things_lie_apart_and_within_the_picture_at_every_aspect(aspect, n_things):
    height = round(96 / math.sqrt(aspect))
    width = round(height * aspect)
    for seed in range(20):
        scene = world.random_scene(Random(seed), n_things, aspect)
        assert len(scene.things) == n_things
        covered = np.zeros((height, width), dtype=int)
        for thing in scene.things:
            left, top, right, bottom = thing.box(width, height)
            assert left >= 0
            assert top >= 0
            assert right <= width
            assert bottom <= height
            covered += pixels(world.segmentation(Scene((thing,), scene.background), width, height)).max(axis=-1) > 0
        assert covered.max() == 1, "two things touch"


@pytest.mark.parametrize("target", TARGETS)
def test_boxes_lie_on_the_lattice_a_step_off_the_border_at_every_size(target):
    for width, height in candidate_sizes(target, patch=16):
        sides = {}
        for seed in range(12):
            for thing in world.random_scene(Random(seed), None, width / height, training=False).things:
                left, top, right, bottom = box = thing.box(width, height)
                assert all(type(edge) is int and edge % LATTICE == 0 for edge in box)
                assert LATTICE <= left < right <= width - LATTICE
                assert LATTICE <= top < bottom <= height - LATTICE
                assert right - left == bottom - top
                assert (right - left) % (2 * LATTICE) == 0
                exact = world.SIZES[thing.size] * math.sqrt(width * height)
                assert abs(right - left - exact) <= LATTICE
                assert abs((left + right) / 2 - thing.x * width) <= 1.5 * LATTICE
                assert abs((top + bottom) / 2 - thing.y * height) <= 1.5 * LATTICE
                sides[thing.size] = right - left
        assert len({*sides.values()}) == len(sides)  # small and large are told apart


@pytest.mark.parametrize("size", [(64, 64), (80, 80), (80, 64), (128, 48), (80, 32), (96, 96)], ids=str)
def test_things_lie_apart_in_pictures_of_the_sizes_that_are_trained_on(size):
    n_joined = 0
    for seed in range(300):
        rng = Random(seed)
        scene = world.counted_scene(rng, rng.randint(2, 3), size[0] / size[1])
        masks = [pixels(world.segmentation(Scene((thing,), ()), *size)).max(axis=-1) > 0 for thing in scene.things]
        n_joined += sum(mask.astype(int) for mask in masks).max() > 1
    assert n_joined <= (1 if size == (80, 32) else 0)  # the least size: see world.GAP


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("size", world.SIZES)
def test_a_thing_fills_its_box_with_its_color(shape, size):
    scene = alone(shape, "blue", size, x=0.4, y=0.6)
    shown = np.abs(pixels(world.picture(scene, 120, 120)) - COLORS["blue"]).sum(axis=-1) == 0
    rows, columns = np.flatnonzero(shown.any(axis=1)), np.flatnonzero(shown.any(axis=0))
    left, top, right, bottom = scene.things[0].box(120, 120)
    tolerance = 0.1 * (right - left) + 1
    assert columns[0] - left <= tolerance
    assert right - columns[-1] <= tolerance + 1
    assert rows[0] - top <= tolerance
    assert bottom - rows[-1] <= tolerance + 1
    assert shown.sum() > 0.2 * (right - left) * (bottom - top)


def test_edges_are_antialiased():
    values = {tuple(color) for color in pixels(world.picture(alone(), 96, 96)).reshape(-1, 3)}
    assert len(values) > 10


def test_shapes_are_told_apart_by_their_outline():
    masks = [pixels(world.segmentation(alone(shape), 96, 96)).max(axis=-1) > 128 for shape in SHAPES]
    for i, a in enumerate(masks):
        for b in masks[:i]:
            assert (a & b).sum() / (a | b).sum() < 0.85


def test_labels_agree_with_the_picture():
    scene = Scene((Thing("circle", "red", "large", 0.25, 0.3), Thing("star", "cyan", "large", 0.7, 0.7)), ("black",))
    segments, depths = pixels(world.segmentation(scene, 96, 96)), pixels(world.depth(scene, 96, 96))
    picture, normals = pixels(world.picture(scene, 96, 96)), pixels(world.surface_normals(scene, 96, 96))
    for thing in scene.things:
        shown = np.abs(picture - COLORS[thing.color]).sum(axis=-1) == 0
        assert (segments[shown] == world.SEGMENT_COLORS[thing.shape]).all()
        assert len(np.unique(depths[shown])) == 1
    circle, star = (
        depths[(segments == world.SEGMENT_COLORS[shape]).all(axis=-1)].max() for shape in ("circle", "star")
    )
    assert 0 < circle < star  # the star stands lower, so nearer
    empty = (segments == 0).all(axis=-1)
    assert (depths[empty] == 0).all()
    corner = normals[:8, 88:].reshape(-1, 3)
    assert np.abs(corner - [128, 128, 255]).max() <= 1
    left, top, right, bottom = scene.things[0].box(96, 96)
    x, y, reach = (left + right) // 2, (top + bottom) // 2, (right - left) * 3 // 8
    assert normals[y, x - reach][0] < 100 < 156 < normals[y, x + reach][0]  # the left flank faces left, the right right
    assert normals[y - reach, x][1] < 100 < 156 < normals[y + reach, x][1]


def test_a_detection_adds_a_box_around_the_thing_and_changes_nothing_else():
    scene = world.random_scene(Random(3), 3)
    boxed, plain = pixels(world.detection(scene, scene.things[1], 96, 96)), pixels(world.picture(scene, 96, 96))
    drawn = (boxed == world.BOX_COLOR).all(axis=-1)
    assert np.array_equal(boxed[~drawn], plain[~drawn])
    rows, columns = np.flatnonzero(drawn.any(axis=1)), np.flatnonzero(drawn.any(axis=0))
    left, top, right, bottom = scene.things[1].box(96, 96)
    line = world.BOX_LINE
    assert (columns[0], rows[0]) == (left - line, top - line)
    assert (columns[-1] + 1, rows[-1] + 1) == (right + line, bottom + line)
    assert not drawn[top:bottom, left:right].any()


def test_relations_are_exclusive_and_mirror_each_other():
    opposite = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))
    seen = Counter()
    for seed in range(300):
        scene = world.random_scene(Random(seed), 2, aspect=Random(seed).choice(ASPECTS), training=False)
        a, b = scene.things
        related = world.relation(a, b, scene.aspect)
        seen[related] += 1
        assert world.relation(b, a, scene.aspect) == (related and opposite[related])
    assert set(seen) == {*RELATIONS, None}
    assert world.relation(Thing("ring", "red", "small", 0.2, 0.5), Thing("ring", "red", "small", 0.8, 0.5)) == "left of"


def test_one_composition_in_eight_is_held_out_and_every_part_of_it_is_trained_on():
    triples = [(c, s, r) for c in COLORS for s in SHAPES for r in (*RELATIONS, None)]
    held = [triple for triple in triples if world.is_held_out(*triple)]
    assert len(held) == len(triples) // 8
    trained = [triple for triple in triples if not world.is_held_out(*triple)]
    for part in range(3):
        assert {triple[part] for triple in trained} == {triple[part] for triple in triples}


def test_training_never_shows_what_is_held_out_and_others_do():
    scenes = [world.random_scene(Random(seed)) for seed in range(300)]
    assert not any(any(world.held_out_triples(scene)) for scene in scenes)
    assert any(any(world.held_out_triples(world.random_scene(Random(seed), training=False))) for seed in range(50))
    for seed in range(50):
        scene = world.counted_scene(Random(seed), 3)
        assert len({(thing.shape, thing.color) for thing in scene.things}) == 1
        assert not world.is_held_out(scene.things[0].color, scene.things[0].shape, None)


@pytest.mark.parametrize("aspect", ASPECTS)
def test_mixed_scenes_have_different_things_of_two_colors_and_two_shapes_and_show_nothing_held_out(aspect):
    for seed in range(30):
        scene = world.mixed_scene(Random(seed), 2 + seed % 3, aspect)
        assert len({thing.name for thing in scene.things}) == len(scene.things) == 2 + seed % 3
        assert max(len({thing.color for thing in scene.things}), len({thing.shape for thing in scene.things})) <= 2
        assert not any(world.held_out_triples(scene))


def test_a_turn_around_the_scene_comes_back_and_keeps_distances():
    scene = world.random_scene(Random(1), 2)
    turned = world.view(scene, math.pi / 2)
    a, b = scene.things
    c, d = turned.things
    assert math.dist((c.x, c.y), (d.x, d.y)) == pytest.approx(math.dist((a.x, a.y), (b.x, b.y)))
    back = world.view(turned, -math.pi / 2)
    assert [(t.x, t.y) for t in back.things] == [pytest.approx((t.x, t.y)) for t in scene.things]
    assert (c.shape, c.color) == (a.shape, a.color)


def test_a_gradient_runs_from_the_first_color_down_to_the_second():
    image = pixels(world.picture(Scene((), ("white", "black")), 8, 96))
    assert tuple(image[0, 0]) == world.BACKGROUNDS["white"]
    assert tuple(image[-1, 0]) == world.BACKGROUNDS["black"]
    assert (np.diff(image[:, 0, 0]) <= 0).all()
