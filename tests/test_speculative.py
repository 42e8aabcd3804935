"""Windows of guesses: laid out as the image is, and whatever is guessed the tokens are those of one draw a step."""

import numpy as np
import pytest

from lumina_rt import Engine, EngineConfig
from lumina_rt.speculative import WINDOWS, Guesses, Pace, accepted
from lumina_rt.unirep import Layout, Slot

LAYOUT, EOL = Layout(4, 6), 99
HEAD = [1, 2, 3]


@pytest.mark.parametrize("n_known", range(3, LAYOUT.n_tokens - 2))
@pytest.mark.parametrize("n_draws", [1, 2, 5, 64])
@pytest.mark.parametrize("n_tokens", [0, 1, 4, 100])
def test_a_draft_follows_the_layout_and_ends_before_what_is_drawn(n_known, n_draws, n_tokens):
    image = [*HEAD, *([10] * 6 + [EOL]) * 4, 98]
    if LAYOUT.slot(n_known) is not Slot.CODE:
        return
    draft, indices = Guesses(LAYOUT, EOL).draft(image[:n_known], n_draws, n_tokens)
    assert indices[0] == n_known
    assert len(draft) == indices[-1] - n_known <= n_tokens
    codes = [i for i in range(n_known, LAYOUT.n_tokens) if LAYOUT.slot(i) is Slot.CODE]
    assert indices == codes[: len(indices)]
    assert len(indices) <= n_draws
    # Nothing stops it early but its bounds and the end of the image.
    longer = codes[: len(indices) + 1][-1] - n_known
    assert len(indices) in (n_draws, len(codes)) or longer > n_tokens
    for i, token in enumerate(draft, n_known):
        assert (token == EOL) == (LAYOUT.slot(i) is Slot.END_OF_LINE)


def test_new_places_take_their_left_neighbour_and_a_row_begins_as_the_one_above():
    known = [*HEAD, 10, 11, 12, 13, 14, 15, EOL]
    assert Guesses(LAYOUT, EOL).draft(known, 3, 100)[0] == [10, 10]
    assert Guesses(LAYOUT, EOL).draft([*known, 20], 3, 100)[0] == [20, 20]


def test_what_was_drawn_behind_a_wrong_past_is_the_next_guess():
    guesses = Guesses(LAYOUT, EOL)
    guesses.note(4, 50)
    assert guesses.draft([*HEAD], 4, 100) == ([3, 50, 50], [3, 4, 5, 6])


def test_draws_hold_up_to_the_first_that_differs_from_its_guess():
    draft, indices = [7, EOL, 8, 9], [3, 5, 6, 7]
    assert accepted(draft, indices, [7, 8, 9, 1]) == 4
    assert accepted(draft, indices, [7, 8, 1, 1]) == 3
    assert accepted(draft, indices, [7, 1, 9, 1]) == 2
    assert accepted(draft, indices, [1, 8, 9, 1]) == 1
    assert accepted([], [3], [1]) == 1


def test_a_pace_of_auto_takes_what_commits_most_a_second():
    def settled(seconds_of, held):
        pace, rng = Pace("auto"), np.random.default_rng(0)
        for _ in range(300):
            n_draws = pace.window(2)
            assert n_draws in WINDOWS
            pace.observe(2 * n_draws, seconds_of(2 * n_draws))
            n_held = 1
            while n_held < n_draws and rng.random() < held:
                n_held += 1
            pace.learn(n_draws, n_held)
        return pace.window(2)

    assert settled(lambda n: 1.0, held=0.9) >= 16, "tokens are free"
    assert settled(lambda n: float(n), held=0.5) == 1, "every token costs as much as the first"
    assert 2 <= settled(lambda n: 1 + n / 20, held=0.5) <= 6
    assert 6 <= settled(lambda n: 1 + n / 20, held=0.8) <= 12, "of a draw, where the one before it held"
    assert Pace("off").window(2) == 1
    assert Pace(7).window(2) == 7


@pytest.mark.parametrize("slope", [0.005, 0.02, 0.1])
def test_a_pace_of_auto_learns_within_an_image_that_guesses_do_not_hold(slope):
    pace, codes, seconds = Pace("auto"), 100, 0.0
    for _ in range(codes):
        n_draws = pace.window(2)
        took = 1 + slope * 2 * (n_draws - 1)
        pace.observe(2 * n_draws, took)
        pace.learn(n_draws, 1)
        seconds += took
    assert seconds < 1.03 * codes


