"""The pictures of finished answers: drawn when somebody reads them, small ones several at a time."""

import threading
from collections import deque
from collections.abc import Sequence
from weakref import ref

import numpy as np
import torch
from PIL import Image

from lumina_rt.vqgan import VQGAN, to_uint8

# Pixels that are drawn together at most; a larger picture is drawn alone. The operations of small ones take longer to
# begin than to do: on two cores with AMX one of 80 x 80 takes the embedded model 4.7 ms alone, and 2.4 as one of eight.
AT_ONCE = 8 * 80 * 80


class Picture:
    """One finished image. codes: int64 [rows, columns].  image: RGB, once it is drawn."""

    def __init__(self, codes: np.ndarray):
        self.codes, self.image = codes, None


class Pictures:
    """What a VQGAN draws for an Engine. Any thread may call it."""

    def __init__(self, vqgan: VQGAN):
        self.vqgan = vqgan
        self._drawing = threading.Lock()  # one drawing at a time: what it takes of memory is taken once
        self._waiting: deque[ref[Picture]] = deque()  # drawn for nobody where nobody can read it any more

    def add(self, codes: np.ndarray) -> Picture:
        """A picture to be read later, which may be drawn with another one before. Waits for nothing."""
        picture = Picture(codes)
        self._waiting.append(ref(picture))
        return picture

    def read(self, picture: Picture) -> Image.Image:
        """Draw a picture where that is still to be done, and others of its size that wait along with it."""
        with self._drawing:
            if picture.image is None:
                self._draw(self._together(picture))
        return picture.image

    def draw(self, codes: Sequence[np.ndarray]) -> list[Image.Image]:
        """Draw the pictures that codes of one shape stand for."""
        batch = torch.from_numpy(np.stack(codes).astype(np.int64))
        return [Image.fromarray(pixels) for pixels in to_uint8(self.vqgan.decode(batch)).cpu().numpy()]

    def _draw(self, pictures: list[Picture]) -> None:
        """Draw some pictures together. Raises what drawing the first of them raises."""
        try:
            drawn = self.draw([picture.codes for picture in pictures])
        except Exception:
            if len(pictures) == 1:
                raise
            return self._draw(pictures[:1])  # whose turn it is; the others are drawn when it is theirs
        for picture, image in zip(pictures, drawn, strict=True):
            picture.image = image

    def _together(self, picture: Picture) -> list[Picture]:
        """A picture, and some of its size that wait, as many as fit. These, and what nobody can read, wait no more."""
        together = [picture]
        n_most = AT_ONCE // (picture.codes.size * self.vqgan.config.factor**2) if self.vqgan.is_batch_invariant else 1
        for _ in range(len(self._waiting)):
            other = self._waiting.popleft()()
            if other is None or other is picture or other.image:
                continue
            if len(together) < n_most and other.codes.shape == picture.codes.shape:
                together.append(other)
            else:
                self._waiting.append(ref(other))
        return together
