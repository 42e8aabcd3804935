"""Pictures in a terminal: half blocks and kitty's protocol. What is shown while an image grows: tests/test_cli.py."""

import base64
import io
import re

import numpy as np
import pytest
from PIL import Image
from test_images import picture

from lumina_rt.terminal import half_blocks, kitty


def test_half_blocks_show_two_rows_of_pixels_a_line():
    picture = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
    assert half_blocks(picture, 80, 24) == [
        "\x1b[38;2;0;1;2;48;2;6;7;8m\u2580\x1b[38;2;3;4;5;48;2;9;10;11m\u2580\x1b[0m"
    ]


@pytest.mark.parametrize("size", [(768, 768), (1536, 384), (384, 1536), (40, 20), (1, 1), (300, 1), (1, 300)])
def test_half_blocks_fit_the_terminal_and_keep_the_shape(size):
    lines = half_blocks(Image.new("RGB", size), 80, 24)
    columns = lines[0].count("\u2580")
    assert 1 <= len(lines) <= 24
    assert 1 <= columns <= 80
    assert all(line.count("\u2580") == columns for line in lines)
    if min(size) > 1:
        assert columns / (2 * len(lines)) == pytest.approx(size[0] / size[1], rel=0.1)
        assert columns == min(size[0], 80, int(48 * size[0] / size[1]))


@pytest.mark.parametrize("size", [(768, 768), (1536, 384), (40, 20), (1, 1), (1, 300)])
def test_kittys_protocol_carries_the_whole_picture_into_the_cells_of_half_blocks(size):
    sent = picture(*size)
    lines = kitty(sent, 80, 24)
    blocks = half_blocks(sent, 80, 24)
    assert len(lines) == len(blocks)
    assert not any(lines[:-1])
    height = len(lines)
    moves = (f"\x1b[{height - 1}F", f"\x1b[{height - 1}E") if height > 1 else ("", "")
    assert lines[-1].startswith(moves[0] + "\x1b_G")
    assert lines[-1].endswith("\x1b\\" + moves[1])
    chunks = re.findall(r"\x1b_G([^;]*);([^\x1b]*)\x1b\\", lines[-1])
    first = dict(pair.split("=") for pair in chunks[0][0].split(","))
    assert (first["a"], first["f"], first["c"], first["r"]) == ("T", "100", str(blocks[0].count("\u2580")), str(height))
    assert first["m"] == str(int(len(chunks) > 1))
    assert [keys for keys, _ in chunks[1:]] == ["m=1"] * (len(chunks) - 2) + ["m=0"] * (len(chunks) > 1)
    assert all(len(data) <= 4096 and len(data) % 4 == 0 for _, data in chunks)
    shown = Image.open(io.BytesIO(base64.b64decode("".join(data for _, data in chunks))))
    assert np.array_equal(np.asarray(shown), np.asarray(sent))
