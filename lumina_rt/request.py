"""A request and its samples: the only mutable state of a generation.

A Sample follows the grammar of its answer: it is told which token was drawn, appends every token that must follow,
and says what is to be drawn next. It knows tokens, not logits, and takes no decision about pages or steps.
"""

import enum
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np

from lumina_rt import unirep
from lumina_rt.kv_cache import Lease, Row
from lumina_rt.params import SamplingParams
from lumina_rt.speculative import Guesses
from lumina_rt.tokenizer import TextStream
from lumina_rt.unirep import Layout, Slot
from lumina_rt.vocab import Vocab


class Draw(enum.Enum):
    """What kind of token a sample draws next, and so which controls and which part of the head hold."""

    TEXT = enum.auto()
    HEIGHT = enum.auto()
    WIDTH = enum.auto()
    CODE = enum.auto()


@dataclass(frozen=True)
class Grammar:
    """What the answers of one Engine are made of.

    sizes: legal (width, height) in pixels.  factor: pixels per latent.
    """

    vocab: Vocab
    sizes: tuple[tuple[int, int], ...]
    factor: int = 16

    def __post_init__(self):
        layouts = sorted({Layout.from_size(*size, self.factor) for size in self.sizes}, key=lambda x: x.n_tokens)
        object.__setattr__(self, "layouts", tuple(layouts))


class Sample:
    """One answer in the making.

    tokens: prompt and answer.  cond: the row of all tokens.  uncond: the row of the current image alone, from its
    `<start-of-image>` on, or None.  images: codes [rows, columns] of the finished ones.
    """

    def __init__(self, index: int, prompt: list[int], params: SamplingParams, grammar: Grammar, n_answer: int):
        self.index, self.params, self.grammar = index, params, grammar
        self.tokens = list(prompt)
        self.n_prompt = len(prompt)
        self.n_end = len(prompt) + n_answer
        self.cond, self.uncond = Row(), None
        self._asked = Layout.from_size(*params.size, grammar.factor) if params.size else None
        self.image_start: int | None = None
        self.layout: Layout | None = None
        self.guesses: Guesses | None = None  # of the image that has this layout
        self.images: list[np.ndarray] = []
        self.finish_reason: str | None = None
        self.closed: list[Row] = []  # rows of finished images, whose pages can be given back
        self.n_waited = 0  # steps in a row in which it could have run and got nothing
        self._force()
        self.n_shared = len(self.tokens)  # what all samples of a request begin with

    @property
    def answer(self) -> list[int]:
        return self.tokens[self.n_prompt :]

    @property
    def next_draw(self) -> Draw:
        """The kind of the token at index len(tokens), which the grammar leaves open."""
        if self.image_start is None:
            return Draw.TEXT
        if self.layout is None:
            return Draw.HEIGHT if len(self.tokens) - self.image_start == 1 else Draw.WIDTH
        return Draw.CODE

    @property
    def is_guided(self) -> bool:
        return self.uncond is not None and self.next_draw is Draw.CODE

    @property
    def n_rows(self) -> int:
        """Rows that the next token is drawn from."""
        return 2 if self.is_guided else 1

    @property
    def is_prefilling(self) -> bool:
        return self.cond.n_cached < self.n_shared - 1

    @property
    def rows_done(self) -> int:
        """Finished rows of latents of the current image."""
        return self.layout.rows_done(len(self.tokens) - self.image_start) if self.layout else 0

    def pending(self, row: Row) -> list[int]:
        """The tokens of `row` that are known and not cached yet."""
        start = self.image_start if row is self.uncond else 0
        return self.tokens[start + row.n_cached :]

    def draft(self, n_draws: int, n_tokens: int) -> tuple[list[int], list[int]]:
        """Guess tokens to be fed behind the known ones, and tell which indices of `tokens` a step can then draw.

        n_draws, n_tokens: the most indices, and the most guesses. Outside images there is one index and no guess.
        """
        if n_draws == 1 or self.layout is None:
            return [], [len(self.tokens)]
        start = self.image_start
        draft, indices = self.guesses.draft(self.tokens[start:], n_draws, n_tokens)
        return draft, [start + i for i in indices]

    def note(self, indices: list[int], drawn: list[int]) -> None:
        """Remember what was drawn behind guesses that turned out wrong."""
        for index, token in zip(indices, drawn, strict=True):
            self.guesses.note(index - self.image_start, token)

    def choices(self) -> list[int]:
        """The tokens that may stand at an open grid slot: legal sizes whose image still fits, in ascending order."""
        vocab, room = self.grammar.vocab, self.n_end - self.image_start
        layouts = [layout for layout in self.grammar.layouts if layout.n_tokens <= room]
        if self.next_draw is Draw.HEIGHT:
            return sorted({vocab.grid_token(layout.grid_height) for layout in layouts})
        height = vocab.grid_count(self.tokens[-1])
        return sorted(vocab.grid_token(layout.grid_width) for layout in layouts if layout.grid_height == height)

    @property
    def n_largest_image(self) -> int:
        """Tokens of the largest image that the answer may hold; 0 where it may hold none."""
        if self.params.num_images == 0:
            return 0
        largest = self._asked or self.grammar.layouts[-1]
        return min(largest.n_tokens, self.n_end - self.n_prompt)

    @property
    def may_start_image(self) -> bool:
        """Whether a text answer may turn to an image here: allowed, and room for the smallest size."""
        smallest = self._asked or self.grammar.layouts[0]
        return self.params.num_images is None and len(self.tokens) + smallest.n_tokens <= self.n_end

    def advance(self, token: int) -> None:
        """Append a drawn token and all that must follow it; set `finish_reason` when the answer is complete."""
        self._append(token)
        self._force()
        if self.finish_reason is None and len(self.tokens) >= self.n_end:
            self.finish_reason = "length"

    def _append(self, token: int) -> None:
        vocab = self.grammar.vocab
        self.tokens.append(token)
        if self.image_start is None:
            if token == vocab.image_start:
                self.image_start = len(self.tokens) - 1
                self.uncond = Row() if self.params.guidance_scale != 1 else None
            elif token == vocab.end_of_turn:
                self.finish_reason = "stop"
            return
        i = len(self.tokens) - self.image_start  # tokens of this image so far
        if i == 3:
            self.layout = Layout.from_grid(*(vocab.grid_count(t) for t in self.tokens[-2:]))
            self.guesses = Guesses(self.layout, vocab.end_of_line)
        elif i > 3 and i == self.layout.n_tokens:
            self.images.append(unirep.decode(self.tokens[self.image_start :], vocab))
            self.image_start = self.layout = self.guesses = None
            if self.uncond is not None:
                self.closed.append(self.uncond)
                self.uncond = None

    def _force(self) -> None:
        while self.finish_reason is None and (token := self._forced()) is not None:
            self._append(token)

    def _forced(self) -> int | None:
        """The token that must come next, or None where it is to be drawn."""
        vocab, params = self.grammar.vocab, self.params
        if self.image_start is None:
            if not params.num_images:
                return None
            return vocab.image_start if len(self.images) < params.num_images else vocab.end_of_turn
        i = len(self.tokens) - self.image_start
        if i < 3:
            asked = self._asked
            return asked and vocab.grid_token(asked.grid_height if i == 1 else asked.grid_width)
        slot = self.layout.slot(i)
        return {Slot.END_OF_LINE: vocab.end_of_line, Slot.END: vocab.image_end}.get(slot)


