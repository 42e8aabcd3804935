"""Pictures of images that are still being drawn, decoded beside the steps and never waited for.

One thread decodes for a whole Engine, in the order of asking. A request has one preview in the making at a time: what
it asks for meanwhile is left out. Previews of all requests take SHARE of the time at most, in the long run: what is
asked for before those so far are within it is left out as well. This file knows codes and pixels, not tokens.
"""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from PIL import Image

from lumina_rt.outputs import Preview
from lumina_rt.request import Request
from lumina_rt.unirep import Layout

UNDRAWN = (128, 128, 128)
SHARE = 0.02  # of the time


class Previews:
    """decode: the picture that codes, int64 [rows, columns], stand for.  factor: pixels per latent."""

    def __init__(self, decode: Callable[[np.ndarray], Image.Image], factor: int):
        self._decode, self._factor = decode, factor
        self._thread = ThreadPoolExecutor(1, "previews", initializer=stand_aside)
        self._next = 0.0  # by time.monotonic, when another may begin

    def begin(self, request: Request, sample: int, image: int, layout: Layout, codes: np.ndarray) -> None:
        """Have the finished rows of an image decoded, unless a preview of this request is still in the making, or
        previews have had their share of the time.

        The samples of a request take turns, as the first of them would else be the only one to be seen; one that
        writes text has none.
        """
        samples, n = request.samples, len(request.samples)
        turns = ((request.previewed + i) % n for i in range(1, n + 1))
        due = next(i for i in turns if i == sample or (samples[i].layout and not samples[i].finish_reason))
        if request.preview is None and sample == due and time.monotonic() >= self._next:
            request.previewed = sample
            request.preview = self._thread.submit(self._draw, request.request_id, sample, image, layout, codes)

    def take(self, request: Request) -> Preview | None:
        """The preview that has become ready, once. Raises what its decoding raised."""
        if request.preview is None or not request.preview.done():
            return None
        ready, request.preview = request.preview, None
        return ready.result()

    def _draw(self, request_id: int, sample: int, image: int, layout: Layout, codes: np.ndarray) -> Preview:
        begun = time.monotonic()
        picture = Image.new("RGB", layout.size(self._factor), UNDRAWN)
        try:
            picture.paste(self._decode(codes))
        finally:
            now = time.monotonic()
            self._next = max(self._next, now) + (now - begun) / SHARE
        return Preview(request_id, sample, image, len(codes), layout.rows, picture)


def stand_aside() -> None:
    """Give this thread a stream of its own where a GPU is in use, so that a step does not stand behind a picture, and
    no OpenMP threads beside it.

    With more of those than cores libgomp lets the ones of the steps sleep at every op, for as long as the process lives
    (an image of the embedded model 0.59 s in place of 0.15, on two cores).
    """
    torch.set_num_threads(1)  # of this thread
    if torch.cuda.is_initialized():
        torch.cuda.set_stream(torch.cuda.Stream())
