"""The names decide: nothing is assumed about which id a token has."""

import numpy as np
import pytest

from lumina_rt.vocab import Vocab, image_name, reserved_name

CONTROLS = ["<s>", "<pad>", "</s>", "<unk>", "<eoss>", "<racm3:break>"]
RESERVED = [reserved_name(n) for n in (8706, 8707, *range(8796, 8865))]


def shuffled_names(n_codes=256, seed=0, step=3):
    """Names on ids with gaps, in no order at all."""
    names = CONTROLS + RESERVED + [image_name(code) for code in range(n_codes)] + ["a", "b", "Ġthe"]
    ids = np.random.default_rng(seed).permutation(len(names)) * step + 7
    return dict(zip(names, ids.tolist(), strict=True))


def published_names():
    names = ["<s>", "<pad>", "</s>", "<unk>", *(image_name(code) for code in range(8192))]
    names += ["<eoss>", "<racm3:break>", *(reserved_name(n) for n in range(8194, 8865)), "a", "b"]
    return {name: id for id, name in enumerate(names)}


def test_codes_are_spelled_in_letters():
    assert image_name(0) == "IMGIMGAZ"
    assert image_name(12) == "IMGIMGBCZ"
    assert image_name(8191) == "IMGIMGIBJBZ"


def test_published_names_give_the_published_ids():
    vocab = Vocab(published_names())
    assert (vocab.bos, vocab.image_start, vocab.image_end) == (0, 8197, 8196)
    assert (vocab.end_of_turn, vocab.end_of_line) == (8710, 8803)
    assert [vocab.grid_token(n) for n in (1, 24, 64)] == [8805, 8828, 8868]
    np.testing.assert_array_equal(vocab.image_ids, np.arange(4, 8196))


def test_ids_at_any_place_and_in_any_order_map_by_name():
    names = shuffled_names()
    vocab = Vocab(names)
    assert vocab.image_ids.dtype == np.int64
    assert vocab.image_ids.tolist() == [names[image_name(code)] for code in range(256)]
    assert sorted(vocab.image_ids.tolist()) != vocab.image_ids.tolist()
    assert vocab.end_of_line == names["<reserved08799>"]
    for n in range(1, 65):
        assert vocab.grid_token(n) == names[f"<reserved{8800 + n:05d}>"]
        assert vocab.grid_count(vocab.grid_token(n)) == n
    assert vocab.size == max(names.values()) + 1


def test_codes_is_the_inverse_and_minus_one_for_every_other_integer():
    names = shuffled_names()
    vocab = Vocab(names)
    ids = np.arange(-vocab.size - 5, vocab.size + 5)
    expected = {names[image_name(code)]: code for code in range(256)}
    codes = vocab.codes(ids)
    assert codes.dtype == np.int64
    assert codes.tolist() == [expected.get(id, -1) for id in ids.tolist()]
    assert vocab.codes(vocab.image_ids.reshape(16, 16)).tolist() == np.arange(256).reshape(16, 16).tolist()


def test_the_table_of_codes_cannot_be_changed_by_accident():
    with pytest.raises(ValueError, match="read-only"):
        Vocab(shuffled_names()).image_ids[0] = 5


def test_everything_with_a_meaning_is_a_control_and_nothing_else():
    names = shuffled_names() | {"<sentinel:7>": 5000, "<image>": 5001, "<|image|>": 5002, "<odd>": 5003}
    vocab = Vocab(names, special=frozenset([5003]))
    ordinary = {name for name, id in names.items() if id not in vocab.control_ids}
    assert ordinary == {"a", "b", "Ġthe"}


def test_a_text_answer_may_hold_only_start_of_image_and_end_of_turn_of_the_controls():
    vocab = Vocab(shuffled_names())
    allowed = vocab.control_ids - set(vocab.text_forbidden.tolist())
    assert vocab.text_forbidden.dtype == np.int64
    assert allowed == {vocab.image_start, vocab.end_of_turn}


def test_a_placeholder_beyond_the_embedding_table_counts_neither_as_a_row_nor_as_a_logit():
    names = published_names()
    vocab = Vocab(names | {"<|image|>": 65536})
    assert vocab.size == len(names)
    assert vocab.text_forbidden.max() < vocab.size
    assert 65536 in vocab.control_ids
    assert vocab.codes(np.array([65536])).tolist() == [-1]


@pytest.mark.parametrize("n", [0, -1, 65])
def test_no_size_token_for_what_the_names_lack(n):
    with pytest.raises(ValueError, match=f"no size token for {n} grid units"):
        Vocab(shuffled_names()).grid_token(n)


@pytest.mark.parametrize("name", ["<reserved08800>", "<reserved08799>", "a", image_name(3)])
def test_no_count_for_a_token_that_is_no_size(name):
    names = shuffled_names()
    with pytest.raises(ValueError, match=f"token {names[name]} is not a size token"):
        Vocab(names).grid_count(names[name])


def test_one_report_names_everything_that_is_wrong():
    names = shuffled_names()
    for name in ("<eoss>", "<s>", image_name(17), "<reserved08801>"):
        del names[name]
    names["twin"] = names["a"]
    names["far"] = 10**12
    with pytest.raises(ValueError, match="not a tokenizer") as caught:
        Vocab(names)
    report = str(caught.value)
    assert "\n" not in report
    for part in (
        "<eoss>",
        "<s>",
        "code 17 of 255 (IMGIMGBHZ)",
        "size tokens",
        "shared by a and twin",
        "far has",
    ):
        assert part in report


def test_a_vocabulary_without_images_is_refused():
    names = {name: id for name, id in shuffled_names().items() if not name.startswith("IMGIMG")}
    with pytest.raises(ValueError, match="no image token for code 0"):
        Vocab(names)


def test_a_code_spelled_twice_or_absurdly_large_is_refused_at_once():
    for name in ("IMGIMGABZ", "IMGIMG" + "J" * 40 + "Z"):
        with pytest.raises(ValueError, match="no image token for code 256 of 257"):
            Vocab(shuffled_names() | {name: 9000})
