"""The grammar of an answer: whatever is drawn among what it allows, a finished answer decodes."""

from collections import deque

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from test_vocab import shuffled_names

from lumina_rt import unirep
from lumina_rt.kv_cache import Lease, PagePool, Row
from lumina_rt.params import SamplingParams
from lumina_rt.request import Draw, Grammar, Request, Sample, answer_length
from lumina_rt.unirep import Layout, candidate_sizes
from lumina_rt.vocab import Vocab

NAMES = shuffled_names()
VOCAB = Vocab(NAMES)
SIZES = (*candidate_sizes(64), (32, 32))
GRAMMAR = Grammar(VOCAB, SIZES)
PROMPT = [VOCAB.bos, NAMES["a"], VOCAB.end_of_turn]
SMALLEST, LARGEST = 10, 28  # tokens of the images of 32x32 and of 32x128


def make_sample(params, room=1000, prompt=PROMPT):
    return Sample(0, prompt, params, GRAMMAR, answer_length(params, GRAMMAR, room))


def legal_draw(sample, rng, text):
    """Any token that the grammar leaves open here. text: the tokens that text is made of."""
    vocab = sample.grammar.vocab
    match sample.next_draw:
        case Draw.CODE:
            return int(rng.choice(vocab.image_ids))
        case Draw.HEIGHT | Draw.WIDTH:
            return int(rng.choice(sample.choices()))
    controls = [vocab.end_of_turn] * (rng.random() < 0.3)
    controls += [vocab.image_start] * (sample.may_start_image and rng.random() < 0.3)
    return int(rng.choice(controls or text))


def draw_to_end(sample, seed=0):
    rng = np.random.default_rng(seed)
    while not sample.finish_reason:
        sample.advance(legal_draw(sample, rng, [NAMES["a"], NAMES["b"]]))
    return sample


def split_answer(answer, vocab=VOCAB):
    """The codes of every image of an answer, by `unirep.decode`, and the tokens between them."""
    images, text, i = [], [], 0
    while i < len(answer):
        if answer[i] != vocab.image_start:
            text.append(answer[i])
            i += 1
            continue
        end = answer.index(vocab.image_end, i) + 1
        images.append(unirep.decode(answer[i:end], vocab))
        i = end
    return images, text


def assert_whole(sample, vocab=VOCAB):
    """A finished answer is text and whole images of legal sizes, the images are its own, and all fits."""
    images, text = split_answer(sample.answer, vocab)
    assert len(images) == len(sample.images)
    for image, own in zip(images, sample.images, strict=True):
        np.testing.assert_array_equal(image, own)
        assert Layout(*image.shape) in sample.grammar.layouts
        assert sample.params.size in (None, Layout(*image.shape).size())
    if sample.params.num_images is not None:
        assert len(images) == sample.params.num_images
    if sample.params.num_images:
        assert text == [vocab.end_of_turn]
    ends = [vocab.end_of_turn] if sample.finish_reason == "stop" else []
    assert [t for t in text if t in vocab.control_ids] == ends
    assert text[len(text) - len(ends) :] == ends
    assert sample.finish_reason in ("stop", "length")
    assert len(sample.tokens) <= sample.n_end
    assert sample.finish_reason == "stop" or len(sample.tokens) == sample.n_end
    assert sample.uncond is None
    assert sample.image_start is None


def test_layouts_are_the_sizes_once_each_and_the_smallest_first():
    grammar = Grammar(VOCAB, (*SIZES, (64, 64)))
    assert {layout.size() for layout in grammar.layouts} == set(SIZES)
    assert len(grammar.layouts) == len(SIZES)
    lengths = [layout.n_tokens for layout in grammar.layouts]
    assert lengths == sorted(lengths)
    assert (lengths[0], lengths[-1]) == (SMALLEST, LARGEST)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("num_images", [1, 2, 3])
