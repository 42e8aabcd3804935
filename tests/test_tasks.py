"""The tasks as dialogs: well formed, of the size asked for, in the runtime's words, and of nothing held out."""

import math
import re
from random import Random

import numpy as np
import pytest
from lumina_rt.sft import checker, tasks, world
from lumina_rt.sft.tasks import TASKS

from lumina_rt import prompts
from lumina_rt.prompts import IMAGE_MARK, as_conversation

SIZES = ((64, 64), (96, 48), (48, 96))
TEXT_ANSWERS = ("describe", "questions", "talk")


def dialogs(task, n=40):
    for seed in range(n):
        size = SIZES[seed % len(SIZES)]
        yield size, TASKS[task](Random(seed), size)


def same(a, b):
    return np.array_equal(np.asarray(a), np.asarray(b))


@pytest.mark.parametrize("task", TASKS)
def test_a_dialog_is_one_that_the_runtime_takes_and_ends_with_an_answer(task):
    for _, turns in dialogs(task):
        assert len(turns) % 2 == 0
        for i, turn in enumerate(turns):
            assert turn.role == ("user", "assistant")[i % 2]
            assert turn.text.count(IMAGE_MARK) == len(turn.images)
            assert turn.text.strip()
        # The runtime changes nothing of it: marks and spaces stand where it would put them.
        assert as_conversation(turns[:-1]) == turns[:-1]
        assert (turns[-1].text.replace(IMAGE_MARK, "") == "") == (task not in TEXT_ANSWERS)


@pytest.mark.parametrize("task", TASKS)
def test_every_picture_has_the_size_asked_for(task):
    for size, turns in dialogs(task):
        expected = (tasks.VIEW_SIZE, tasks.VIEW_SIZE) if task == "multiview" else size
        images = [image for turn in turns for image in turn.images]
        assert {image.size for image in images} == ({expected} if task != "talk" else set())
        assert all(image.mode == "RGB" for image in images)


@pytest.mark.parametrize("task", TASKS)
def test_a_seed_gives_the_same_dialog_and_another_gives_others(task):
    words = []
    for seed in (*range(12), 0):
        turns = TASKS[task](Random(seed), (64, 64))
        words.append([(turn.text, *(image.tobytes() for image in turn.images)) for turn in turns])
    assert words[0] == words[-1]
    assert len({repr(one) for one in words}) > 8


@pytest.mark.parametrize("task", TASKS)
def test_no_task_shows_a_composition_that_is_held_out(task, monkeypatch):
    draw, shown = world.picture, []
    monkeypatch.setattr(world, "picture", lambda scene, *size: shown.append(scene) or draw(scene, *size))
    for _ in dialogs(task, 100):
        pass
    assert bool(shown) == (task != "talk")
    assert not any(any(world.held_out_triples(scene)) for scene in shown)


def test_a_scene_for_evaluation_may_show_what_is_held_out():
    scenes = [tasks.scene_for(Random(seed), (64, 64), training=False) for seed in range(60)]
    assert any(any(world.held_out_triples(scene)) for scene in scenes)
    equal = [len({thing.name for thing in scene.things}) < len(scene.things) for scene in scenes]
    assert 5 < sum(equal) < 25  # one time in four


@pytest.mark.parametrize(("task", "prompt"), [
    ("describe", prompts.description()), ("segmentation", prompts.segmentation()), ("depth", prompts.depth()),
    ("normals", prompts.surface_normal()),
])  # fmt: skip
def test_a_picture_is_asked_about_in_the_words_of_the_runtime(task, prompt):
    assert {turns[0].text for _, turns in dialogs(task)} == {prompt}


def test_a_picture_is_drawn_of_what_the_caption_names():
    for size, (question, answer) in dialogs("text_to_image"):
        words = question.text.removeprefix(prompts.text_to_image("-", *size).removesuffix("-"))
        assert len(words) < len(question.text)
        for color, shape in {(thing.color, thing.shape) for thing in checker.find_things(answer.images[0])}:
            assert f"{color} {shape}" in words


@pytest.mark.parametrize("task", ["segmentation", "depth", "normals"])
def test_a_label_map_is_that_of_the_picture_shown(task, monkeypatch):
    scenes, draw = [], world.picture
    monkeypatch.setattr(world, "picture", lambda scene, *size: scenes.append(scene) or draw(scene, *size))
    draw_map = {"segmentation": world.segmentation, "depth": world.depth, "normals": world.surface_normals}[task]
    for size, (question, answer) in dialogs(task, 10):
        assert same(question.images[0], draw(scenes[-1], *size))
        assert same(answer.images[0], draw_map(scenes[-1], *size))


