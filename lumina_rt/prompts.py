"""The exact words the model was trained on, and conversations as tokens.

Nothing here looks at pixels: an image becomes codes through the `encode_image` that the caller gives.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from lumina_rt import unirep
from lumina_rt.tokenizer import Tokenizer

IMAGE_MARK = "<|image|>"
ROLES = ("user", "assistant")
_MESSAGE_KEYS = {"role", "content", "images"}


def text_to_image(prompt: str, width: int, height: int) -> str:
    """Ask for one image of width x height pixels."""
    words = _words("prompt", prompt)
    return f"Generate an image of {width}x{height} according to the following prompt:\n{words}"


def multiview(prompt: str, views: int = 16, size: int = 384) -> str:
    """Ask for `views` square images of one object, `size` pixels a side (paper, figure 18)."""
    if views < 1:
        raise ValueError(f"views is {views!r}; expected at least 1")
    # The paper does not tell the space after the colon; text_to_image has a line break for certain.
    words = _words("prompt", prompt)
    return f"Generate {views} object views of {size}x{size} according to the following prompt:\n{words}"


def segmentation() -> str:
    """Ask for the semantic segmentation of one image."""
    # The misspelling is in the prompt that the model was trained on.
    return f"Segmentic segmentation. {IMAGE_MARK}"


def depth() -> str:
    """Ask for the depth map of one image."""
    return f"Depth estimation. {IMAGE_MARK}"


def surface_normal() -> str:
    """Ask for the surface normals of one image."""
    return f"Surface normal estimation. {IMAGE_MARK}"


def pose() -> str:
    """Ask for the human poses in one image."""
    return f"Human pose estimation. {IMAGE_MARK}"


def detection(object: str) -> str:
    """Ask where `object` is in one image."""
    return f"Detect: {_words('object', object)} {IMAGE_MARK}"


def editing(instruction: str) -> str:
    """Ask for one image, edited."""
    return f"{_words('instruction', instruction)} {IMAGE_MARK}"


def from_condition(caption: str) -> str:
    """Ask for a photo from a depth map, a segmentation, surface normals or poses."""
    request = "Generate an image according to the provided image, and according to the following caption:"
    return f"{request}\n{_words('caption', caption)} {IMAGE_MARK}"


def description() -> str:
    """Ask for a description of one image."""
    return f"Describe the image in detail. {IMAGE_MARK}"


def _words(field: str, text: str) -> str:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{field} is {text!r}; expected some text")
    if IMAGE_MARK in text:
        # It would claim an image that the template did not plan for, and shift those that follow.
        raise ValueError(f"{field} contains {IMAGE_MARK}; the template puts the mark itself")
    return text


@dataclass(frozen=True)
class Message:
    """One turn of a conversation.

    role: "user" or "assistant".  text: holds one `<|image|>` mark for each image, or none at all.
    images: PIL images, paths, bytes of image files, or codes (integer ndarray [rows, columns]): an image that
    the model made keeps its own codes, and is never encoded from pixels again.
    token_ids: of an answer, the tokens that it was drawn as; they then stand for text and images both, as text
    that is encoded again need not give the same tokens. `Answer.message` sets them.
    """

    role: str
    text: str
    images: tuple = ()
    token_ids: tuple[int, ...] = ()


Conversation = str | Message | Sequence[Message] | Sequence[Mapping]


def as_conversation(value: Conversation) -> tuple[Message, ...]:
    """Check a conversation, and put the marks where they were left out.

    value: one question, or the turns in order; a turn is a Message or {"role", "content", "images"?}.
    Any question that has images and no mark gets "<|image|> " in front per image (the reference does this in
    the first question only); such an answer gets the mark without the space, as the model answers.

    Raises ValueError for anything but user and assistant in turns with the user first and last, for an empty
    message, and for a number of marks other than that of the images.
    """
    if isinstance(value, str):
        value = Message("user", value)
    if isinstance(value, Message | Mapping):
        value = [value]
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise ValueError(f"conversation is {type(value).__name__}; expected a str or a sequence of messages")
    messages = tuple(_message(turn, i) for i, turn in enumerate(value))
    if len(messages) % 2 == 0:
        last = "its last is the assistant's" if messages else "it is empty"
        raise ValueError(f"a conversation of {len(messages)} messages; {last}, expected the user's")
    return messages


def _message(turn: Message | Mapping, i: int) -> Message:
    if isinstance(turn, Mapping):
        if not {"role", "content"} <= turn.keys() <= _MESSAGE_KEYS:
            keys = sorted(map(str, turn))
            raise ValueError(f"message {i} has the keys {keys}; expected role, content and maybe images")
        images = turn.get("images")
        turn = Message(turn["role"], turn["content"], () if images is None else images)
    if not isinstance(turn, Message):
        raise ValueError(f"message {i} is {type(turn).__name__}; expected a Message or a dict")
    if turn.role != ROLES[i % 2]:
        raise ValueError(f"message {i} has the role {turn.role!r}; expected {ROLES[i % 2]!r}")
    if not isinstance(turn.text, str):
        raise ValueError(f"the text of message {i} is {type(turn.text).__name__}; expected str")
    if turn.token_ids:
        if turn.role != "assistant":
            raise ValueError(f"message {i} of the user has token_ids; expected them in answers only")
        return turn
    if not isinstance(turn.images, tuple | list):
        found = type(turn.images).__name__
        raise ValueError(f"the images of message {i} are {found}; expected a tuple or list")
    for image in turn.images:
        _check_image(image, i)

    text, n_images = turn.text, len(turn.images)
    if turn.role == "user" and not text.strip() and not n_images:
        raise ValueError(f"message {i} is empty; expected text or an image")
    if IMAGE_MARK not in text:
        text = (IMAGE_MARK + " " * (turn.role == "user")) * n_images + text
    n_marks = text.count(IMAGE_MARK)
    if n_marks != n_images:
        marks = _count(n_marks, f"{IMAGE_MARK} mark")
        raise ValueError(f"{_count(n_images, 'image')} for {marks} in message {i}; expected one mark an image")
    return replace(turn, text=text, images=tuple(turn.images))


def _check_image(image: object, i: int) -> None:
    if isinstance(image, np.ndarray):
        if image.ndim != 2 or image.dtype.kind not in "iu":
            found = f"{image.dtype} of shape {image.shape}"
            raise ValueError(f"codes in message {i} are {found}; expected integers [rows, columns]")
    elif not isinstance(image, Image.Image | str | Path | bytes):
        found = type(image).__name__
        raise ValueError(f"an image of message {i} is {found}; expected a PIL image, a path, bytes or codes")


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + "s" * (n != 1)


def encode_conversation(
    messages: Conversation, tokenizer: Tokenizer, encode_image: Callable[[object], np.ndarray]
) -> list[int]:
    """Lay out a conversation as tokens, up to where the answer begins.

    encode_image: PIL image, path or bytes -> integers [rows, columns]; images that are codes do not pass it.
    Returns `bos q1 end_of_turn a1 end_of_turn q2 end_of_turn`; text between two images is encoded on its own.
    Raises ValueError as `as_conversation`.
    """
    vocab = tokenizer.vocab
    tokens = [vocab.bos]
    for message in as_conversation(messages):
        if message.token_ids:
            if unknown := [id for id in message.token_ids if not 0 <= id < vocab.size]:
                raise ValueError(f"token_ids of an answer hold {unknown[0]}; expected 0 to {vocab.size - 1}")
            tokens += [*message.token_ids, vocab.end_of_turn]
            continue
        before, *pieces = message.text.split(IMAGE_MARK)
        tokens += tokenizer.encode(before)
        for image, piece in zip(message.images, pieces, strict=True):
            codes = image if isinstance(image, np.ndarray) else encode_image(image)
            tokens += unirep.encode(codes, vocab) + tokenizer.encode(piece)
        tokens.append(vocab.end_of_turn)
    return tokens
