"""Uni-Rep: how an image stands in a token sequence (paper, section 2.2.1). Pure arithmetic.

    <start-of-image> height width  (columns codes, <end-of-line>) x rows  <end-of-image>

The two size tokens count grid units of 32 pixels, height first; a grid unit is two latents. Nothing here
knows which sizes a model was trained on, or what a code looks like.
"""

import enum
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lumina_rt.vocab import Vocab

LATENTS_PER_GRID = 2


class Slot(enum.Enum):
    """What kind of token stands at an index of an image."""

    START = enum.auto()
    HEIGHT = enum.auto()
    WIDTH = enum.auto()
    CODE = enum.auto()
    END_OF_LINE = enum.auto()
    END = enum.auto()


_HEAD = (Slot.START, Slot.HEIGHT, Slot.WIDTH)


@dataclass(frozen=True)
class Layout:
    """The token layout of one image of rows x columns latents."""

    rows: int
    columns: int

    def __post_init__(self):
        sides = (self.rows, self.columns)
        if any(side <= 0 or side % LATENTS_PER_GRID for side in sides):
            raise ValueError(f"{self.rows} x {self.columns} latents; expected two even positive numbers")

    @classmethod
    def from_size(cls, width: int, height: int, factor: int = 16) -> "Layout":
        """Layout of a width x height image in pixels, at `factor` pixels a latent."""
        unit = factor * LATENTS_PER_GRID
        if width <= 0 or height <= 0 or width % unit or height % unit:
            raise ValueError(f"size is {width}x{height}; expected positive multiples of {unit}")
        return cls(height // factor, width // factor)

    @classmethod
    def from_grid(cls, grid_height: int, grid_width: int) -> "Layout":
        return cls(grid_height * LATENTS_PER_GRID, grid_width * LATENTS_PER_GRID)

    def size(self, factor: int = 16) -> tuple[int, int]:
        """(width, height) in pixels, at `factor` pixels a latent."""
        return self.columns * factor, self.rows * factor

    @property
    def grid_height(self) -> int:
        return self.rows // LATENTS_PER_GRID

    @property
    def grid_width(self) -> int:
        return self.columns // LATENTS_PER_GRID

    @property
    def n_tokens(self) -> int:
        return (self.columns + 1) * self.rows + 4

    def slot(self, i: int) -> Slot:
        """What must come at index `i` of the image, counted from `<start-of-image>`."""
        if not 0 <= i < self.n_tokens:
            raise ValueError(f"index {i} is not in an image of {self.n_tokens} tokens")
        if i < len(_HEAD):
            return _HEAD[i]
        if i == self.n_tokens - 1:
            return Slot.END
        return Slot.END_OF_LINE if self._column(i) == self.columns else Slot.CODE

    def rows_done(self, n_tokens: int) -> int:
        """Rows of latents that are complete, line end included, after the first `n_tokens` of the image."""
        return min(max(n_tokens - len(_HEAD), 0) // (self.columns + 1), self.rows)

    def codes_left(self, n_tokens: int) -> int:
        """Codes that the row of latents still lacks after the first `n_tokens` of the image, its size among them."""
        return self.columns - self._column(n_tokens)

    def _column(self, i: int) -> int:
        return (i - len(_HEAD)) % (self.columns + 1)


def encode(codes: np.ndarray, vocab: Vocab) -> list[int]:
    """Lay out the codes of an image as tokens.

    codes: integers [rows, columns].  Returns n_tokens ids. Raises ValueError for another shape or type, and
    for a code or a size that the vocabulary has no token for.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.dtype.kind not in "iu":
        raise ValueError(f"codes are {codes.dtype} of shape {codes.shape}; expected integers [rows, columns]")
    layout = Layout(*codes.shape)
    n_codes = len(vocab.image_ids)
    if codes.min() < 0 or codes.max() >= n_codes:
        raise ValueError(f"codes run from {codes.min()} to {codes.max()}; expected 0 to {n_codes - 1}")
    lines = np.full((layout.rows, layout.columns + 1), vocab.end_of_line, dtype=np.int64)
    lines[:, :-1] = vocab.image_ids[codes]
    sizes = (vocab.grid_token(layout.grid_height), vocab.grid_token(layout.grid_width))
    return [vocab.image_start, *sizes, *lines.ravel().tolist(), vocab.image_end]


def decode(tokens: Sequence[int], vocab: Vocab) -> np.ndarray:
    """Read the codes of one whole image back. The inverse of `encode`.

    Returns int64 [rows, columns]. Raises ValueError that names the first place where the layout is broken.
    """
    if len(tokens) < len(_HEAD) or tokens[0] != vocab.image_start:
        raise ValueError("the tokens of an image begin with <start-of-image> and its two size tokens")
    layout = Layout.from_grid(vocab.grid_count(tokens[1]), vocab.grid_count(tokens[2]))
    if len(tokens) != layout.n_tokens:
        raise ValueError(
            f"{len(tokens)} tokens for {layout.rows} x {layout.columns} latents; expected {layout.n_tokens}"
        )
    if tokens[-1] != vocab.image_end:
        raise ValueError(f"token {tokens[-1]} ends the image; expected the end of image {vocab.image_end}")
    lines = np.asarray(tokens[len(_HEAD) : -1], dtype=np.int64).reshape(layout.rows, layout.columns + 1)
    for row in np.flatnonzero(lines[:, -1] != vocab.end_of_line):
        raise ValueError(f"token {lines[row, -1]} ends row {row}; expected the line end {vocab.end_of_line}")
    codes = vocab.codes(lines[:, :-1])
    for row, column in np.argwhere(codes < 0):
        index = len(_HEAD) + row * (layout.columns + 1) + column
        raise ValueError(f"token {lines[row, column]} at index {index} is not an image code")
    return codes


def candidate_sizes(target: int, patch: int = 32, max_ratio: float = 4.0) -> tuple[tuple[int, int], ...]:
    """The (width, height) pairs in pixels that a model of `target` x `target` area is trained on.

    From one row of (target / patch)^2 patches the shape grows in height as long as the area allows, and else
    shrinks in width; pairs longer than `max_ratio` to 1 are left out.
    """
    area = (target // patch) ** 2
    width, height = area, 1
    sizes = []
    while width > 0:
        if max(width, height) <= max_ratio * min(width, height):
            sizes.append((width * patch, height * patch))
        if (height + 1) * width <= area:
            height += 1
        else:
            width -= 1
    return tuple(sizes)


def check_size(width: int, height: int, legal: Sequence[tuple[int, int]]) -> None:
    """Raise ValueError unless (width, height) is legal; the message tells the three nearest legal sizes.

    Nearest by the distance of (log width, log height), which weighs shape and area alike.
    """
    if (width, height) in legal:
        return
    if not all(isinstance(side, int) and side > 0 for side in (width, height)):
        raise ValueError(f"size {width}x{height} is not a size; expected a width and a height in pixels")

    def distance(size: tuple[int, int]) -> float:
        return math.dist((math.log(size[0]), math.log(size[1])), (math.log(width), math.log(height)))

    nearest = sorted(legal, key=distance)[:3]
    listed = ", ".join(f"{w}x{h}" for w, h in nearest)
    raise ValueError(f"size {width}x{height} is not one that the model knows; the nearest are {listed}")
