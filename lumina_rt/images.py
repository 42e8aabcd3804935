"""Pictures in and out: safe decoding of a user's file, fitting to a size the model knows, PNG with settings.

It knows nothing of codes; vqgan.py turns pixels into codes and back.
"""

import io
import json
import math
import os
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, JpegImagePlugin, PngImagePlugin, WebPImagePlugin

SETTINGS_KEY = "lumina_rt"

# Readers by signature, not Image.open: its own size limit would hide the size that our error line names.
_READERS = {
    b"\x89PNG\r\n\x1a\n": PngImagePlugin.PngImageFile,
    b"\xff\xd8\xff": JpegImagePlugin.JpegImageFile,
    b"RIFF": WebPImagePlugin.WebPImageFile,
}


def open_image(source: str | Path | bytes | Image.Image, max_pixels: int = 64_000_000) -> Image.Image:
    """Decode one image: PNG, JPEG or WEBP from a path or from bytes, or a PIL image.

    Turns it upright by its EXIF orientation; of an animation it is the first frame. Raises ValueError for a
    file that is missing, of another format or damaged, for a source of another type, and, before any pixel is
    decoded, for more than `max_pixels`.
    """
    with _reader(source, max_pixels) as (_, image):
        return ImageOps.exif_transpose(image)


@contextmanager
def _reader(
    source: str | Path | bytes | Image.Image, max_pixels: float = math.inf
) -> Iterator[tuple[str, Image.Image]]:
    """Read the header of an image file; what fails there or in the block is one ValueError line."""
    if not isinstance(source, str | os.PathLike | bytes | Image.Image):
        raise ValueError(f"image is {type(source).__name__}; expected a path, bytes or a PIL image")
    is_path = isinstance(source, str | os.PathLike)
    name = str(source) if is_path else "image"
    # Pipes and devices would block or never end.
    if is_path and not Path(source).is_file():
        raise ValueError(f"{name} is not a file; expected a PNG, JPEG or WEBP image")
    try:
        if isinstance(source, Image.Image):  # perhaps of a file that Pillow has not decoded yet
            _check_pixels(name, source.size, max_pixels)
            yield name, source
            return
        with open(source, "rb") if is_path else io.BytesIO(source) as file:
            start = file.read(30)
            file.seek(0)
            reader = next((r for signature, r in _READERS.items() if start.startswith(signature)), None)
            if reader is None:
                raise ValueError(f"{name} is not a PNG, JPEG or WEBP image")
            if reader is WebPImagePlugin.WebPImageFile:
                # Its decoder makes the whole canvas, and Pillow applies a limit of its own, to tell the size.
                _check_pixels(name, _webp_size(start), max_pixels)
            image = reader(file)
            _check_pixels(name, image.size, max_pixels)
            yield name, image
    except Exception as error:
        # Decoders of damaged files raise all kinds: OSError, SyntaxError, EOFError, struct.error ...
        if isinstance(error, ValueError) and str(error).startswith(name):
            raise
        raise ValueError(f"{name} cannot be read as an image: {' '.join(str(error).split())}") from error


def _check_pixels(name: str, size: tuple[int, int], max_pixels: float) -> None:
    width, height = size
    if width * height == 0:
        raise ValueError(f"{name} has {width}x{height} pixels; expected at least one")
    if width * height > max_pixels:
        raise ValueError(f"{name} has {width}x{height} pixels; expected {max_pixels} at most")


def _webp_size(start: bytes) -> tuple[int, int]:
    """(width, height) that the first 30 bytes of a WEBP claim (RFC 9649), (0, 0) where they claim none."""

    def number(begin: int, end: int) -> int:
        return int.from_bytes(start[begin:end], "little")

    kind = start[12:16]
    if kind == b"VP8X":
        return number(24, 27) + 1, number(27, 30) + 1
    if kind == b"VP8L":
        return number(21, 25) % 2**14 + 1, (number(21, 25) >> 14) % 2**14 + 1
    if kind == b"VP8 ":
        return number(26, 28) % 2**14, number(28, 30) % 2**14
    return 0, 0


