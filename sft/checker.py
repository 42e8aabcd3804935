"""What a picture of the procedural world shows, read from its pixels alone.

It knows the colours and outlines that the world draws with, and nothing of scenes, captions, tokens or models.
"""

import math
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import product

import numpy as np
from lumina_rt.sft import world
from lumina_rt.sft.world import Thing
from PIL import Image
from scipy import ndimage

CHROMA = 75  # backgrounds stay below 55 between their largest and their smallest channel, things above 110
LEAST_AREA = 0.005  # of the picture; the smallest thing, a small star, covers 0.01
LEAST_FIT = 0.55  # intersection over union of a thing and the outline that it is taken for
MOST_ASPECT = 1.5  # of its bounds; things are drawn in squares, and two circles that touch are no circle


@dataclass(frozen=True)
class Found:
    """A thing that is seen. x, y: its centre over width and height.  area: over the picture's.  fit: see LEAST_FIT."""

    shape: str
    color: str
    x: float
    y: float
    area: float
    fit: float

    @property
    def name(self) -> str:
        return f"{self.color} {self.shape}"


def find_things(image: Image.Image) -> list[Found]:
    """Every coloured blob of a picture, named by the colour and the outline nearest to it, from left to right."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    height, width = pixels.shape[:2]
    nearest = _nearest(pixels, list(world.COLORS.values()))
    colored = np.ptp(pixels, axis=-1) > CHROMA
    # Seen through antialiasing the rim of one colour is often nearest to another; opening takes the rims away.
    brush = np.ones((2, 2) if math.sqrt(width * height) < 60 else (3, 3), dtype=bool)
    found = []
    for index, color in enumerate(world.COLORS):
        mine = colored & (nearest == index)
        cores, n_cores = ndimage.label(ndimage.binary_opening(mine, brush), np.ones((3, 3)))
        for core in range(1, n_cores + 1):
            blob = ndimage.binary_dilation(cores == core, iterations=2) & mine
            if blob.sum() >= LEAST_AREA * width * height:
                found.append(_name(_coverage(pixels, blob, color), color))
    return sorted(found, key=lambda thing: thing.x)


def find_box(image: Image.Image) -> tuple[int, int, int, int] | None:
    """Left, top, right, bottom of the box that is drawn in a picture, in pixels, or None where there is none."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    # Its line is thin: what a lossy codec leaves of its colour is still clearly nearer to it than to any other.
    drawn = _nearest(pixels, [world.BOX_COLOR, *world.COLORS.values(), *world.BACKGROUNDS.values()]) == 0
    rows, columns = np.flatnonzero(drawn.sum(1) >= 3), np.flatnonzero(drawn.sum(0) >= 3)
    if not len(rows) or not len(columns):
        return None
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def find_background(image: Image.Image) -> tuple[str, ...]:
    """The background's colour, or the upper and the lower one of a gradient."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    plain = np.ptp(pixels, axis=-1) <= CHROMA
    names, ends = list(world.BACKGROUNDS), []
    for rows in (slice(0, 3), slice(-3, None)):
        part = pixels[rows][plain[rows]]
        if not len(part):
            return ()
        ends.append(names[int(_nearest(np.median(part, axis=0)[None], list(world.BACKGROUNDS.values()))[0])])
    return (ends[0],) if ends[0] == ends[1] else tuple(ends)


def classes(image: Image.Image) -> np.ndarray:
    """A segmentation map read back: int [height, width], 0 the background, then the shapes in the world's order."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    return _nearest(pixels, [(0, 0, 0), *world.SEGMENT_COLORS.values()])


def _nearest(pixels: np.ndarray, colors: list[tuple[int, int, int]]) -> np.ndarray:
    palette = np.array(colors, dtype=np.float32)
    return np.square(pixels[..., None, :] - palette).sum(-1).argmin(-1)


def _coverage(pixels: np.ndarray, blob: np.ndarray, color: str) -> np.ndarray:
    """How much of each pixel a thing covers, 0 to 1: where it stands between the background's colour and the thing's.

    The points of a small star cover few pixels whole, so that yes or no for each pixel takes it for a circle.
    """
    near = ndimage.binary_dilation(blob, iterations=2)
    rim = ndimage.binary_dilation(near, iterations=2) & ~near & (np.ptp(pixels, axis=-1) <= CHROMA)
    around = np.median(pixels[rim], axis=0) if rim.any() else np.zeros(3)
    axis = np.array(world.COLORS[color]) - around
    return ((pixels - around) @ axis / (axis @ axis)).clip(0, 1) * near


def _name(coverage: np.ndarray, color: str) -> Found:
    height, width = coverage.shape
    shown = coverage >= min(0.5, coverage.max())
    rows, columns = np.flatnonzero(shown.any(1)), np.flatnonzero(shown.any(0))
    bounds = columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
    fits = {shape: _fit(coverage, bounds, shape) for shape in world.SHAPES}
    shape = max(fits, key=fits.get)
    sides = bounds[2] - bounds[0], bounds[3] - bounds[1]
    is_thing = fits[shape] >= LEAST_FIT and max(sides) <= MOST_ASPECT * min(sides)
    return Found(
        shape if is_thing else "blob",
        color,
        (bounds[0] + bounds[2]) / 2 / width,
        (bounds[1] + bounds[3]) / 2 / height,
        float(coverage.mean()),
        fits[shape],
    )


def _fit(coverage: np.ndarray, bounds: tuple[int, int, int, int], shape: str) -> float:
    """Intersection over union of a thing and an outline stretched to its bounds, both by coverage.

    The tips of a star cover less than half of a pixel, so that a thing may reach one pixel further on each side than
    what is seen of it: the best of these bounds counts.
    """
    height, width = coverage.shape
    best = 0.0
    for left, top, right, bottom in product((0, 1), repeat=4):
        left, top, right, bottom = bounds[0] - left, bounds[1] - top, bounds[2] + right, bounds[3] + bottom
        if left >= 0 and top >= 0 and right <= width and bottom <= height:
            cut, expected = coverage[top:bottom, left:right], _stretched(shape, right - left, bottom - top)
            best = max(best, float(np.minimum(cut, expected).sum() / np.maximum(cut, expected).sum()))
    return best


@lru_cache(maxsize=4096)
def _stretched(shape: str, width: int, height: int) -> np.ndarray:
    return np.asarray(_outline(shape).resize((width, height), Image.Resampling.BOX)) / 255


@cache
def _outline(shape: str) -> Image.Image:
    """A shape as it is drawn, large and cut to its bounds."""
    drawn = world.segmentation(world.Scene((Thing(shape, "red", "large", 0.5, 0.5),), ()), 256, 256)
    outline = drawn.convert("L").point(lambda value: 255 * (value > 0))
    return outline.crop(outline.getbbox())
