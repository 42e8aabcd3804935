"""Train the image tokenizer on pictures and label maps of the procedural world.

The recipe of a plain VQ-VAE (van den Oord et al. 2017): an autoencoder first; then its latents become the codebook,
which follows them as a moving average, while rows that nothing chooses are moved onto latents of the batch.
"""

import argparse
import math
import os
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from lumina_rt.sft import world
from lumina_rt.sft.world import Scene
from torch import Tensor
from tqdm import tqdm

from lumina_rt.images import to_pixels
from lumina_rt.unirep import candidate_sizes
from lumina_rt.vqgan import VQGAN, VQGANConfig

CONFIG = VQGANConfig(
    embed_dim=8, n_embed=4096, z_channels=64, ch=32, ch_mult=(1, 2, 2, 4), num_res_blocks=1, norm_groups=8
)
TARGETS = (96, 96, 64)  # areas of the training pictures, in the share in which they stand here
COMMITMENT = 0.25
EMA_DECAY = 0.99


def random_image(rng: Random, width: int, height: int, training: bool = True):
    """A picture, or one time in two what the labelling tasks draw."""
    scene = world.random_scene(rng, None, width / height, training)
    kinds = (world.picture, _with_box, world.segmentation, world.depth, world.surface_normals)
    (draw,) = rng.choices(kinds, (5, 2, 1, 1, 1))
    return draw(scene, width, height)


def _with_box(scene: Scene, width: int, height: int):
    return world.detection(scene, scene.things[0], width, height)


def batches(seed: int, batch_size: int, start: int = 0) -> Iterator[Tensor]:
    """Endless batches, float [batch_size, 3, H, W] in [-1, 1], each of one size; the same from `start` on."""
    sizes = {target: candidate_sizes(target, patch=2 * CONFIG.factor) for target in TARGETS}
    step = start
    while True:
        rng = Random(f"vq {seed} {step}")
        width, height = rng.choice(sizes[rng.choice(TARGETS)])
        images = [to_pixels(random_image(rng, width, height)) for _ in range(batch_size)]
        yield torch.from_numpy(np.stack(images))
        step += 1


class Codebook:
    """The codebook of a VQGAN as a moving average of the latents that choose each row."""

    def __init__(self, vqgan: VQGAN):
        self.rows = vqgan.quantize.embedding.weight
        self.rows.requires_grad_(False)
        self.counts = torch.ones(len(self.rows))
        self.sums = self.rows.detach().clone()

    def start(self, latents: Tensor) -> None:
        """Take rows at random from latents, [n, embed_dim]."""
        self.rows.copy_(latents[torch.randint(len(latents), (len(self.rows),))])
        self.sums.copy_(self.rows)
        self.counts.fill_(1)

    def follow(self, latents: Tensor, codes: Tensor) -> None:
        """Move towards latents, [n, embed_dim], that have chosen codes, int64 [n]."""
        chosen = torch.zeros_like(self.counts).index_add_(0, codes, torch.ones(len(codes)))
        self.counts.lerp_(chosen, 1 - EMA_DECAY)
        self.sums.lerp_(torch.zeros_like(self.sums).index_add_(0, codes, latents), 1 - EMA_DECAY)
        dead = (self.counts < 0.02).nonzero().flatten()
        if len(dead):
            moved = latents[torch.randint(len(latents), (len(dead),))]
            self.sums[dead], self.counts[dead] = moved, 1.0
        self.rows.copy_(self.sums / self.counts[:, None])


def _weight(pixels: Tensor) -> Tensor:
    """What an error weighs, [b, 1, H, W]: more beside edges, where what is drawn is told apart."""
    around = F.avg_pool2d(pixels, 9, stride=1, padding=4, count_include_pad=False)
    return 1 + 4 * (pixels - around).abs().amax(1, keepdim=True)


