"""The trainer of the image tokenizer: what it cuts out, how the codebook and Muon move, and that a run goes on."""

import math
import shutil
from contextlib import contextmanager
from itertools import islice
from random import Random

import pytest
import torch
from lumina_rt.sft import vq, world
from lumina_rt.sft.muon import Muon, orthogonal
from lumina_rt.sft.vq import CONFIG, TARGETS, WINDOW, Codebook

from lumina_rt.unirep import candidate_sizes
from lumina_rt.vqgan import VQGAN, VQGANConfig
from lumina_rt.weights import fastest_dtype

SIZES = [size for target in sorted({*TARGETS}) for size in candidate_sizes(target, patch=2 * CONFIG.factor)]
TINY = VQGANConfig(embed_dim=4, n_embed=16, z_channels=8, ch=8, ch_mult=(1, 1, 1, 1), num_res_blocks=1, norm_groups=1)


@contextmanager
def tiny():
    """Make training small: cuts of 16 x 16 pixels, 16 codes, and rows that die soon and are revived soon."""
    values = {"CONFIG": TINY, "TARGETS": (64,), "WINDOW": 16, "WHOLE": 0.0, "RECENT": 64}
    values |= {"REVIVE_EVERY": 3, "EMA_DECAY": 0.5}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setattr(vq, name, value)
        yield patch


def train(folder, steps, lr=0.02):
    return vq.train(folder, steps, batch_size=2, lr=lr, warmup=10, seed=3)


@pytest.fixture
def codebook():
    """A codebook of four rows, (0, 0) to (3, 3)."""
    shape = {"embed_dim": 2, "n_embed": 4, "z_channels": 4, "ch": 4, "ch_mult": (1,)}
    book = Codebook(VQGAN(VQGANConfig(**shape, num_res_blocks=1, norm_groups=1)))
    with torch.no_grad():
        book.rows.copy_(torch.arange(4.0)[:, None].expand(4, 2))
    return book


def test_a_window_lies_in_the_picture_on_the_grid_of_latents_at_a_corner_of_its_thing():
    starts = set()
    for seed in range(400):
        rng = Random(seed)
        width, height = rng.choice(SIZES)
        thing = rng.choice(world.random_scene(rng, None, width / height).things)
        cut = vq.window(rng, width, height, thing)
        box = thing.box(width, height)
        for axis, length in enumerate((width, height)):
            start, end = cut[axis], cut[axis + 2]
            assert 0 <= start < end <= length
            assert end - start == min(WINDOW, length)
            assert start % CONFIG.factor == end % CONFIG.factor == 0
            near = CONFIG.factor / 2  # by so much the grid may move a window
            assert any(start - near <= corner <= end + near for corner in (box[axis], box[axis + 2]))
        starts.add(cut[:2])
    assert len(starts) > 40


def test_batches_are_windows_first_then_whole_pictures_of_one_size():
    for step, pixels in enumerate(islice(vq.batches(1, 8, whole_from=6), 14)):
        n, channels, height, width = pixels.shape
        assert (n, channels) == (8 if step < 6 else 2, 3)  # a whole picture costs as much as several windows
        if step < 6:
            assert (width, height) in {(min(w, WINDOW), min(h, WINDOW)) for w, h in SIZES}
        else:
            assert (width, height) in SIZES
        assert pixels.dtype == torch.float32
        assert pixels.abs().max() <= 1
        assert not torch.equal(pixels[0], pixels[1])


@pytest.mark.parametrize("start", [1, 3, 4, 6])
def test_batches_from_a_step_on_are_those_of_a_run_from_the_beginning(start):
    whole = list(islice(vq.batches(1, 2, whole_from=4), 7))
    later = list(islice(vq.batches(1, 2, whole_from=4, start=start), 7 - start))
    assert all(torch.equal(a, b) for a, b in zip(whole[start:], later, strict=True))
    other = next(vq.batches(2, 2, whole_from=4))
    assert other.shape != whole[0].shape or not torch.equal(other, whole[0])


def test_a_picture_is_one_in_two_of_what_is_drawn():
    scene = world.random_scene(Random(0))
    picture = world.picture(scene, 64, 64).tobytes()
    drawn = [vq.random_image(Random(seed), scene, 64, 64).tobytes() for seed in range(400)]
    assert 0.42 < drawn.count(picture) / 400 < 0.58
    assert len(set(drawn)) == 5


