"""The checker reads from pixels what a scene shows, and does not take one thing for another."""

from random import Random

import numpy as np
import pytest
from lumina_rt.sft import checker, tasks, world
from lumina_rt.sft.world import BACKGROUNDS, COLORS, SHAPES, Scene, Thing
from PIL import Image, ImageFilter

SIZES = ((64, 64), (80, 80), (96, 96), (96, 48), (144, 64), (48, 96))


def noisy(image):
    noise = np.random.default_rng(0).normal(0, 8, (image.height, image.width, 3))
    return Image.fromarray((np.asarray(image) + noise).clip(0, 255).astype(np.uint8))


def blurred(image):
    return image.filter(ImageFilter.GaussianBlur(0.6))


def as_it_is(image):
    return image


def names(image):
    return sorted(thing.name for thing in checker.find_things(image))


def coverage(thing, size):
    """How much of each pixel a thing covers, 0 to 255."""
    return np.asarray(world.segmentation(Scene((thing,), ()), *size)).max(-1)


def scenes(size, n=10):
    """Scenes whose things lie apart in a picture of this size."""
    for seed in range(n):
        scene = tasks.scene_for(Random(seed), size, training=False)
        if sum(coverage(thing, size) > 0 for thing in scene.things).max() == 1:
            yield scene


@pytest.mark.parametrize("change", [as_it_is, noisy, blurred])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_all_things_and_the_background_of_a_picture_are_found(size, change):
    for scene in scenes(size):
        image = change(world.picture(scene, *size))
        assert names(image) == sorted(thing.name for thing in scene.things)
        assert checker.find_background(image) == scene.background


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_things_are_found_where_they_are_from_left_to_right(size):
    width, height = size
    for scene in scenes(size):
        found = checker.find_things(world.picture(scene, *size))
        assert [thing.x for thing in found] == sorted(thing.x for thing in found)
        for thing in scene.things:
            left, top, right, bottom = thing.box(*size)
            near = [
                other
                for other in found
                if abs(other.x * width - (left + right) / 2) <= 2 and abs(other.y * height - (top + bottom) / 2) <= 3
            ]
            assert [other.name for other in near] == [thing.name]
            assert near[0].area == pytest.approx((coverage(thing, size) > 127).mean(), rel=0.25)
            assert checker.LEAST_FIT < near[0].fit <= 1


@pytest.mark.parametrize("change", [as_it_is, noisy, blurred])
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_box_is_found_with_its_line_and_none_where_there_is_none(size, change):
    n_boxes = 0
    for scene in scenes(size):
        assert checker.find_box(change(world.picture(scene, *size))) is None
        for thing in scene.things:
            left, top, right, bottom = thing.box(*size)
            line = world.BOX_LINE
            found = checker.find_box(change(world.detection(scene, thing, *size)))
            expected = left - line, top - line, right + line, bottom + line
            assert np.abs(np.subtract(found, expected)).max() <= (0 if change is as_it_is else 1)
            n_boxes += 1
    assert n_boxes > 15


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_each_color_and_shape_is_told_from_every_other(color, shape):
    for background in BACKGROUNDS:
        for size in world.SIZES:
            scene = Scene((Thing(shape, color, size, 0.4, 0.6),), (background,))
            assert names(world.picture(scene, 64, 64)) == [f"{color} {shape}"]


def test_a_thing_too_many_or_too_few_is_told():
    a, b = Thing("ring", "red", "small", 0.25, 0.3), Thing("ring", "red", "small", 0.7, 0.7)
    assert names(world.picture(Scene((a, b), ("white",)), 64, 64)) == ["red ring"] * 2
    assert names(world.picture(Scene((a,), ("white",)), 64, 64)) == ["red ring"]
    assert names(world.picture(Scene((), ("white", "black")), 64, 64)) == []


def test_two_equal_things_that_touch_are_no_thing():
    image = world.picture(Scene((Thing("circle", "cyan", "small", 0.3, 0.5),), ("white",)), 80, 80)
    (left, top, right, bottom) = Thing("circle", "cyan", "small", 0.3, 0.5).box(80, 80)
    image.paste(image.crop((left, top, right, bottom)), (right - 1, top))
    assert names(image) == ["cyan blob"]


def test_what_is_no_outline_of_the_world_is_a_blob():
    pixels = np.full((64, 64, 3), BACKGROUNDS["white"], dtype=np.uint8)
    pixels[10:50, 10:16] = pixels[44:50, 10:50] = COLORS["blue"]
    assert names(Image.fromarray(pixels)) == ["blue blob"]


@pytest.mark.parametrize("size", ["small", "large"])
def test_stars_are_read_when_their_points_are_blurred_away(size):
    """Blurred by 1.2 pixels a star has few points left that are of its colour alone."""
    for color in COLORS:
        for background in BACKGROUNDS:
            scene = Scene((Thing("star", color, size, 0.52, 0.47),), (background,))
            soft = world.picture(scene, 80, 80).filter(ImageFilter.GaussianBlur(1.2))
            assert names(soft) == [f"{color} star"], background


def test_noise_alone_shows_nothing():
    gray = np.random.default_rng(1).integers(0, 256, (64, 64, 1))
    image = Image.fromarray(np.repeat(gray, 3, axis=2).astype(np.uint8))
    assert names(image) == []
    assert checker.find_box(image) is None


def test_a_wrong_background_is_told_and_one_that_is_hidden_is_none():
    assert checker.find_background(world.picture(Scene((), ("gray",)), 64, 64)) == ("gray",)
    for a in BACKGROUNDS:
        for b in set(BACKGROUNDS) - {a}:
            assert checker.find_background(world.picture(Scene((), (a, b)), 64, 64)) == (a, b)
    assert checker.find_background(Image.new("RGB", (64, 64), COLORS["green"])) == ()


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_a_segmentation_is_read_back_as_the_shapes_of_its_things(size):
    for scene in scenes(size, 10):
        found = checker.classes(world.segmentation(scene, *size))
        assert found.shape == (size[1], size[0])
        covered = np.zeros_like(found)
        for thing in scene.things:
            covered += coverage(thing, size)
            assert (found[coverage(thing, size) == 255] == 1 + SHAPES.index(thing.shape)).all()
        assert (found[covered == 0] == 0).all()
        assert {*np.unique(found)} >= {0} | {1 + SHAPES.index(thing.shape) for thing in scene.things}