def test_a_given_size_leaves_nothing_open_but_the_codes(size, num_images):
    sample = make_sample(SamplingParams(num_images=num_images, size=size))
    rng = np.random.default_rng(0)
    layout = Layout.from_size(*size)
    wanted = rng.integers(0, 256, (num_images, layout.rows, layout.columns))
    assert sample.tokens == [*PROMPT, *unirep.encode(wanted[0], VOCAB)[:3]]
    for code in wanted.ravel():
        assert sample.next_draw is Draw.CODE
        assert not sample.finish_reason
        sample.advance(int(VOCAB.image_ids[code]))
    assert sample.finish_reason == "stop"
    assert sample.answer == [t for codes in wanted for t in unirep.encode(codes, VOCAB)] + [VOCAB.end_of_turn]
    assert len(sample.tokens) == sample.n_end
    np.testing.assert_array_equal(np.stack(sample.images), wanted)


def test_any_legal_size_can_be_chosen_and_no_other():
    grids = {(height // 32, width // 32) for width, height in SIZES}
    reached = set()
    sample = make_sample(SamplingParams(num_images=1))
    assert sample.tokens == [*PROMPT, VOCAB.image_start]
    assert sample.next_draw is Draw.HEIGHT
    assert sample.choices() == sorted({VOCAB.grid_token(height) for height, _ in grids})
    for height in sample.choices():
        sample = make_sample(SamplingParams(num_images=1))
        sample.advance(height)
        assert sample.next_draw is Draw.WIDTH
        assert sample.choices() == sorted(VOCAB.grid_token(w) for h, w in grids if VOCAB.grid_token(h) == height)
        for width in sample.choices():
            sample = make_sample(SamplingParams(num_images=1))
            sample.advance(height)
            sample.advance(width)
            assert sample.next_draw is Draw.CODE
            assert_whole(draw_to_end(sample))
            assert sample.finish_reason == "stop"
            reached.add((VOCAB.grid_count(height), VOCAB.grid_count(width)))
    assert reached == grids


def test_images_in_a_row_have_sizes_of_their_own():
    shapes = set()
    for seed in range(20):
        sample = draw_to_end(make_sample(SamplingParams(num_images=3)), seed)
        assert_whole(sample)
        shapes.add(len({codes.shape for codes in sample.images}))
    assert shapes == {1, 2, 3}


def test_max_tokens_cuts_no_image_that_was_asked_for():
    sample = draw_to_end(make_sample(SamplingParams(num_images=2, size=(64, 64), max_tokens=5)))
    assert_whole(sample)
    assert sample.finish_reason == "stop"


@pytest.mark.parametrize(
    ("size", "each"),
    [((64, 64), 24), ((128, 32), 22), ((32, 128), 28), (None, 28)],
)
def test_images_take_exactly_the_room_they_need_and_one_token_less_is_refused(size, each):
    params = SamplingParams(num_images=3, size=size)
    need = 3 * each + 1
    assert answer_length(params, GRAMMAR, need) == need
    with pytest.raises(ValueError, match=f"3 images take {need} tokens; {need - 1} are left beside the prompt"):
        answer_length(params, GRAMMAR, need - 1)


@pytest.mark.parametrize("num_images", [0, None])
def test_text_ends_at_the_end_of_turn(num_images):
    sample = make_sample(SamplingParams(num_images=num_images))
    for _ in range(5):
        assert sample.next_draw is Draw.TEXT
        sample.advance(NAMES["a"])
        assert sample.finish_reason is None
    sample.advance(VOCAB.end_of_turn)
    assert sample.finish_reason == "stop"
    assert sample.answer == [NAMES["a"]] * 5 + [VOCAB.end_of_turn]


@pytest.mark.parametrize("num_images", [0, None])
@pytest.mark.parametrize(("max_tokens", "room", "n"), [(1, 9, 1), (7, 9, 7), (9, 7, 7), (8192, 1, 1)])
def test_text_ends_at_max_tokens_or_where_the_room_ends(num_images, max_tokens, room, n):
    sample = make_sample(SamplingParams(num_images=num_images, max_tokens=max_tokens), room)
    for _ in range(n):
        assert sample.finish_reason is None
        sample.advance(NAMES["b"])
    assert sample.finish_reason == "length"
    assert len(sample.answer) == n


def test_an_end_of_turn_on_the_last_token_is_a_stop():
    sample = make_sample(SamplingParams(num_images=0, max_tokens=2))
    sample.advance(NAMES["a"])
    sample.advance(VOCAB.end_of_turn)
    assert sample.finish_reason == "stop"


def test_a_text_answer_starts_no_image():
    sample = make_sample(SamplingParams(num_images=0))
    assert not sample.may_start_image
    assert sample.n_largest_image == 0


@pytest.mark.parametrize("size", [None, *SIZES], ids=str)
def test_a_free_answer_starts_an_image_only_where_it_fits_and_then_at_a_size_that_fits(size):
    layouts = [layout for layout in GRAMMAR.layouts if size in (None, layout.size())]
    for room in range(1, 40):
        for n_text in range(min(room, 4)):
            sample = make_sample(SamplingParams(size=size), room)
            for _ in range(n_text):
                sample.advance(NAMES["a"])
            left = room - n_text
            fitting = {layout for layout in layouts if layout.n_tokens <= left}
            assert sample.may_start_image == bool(fitting)
            if not fitting:
                continue
            sample.advance(VOCAB.image_start)
            if size is None:
                heights = {VOCAB.grid_count(token) for token in sample.choices()}
                assert heights == {layout.grid_height for layout in fitting}
                for height in sample.choices():
                    sample.tokens.append(height)
                    widths = {VOCAB.grid_count(token) for token in sample.choices()}
                    sample.tokens.pop()
                    assert widths == {
                        layout.grid_width for layout in fitting if VOCAB.grid_token(layout.grid_height) == height
                    }
            assert_whole(draw_to_end(sample, seed=room))


def test_an_image_that_fills_the_room_to_its_last_token_is_whole_and_ends_the_answer():
    sample = make_sample(SamplingParams(size=(32, 32)), room=SMALLEST)
    sample.advance(VOCAB.image_start)
    draw_to_end(sample)
    assert_whole(sample)
    assert sample.finish_reason == "length"
    assert len(sample.images) == 1


def test_a_free_answer_goes_on_with_text_after_an_image():
    sample = make_sample(SamplingParams(size=(32, 32)))
    sample.advance(VOCAB.image_start)
    for _ in range(4):
        sample.advance(int(VOCAB.image_ids[3]))
    assert sample.next_draw is Draw.TEXT
    assert sample.may_start_image
    assert sample.tokens[-2:] == [VOCAB.end_of_line, VOCAB.image_end]


PARAMS = st.builds(
    SamplingParams,
    num_images=st.sampled_from([None, 0, 1, 2, 3]),
    size=st.sampled_from([None, *SIZES]),
    guidance_scale=st.sampled_from([1.0, 4.0]),
    max_tokens=st.integers(1, 120),
)


@settings(max_examples=200, deadline=None)
@given(params=PARAMS, room=st.integers(1, 120), seed=st.integers(0, 2**32 - 1))
def test_every_answer_of_legal_draws_decodes_and_fits(params, room, seed):
    largest = Layout.from_size(*params.size).n_tokens if params.size else LARGEST
    assume(not params.num_images or params.num_images * largest + 1 <= room)
    sample = make_sample(params, room)
    rng = np.random.default_rng(seed)
    while not sample.finish_reason:
        n_tokens, was_in_image = len(sample.tokens), sample.image_start is not None
        sample.advance(legal_draw(sample, rng, [NAMES["a"], NAMES["b"]]))
        assert len(sample.tokens) > n_tokens
        guided = sample.image_start is not None and params.guidance_scale != 1
        assert (sample.uncond is not None) == guided
        assert sample.is_guided == (guided and sample.next_draw is Draw.CODE and not sample.finish_reason)
        if guided and not was_in_image:
            assert sample.uncond == Row()
        if sample.image_start is not None:
            assert sample.tokens[sample.image_start] == VOCAB.image_start
            n_image = len(sample.tokens) - sample.image_start
            assert n_image < sample.n_largest_image
            ends = sample.tokens[sample.image_start :].count(VOCAB.end_of_line)
            assert sample.rows_done == ends
    assert_whole(sample)
    n_guided = len(sample.images) if params.guidance_scale != 1 else 0
    assert len(sample.closed) == n_guided
    assert len({id(row) for row in sample.closed}) == n_guided


def test_an_unconditional_row_begins_at_the_start_of_its_image_and_joins_at_the_first_code():
    sample = make_sample(SamplingParams(num_images=2, guidance_scale=4.0))
    first = sample.uncond
    assert first == Row()
    assert not sample.is_guided
    sample.advance(VOCAB.grid_token(1))
    assert not sample.is_guided
    sample.advance(VOCAB.grid_token(1))
    assert sample.is_guided
    assert sample.pending(first) == [VOCAB.image_start, VOCAB.grid_token(1), VOCAB.grid_token(1)]
    first.n_cached, sample.cond.n_cached = 3, len(sample.tokens)
    assert sample.pending(first) == sample.pending(sample.cond) == []
    codes = VOCAB.image_ids[:4].tolist()
    sample.advance(codes[0])
    sample.advance(codes[1])
    assert sample.pending(first) == sample.pending(sample.cond) == [*codes[:2], VOCAB.end_of_line]
    sample.advance(codes[2])
    sample.advance(codes[3])
    assert sample.closed == [first]
    assert sample.closed[0] is first
    assert sample.uncond is not first
    assert sample.pending(sample.uncond) == [VOCAB.image_start]
    assert sample.next_draw is Draw.HEIGHT


@pytest.mark.parametrize("guidance", [1, 1.0])
def test_no_unconditional_row_without_guidance(guidance):
    sample = make_sample(SamplingParams(num_images=1, size=(32, 32), guidance_scale=guidance))
    assert sample.uncond is None
    assert not sample.is_guided
    assert draw_to_end(sample).closed == []


def test_a_guidance_of_zero_is_guided():
    assert make_sample(SamplingParams(num_images=1, size=(32, 32), guidance_scale=0)).is_guided


def test_what_all_samples_share_is_the_prompt_and_what_is_forced_after_it():
    assert make_sample(SamplingParams(num_images=0)).n_shared == len(PROMPT)
    assert make_sample(SamplingParams(num_images=1)).n_shared == len(PROMPT) + 1
    sample = make_sample(SamplingParams(num_images=1, size=(64, 64)))
    assert sample.n_shared == len(PROMPT) + 3
    assert sample.is_prefilling
    sample.cond.n_cached = sample.n_shared - 2
    assert sample.is_prefilling
    sample.cond.n_cached = sample.n_shared - 1
    assert not sample.is_prefilling


@pytest.mark.parametrize(
    ("params", "room", "n"),
    [
        (SamplingParams(num_images=0), 500, 0),
        (SamplingParams(num_images=2, size=(64, 64)), 500, 24),
        (SamplingParams(num_images=2), 500, 28),
        (SamplingParams(), 500, 28),
        (SamplingParams(max_tokens=12), 500, 12),
        (SamplingParams(size=(32, 32)), 500, 10),
    ],
)
def test_the_largest_image_bounds_the_unconditional_row(params, room, n):
    assert make_sample(params, room).n_largest_image == n


def test_a_sample_keeps_the_callers_prompt_as_it_was():
    prompt = list(PROMPT)
    draw_to_end(make_sample(SamplingParams(num_images=1, size=(32, 32)), prompt=prompt))
    assert prompt == PROMPT


def test_a_token_that_the_grammar_forbids_does_not_pass_unnoticed():
    sample = make_sample(SamplingParams(num_images=1))
    sample.advance(VOCAB.grid_token(1))
    with pytest.raises(ValueError, match="not a size token"):
        sample.advance(NAMES["a"])
    sample = make_sample(SamplingParams(num_images=1, size=(32, 32)))
    for _ in range(3):
        sample.advance(NAMES["a"])
    with pytest.raises(ValueError, match=f"token {NAMES['a']} at index 3 is not an image code"):
        sample.advance(NAMES["a"])


def test_a_request_is_finished_when_all_its_samples_are():
    samples = [make_sample(SamplingParams(num_images=0)) for _ in range(2)]
    request = Request(0, samples, Lease(PagePool(1)), seed=0, texts=[], events=deque())
    for sample in samples:
        assert not request.is_finished
        sample.advance(VOCAB.end_of_turn)
    assert request.is_finished
