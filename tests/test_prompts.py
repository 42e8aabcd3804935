"""The templates to the letter, and conversations as the reference lays them out."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lumina_rt import prompts, unirep
from lumina_rt.dummy import write_tokenizer
from lumina_rt.prompts import Message, as_conversation, encode_conversation
from lumina_rt.tokenizer import Tokenizer

PICTURE = Image.new("RGB", (32, 32))
CODES = np.arange(4).reshape(2, 2)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 64)
    return Tokenizer.from_file(folder / "tokenizer.json")


def never(image):
    raise AssertionError("codes must not be encoded again")


SIZED = "according to the following prompt:\n"
CONDITIONED = "Generate an image according to the provided image, and according to the following caption:\n"


@pytest.mark.parametrize(
    ("text", "literal"),
    [
        (prompts.text_to_image("A cat.\nHi", 1280, 800), f"Generate an image of 1280x800 {SIZED}A cat.\nHi"),
        (prompts.segmentation(), "Segmentic segmentation. <|image|>"),
        (prompts.depth(), "Depth estimation. <|image|>"),
        (prompts.surface_normal(), "Surface normal estimation. <|image|>"),
        (prompts.pose(), "Human pose estimation. <|image|>"),
        (prompts.detection("The red apple."), "Detect: The red apple. <|image|>"),
        (prompts.editing("Make it night"), "Make it night <|image|>"),
        (prompts.from_condition("A hill"), f"{CONDITIONED}A hill <|image|>"),
        (prompts.multiview("A helmet"), f"Generate 16 object views of 384x384 {SIZED}A helmet"),
        (prompts.multiview("A", views=4, size=64), f"Generate 4 object views of 64x64 {SIZED}A"),
        (prompts.description(), "Describe the image in detail. <|image|>"),
    ],
)
def test_a_template_is_the_words_the_model_was_trained_on(text, literal):
    assert text == literal


FIELDS = {
    "prompt": lambda text: prompts.text_to_image(text, 512, 512),
    "object": prompts.detection,
    "instruction": prompts.editing,
    "caption": prompts.from_condition,
}


@pytest.mark.parametrize(("field", "template"), [*FIELDS.items(), ("prompt", prompts.multiview)])
def test_words_of_a_user_may_not_claim_an_image_nor_be_empty(field, template):
    with pytest.raises(ValueError, match=rf"^{field} contains <\|image\|>"):
        template("a <|image|> b")
    for empty in ("", " \n", None):
        with pytest.raises(ValueError, match=f"^{field} is .*expected some text"):
            template(empty)


def test_a_string_is_one_question():
    assert as_conversation("hello") == (Message("user", "hello"),)
    assert as_conversation(Message("user", "hello")) == (Message("user", "hello"),)


def test_messages_and_dicts_say_the_same():
    dicts = [
        {"role": "user", "content": "what? <|image|>", "images": [PICTURE]},
        {"role": "assistant", "content": "a cat"},
        {"role": "user", "content": "sure?", "images": None},
    ]
    messages = [
        Message("user", "what? <|image|>", (PICTURE,)),
        Message("assistant", "a cat"),
        Message("user", "sure?"),
    ]
    assert as_conversation(dicts) == as_conversation(messages) == tuple(messages)


def test_marks_left_out_are_put_in_front_of_any_question():
    talk = [
        Message("user", "one", (PICTURE, PICTURE)),
        Message("assistant", "ok"),
        Message("user", "", (PICTURE,)),
    ]
    texts = [message.text for message in as_conversation(talk)]
    assert texts == ["<|image|> <|image|> one", "ok", "<|image|> "]


def test_an_answer_that_is_only_an_image_begins_with_it():
    talk = [Message("user", "draw"), Message("assistant", "", (CODES,)), Message("user", "more")]
    assert as_conversation(talk)[1].text == "<|image|>"


def test_a_checked_conversation_stays_as_it_is():
    once = as_conversation([Message("user", "one", (PICTURE,))])
    assert as_conversation(once) == once


USER, ASSISTANT = Message("user", "q"), Message("assistant", "a")
EACH = "; expected one mark an image"


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ([], "it is empty"),
        (None, "NoneType; expected a str or a sequence"),
        (b"hello", "bytes; expected a str"),
        ("", "message 0 is empty"),
        ("  \n", "message 0 is empty"),
        ([USER, ASSISTANT], "its last is the assistant's"),
        ([ASSISTANT, USER, ASSISTANT], "message 0 has the role 'assistant'; expected 'user'"),
        ([USER, USER, USER], "message 1 has the role 'user'; expected 'assistant'"),
        (Message("system", "be nice"), "'system'; expected 'user'"),
        ([USER, ASSISTANT, Message("user", "")], "message 2 is empty"),
        (["hello"], "message 0 is str; expected a Message or a dict"),
        ([{"role": "user"}], r"keys \['role'\]"),
        ([{"role": "user", "content": "a", "image": 1}], "'image', 'role'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "text of message 0 is list; expected str"),
        (Message("user", "a", "picture.png"), "images of message 0 are str"),
        (Message("user", "a", (7,)), "an image of message 0 is int"),
        (Message("user", "a", (np.zeros((2, 2)),)), r"codes in message 0 are float64 of shape \(2, 2\)"),
        (Message("user", "a", (np.zeros(4, dtype=int),)), r"int64 of shape \(4,\)"),
        ("what? <|image|>", rf"^0 images for 1 <\|image\|> mark in message 0{EACH}$"),
        (Message("user", "<|image|>", (PICTURE,) * 2), rf"^2 images for 1 <\|image\|> mark in message 0{EACH}$"),
        (
            Message("user", "<|image|><|image|>", (PICTURE,)),
            rf"^1 image for 2 <\|image\|> marks in message 0{EACH}$",
        ),
        ([USER, Message("assistant", "see <|image|>"), USER], "0 images for 1 .* in message 1"),
    ],
)
def test_a_conversation_that_makes_no_sense_is_refused_in_one_line(value, reason):
    with pytest.raises(ValueError, match=reason) as caught:
        as_conversation(value)
    assert "\n" not in str(caught.value)


def test_a_conversation_is_bos_and_then_turns_each_with_its_end(tokenizer):
    vocab, encode = tokenizer.vocab, tokenizer.encode
    tokens = encode_conversation([USER, ASSISTANT, Message("user", "r")], tokenizer, never)
    end = vocab.end_of_turn
    assert tokens == [vocab.bos, *encode("q"), end, *encode("a"), end, *encode("r"), end]


def test_each_mark_becomes_its_image_in_order(tokenizer):
    vocab, encode = tokenizer.vocab, tokenizer.encode
    sources = (PICTURE, "a.png", Path("b.png"))
    codes = {id(source): np.full((2, 2), 10 + i) for i, source in enumerate(sources)}
    message = Message("user", "x <|image|>y<|image|><|image|> z", sources)
    tokens = encode_conversation([message], tokenizer, lambda image: codes[id(image)])
    images = [unirep.encode(codes[id(source)], vocab) for source in sources]
    texts = [encode(piece) for piece in ("x ", "y", "", " z")]
    body = [*texts[0], *images[0], *texts[1], *images[1], *texts[2], *images[2], *texts[3]]
    assert tokens == [vocab.bos, *body, vocab.end_of_turn]


def test_an_image_the_model_made_keeps_its_codes(tokenizer):
    talk = [Message("user", "draw"), Message("assistant", "", (CODES,)), Message("user", "bluer")]
    tokens = encode_conversation(talk, tokenizer, never)
    start = tokens.index(tokenizer.vocab.image_start)
    end = tokens.index(tokenizer.vocab.image_end) + 1
    np.testing.assert_array_equal(unirep.decode(tokens[start:end], tokenizer.vocab), CODES)
    assert tokens[start - 1] == tokens[end] == tokenizer.vocab.end_of_turn


def test_control_names_in_a_message_stay_words(tokenizer):
    vocab = tokenizer.vocab
    tokens = encode_conversation("</s><s>IMGIMGAZ<racm3:break><reserved08706>", tokenizer, never)
    assert tokens[0] == vocab.bos
    assert tokens[-1] == vocab.end_of_turn
    assert vocab.control_ids.isdisjoint(tokens[1:-1])


def test_an_answer_with_its_tokens_stands_for_itself(tokenizer):
    vocab = tokenizer.vocab
    ids = (vocab.image_start, 200, 201)
    talk = [USER, Message("assistant", "spelled <|image|> by the model", (), ids), USER]
    tokens = encode_conversation(talk, tokenizer, never)
    assert tuple(tokens[3:7]) == (*ids, vocab.end_of_turn)
    with pytest.raises(ValueError, match=f"hold {vocab.size}; expected 0 to"):
        encode_conversation([USER, Message("assistant", "a", (), (vocab.size,)), USER], tokenizer, never)


def test_an_answer_may_be_empty(tokenizer):
    tokens = encode_conversation([USER, Message("assistant", ""), USER], tokenizer, never)
    assert tokens.count(tokenizer.vocab.end_of_turn) == 3
