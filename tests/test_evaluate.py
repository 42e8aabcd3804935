"""The evaluation: what is right counts, what is wrong does not. The engine here answers what it is told to."""

from collections import Counter
from dataclasses import replace
from random import Random
from types import SimpleNamespace

import pytest
from lumina_rt.sft import captions, evaluate, tasks, world
from lumina_rt.sft.edits import edit
from lumina_rt.sft.evaluate import CATEGORIES, Case
from lumina_rt.sft.world import COLORS, Scene, Thing

from lumina_rt import Message, SamplingParams, unirep

N = 6


class Stub:
    """Answers the i-th question with the i-th of `answers`: lists of images, or a text."""

    def __init__(self, answers=()):
        self.default_size, self.input_sizes = (80, 80), unirep.candidate_sizes(80, patch=16)
        self.answers, self.asked, self.editing = list(answers), [], {"guidance_scale": 1.5}

    def params(self, **controls):
        return SamplingParams(**controls)

    def generate(self, conversations, params):
        self.asked += list(conversations)
        mine, self.answers = self.answers[: len(conversations)], self.answers[len(conversations) :]
        return [_output(answer) for answer in mine]


def _output(answer):
    text, images = (answer, []) if isinstance(answer, str) else ("", list(answer))
    answers = [SimpleNamespace(message=lambda: Message("assistant", "an answer"))]
    return SimpleNamespace(images=images, text=text, answers=answers)


def other_color(scene: Scene) -> Scene:
    """The scene with its first thing in a colour that none of its things has."""
    color = next(color for color in COLORS if color not in {thing.color for thing in scene.things})
    return replace(scene, things=(replace(scene.things[0], color=color), *scene.things[1:]))


def moved(scene: Scene) -> Scene:
    return replace(scene, things=tuple(replace(thing, x=1 - thing.x, y=1 - thing.y) for thing in scene.things))


def scenes(seed: str, n: int = N, **options) -> list[tuple[Scene, tuple[int, int]]]:
    return evaluate._scenes(Stub(), n, seed, **options)


def pictures(found) -> list:
    return [[world.picture(scene, *size)] for scene, size in found]


def test_cases_share_the_categories_and_sizes_and_are_the_same_each_time():
    cases = evaluate.text_to_image_cases(Stub(), 48)
    assert cases == evaluate.text_to_image_cases(Stub(), 48)
    assert set(Counter(case.category for case in cases).values()) == {8}
    assert Counter(case.size for case in cases) == {(80, 80): 24, (96, 64): 12, (64, 96): 12}


def test_what_is_asked_was_never_trained_on():
    for case in evaluate.text_to_image_cases(Stub(), 60):
        alone = [world.is_held_out(thing.color, thing.shape, None) for thing in case.scene.things]
        related = [related for *_, related in world.held_out_triples(case.scene)]
        assert any(related) if case.category == "position" else any(alone)
        told = any(f" {related} " in case.caption for related in world.RELATIONS)
        assert told == (case.category == "position")


@pytest.mark.parametrize("category", CATEGORIES)
def test_the_true_picture_is_right_in_every_category_and_an_empty_one_in_none(category):
    for case in evaluate.text_to_image_cases(Stub(), 36):
        if case.category == category:
            assert evaluate.is_right(case, world.picture(case.scene, *case.size))
            assert not evaluate.is_right(case, world.picture(replace(case.scene, things=()), *case.size))


def case_of(category: str, *things: Thing) -> Case:
    return Case(category, "", (80, 80), Scene(things, ("white",)))


RED, BLUE = Thing("circle", "red", "small", 0.25, 0.5), Thing("star", "blue", "small", 0.75, 0.5)


@pytest.mark.parametrize(
    ("case", "drawn", "right"),
    [
        (case_of("single_object", RED), (replace(RED, color="green"),), True),  # the shape alone is asked
        (case_of("single_object", RED), (replace(RED, shape="ring"),), False),
        (case_of("single_object", RED), (RED, BLUE), False),  # nothing else may be there
        (case_of("colors", RED), (replace(RED, color="green"),), False),
        (case_of("two_object", RED, BLUE), (replace(RED, color="blue"), replace(BLUE, color="red")), True),
        (case_of("color_attribution", RED, BLUE), (replace(RED, color="blue"), replace(BLUE, color="red")), False),
        (case_of("color_attribution", RED, BLUE), (replace(RED, x=0.75), replace(BLUE, x=0.25)), True),
        (case_of("position", RED, BLUE), (RED, BLUE), True),
        (case_of("position", RED, BLUE), (replace(RED, x=0.75), replace(BLUE, x=0.25)), False),
        (case_of("position", RED, BLUE), (replace(RED, x=0.5, y=0.2), replace(BLUE, x=0.5, y=0.8)), False),
        (case_of("counting", RED, replace(RED, x=0.75)), (RED, replace(RED, x=0.75)), True),
        (case_of("counting", RED, replace(RED, x=0.75)), (RED,), False),
    ],
)
def test_a_picture_is_right_when_it_shows_what_the_category_asks_for(case, drawn, right):
    assert evaluate.is_right(case, world.picture(Scene(drawn, ("white",)), 80, 80)) == right