def test_rows_follow_the_moving_average_of_the_latents_that_chose_them(codebook):
    codebook.follow(torch.tensor([[1.0, 0.0], [3.0, 0.0], [0.0, 5.0]]), torch.tensor([0, 0, 2]))
    assert torch.allclose(codebook.rows, torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 5.0], [3.0, 3.0]]))
    codebook.follow(torch.tensor([[6.0, 0.0]]), torch.tensor([0]))
    decay = vq.EMA_DECAY
    count, total = (1 - decay) * (2 * decay + 1), (1 - decay) * (4 * decay + 6)
    assert float(codebook.counts[0]) == pytest.approx(count)
    assert float(codebook.rows[0, 0]) == pytest.approx(total / count)
    assert torch.allclose(codebook.rows[1:], torch.tensor([[1.0, 1.0], [0.0, 5.0], [3.0, 3.0]]))  # unchosen: they stay
    assert codebook.recent.tolist() == [[1, 0], [3, 0], [0, 5], [6, 0]]
    assert not codebook.rows.requires_grad


def test_the_codebook_of_a_model_is_the_one_that_moves():
    model = VQGAN(TINY)
    Codebook(model).follow(torch.full((1, 4), 7.0), torch.tensor([5]))
    assert model.quantize.embedding.weight[5].tolist() == [7] * 4


def test_recent_latents_are_the_last_ones(codebook, monkeypatch):
    monkeypatch.setattr(vq, "RECENT", 5)
    for i in range(4):
        codebook.see(torch.full((2, 2), float(i)))
    assert codebook.recent[:, 0].tolist() == [1, 2, 2, 3, 3]


def test_at_the_start_every_row_becomes_a_latent_of_its_own(codebook):
    torch.manual_seed(0)
    latents = 10 + torch.arange(12.0).view(6, 2)
    codebook.see(latents)
    codebook.revive()
    places = [latents.tolist().index(row) for row in codebook.rows.tolist()]
    assert len(set(places)) == 4
    assert (codebook.counts >= vq.DEAD).all()  # they live until they are judged
    assert torch.allclose(codebook.sums, codebook.rows * codebook.counts[:, None])


def test_dead_rows_move_onto_latents_far_from_the_codebook_and_the_living_stay(codebook):
    torch.manual_seed(0)
    codebook.counts.copy_(torch.tensor([1.0, 0.0, 0.9 * vq.DEAD, vq.DEAD]))
    codebook.sums.copy_(codebook.rows * codebook.counts[:, None])
    near = torch.tensor([[0.0, 0.0], [3.0, 3.0]]).repeat(50, 1)
    codebook.see(torch.cat((near, torch.tensor([[10.0, 10.0], [-10.0, 0.0]]))))
    codebook.revive()
    assert codebook.rows[[0, 3]].tolist() == [[0, 0], [3, 3]]
    assert sorted(codebook.rows[[1, 2]].tolist()) == [[-10, 0], [10, 10]]
    assert codebook.counts.tolist() == pytest.approx([1.0, 2 * vq.DEAD, 2 * vq.DEAD, vq.DEAD])
    before = codebook.rows.clone()
    codebook.revive()
    assert torch.equal(codebook.rows, before)