def train(
    folder: Path, steps: int, batch_size: int, lr: float, warmup: int, seed: int, start_from: Path | None = None
) -> VQGAN:
    """Train for `steps` steps, the first `warmup` of them without a codebook, and write into `folder`.

    start_from: a VQGAN of CONFIG but for its codebook, whose encoder and decoder to take.
    """
    torch.manual_seed(seed)
    vqgan = VQGAN(CONFIG).train()
    if start_from:
        taken = VQGAN.from_pretrained(start_from).state_dict()
        vqgan.load_state_dict({n: w for n, w in taken.items() if not n.startswith("quantize.")}, strict=False)
    codebook = Codebook(vqgan)
    learned = [p for p in vqgan.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr, betas=(0.9, 0.95), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min(1, (i + 1) / 100) * max(0.02, 0.5 + 0.5 * math.cos(math.pi * i / steps))
    )
    start = 0
    state_path = folder / "training.pt"
    if state_path.exists():
        state = torch.load(state_path, weights_only=True)
        vqgan.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        codebook.counts, codebook.sums, start = state["counts"], state["sums"], state["step"]
    bar = tqdm(
        zip(range(start, steps), batches(seed, batch_size, start), strict=False),
        total=steps,
        initial=start,
        mininterval=5,
    )
    average = None
    for step, pixels in bar:
        torch.manual_seed(step)
        with torch.autocast("cpu", torch.bfloat16):
            latents = vqgan.encode_latents(pixels)
        latents = latents.float()
        quantized = latents
        loss = 0.0
        if step >= warmup:
            rows = latents.detach().permute(0, 2, 3, 1).flatten(0, 2)
            if step == warmup:
                codebook.start(rows)
            codes = vqgan.quantize(latents)
            found = vqgan.quantize.lookup(codes)
            loss = COMMITMENT * F.mse_loss(latents, found)
            quantized = latents + (found - latents).detach()
            codebook.follow(rows, codes.flatten())
        with torch.autocast("cpu", torch.bfloat16):
            drawn = vqgan.decode_latents(quantized)
        difference = drawn.float() - pixels
        loss = loss + (_weight(pixels) * (difference.square() + 0.1 * difference.abs())).mean()
        error = difference.detach().square().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned, 1.0)
        optimizer.step()
        schedule.step()
        average = error.item() if average is None else 0.98 * average + 0.02 * error.item()
        if step % 50 == 0:
            bar.set_postfix(psnr=f"{10 * math.log10(4 / average):.2f}", used=int((codebook.counts > 0.1).sum()))
        if (step + 1) % 500 == 0:
            vqgan.save_pretrained(folder)
            state = {
                "model": vqgan.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": schedule.state_dict(),
                "counts": codebook.counts,
                "sums": codebook.sums,
                "step": step + 1,
            }
            torch.save(state, state_path.with_suffix(".partial"))
            os.replace(state_path.with_suffix(".partial"), state_path)
    vqgan.save_pretrained(folder)
    return vqgan.eval()


@torch.no_grad()
def psnr(vqgan: VQGAN, n: int = 200, target: int = 96, seed: int = 1) -> float:
    """Mean PSNR in dB of the round trip of held-out pictures, as bytes would show them."""
    values = []
    sizes = candidate_sizes(target, patch=2 * vqgan.config.factor)
    for i in range(n):
        rng = Random(f"vq test {seed} {i}")
        width, height = rng.choice(sizes)
        scene = world.random_scene(rng, None, width / height, training=False)
        pixels = torch.from_numpy(to_pixels(world.picture(scene, width, height)))[None]
        error = (vqgan.decode(vqgan.encode(pixels)).clamp(-1, 1) - pixels).square().mean()
        values.append(10 * math.log10(4 / error.item()))
    return sum(values) / n


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lumina_rt.sft.vq", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=5000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--warmup", type=int, default=500)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--start-from", type=Path, help="a folder whose encoder and decoder to go on from")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    vqgan = train(**vars(args))
    print(f"round trip of held-out pictures: {psnr(vqgan):.2f} dB")


if __name__ == "__main__":
    main()