def test_the_shares_are_those_of_the_pictures():
    cases = evaluate.text_to_image_cases(Stub(), 12)
    wrong = world.picture(Scene((), ("gray",)), 80, 80)
    drawn = [[wrong if case.category == "colors" else world.picture(case.scene, *case.size)] for case in cases]
    result = evaluate.text_to_image(Stub(drawn), 12)
    assert result["categories"] == {category: float(category != "colors") for category in CATEGORIES}
    assert result["overall"] == pytest.approx(5 / 6)
    assert set(result["sizes"]) == {"80x80", "96x64"}


LABELS = {
    "segmentation": (evaluate.segmentation, world.segmentation, 1.0, lambda value: value < 0.7),
    "depth": (evaluate.depth, world.depth, 0.0, lambda value: value > 0.03),
    "normals": (evaluate.surface_normals, world.surface_normals, 0.0, lambda value: value > 10),
}


@pytest.mark.parametrize("task", LABELS)
def test_a_label_map_scores_best_where_it_is_the_truth(task):
    measure, draw, best, is_bad = LABELS[task]
    truth = [[draw(scene, *size)] for scene, size in scenes(task)]
    assert measure(Stub(truth), N) == pytest.approx(best, abs=0.1 if task == "normals" else 1e-6)
    elsewhere = [[draw(moved(scene), *size)] for scene, size in scenes(task)]
    assert is_bad(measure(Stub(elsewhere), N))


def test_a_box_counts_where_it_is_around_the_thing_that_was_asked_for():
    found = scenes("detection", fits=lambda scene: captions.detection_target(Random(0), scene) is not None)
    targets = [captions.detection_target(Random(i), scene) for i, (scene, _) in enumerate(found)]
    drawn = [[world.detection(scene, thing, *size)] for (scene, size), thing in zip(found, targets, strict=True)]
    assert evaluate.detection(Stub(drawn), N) == 1
    assert evaluate.detection(Stub(pictures(found)), N) == 0  # no box at all
    corner = [Thing("ring", "red", "small", 0.1, 0.1 + 0.8 * (thing.y < 0.5)) for thing in targets]
    elsewhere = [[world.detection(scene, thing, *size)] for (scene, size), thing in zip(found, corner, strict=True)]
    assert evaluate.detection(Stub(elsewhere), N) < 0.5


def test_an_edit_counts_where_it_was_made_and_nothing_else_changed():
    found = scenes("editing")
    after = [(edit(Random(f"edit {i}"), scene, training=False)[1], size) for i, (scene, size) in enumerate(found)]
    assert evaluate.editing(Stub(pictures(after)), N) == 1
    assert evaluate.editing(Stub(pictures(found)), N) == 0  # left as it was
    assert evaluate.editing(Stub(pictures([(other_color(scene), size) for scene, size in after])), N) == 0


def test_two_edits_in_turn_are_judged_by_the_last_picture_and_the_second_question_follows_the_first_answer():
    found, after = scenes("two edits"), []
    for i, (scene, size) in enumerate(found):
        rng = Random(f"two edits {i}")
        first = edit(rng, scene, training=False)[1]
        after.append((edit(rng, first, training=False)[1], size))
    engine = Stub([*pictures(found), *pictures(after)])
    assert evaluate.editing_in_two_turns(engine, N) == 1
    assert [len(dialog) for dialog in engine.asked[N:]] == [3] * N
    assert evaluate.editing_in_two_turns(Stub([*pictures(after), *pictures(found)]), N) < 0.5


def test_a_picture_from_a_condition_shows_the_told_things_in_the_places_of_the_map():
    found = scenes("condition")
    assert evaluate.from_condition(Stub(pictures(found)), N) == 1
    alone = [(replace(scene, things=(replace(scene.things[0], x=0.2, y=0.2),)), size) for scene, size in found]
    assert evaluate.from_condition(Stub(pictures([(moved(scene), size) for scene, size in alone])), N) < 1


def test_answers_count_when_they_are_the_very_words():
    found = scenes("questions")
    right = [captions.question(Random(f"question {i}"), scene)[1] for i, (scene, _) in enumerate(found)]
    assert evaluate.questions(Stub(right), N) == 1
    assert evaluate.questions(Stub([f"{answer}s" for answer in right]), N) == 0
    told = [captions.description(scene) for scene, _ in scenes("descriptions")]
    assert evaluate.descriptions(Stub(told), N) == 1
    assert evaluate.descriptions(Stub(told[::-1]), N) < 0.5


def test_views_agree_when_each_is_the_first_one_turned():
    n_views, side = 4, tasks.VIEW_SIZE
    found = [tasks.turntable_scene(Random(f"views {i}"), training=False) for i in range(N)]

    def views(scene: Scene, step: float):
        return [world.picture(world.view(scene, i * step), side, side) for i in range(n_views)]

    quarter = 3.14159265 / 2
    assert evaluate.multiview(Stub([views(scene, quarter) for scene in found]), N) == 1
    assert evaluate.multiview(Stub([views(scene, 0) for scene in found]), N) == 0  # never turned
    assert evaluate.multiview(Stub([views(other_color(scene), quarter) for scene in found]), N) == 0