@pytest.mark.parametrize("shape", [(8, 72), (72, 8), (16, 40)], ids=str)
def test_orthogonal_brings_singular_values_near_1_and_keeps_directions(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 1e-3
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    assert s.max() / s.min() > 1.5
    turned = u.T @ orthogonal(matrix[None])[0] @ vt.T
    assert turned.diagonal().min() > 0.6
    assert turned.diagonal().max() < 1.3
    assert (turned - turned.diagonal().diag()).abs().max() < 1e-4


@pytest.mark.parametrize("shape", [(4, 3, 3, 3), (40, 2, 3, 3)], ids=str)
def test_a_step_of_muon_goes_by_lr_against_the_orthogonal_gradient(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(shape, generator=generator))
    before, weight.grad = weight.detach().clone(), torch.randn(shape, generator=generator)
    Muon([weight], lr=0.1).step()
    scale = 0.1 * max(1, shape[0] / (shape[1] * 9)) ** 0.5
    dtype = fastest_dtype("cpu")
    expected = before - scale * orthogonal(weight.grad.flatten(1)[None].to(dtype)).float().view(shape)
    # Muon scales the gradient first, which rounds otherwise.
    assert torch.allclose(weight, expected, atol=max(1e-4, 4 * scale * torch.finfo(dtype).eps))


def test_muon_has_momentum_and_finds_a_minimum():
    target = torch.randn(6, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    weight = torch.nn.Parameter(torch.zeros_like(target))
    optimizer = Muon([weight], lr=0.05)
    for _ in range(200):
        weight.grad = weight.detach() - target
        optimizer.step()
    assert (weight - target).square().mean() < 0.02 * target.square().mean()
    weight.grad = torch.zeros_like(target)
    before = weight.detach().clone()
    optimizer.step()
    assert not torch.equal(weight, before)


def test_an_error_weighs_more_beside_an_edge():
    pixels = torch.full((1, 3, 32, 32), -0.5)
    assert torch.allclose(vq._weight(pixels), torch.ones(1, 1, 32, 32))
    pixels[:, 1, :, 16:] = 0.5
    weight = vq._weight(pixels)
    assert weight.shape == (1, 1, 32, 32)
    assert torch.allclose(weight[..., :11], torch.ones(1, 1, 32, 11))
    assert weight[..., 15:17].min() > 2.5


def test_an_error_weighs_the_more_the_smaller_the_contrast_of_its_edge():
    edges = []
    for contrast in (2.0, 0.75, 0.3):
        pixels = torch.full((1, 3, 32, 32), -1.0)
        pixels[:, 1, :, 16:] += contrast
        edges.append(float(vq._weight(pixels)[..., 15:17].min()))
    assert edges == sorted(edges)
    assert edges[-1] > 1.5 * edges[0]


def test_training_lowers_the_error_of_the_round_trip_and_writes_the_model(tmp_path):
    with tiny():
        start = train(tmp_path / "start", 1)
        trained = train(tmp_path / "trained", 40, lr=0.1)
        assert vq.psnr(trained, n=6, target=64) > vq.psnr(start, n=6, target=64) + 3
    assert not trained.training
    assert len(trained.encode(next(vq.batches(9, 8, whole_from=0))).unique()) > 4
    written = VQGAN.from_pretrained(tmp_path / "trained").state_dict()
    assert all(torch.equal(tensor, written[name]) for name, tensor in trained.state_dict().items())


def test_a_run_that_goes_on_from_a_saved_state_ends_with_the_same_bits(tmp_path):
    """A state is saved at step 500; to come there at once, a run of one step gives the state of 496."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    starts, batches = [], vq.batches
    with tiny() as patch:
        with pytest.MonkeyPatch.context() as last:
            last.setattr(vq, "range", lambda *ends: [499] if len(ends) == 2 else range(*ends), raising=False)
            train(whole, 505)
        state = torch.load(whole / "training.pt", weights_only=True)
        torch.save({**state, "step": 496}, whole / "training.pt")
        patch.setattr(vq, "batches", lambda *args: starts.append(args[-1]) or batches(*args))
        expected = train(whole, 505).state_dict()
        killed.mkdir()
        shutil.copy(whole / "training.pt", killed)
        found = train(killed, 505).state_dict()
    assert starts == [496, 500]
    saved = torch.load(killed / "training.pt", weights_only=True)["model"]
    for name, tensor in expected.items():
        assert torch.equal(tensor, found[name]), name
        assert not torch.equal(tensor, saved[name]), name


def test_psnr_is_that_of_the_bytes_of_held_out_pictures():
    class Halved:
        """Returns pictures at half their contrast."""

        config = CONFIG

        def __init__(self):
            self.seen = []

        def encode(self, pixels):
            self.seen.append(pixels)
            return pixels

        def decode(self, codes):
            return codes / 2

    halved = Halved()
    found = vq.psnr(halved, n=8, target=64)
    values = [10 * math.log10(4 / (pixels / 2).square().mean().item()) for pixels in halved.seen]
    assert found == pytest.approx(sum(values) / 8)
    sizes = candidate_sizes(64, patch=2 * CONFIG.factor)
    assert all((pixels.shape[3], pixels.shape[2]) in sizes for pixels in halved.seen)


def test_codes_that_stand_for_patches_alike_are_merged_and_the_commonest_stays():
    with tiny() as patch:
        torch.manual_seed(0)
        vqgan = VQGAN(TINY).eval()
        counts = torch.zeros(16)
        for pixels in islice(vq.batches(0, 8, 0), 4):
            counts += torch.bincount(vqgan.encode(pixels).flatten(), minlength=16)
        patch.setattr(vq, "ALIKE", 0.0)
        every, kept = vq.merge_codes(vqgan, n_batches=4, batch_size=2)
        assert kept.tolist() == counts.nonzero().flatten().tolist()  # what nothing chooses goes, all else stays
        assert torch.equal(every.quantize.embedding.weight, vqgan.quantize.embedding.weight[kept])
        patch.setattr(vq, "ALIKE", 10.0)
        one, kept = vq.merge_codes(vqgan, n_batches=4, batch_size=2)
        assert kept.tolist() == [int(counts.argmax())]
        assert one.config.n_embed == 1


def test_refining_trains_the_decoder_and_leaves_the_codes(tmp_path):
    with tiny():
        vqgan = train(tmp_path, 40, lr=0.1)
        before, error = {name: p.clone() for name, p in vqgan.state_dict().items()}, vq.psnr(vqgan, n=6, target=64)
        vq.refine(vqgan, 60, batch_size=4, lr=0.02)
        assert vq.psnr(vqgan, n=6, target=64) > error
    assert not vqgan.training
    moved = {name.split(".")[0] for name, p in vqgan.state_dict().items() if not torch.equal(p, before[name])}
    assert moved == {"decoder", "post_quant_conv"}