def answer_length(params: SamplingParams, grammar: Grammar, room: int) -> int:
    """The most tokens an answer can have: exact where number and size of its images are given.

    room: tokens left beside the prompt. Raises ValueError when images asked for by number do not fit.
    """
    largest = grammar.layouts[-1].n_tokens
    if params.size:
        largest = Layout.from_size(*params.size, grammar.factor).n_tokens
    if params.num_images:
        n_tokens = params.num_images * largest + 1
        if n_tokens > room:
            raise ValueError(f"{params.num_images} images take {n_tokens} tokens; {room} are left beside the prompt")
        return n_tokens
    return min(params.max_tokens, room)


@dataclass(eq=False)
class Request:
    """A prompt, its samples, and the pages it was promised.

    events: where its caller finds what happens: TextDelta, ImageRow, Preview, and at last what makes the RequestOutput
    when it is called, or the exception that ended it. Requests of one caller may share it.
    preview_every: rows of an image from one preview to the next; None asks for none.
    wake: called, in the thread that steps, when there is an event for a caller in asyncio.
    """

    request_id: int
    samples: list[Sample]
    lease: Lease
    seed: int
    texts: list[TextStream]
    events: deque
    preview_every: int | None = None
    preview: Future | None = None  # the one in the making
    previewed: int = -1  # the sample of the last one
    wake: Callable[[], None] | None = None
    arrived: float = field(default_factory=time.perf_counter)
    admitted: float | None = None
    prefilled: float | None = None
    n_steps: int = 0
    has_forked: bool = False  # the other samples have taken over the first one's prompt

    def tell(self, event) -> None:
        self.events.append(event)
        if self.wake:
            self.wake()

    @property
    def is_finished(self) -> bool:
        return all(sample.finish_reason for sample in self.samples)
