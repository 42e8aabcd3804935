"""Files of a user are safe to open, and a picture is fitted as the model was trained, but for the crop."""

import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo, iTXt

from lumina_rt.images import best_size, fit, open_image, read_settings, save_png, to_pixels
from lumina_rt.unirep import candidate_sizes

SIZES = candidate_sizes(512)


def picture(width=40, height=30, mode="RGB", seed=0):
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(noise).convert(mode)


def as_bytes(image, format, **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def png_header(width, height):
    """A PNG that claims a size and holds next to nothing."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_the_three_formats_open_from_path_bytes_and_image(tmp_path, format):
    content = as_bytes(picture(), format)
    path = tmp_path / "picture"
    path.write_bytes(content)
    expected = np.asarray(Image.open(path))
    for source in (path, str(path), content, Image.open(path)):
        np.testing.assert_array_equal(np.asarray(open_image(source)), expected)


def test_an_opened_image_needs_its_file_no_more(tmp_path):
    path = tmp_path / "a.webp"
    path.write_bytes(as_bytes(picture(), "WEBP"))
    image = open_image(path)
    path.unlink()
    assert image.convert("L").getpixel((39, 29)) >= 0


@pytest.mark.parametrize("format", ["GIF", "BMP", "TIFF", "PPM", "ICO"])
def test_other_formats_are_refused(tmp_path, format):
    path = tmp_path / "picture.png"
    path.write_bytes(as_bytes(picture(), format))
    with pytest.raises(ValueError, match=r"picture\.png is not a PNG, JPEG or WEBP image"):
        open_image(path)


@pytest.mark.parametrize("content", [b"", b"hello", b"\x89PNG\r\n\x1a\n", b"RIFF\0\0\0\0WAVEfmt ", b"\xff\xd8\xff\xe0"])
def test_files_that_are_no_images_are_refused_by_name(tmp_path, content):
    path = tmp_path / "picture.png"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"picture\.png") as caught:
        open_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_file_is_refused_at_any_length(tmp_path, format):
    content = as_bytes(picture(), format)
    path = tmp_path / "cut"
    for length in range(4, len(content) * 9 // 10, len(content) // 25):
        path.write_bytes(content[:length])
        with pytest.raises(ValueError, match=str(path)) as caught:
            open_image(path)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_damaged_file_opens_or_is_refused_and_nothing_else(format):
    content = as_bytes(picture(), format)
    rng = np.random.default_rng(0)
    for _ in range(150):
        damaged = bytearray(content)
        for i in rng.integers(0, len(content), 4):
            damaged[i] = rng.integers(0, 256)
        try:
            open_image(bytes(damaged), max_pixels=100_000).convert("RGB")
        except ValueError as error:
            assert "\n" not in str(error)  # noqa: PT017


@pytest.mark.parametrize(("width", "height"), [(100_000, 100_000), (9_000, 9_000), (2**31 - 1, 2**31 - 1)])
def test_an_image_bomb_is_refused_by_its_header(tmp_path, width, height):
    path = tmp_path / "bomb.png"
    path.write_bytes(png_header(width, height))
    with pytest.raises(ValueError, match=rf"bomb\.png has {width}x{height} pixels; expected 64000000 at most"):
        open_image(path)


def webp_header(kind, width, height):
    """A WEBP that claims a size and holds nothing."""
    if kind == b"VP8X":
        body = bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    elif kind == b"VP8L":
        body = b"\x2f" + (width - 1 | height - 1 << 14).to_bytes(4, "little") + bytes(5)
    else:
        body = bytes(3) + b"\x9d\x01\x2a" + struct.pack("<HH", width, height)
    chunk = b"WEBP" + kind + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", len(chunk)) + chunk


@pytest.mark.parametrize("kind", [b"VP8X", b"VP8L", b"VP8 "])
@pytest.mark.parametrize(("width", "height"), [(16_383, 16_380), (9_000, 9_001)])
def test_a_webp_bomb_is_refused_before_its_canvas_is_made(monkeypatch, kind, width, height):
    def never(content):
        raise AssertionError("the decoder allocates the canvas")

    monkeypatch.setattr("PIL._webp.WebPAnimDecoder", never)
    with pytest.raises(ValueError, match=f"^image has {width}x{height} pixels; expected 64000000 at most$"):
        open_image(webp_header(kind, width, height))


@pytest.mark.parametrize(("format", "options"), [("WEBP", {"lossless": True}), ("WEBP", {}), ("PNG", {}), ("JPEG", {})])
def test_the_limit_is_exact_for_every_format(format, options):
    content = as_bytes(picture(40, 30), format, **options)
    assert open_image(content, max_pixels=1200).size == (40, 30)
    with pytest.raises(ValueError, match="has 40x30 pixels; expected 1199 at most"):
        open_image(content, max_pixels=1199)


@pytest.mark.filterwarnings("error")
def test_a_caller_may_allow_more_than_pillow_does():
    content = as_bytes(Image.new("1", (10_000, 9_500)), "PNG")
    assert open_image(content, max_pixels=95_000_000).size == (10_000, 9_500)


def test_a_truncated_image_that_pillow_opened_is_refused_too():
    content = as_bytes(picture(), "PNG")
    with pytest.raises(ValueError, match=r"^image cannot be read as an image: image file is truncated"):
        open_image(Image.open(io.BytesIO(content[: len(content) // 2])))


@pytest.mark.parametrize("source", [None, 7, np.zeros((4, 4, 3), np.uint8)], ids=["None", "int", "ndarray"])
def test_a_source_of_another_type_is_told(source):
    with pytest.raises(ValueError, match=f"^image is {type(source).__name__}; expected a path, bytes or a PIL image$"):
        open_image(source)


def test_the_limit_holds_for_images_too_and_to_the_pixel():
    assert open_image(picture(40, 30), max_pixels=1200).size == (40, 30)
    with pytest.raises(ValueError, match="40x30 pixels; expected 1199 at most"):
        open_image(picture(40, 30), max_pixels=1199)


def test_what_is_no_file_is_refused_and_never_waited_for(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    for path in (tmp_path, tmp_path / "nowhere.png", pipe, "/dev/zero", "a\0b"):
        with pytest.raises(ValueError, match="is not a file"):
            open_image(path)


# Where the top left corner of the scene lies in the stored pixels (left, top), by EXIF orientation.
CORNERS = {1: (0, 0), 2: (1, 0), 3: (1, 1), 4: (0, 1), 5: (0, 0), 6: (0, 1), 7: (1, 1), 8: (1, 0)}


@pytest.mark.parametrize("orientation", CORNERS)
@pytest.mark.parametrize(("format", "options"), [("PNG", {}), ("JPEG", {"quality": 100}), ("WEBP", {})])
def test_a_photo_is_turned_upright(orientation, format, options):
    width, height = (40, 20) if orientation < 5 else (20, 40)
    right, bottom = CORNERS[orientation]
    left, top = right * width // 2, bottom * height // 2
    stored = Image.new("RGB", (width, height), "black")
    stored.paste("white", (left, top, left + width // 2, top + height // 2))
    exif = Image.Exif()
    exif[0x0112] = orientation
    content = as_bytes(stored, format, exif=exif.tobytes(), **options)
    for source in (content, Image.open(io.BytesIO(content))):
        opened = open_image(source)
        assert opened.size == (40, 20)
        grey = opened.convert("L")
        corners = [grey.getpixel(xy) > 128 for xy in ((2, 2), (37, 2), (2, 17), (37, 17))]
        assert corners == [True, False, False, False]


@pytest.mark.parametrize("format", ["PNG", "WEBP"])
def test_of_an_animation_it_is_the_first_frame(format):
    frames = [Image.new("RGB", (8, 8), color) for color in ("red", "lime", "blue")]
    options = {"lossless": True} if format == "WEBP" else {}
    content = as_bytes(frames[0], format, save_all=True, append_images=frames[1:], **options)
    assert open_image(content).convert("RGB").getpixel((4, 4)) == (255, 0, 0)


def test_best_size_keeps_most_of_the_image():
    assert best_size(512, 512, SIZES) == (512, 512)
    assert best_size(4000, 1000, SIZES) == (1024, 256)
    assert best_size(1, 1000, SIZES) == (256, 1024)
    assert best_size(1920, 1080, candidate_sizes(768)) == (1024, 576)
    assert best_size(500, 500, [(512, 512), (1024, 768)]) == (512, 512)


def test_best_size_takes_the_larger_pair_of_equally_good_ones():
    assert best_size(100, 100, [(64, 64), (96, 96), (32, 32)]) == (96, 96)
    assert best_size(100, 100, [(32, 64), (64, 32)]) == (64, 32)
    assert best_size(100, 100, [(64, 32), (32, 64)]) == (64, 32)


@pytest.mark.parametrize("size", [(512, 512), (100, 80), (3000, 2000), (1, 1), (2000, 3), (777, 1333)])
def test_fit_gives_the_best_candidate_size_in_rgb(size):
    fitted = fit(picture(*size), SIZES)
    assert fitted.size == best_size(*size, SIZES)
    assert fitted.mode == "RGB"


def scaled_then_cropped(image, target):
    """The plain way: scale all of the image, then cut the middle out."""
    while all(side >= 2 * t for side, t in zip(image.size, target, strict=True)):
        image = image.resize(tuple(side // 2 for side in image.size), Image.Resampling.BOX)
    scale = max(t / side for side, t in zip(image.size, target, strict=True))
    image = image.resize(tuple(round(side * scale) for side in image.size), Image.Resampling.BICUBIC)
    left, top = ((side - t) // 2 for side, t in zip(image.size, target, strict=True))
    return image.crop((left, top, left + target[0], top + target[1]))


@pytest.mark.parametrize("size", [(300, 200), (97, 143), (130, 64), (61, 400), (259, 257)], ids=str)
@pytest.mark.parametrize("target", [(64, 64), (96, 32), (32, 128)], ids=str)
def test_fit_is_scaling_the_whole_and_cutting_the_middle_out(size, target):
    # Smooth, and within the range: Pillow orders its two passes by cost, and each rounds and clips.
    smooth = picture(9, 7).point(lambda value: 40 + value * 2 // 3).resize(size, Image.Resampling.BICUBIC)
    fitted = np.asarray(fit(smooth, [target]), dtype=int)
    plain = np.asarray(scaled_then_cropped(smooth, target), dtype=int)
    assert np.abs(fitted - plain).max() <= 2


@pytest.mark.parametrize("side", [31, 64, 100, 128, 301, 512])
def test_fit_without_a_crop_is_the_scaling_of_the_reference_to_the_bit(side):
    image = picture(side, side)
    assert fit(image, [(64, 64)]).tobytes() == scaled_then_cropped(image, (64, 64)).tobytes()


@pytest.mark.parametrize("size", [(300, 100), (100, 300), (640, 600)])
def test_the_crop_is_centred(size):
    ramp_x = np.linspace(0, 255, size[0])[None, :].repeat(size[1], 0)
    ramp_y = np.linspace(0, 255, size[1])[:, None].repeat(size[0], 1)
    ramps = Image.fromarray(np.stack([ramp_x, ramp_y, ramp_x], -1).round().astype(np.uint8))
    means = np.asarray(fit(ramps, [(64, 64)]), dtype=float).mean((0, 1))
    np.testing.assert_allclose(means, 127.5, atol=1)


def test_the_same_image_is_fitted_the_same_way_each_time():
    image = picture(901, 333)
    assert fit(image, SIZES).tobytes() == fit(image, SIZES).tobytes()


def test_a_very_long_image_costs_no_more_than_its_target():
    assert fit(Image.new("RGB", (1, 200_000)), SIZES).size == (256, 1024)


def half_transparent(mode):
    """Left half red and opaque (grey in grey modes), right half invisible."""
    image = Image.new("RGBA", (64, 64), (200, 0, 0, 255))
    image.paste((0, 200, 0, 0), (32, 0, 64, 64))
    if mode == "P":
        palette = Image.new("P", (64, 64), 0)
        palette.putpalette([200, 0, 0, 0, 200, 0])
        palette.paste(1, (32, 0, 64, 64))
        palette.info["transparency"] = 1
        return palette
    if mode in ("RGB", "L"):
        opaque = Image.new(mode, (64, 64), (200, 0, 0) if mode == "RGB" else 60)
        color = (0, 200, 0) if mode == "RGB" else 90
        opaque.paste(color, (32, 0, 64, 64))
        opaque.info["transparency"] = color
        return opaque
    if mode == "La":
        image = image.convert("LA")
    return image.convert(mode)


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "PA", "RGB", "L", "La", "RGBa"])
def test_transparency_is_flattened_on_white(mode):
    image = half_transparent(mode)
    grey = mode in ("L", "LA", "La")
    stored = [] if mode in ("PA", "La", "RGBa") else [open_image(as_bytes(image, "PNG"))]
    for source in (image, *stored):
        fitted = fit(source, [(64, 64)])
        assert fitted.getpixel((60, 32)) == (255, 255, 255)
        assert fitted.getpixel((4, 32)) == ((60, 60, 60) if grey else (200, 0, 0))


def test_half_a_veil_mixes_with_white():
    veil = Image.new("RGBA", (64, 64), (0, 0, 0, 128))
    assert fit(veil, [(64, 64)]).getpixel((5, 5)) == (127, 127, 127)


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV", "RGBX", "F", "LAB"])
def test_any_mode_comes_out_as_the_color_it_shows(mode):
    if mode == "LAB":
        image = Image.merge("LAB", [Image.new("L", (64, 64), value) for value in (255, 128, 128)])
    else:
        image = Image.new("RGB", (64, 64), "white").convert(mode)
    low = min(fit(image, [(64, 64)]).getpixel((30, 30)))
    assert low >= 250


def test_sixteen_bit_grey_keeps_its_shades():
    shades = np.linspace(0, 65535, 64).round().astype(np.uint16)[None, :].repeat(64, 0)
    content = as_bytes(Image.fromarray(shades), "PNG")
    for image in (open_image(content), Image.fromarray(shades.astype(np.int32))):
        row = np.asarray(fit(image, [(64, 64)]))[30]
        np.testing.assert_allclose(row, (shades[0] / 257)[:, None].repeat(3, 1), atol=0.51)


def test_a_cmyk_photo_has_its_colors():
    red = Image.new("CMYK", (64, 64), (0, 255, 255, 0))
    pixel = fit(open_image(as_bytes(red, "JPEG", quality=100)), [(64, 64)]).getpixel((9, 9))
    np.testing.assert_allclose(pixel, (255, 0, 0), atol=6)


def test_pixels_run_from_minus_one_to_one_in_channels_rows_columns():
    image = Image.new("RGB", (4, 2), (0, 255, 51))
    image.putpixel((3, 1), (255, 0, 0))
    pixels = to_pixels(image)
    assert pixels.dtype == np.float32
    assert pixels.shape == (3, 2, 4)
    assert pixels.flags.c_contiguous
    assert pixels[:, 0, 0].tolist() == [-1, 1, np.float32(51 / 255 * 2 - 1)]
    assert pixels[:, 1, 3].tolist() == [1, -1, -1]
    with pytest.raises(ValueError, match="mode L; expected RGB"):
        to_pixels(image.convert("L"))


def test_pixels_are_computed_in_float64_as_by_the_reference():
    levels = Image.fromarray(np.arange(256, dtype=np.uint8)[None, :]).convert("RGB")
    assert to_pixels(levels)[0, 0].tolist() == [float(np.float32(level / 255 * 2 - 1)) for level in range(256)]


SETTINGS = {"prompt": 'naïve 🙂 "quoted"\n', "seed": 2**63, "size": [512, 512], "none": None}


def test_settings_travel_with_the_image(tmp_path):
    path = tmp_path / "a.png"
    save_png(picture(), path, SETTINGS)
    assert read_settings(path) == SETTINGS
    np.testing.assert_array_equal(np.asarray(open_image(path)), np.asarray(picture()))
    assert isinstance(Image.open(path).text["lumina_rt"], iTXt)


@pytest.mark.parametrize("value", [object(), np.float32(1), {1, 2}])
def test_settings_that_json_cannot_hold_are_refused_and_nothing_is_written(tmp_path, value):
    with pytest.raises(ValueError, match=r"^settings cannot be written as JSON: "):
        save_png(picture(), tmp_path / "a.png", {"value": value})
    assert os.listdir(tmp_path) == []


def test_images_without_settings_have_none(tmp_path):
    save_png(picture(), tmp_path / "a.png", None)
    (tmp_path / "b.jpg").write_bytes(as_bytes(picture(), "JPEG"))
    assert read_settings(tmp_path / "a.png") is None
    assert read_settings(str(tmp_path / "b.jpg")) is None


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000])
def test_settings_that_cannot_be_read_are_refused(tmp_path, text):
    info = PngInfo()
    info.add_text("lumina_rt", text)
    path = tmp_path / "a.png"
    picture().save(path, pnginfo=info)
    with pytest.raises(ValueError, match=r"a\.png holds settings"):
        read_settings(path)
    with pytest.raises(ValueError, match="is not a file"):
        read_settings(tmp_path / "b.png")


def test_a_file_is_replaced_only_by_force(tmp_path):
    path = tmp_path / "a.png"
    path.write_text("precious")
    with pytest.raises(ValueError, match=r"a\.png exists already"):
        save_png(picture(), path)
    assert path.read_text() == "precious"
    save_png(picture(), path, force=True)
    assert open_image(path).size == (40, 30)
    assert os.listdir(tmp_path) == ["a.png"]


def test_a_saved_file_has_the_permissions_of_any_other(tmp_path):
    save_png(picture(), tmp_path / "a.png")
    (tmp_path / "b").write_text("")
    assert (tmp_path / "a.png").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_text("precious")

    def full(self, file, *args, **kwargs):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", full)
    with pytest.raises(ValueError, match=r"a\.png cannot be written: No space left on device"):
        save_png(picture(), path, force=True)
    assert path.read_text() == "precious"
    assert os.listdir(tmp_path) == ["a.png"]


def test_places_that_cannot_be_written_are_told(tmp_path):
    with pytest.raises(ValueError, match="cannot be written: No such file or directory"):
        save_png(picture(), tmp_path / "no" / "a.png")
    for force in (False, True):
        with pytest.raises(ValueError, match="is a folder"):
            save_png(picture(), tmp_path, force=force)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be written"):
        save_png(picture(), tmp_path / "file" / "a.png", force=True)