def test_a_detection_is_the_picture_with_a_box_around_what_was_asked():
    for _, (question, answer) in dialogs("detection"):
        name = re.fullmatch(r"Detect: (\w+ \w+) <\|image\|>", question.text)[1]
        left, top, right, bottom = checker.find_box(answer.images[0])
        width, height = answer.images[0].size
        inside = [
            thing
            for thing in checker.find_things(question.images[0])
            if left < thing.x * width < right and top < thing.y * height < bottom
        ]
        assert [thing.name for thing in inside] == [name]
        assert checker.find_box(question.images[0]) is None


def test_an_edit_starts_from_the_picture_shown_and_a_second_from_its_answer(monkeypatch):
    made, edit = [], tasks.edit
    monkeypatch.setattr(tasks, "edit", lambda rng, scene: made.append((scene, *edit(rng, scene))) or made[-1][1:])
    seen = set()
    for size, turns in dialogs("editing"):
        before, words, after = made[0]
        assert turns[0].text == prompts.editing(words)
        assert same(turns[0].images[0], world.picture(before, *size))
        assert same(turns[1].images[0], world.picture(after, *size))
        assert len(turns) == 2 * len(made)
        if len(made) == 2:
            assert made[1][0] == after
            assert turns[2].text == made[1][1]
            assert same(turns[3].images[0], world.picture(made[1][2], *size))
        seen.add(len(made))
        made.clear()
    assert seen == {1, 2}


def test_a_condition_is_a_map_of_the_picture_that_is_drawn(monkeypatch):
    scenes, draw, seen = [], world.picture, set()
    monkeypatch.setattr(world, "picture", lambda scene, *size: scenes.append(scene) or draw(scene, *size))
    for size, (question, answer) in dialogs("from_condition"):
        assert question.text.startswith(prompts.from_condition("-").split("-")[0])
        maps = [draw_map(scenes[-1], *size) for draw_map in (world.segmentation, world.depth)]
        (kind,) = (i for i, image in enumerate(maps) if same(image, question.images[0]))
        assert same(answer.images[0], draw(scenes[-1], *size))
        seen.add(kind)
    assert seen == {0, 1}


def test_questions_show_one_picture_and_ask_on_about_it():
    n_turns = set()
    for _, turns in dialogs("questions"):
        n_turns.add(len(turns) // 2)
        assert [len(turn.images) for turn in turns] == [1] + [0] * (len(turns) - 1)
        assert turns[0].text.startswith(f"{IMAGE_MARK} ")
    assert n_turns == {*range(2, 9)}


def test_views_are_as_many_as_asked_and_turn_around_the_scene():
    seen = set()
    for seed in range(30):
        question, answer = TASKS["multiview"](Random(seed), (64, 64))
        n_views = len(answer.images)
        side = tasks.VIEW_SIZE
        assert question.text.startswith(prompts.multiview("-", n_views, side).removesuffix("-"))
        assert answer.text == IMAGE_MARK * n_views
        first, opposite = (checker.find_things(answer.images[i]) for i in (0, n_views // 2))
        assert sorted(thing.name for thing in first) == sorted(thing.name for thing in opposite)
        for thing in first:
            (turned,) = (other for other in opposite if other.name == thing.name)
            assert thing.x + turned.x == pytest.approx(1, abs=6 / side)  # boxes lie on a lattice
            assert thing.y + turned.y == pytest.approx(1, abs=6 / side)
        seen.add(n_views)
    assert seen == set(tasks.VIEWS)


def test_a_turntable_scene_stays_in_the_picture_while_it_turns():
    for seed in range(30):
        scene = tasks.turntable_scene(Random(seed))
        assert len({thing.name for thing in scene.things}) == 2
        for angle in np.linspace(0, 2 * math.pi, 16):
            for thing in world.view(scene, angle).things:
                radius = world.SIZES[thing.size] / 2
                assert radius < thing.x < 1 - radius
                assert radius < thing.y < 1 - radius


def test_small_and_large_differ_at_every_size_that_the_tasks_draw():
    sizes = {image.size for task in TASKS for _, turns in dialogs(task, 6) for turn in turns for image in turn.images}
    for width, height in sizes:
        sides = [world.Thing("star", "red", size, 0.5, 0.5).box(width, height) for size in ("small", "large")]
        assert sides[0][2] - sides[0][0] < sides[1][2] - sides[1][0]


def test_half_of_the_scenes_to_tell_apart_share_colors_and_shapes(monkeypatch):
    monkeypatch.setattr(world, "mixed_scene", lambda rng, n_things, aspect: None)
    scenes = [tasks.scene_to_tell_apart(Random(seed), (80, 80)) for seed in range(200)]
    assert 80 <= scenes.count(None) <= 120
