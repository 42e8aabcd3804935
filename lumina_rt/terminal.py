"""Images as they grow, in the terminal and in a file: half blocks of 24-bit color, or kitty's graphics protocol."""

import base64
import io
import os
import shutil
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from lumina_rt import images
from lumina_rt.outputs import Preview, RequestOutput

MOST_SHOWN = 64  # pictures, the newest


class GrowingSheet:
    """A callback of the Engine that shows images as they grow: in the terminal, and in a file.

    Several of them stand in one sheet, as do the views of `multiview`.
    """

    def __init__(self, every: int, file: Path | None, in_terminal: bool):
        """every: rows of an image from one preview to the next; `self.every` is None where nothing is shown."""
        self._file, self._in_terminal = file, in_terminal
        self.every = every if in_terminal or file else None
        self.pictures: dict[tuple[int, int, int], Image.Image] = {}  # by request, answer and image
        self._n_lines = 0  # of the picture that stands in the terminal
        self._thread = ThreadPoolExecutor(1, "shown previews", initializer=_give_way)  # steps wait for no PNG
        self._drawing: Future | None = None
        self._is_behind = False  # whether there is a picture that the last drawing did not have

    def __call__(self, event) -> None:
        if not self.every:
            return
        if isinstance(event, Preview):
            self.pictures[event.request_id, event.sample, event.image] = event.picture
        elif isinstance(event, RequestOutput):
            self.pictures |= {
                (event.request_id, answer.index, i): image
                for answer in event.answers
                for i, image in enumerate(answer.images)
            }
        else:
            return
        for oldest in list(self.pictures)[:-MOST_SHOWN]:
            del self.pictures[oldest]
        self._is_behind = bool(self.pictures)
        if self._is_behind and (self._drawing is None or self._drawing.done()):
            self._draw()

    def finish(self) -> None:
        """Show all as it is at the end. Raises what a drawing raised."""
        if self._is_behind:
            self._draw()
        if self._drawing:
            self._drawing.result()

    def _draw(self) -> None:
        """Draw all pictures as they are now. Raises what the drawing before raised."""
        if self._drawing:
            self._drawing.result()
        self._is_behind = False
        self._drawing = self._thread.submit(self._draw_all, [self.pictures[key] for key in sorted(self.pictures)])

    def _draw_all(self, pictures: list[Image.Image]) -> None:
        sheet = images.contact_sheet(pictures)
        if self._file:
            images.save_png(sheet, self._file, force=True)
        if self._in_terminal:
            self._show(sheet)

    def _show(self, sheet: Image.Image) -> None:
        columns, lines = shutil.get_terminal_size()
        draw = kitty if shows_kitty() else half_blocks
        drawn = draw(sheet, columns, max(1, lines - 2))  # a bar and the cursor stand below
        up = f"\x1b[{self._n_lines}F\x1b[J" if self._n_lines else ""
        with tqdm.external_write_mode(sys.stderr):
            print(up + "\n".join(drawn), file=sys.stderr, flush=True)
        self._n_lines = len(drawn)


def shows_kitty() -> bool:
    """Whether the terminal knows kitty's graphics protocol, by the names that it gives itself."""
    names = {os.environ.get("TERM", ""), os.environ.get("TERM_PROGRAM", "")}
    return not names.isdisjoint({"xterm-kitty", "xterm-ghostty", "ghostty", "WezTerm"})


def _cells(image: Image.Image, columns: int, lines: int) -> tuple[int, int]:
    """Columns and lines of a terminal that a picture takes, each cell two of its pixels high, or of fewer pixels."""
    scale = min(1, columns / image.width, 2 * lines / image.height)
    return max(1, int(image.width * scale)), max(1, int(image.height * scale) // 2)


def kitty(image: Image.Image, columns: int, lines: int) -> list[str]:
    """Draw a picture for a terminal of kitty's graphics protocol, in as many cells as `half_blocks` takes.

    Returns its lines, of which the last holds it; a second picture takes the place of the first.
    """
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    data = base64.b64encode(file.getvalue()).decode()
    chunks = [data[i : i + 4096] for i in range(0, len(data), 4096)]  # the most that the protocol allows
    width, height = _cells(image, columns, lines)
    # Shown at once (a=T), from a PNG (f=100), unanswered (q=2), with the cursor left where it is (C=1).
    keys = [f"a=T,f=100,q=2,C=1,i=1,p=1,c={width},r={height},"] + [""] * (len(chunks) - 1)
    more = [1] * (len(chunks) - 1) + [0]
    escapes = (f"\x1b_G{key}m={m};{chunk}\x1b\\" for key, m, chunk in zip(keys, more, chunks, strict=True))
    # Drawn from the last line, so that the terminal has scrolled to make room by then.
    up, down = (f"\x1b[{height - 1}{way}" if height > 1 else "" for way in "FE")
    return [""] * (height - 1) + [up + "".join(escapes) + down]


def half_blocks(image: Image.Image, columns: int, lines: int) -> list[str]:
    """Draw a picture in characters for a terminal of 24-bit colors: an upper half block shows two pixels.

    It is made smaller, never larger, to fit `columns` characters and `lines` lines. Returns its lines.
    """
    width, height = _cells(image, columns, lines)
    pixels = np.asarray(image.convert("RGB").resize((width, 2 * height), Image.Resampling.BOX))
    return [
        "".join(
            "\x1b[38;2;{};{};{};48;2;{};{};{}m\u2580".format(*upper, *lower)
            for upper, lower in zip(above, below, strict=True)
        )
        + "\x1b[0m"
        for above, below in zip(pixels[::2], pixels[1::2], strict=True)
    ]


def _give_way() -> None:
    """Let this thread have what the steps leave of the cores. Elsewhere than on Linux nice is not a thread's."""
    if sys.platform == "linux":
        os.nice(19)
