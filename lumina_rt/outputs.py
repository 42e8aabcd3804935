"""What a caller gets back: events while an answer grows, and the answer."""

from dataclasses import dataclass, field

import numpy as np
from PIL import Image

from lumina_rt.prompts import Message


@dataclass(frozen=True)
class TextDelta:
    """Text that an answer has gained."""

    request_id: int
    sample: int
    text: str


@dataclass(frozen=True)
class ImageRow:
    """A finished row of an image. codes: int64 [columns]. row counts from 0, of n_rows."""

    request_id: int
    sample: int
    image: int
    row: int
    n_rows: int
    codes: np.ndarray


@dataclass(frozen=True)
class Preview:
    """An image that is still being drawn. picture: RGB, of the final size, and gray where nothing is drawn yet.

    rows_done: finished rows of codes, of n_rows, when it was asked for; the picture comes some steps later.
    """

    request_id: int
    sample: int
    image: int
    rows_done: int
    n_rows: int
    picture: Image.Image


@dataclass(frozen=True)
class Timings:
    """Seconds of one request: waiting, until its first token, until its last, and in the VQGAN; and counts.

    Small pictures of several requests may be decoded together; that time is told of the first that was read.
    """

    queue_s: float
    prefill_s: float
    decode_s: float
    vq_s: float
    total_s: float
    n_prompt_tokens: int
    n_answer_tokens: int
    n_steps: int


@dataclass(frozen=True)
class Answer:
    """One answer.

    text: with a `<|image|>` mark where each image stands.  images: RGB.  codes: int64 [rows, columns] of each image.
    token_ids: all of them, without the end of turn.  finish_reason: "stop", "length" or "abort".
    """

    index: int
    text: str
    images: list[Image.Image]
    codes: list[np.ndarray] = field(repr=False)
    token_ids: list[int] = field(repr=False)
    finish_reason: str

    def message(self) -> Message:
        """This answer as a turn of a dialog; its tokens are kept, so that the next turn reuses its pages."""
        return Message("assistant", self.text, tuple(self.codes), tuple(self.token_ids))


@dataclass(frozen=True)
class RequestOutput:
    """The answers to one request, the seed that they were drawn with, and how long they took."""

    request_id: int
    answers: list[Answer]
    seed: int
    timings: Timings

    @property
    def images(self) -> list[Image.Image]:
        """The images of all answers, in order."""
        return [image for answer in self.answers for image in answer.images]

    @property
    def text(self) -> str:
        """The text of the first answer."""
        return self.answers[0].text

    @property
    def token_ids(self) -> list[int]:
        """The tokens of the first answer."""
        return self.answers[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.answers[0].finish_reason


Event = TextDelta | ImageRow | Preview | RequestOutput