def test_a_pace_of_auto_sees_when_guesses_begin_to_hold():
    pace = Pace("auto")
    for step in range(2000):
        n_draws = pace.window(2)
        pace.observe(2 * n_draws, 1 + n_draws / 10)
        pace.learn(n_draws, 1 if step < 200 else n_draws)
    assert pace.window(2) >= 8


def test_a_first_step_that_compiled_puts_off_no_window():
    pace, sizes = Pace("auto"), {1}
    for _ in range(100):
        n_draws = pace.window(2)
        pace.observe(2 * n_draws, 1.0 if n_draws in sizes else 60.0)
        pace.learn(n_draws, n_draws)
        sizes.add(n_draws)
    assert pace.window(2) == WINDOWS[-1]


@pytest.mark.parametrize("n_others", [1, 3, 40])
def test_rows_that_write_text_beside_images_neither_end_the_search_nor_begin_it_anew(n_others):
    def settled(pace, n_others, n_steps):
        for _ in range(n_steps):
            n_draws = pace.window(2, n_others)
            pace.observe(2 * n_draws + n_others, 1.0)
            pace.learn(n_draws, n_draws)
        return pace.window(2, n_others)

    pace = Pace("auto")
    assert settled(pace, n_others, 100) == WINDOWS[-1]
    assert settled(pace, 0, 1) >= WINDOWS[-4]
    assert settled(pace, n_others, 1) >= WINDOWS[-4]


def test_what_was_not_timed_is_taken_to_lie_between_its_neighbours():
    pace = Pace("auto")
    for n_lines, seconds in ((2, 1.0), (8, 4.0), (12, 3.0), (24, 5.0)):
        pace.observe(n_lines, seconds)
        pace.observe(n_lines, seconds)
    found = [pace._predict(n_lines) for n_lines in (1, 2, 5, 10, 14, 24, 32)]
    assert found == pytest.approx([0.5, 1.0, 2.5, 4.0, 3 + 1 / 3, 5.0, 5 + 8 / 6])


@pytest.mark.parametrize("speculation", ["on", "", 0, 65, 2.5, True, None])
def test_an_unknown_speculation_is_refused_by_its_value(speculation):
    with pytest.raises(ValueError, match=f"speculation is {speculation!r}; expected"):
        EngineConfig(speculation=speculation)


def test_a_window_is_timed_by_its_draws_whatever_line_ends_are_among_them(monkeypatch):
    seen = set()
    monkeypatch.setattr(Pace, "observe", lambda pace, n_draws, seconds: seen.add(n_draws))
    engine = Engine.from_pretrained(speculation=16)
    engine.generate_image("a red circle", 80, 80, progress=False)  # rows of ten codes
    assert max(seen) == 2 * 16


FORMATS = [{}, {"dtype": "bfloat16"}, {"quantization": "int8"}, {"quantization": "int4"}, {"kv_cache_dtype": "int8"}]


@pytest.mark.parametrize("options", FORMATS, ids=lambda options: "-".join(options.values()) or "float32")
def test_pictures_are_the_same_whatever_is_guessed_and_take_fewer_steps(options, monkeypatch):
    # What "auto" takes follows from what steps cost: here all cost the same, on a busy machine as well.
    observe = Pace.observe
    monkeypatch.setattr(Pace, "observe", lambda pace, n_draws, seconds: observe(pace, n_draws, 1.0))

    def drawn(speculation):
        engine = Engine.from_pretrained(**options, speculation=speculation)
        prompts = ["a red circle left of a blue star", "three green squares"]
        params = [engine.params(num_images=1, size=size, seed=4, n=2) for size in ((80, 80), (96, 64))]
        outputs = engine.generate(prompts, params, progress=False)
        codes = [answer.token_ids for output in outputs for answer in output.answers]
        return codes, sum(output.timings.n_steps for output in outputs)

    codes, n_steps = drawn("off")
    for speculation in (4, 16, 64, "auto"):
        found, n_fewer = drawn(speculation)
        assert found == codes
        assert n_fewer < n_steps
    assert drawn(16)[1] * 2 < n_steps
