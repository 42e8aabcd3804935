"""Exhaustive over every size the published models know: encode, decode and slot tell the same story."""

import numpy as np
import pytest
from test_vocab import shuffled_names

from lumina_rt import unirep
from lumina_rt.unirep import Layout, Slot, candidate_sizes, check_size
from lumina_rt.vocab import Vocab

VOCAB = Vocab(shuffled_names())
SIZES = [size for target in (512, 768, 1024) for size in candidate_sizes(target)]


def codes_of(layout, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (layout.rows, layout.columns))


def slot_of(token):
    fixed = {VOCAB.image_start: Slot.START, VOCAB.end_of_line: Slot.END_OF_LINE, VOCAB.image_end: Slot.END}
    return fixed.get(token, Slot.CODE)


@pytest.mark.parametrize(("target", "n", "longest"), [(512, 49, 1092), (768, 73, 2404), (1024, 97, 4228)], ids=str)
def test_candidate_sizes_are_those_of_the_paper(target, n, longest):
    sizes = candidate_sizes(target)
    assert len(sizes) == len(set(sizes)) == n
    assert sizes[0] == (2 * target, target // 2)
    assert sizes[-1] == (target // 2, 2 * target)
    assert (target, target) in sizes
    assert {(height, width) for width, height in sizes} == set(sizes)
    assert max(Layout.from_size(*size).n_tokens for size in sizes) == longest
    for width, height in sizes:
        assert width % 32 == height % 32 == 0
        assert width * height <= target**2
        assert max(width, height) <= 4 * min(width, height)


@pytest.mark.parametrize(("side", "n_tokens"), [(384, 604), (512, 1060), (768, 2356), (1024, 4164)])
def test_square_images_have_the_published_number_of_tokens(side, n_tokens):
    assert Layout.from_size(side, side).n_tokens == n_tokens


def test_tiny_sizes_follow_the_same_rule():
    assert candidate_sizes(64) == ((128, 32), (96, 32), (64, 32), (64, 64), (32, 64), (32, 96), (32, 128))
    assert candidate_sizes(32, patch=32) == ((32, 32),)


def test_every_size_round_trips_and_every_token_is_what_its_slot_says():
    for width, height in SIZES:
        layout = Layout.from_size(width, height)
        codes = codes_of(layout, seed=width)
        tokens = unirep.encode(codes, VOCAB)
        assert len(tokens) == layout.n_tokens
        assert all(type(token) is int for token in tokens[:5])
        decoded = unirep.decode(tokens, VOCAB)
        assert decoded.dtype == np.int64
        np.testing.assert_array_equal(decoded, codes)
        slots = [layout.slot(i) for i in range(layout.n_tokens)]
        assert slots[:3] == [Slot.START, Slot.HEIGHT, Slot.WIDTH]
        assert slots[3:] == [slot_of(token) for token in tokens[3:]]
        assert tokens[1] == VOCAB.grid_token(height // 32)
        assert tokens[2] == VOCAB.grid_token(width // 32)


def test_every_size_comes_back_from_its_layout():
    for width, height in SIZES:
        layout = Layout.from_size(width, height)
        assert (layout.rows, layout.columns) == (height // 16, width // 16)
        assert layout == Layout.from_grid(height // 32, width // 32)
        assert (layout.grid_height, layout.grid_width) == (height // 32, width // 32)
        assert layout.size() == (width, height)
        assert layout.size(factor=8) == (width // 2, height // 2)
        assert Layout.from_size(width // 2, height // 2, factor=8) == layout


def test_the_layout_of_a_small_image_is_the_one_written_down():
    tokens = unirep.encode(np.array([[0, 1, 2, 3], [4, 5, 6, 7]]), VOCAB)
    line, codes = VOCAB.end_of_line, VOCAB.image_ids.tolist()
    head = [VOCAB.image_start, VOCAB.grid_token(1), VOCAB.grid_token(2)]
    assert tokens == [*head, *codes[:4], line, *codes[4:8], line, VOCAB.image_end]


@pytest.mark.parametrize("i", [-1, 60, 61])
def test_no_slot_outside_the_image(i):
    layout = Layout(8, 6)
    assert layout.n_tokens == 60
    with pytest.raises(ValueError, match=f"index {i} "):
        layout.slot(i)


def test_rows_done_counts_line_ends():
    layout = Layout(4, 6)
    for n in range(layout.n_tokens + 20):
        ends = sum(layout.slot(i) is Slot.END_OF_LINE for i in range(min(n, layout.n_tokens)))
        assert layout.rows_done(n) == ends


@pytest.mark.parametrize(
    "make",
    [
        lambda: Layout(0, 2),
        lambda: Layout(2, -2),
        lambda: Layout(3, 2),
        lambda: Layout.from_grid(0, 5),
        lambda: Layout.from_size(520, 512),
        lambda: Layout.from_size(512, 520),
        lambda: Layout.from_size(512, 16),
        lambda: Layout.from_size(0, 512),
    ],
)
def test_no_layout_of_impossible_sides(make):
    with pytest.raises(ValueError, match="expected"):
        make()


@pytest.mark.parametrize(
    ("codes", "reason"),
    [
        (np.zeros((2, 2)), "float64"),
        (np.zeros(4, dtype=int), "shape"),
        (np.zeros((0, 0), dtype=int), "even positive"),
        (np.zeros((2, 3), dtype=int), "even positive"),
        (np.full((2, 2), 256), "256; expected 0 to 255"),
        (np.full((2, 2), -1), "-1 to -1"),
        (np.zeros((2, 130), dtype=int), "no size token for 65"),
    ],
)
def test_codes_that_are_no_image_are_refused(codes, reason):
    with pytest.raises(ValueError, match=reason):
        unirep.encode(codes, VOCAB)


def broken(i, token):
    tokens = unirep.encode(np.arange(16).reshape(4, 4), VOCAB)
    tokens[i] = token
    return tokens


WHOLE = broken(0, VOCAB.image_start)


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        ([], "begin with"),
        (WHOLE[:2], "begin with"),
        (WHOLE[1:], "begin with"),
        (WHOLE[:-1], "23 tokens .* expected 24"),
        ([*WHOLE, VOCAB.end_of_turn], "25 tokens .* expected 24"),
        (broken(1, VOCAB.end_of_line), "not a size token"),
        (broken(2, VOCAB.grid_token(3)), "24 tokens .* expected 32"),
        (broken(1, shuffled_names()["<reserved08800>"]), "not a size token"),
        (broken(9, VOCAB.end_of_line), f"token {VOCAB.end_of_line} at index 9 "),
        (broken(10, -1), "token -1 at index 10 "),
        (broken(10, 10**9), "token 1000000000 at index 10 "),
        (broken(12, int(VOCAB.image_ids[0])), "ends row 1"),
        (broken(23, VOCAB.end_of_turn), "ends the image"),
    ],
)
def test_a_malformed_image_is_refused_and_the_place_is_named(tokens, reason):
    with pytest.raises(ValueError, match=reason):
        unirep.decode(tokens, VOCAB)


def test_any_one_wrong_token_is_noticed():
    for i in range(len(WHOLE)):
        with pytest.raises(ValueError, match="token"):
            unirep.decode(broken(i, VOCAB.bos), VOCAB)


def test_a_legal_size_passes_and_another_is_told_its_neighbours():
    legal = candidate_sizes(768)
    check_size(1024, 576, legal)
    with pytest.raises(ValueError, match=r"800x800 .* 768x768, ") as caught:
        check_size(800, 800, legal)
    assert str(caught.value).count("x") == 4
    with pytest.raises(ValueError, match="nearest are 1536x384, "):
        check_size(9000, 100, legal)


@pytest.mark.parametrize(
    ("size", "nearest"),
    [((1920, 1080), "1024x576"), ((1080, 1920), "576x1024"), ((3000, 3000), "768x768")],
)
def test_the_nearest_size_has_the_shape_that_was_asked_for_however_large(size, nearest):
    with pytest.raises(ValueError, match=f"nearest are {nearest}, "):
        check_size(*size, candidate_sizes(768))


@pytest.mark.parametrize("size", [(0, 512), (512, -1), (512.5, 512), ("512", "512"), (float("nan"), 1)])
def test_what_is_no_size_is_told_so(size):
    with pytest.raises(ValueError, match="expected a width and a height in pixels"):
        check_size(*size, candidate_sizes(512))


def test_an_absurdly_large_size_is_only_illegal():
    with pytest.raises(ValueError, match="the nearest are"):
        check_size(10**400, 1, candidate_sizes(512))
