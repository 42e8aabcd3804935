"""Pictures of finished answers: which are drawn together, and that nobody's depends on whose."""

import gc
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lumina_rt import Engine
from lumina_rt.hub import find_model
from lumina_rt.pictures import AT_ONCE, Pictures
from lumina_rt.vqgan import VQGAN
from lumina_rt.weights import fastest_dtype


class Counting:
    """In the place of a VQGAN: pictures of one color, their first code. Keeps how many it was asked for at a time."""

    def __init__(self, is_batch_invariant=True):
        self.config, self.is_batch_invariant = SimpleNamespace(factor=8), is_batch_invariant
        self.batches = []

    def decode(self, codes):
        self.batches.append(len(codes))
        if (codes == 13).any():
            raise RuntimeError("a code that nobody can draw")
        return (codes[:, :1, :1, None] / 127.5 - 1).expand(-1, 3, 8 * codes.shape[1], 8 * codes.shape[2])


@pytest.fixture
def vqgan():
    return Counting()


def codes_of(code, side=10):
    return np.full((side, side), code)


def color(image):
    assert image.size == (80, 80)
    return image.getpixel((0, 0))[0]


def test_small_pictures_are_drawn_together_and_each_is_its_own(vqgan):
    pictures = Pictures(vqgan)
    mine = [pictures.add(codes_of(20 + i)) for i in range(11)]
    assert [color(pictures.read(picture)) for picture in mine] == pytest.approx(list(range(20, 31)), abs=1)
    assert vqgan.batches == [8, 3]
    assert pictures.read(mine[0]) is mine[0].image  # drawn once
    assert vqgan.batches == [8, 3]


def test_only_pictures_of_one_size_are_drawn_together_and_large_ones_alone(vqgan):
    pictures = Pictures(vqgan)
    side = 1 + int((AT_ONCE / 2) ** 0.5) // 8
    small, other, large = ([pictures.add(codes_of(20, n)) for _ in range(2)] for n in (10, 12, side))
    for picture in (*small, *large, *other):
        pictures.read(picture)
    assert vqgan.batches == [2, 1, 1, 2]


def test_where_a_batch_changes_bits_every_picture_is_drawn_alone():
    vqgan = Counting(is_batch_invariant=False)
    pictures = Pictures(vqgan)
    for picture in [pictures.add(codes_of(20)) for _ in range(3)]:
        pictures.read(picture)
    assert vqgan.batches == [1, 1, 1]


def test_what_nobody_can_read_any_more_is_not_drawn_nor_kept(vqgan):
    pictures = Pictures(vqgan)
    dropped = [pictures.add(codes_of(20)) for _ in range(5)]
    kept = pictures.add(codes_of(30))
    del dropped
    gc.collect()
    pictures.read(kept)
    assert vqgan.batches == [1]
    assert not pictures._waiting


def test_a_picture_that_cannot_be_drawn_takes_no_other_with_it(vqgan):
    pictures = Pictures(vqgan)
    good, bad = pictures.add(codes_of(20)), pictures.add(codes_of(13))
    assert color(pictures.read(good)) == pytest.approx(20, abs=1)
    with pytest.raises(RuntimeError, match="nobody can draw"):
        pictures.read(bad)
    assert vqgan.batches == [2, 1, 1]


@pytest.mark.parametrize("size", [(80, 80), (96, 64), (48, 144)])
def test_images_that_end_together_are_drawn_together_as_they_would_be_alone(size, monkeypatch):
    engine, batches = Engine.from_pretrained("demo", device="cpu", speculation="off"), []
    decode = engine.vqgan.decode_in(torch.bfloat16).decode
    monkeypatch.setattr(engine.vqgan, "decode", lambda codes: batches.append(len(codes)) or decode(codes))
    params = [engine.params(num_images=1, size=size, seed=i) for i in range(5)]
    together = engine.generate(["a red circle"] * 5, params, progress=False)
    assert batches == [5]
    for output in together:
        codes = output.answers[0].codes[0]
        assert np.array_equal(np.asarray(output.images[0]), np.asarray(engine.decode_codes(codes)))


@pytest.mark.skipif(fastest_dtype("cpu") != torch.bfloat16, reason="here decoders work in fp32, each picture alone")
@pytest.mark.parametrize("n_threads", [1, 2, 3, 24])
@pytest.mark.parametrize("shape", [(10, 10), (12, 8), (6, 18), (1, 1), (24, 24)])
def test_bfloat16_decodes_a_picture_to_the_same_bits_in_any_batch(shape, n_threads):
    vqgan, before = VQGAN.from_pretrained(find_model("demo")).decode_in(torch.bfloat16), torch.get_num_threads()
    assert vqgan.is_batch_invariant
    codes = torch.randint(0, vqgan.config.n_embed, (12, *shape), generator=torch.Generator().manual_seed(0))
    torch.set_num_threads(n_threads)
    try:
        alone = torch.cat([vqgan.decode(each) for each in codes.split(1)])
        for n in (2, 3, 8, 12):
            assert torch.equal(torch.cat([vqgan.decode(some) for some in codes.split(n)]), alone)
    finally:
        torch.set_num_threads(before)