def best_size(width: int, height: int, sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Choose the (width, height) of `sizes` that loses least of a width x height image when it is cropped.

    Of equally good ones it takes the larger pair, wider first, as the reference does.
    """

    def kept(size: tuple[int, int]) -> float:
        scales = size[0] / width, size[1] / height
        return min(scales) / max(scales)

    return max(sizes, key=lambda size: (kept(size), size))


def fit(image: Image.Image, sizes: Sequence[tuple[int, int]]) -> Image.Image:
    """Scale and crop an image of any mode to the best of `sizes` (pixels), in RGB with transparency on white.

    As the reference: halving by BOX while both sides are at least twice the target, then BICUBIC until the
    target is covered. The crop is at the centre, where the reference's is at random, so that the same image
    gives the same codes.
    """
    image = _flatten(image)
    width, height = best_size(*image.size, sizes)
    while image.width >= 2 * width and image.height >= 2 * height:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = max(width / image.width, height / image.height)
    covering = round(image.width * scale), round(image.height * scale)
    # Scaling only the part that is kept: a 1 x 60,000 image would cover its target with gigabytes.
    box = _kept(image.size, covering, (width, height))
    return image.resize((width, height), Image.Resampling.BICUBIC, box=box)


def _kept(
    size: tuple[int, int], covering: tuple[int, int], target: tuple[int, int]
) -> tuple[float, float, float, float]:
    """The box, in pixels of an image of `size`, of the centre `target` once it is scaled to `covering`."""
    starts = [(c - t) // 2 for c, t in zip(covering, target, strict=True)]
    ends = [start + t for start, t in zip(starts, target, strict=True)]
    left, top = (start * s / c for start, s, c in zip(starts, size, covering, strict=True))
    right, bottom = (end * s / c for end, s, c in zip(ends, size, covering, strict=True))
    return left, top, right, bottom


def _flatten(image: Image.Image) -> Image.Image:
    """RGB of an image of any mode, transparency on white."""
    if image.mode.startswith("I"):  # 16-bit grey, which convert() would clip at 255
        grey = np.asarray(image).astype(np.float64) / 257
        return Image.fromarray(grey.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if not image.has_transparency_data:
        return image.convert("RGB")
    if image.mode == "La":  # Pillow knows the way from premultiplied grey only in two steps
        image = image.convert("LA")
    image = image.convert("RGBA")
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image)
    return white.convert("RGB")


def to_pixels(image: Image.Image) -> np.ndarray:
    """Pixels of an RGB image as the VQGAN takes them: float32 [3, height, width], -1 (black) to 1."""
    if image.mode != "RGB":
        raise ValueError(f"image is of mode {image.mode}; expected RGB")
    # In float64 and then rounded, as the reference.
    pixels = np.asarray(image, dtype=np.float64) / 255 * 2 - 1
    return np.ascontiguousarray(pixels.transpose(2, 0, 1), dtype=np.float32)


def contact_sheet(views: Sequence[Image.Image]) -> Image.Image:
    """All views in rows, as near to a square as their number allows."""
    columns = math.ceil(math.sqrt(len(views)))
    width, height = (max(sides) for sides in zip(*(view.size for view in views), strict=True))
    sheet = Image.new("RGB", (columns * width, math.ceil(len(views) / columns) * height), "white")
    for i, view in enumerate(views):
        sheet.paste(view, (i % columns * width, i // columns * height))
    return sheet


def save_png(image: Image.Image, path: str | Path, settings: Mapping | None = None, force: bool = False) -> None:
    """Write a PNG that carries `settings` (anything JSON can hold) in an iTXt chunk named "lumina_rt".

    The file appears whole or not at all. Raises ValueError when it is there already and `force` is not given,
    when it cannot be written, and for settings that JSON cannot hold.
    """
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path} is a folder; expected the name of a file")
    if path.exists() and not force:
        raise ValueError(f"{path} exists already; it is replaced only by force")
    info = PngImagePlugin.PngInfo()
    if settings is not None:
        try:
            info.add_itxt(SETTINGS_KEY, json.dumps(dict(settings)))
        except (TypeError, ValueError) as error:
            raise ValueError(f"settings cannot be written as JSON: {error}") from error
    # In the same folder, as a rename is atomic only within one file system.
    partial = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        with open(partial, "xb") as file:
            image.save(file, "PNG", pnginfo=info)
        os.replace(partial, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with suppress(OSError):
            partial.unlink()


def read_settings(path: str | Path) -> dict | None:
    """The settings that `save_png` wrote, or None for an image without. Raises ValueError as `open_image`."""
    with _reader(path) as (name, image):
        text = image.info.get(SETTINGS_KEY)
    if text is None:
        return None
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} holds settings that are not JSON") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{name} holds settings of type {type(settings).__name__}; expected an object")
    return settings
