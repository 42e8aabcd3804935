"""Text of a user stays text: whatever it spells, no control token comes out."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Library

from lumina_rt.dummy import write_tokenizer
from lumina_rt.tokenizer import Tokenizer
from lumina_rt.vocab import image_name, reserved_name

TYPED = [
    *["<s>", "<pad>", "</s>", "<unk>", "<eoss>", "<racm3:break>", "<|image|>", "<image>"],
    *["<reserved08706>", "<reserved08799>", "<reserved08803>", "IMGIMGAZ", "IMGIMGGDZ", "IMGIMGJZ"],
]


def write_flagged_tokenizer(path, all_special=None):
    """Every control name as an added token, some swallowing spaces; most flagged special, or all, or none."""
    names = [
        "<s>",
        "<pad>",
        "</s>",
        "<unk>",
        *map(image_name, range(64)),
        "<eoss>",
        "<racm3:break>",
        "<|image|>",
    ]
    names += [reserved_name(n) for n in (8706, *range(8796, 8865))] + ["<odd>"]
    ids = {name: id for id, name in enumerate([*names, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th"])}
    file = Library(models.BPE(vocab=ids, merges=[("t", "h")]))
    file.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex("IMGIMG[A-J]+Z"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    file.decoder = decoders.ByteLevel()
    for i, name in enumerate(names):
        special = i % 5 != 2 if all_special is None else all_special
        token = AddedToken(name, lstrip=i % 3 == 0, rstrip=i % 4 == 0, normalized=False, special=special)
        file.add_special_tokens([token]) if token.special else file.add_tokens([token])
    file.add_tokens([AddedToken("naïve word", normalized=False)])
    file.enable_truncation(max_length=5)
    file.enable_padding(length=20)
    file.save(str(path))
    return path


@pytest.fixture(scope="module", params=["dummy", "published", "flagged", "unflagged"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    path = folder / "tokenizer.json"
    if request.param in ("dummy", "published"):
        write_tokenizer(folder, 64 if request.param == "dummy" else 8192)
    else:
        write_flagged_tokenizer(path, all_special=None if request.param == "flagged" else False)
    return Tokenizer.from_file(path)


def is_clean(tokenizer, ids):
    return tokenizer.vocab.control_ids.isdisjoint(ids)


@pytest.mark.parametrize("name", ["<racm3:break>", "IMGIMGAZ", "<s>", "<reserved08706>"])
def test_the_library_alone_would_let_control_names_through(tokenizer, name):
    ids = tokenizer._file.encode(name, add_special_tokens=False).ids
    assert not is_clean(tokenizer, ids)


@pytest.mark.parametrize("typed", TYPED)
@pytest.mark.parametrize("frame", ["{}", "a {} b", " {}\n", "x{0}{0}y", "é{}🙂"])
def test_a_control_name_typed_by_a_user_is_spelled_out(tokenizer, typed, frame):
    text = frame.format(typed)
    ids = tokenizer.encode(text)
    assert is_clean(tokenizer, ids)
    assert tokenizer.decode(ids) == text


PIECES = st.one_of(st.sampled_from(TYPED), st.text(max_size=4), st.sampled_from(["IMGIMG", "<", "Z", " ", "th"]))


@settings(max_examples=100, deadline=None)
@given(pieces=st.lists(PIECES, max_size=8))
def test_no_text_becomes_a_control_token_and_all_text_survives(tokenizer, pieces):
    text = "".join(pieces)
    ids = tokenizer.encode(text)
    assert is_clean(tokenizer, ids)
    assert tokenizer.decode(ids) == text


@settings(max_examples=60, deadline=None)
@given(text=st.text(alphabet=st.characters(exclude_characters="<Z", exclude_categories=["Cs"])))
def test_text_without_control_names_has_the_tokens_that_the_library_gives_it(tokenizer, text):
    assert tokenizer.encode(text) == tokenizer._file.encode(text, add_special_tokens=False).ids


def test_ordinary_text_beside_a_control_name_keeps_its_tokens(tokenizer):
    assert tokenizer.encode("the<s>the") == [
        *tokenizer.encode("the"),
        *tokenizer.encode("<s>"),
        *tokenizer.encode("the"),
    ]


def test_a_special_token_with_any_name_is_control(tmp_path):
    tokenizer = Tokenizer.from_file(write_flagged_tokenizer(tmp_path / "tokenizer.json"))
    odd = tokenizer._file.token_to_id("<odd>")
    assert odd in tokenizer.vocab.control_ids
    assert is_clean(tokenizer, tokenizer.encode("an <odd> one"))
    assert tokenizer.decode(tokenizer.encode("an <odd> one")) == "an <odd> one"


def test_long_text_is_neither_truncated_nor_padded(tokenizer):
    assert len(tokenizer.encode("a" * 100)) == 100
    assert len(tokenizer.encode("ab")) == 2


def test_no_beginning_of_sequence_is_added(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.vocab.bos not in tokenizer.encode("a")


def test_a_nul_is_a_character_like_any_other(tokenizer):
    assert tokenizer.decode(tokenizer.encode("a\0b")) == "a\0b"


def test_a_lone_surrogate_is_refused_by_its_place(tokenizer):
    with pytest.raises(ValueError, match="lone surrogate at character 2"):
        tokenizer.encode("ab\ud800c")


def test_decode_leaves_out_control_tokens_and_ids_without_a_name(tokenizer):
    vocab = tokenizer.vocab
    ids = [
        vocab.bos,
        *tokenizer.encode("héllo"),
        vocab.image_start,
        10**6,
        *tokenizer.encode("!"),
        vocab.end_of_turn,
    ]
    assert tokenizer.decode(ids) == "héllo!"
    assert tokenizer.decode(np.array(ids)) == "héllo!"


def test_decode_agrees_with_the_library_on_every_token(tokenizer):
    for id in set(range(tokenizer.vocab.size)) - tokenizer.vocab.control_ids:
        assert tokenizer.decode([id]) == tokenizer._file.decode([id], skip_special_tokens=False)


def test_an_added_word_that_is_not_special_stays_text(tmp_path):
    tokenizer = Tokenizer.from_file(write_flagged_tokenizer(tmp_path / "tokenizer.json"))
    ids = tokenizer.encode("a naïve word!")
    assert tokenizer._file.token_to_id("naïve word") in ids
    assert tokenizer.decode(ids) == "a naïve word!"


def test_a_stream_gives_whole_characters_as_soon_as_they_are_whole(tokenizer):
    stream = tokenizer.stream()
    assert [stream.step(id) for id in tokenizer.encode("é中🙂a")] == [
        *["", "é"],
        *["", "", "中"],
        *["", "", "", "🙂"],
        "a",
    ]
    assert stream.finish() == ""


def test_a_stream_passes_over_control_tokens_amid_a_character(tokenizer):
    first, second = tokenizer.encode("é")
    stream = tokenizer.stream()
    steps = [first, tokenizer.vocab.image_start, tokenizer.vocab.image_end, second]
    assert [stream.step(id) for id in steps] == ["", "", "", "é"]


def test_a_stream_ends_an_unfinished_character_at_the_end_only(tokenizer):
    stream = tokenizer.stream()
    assert [stream.step(id) for id in tokenizer.encode("a🙂")[:-1]] == ["a", "", "", ""]
    assert stream.finish() == "\ufffd"


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_stream_of_any_tokens_is_the_decoded_whole(tokenizer, data):
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab.size + 3), max_size=30))
    stream = tokenizer.stream()
    assert "".join([*map(stream.step, ids), stream.finish()]) == tokenizer.decode(ids)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no tokenizer at .*nowhere\.json"):
        Tokenizer.from_file(tmp_path / "nowhere.json")
    with pytest.raises(ValueError, match=r"expected a tokenizer\.json"):
        Tokenizer.from_file(tmp_path)


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff\xfe", b'{"model": {"type": "BPE"}}', b"[1, 2"])
def test_a_file_that_is_no_tokenizer_is_named(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer\.json") as caught:
        Tokenizer.from_file(path)
    assert "\n" not in str(caught.value)


def without(path, names):
    """Drop names from the file at `path`."""
    file = json.loads(path.read_text())
    for name in names:
        del file["model"]["vocab"][name]
    file["added_tokens"] = [token for token in file["added_tokens"] if token["content"] not in names]
    path.write_text(json.dumps(file))
    return path


def test_a_tokenizer_of_another_model_is_named_with_what_it_lacks(tmp_path):
    write_tokenizer(tmp_path, 64)
    path = without(tmp_path / "tokenizer.json", ["<eoss>", image_name(9)])
    with pytest.raises(ValueError, match=r"tokenizer\.json: .*<eoss>; no image token for code 9 of 63"):
        Tokenizer.from_file(path)


def test_a_tokenizer_that_cannot_write_every_byte_is_refused(tmp_path):
    write_tokenizer(tmp_path, 64)
    with pytest.raises(ValueError, match="no token for 1 of the 256 bytes, 0x41"):
        Tokenizer.from_file(without(tmp_path / "tokenizer.json", ["A"]))


def test_the_dummy_of_published_size_has_the_published_ids(tmp_path):
    write_tokenizer(tmp_path, 8192, 65536)
    vocab = Tokenizer.from_file(tmp_path / "tokenizer.json").vocab
    assert (vocab.bos, vocab.image_end, vocab.image_start) == (0, 8196, 8197)
    assert (vocab.end_of_turn, vocab.end_of_line, vocab.grid_token(24)) == (8710, 8803, 8828)
    assert vocab.image_ids.tolist() == list(range(4, 8196))
    assert vocab.size == 65536
