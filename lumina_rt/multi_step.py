"""Several decode steps in one go: each feeds the codes it draws to the next, on the GPU, and the host reads them once.

Inside a row of latents all of a step but its tokens is known beforehand: positions, pages, controls and the keys of
the noise. So it is copied to the GPU for all of them, and a step, its draw and the way of the drawn token into the next
step are one CUDA graph, recorded for each number of rows at start-up. This file does not know what a row is of.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from lumina_rt import graph
from lumina_rt.kernels import Controls, NoiseKeys
from lumina_rt.kv_cache import KVCache
from lumina_rt.model import Model, Step, upload

MAX_STEPS = 128  # columns of latents of the widest image that checkpoints know, 2048 x 512


@dataclass
class Ahead:
    """What is known of n steps before the first of them runs, each of one token a row and of one draw a row.

    positions, slots, places: int64 arrays [n, rows]; a place is that of the drawn token, which keys its noise.
    block_tables: int32 [rows, blocks].  partners: int64 [rows], the row of the unconditional stream for each, itself
    where there is none; the rows of a pair make the same draw.  leaders: int64 [rows], the conditional ones.
    """

    positions: np.ndarray
    slots: np.ndarray
    places: np.ndarray
    block_tables: np.ndarray
    leaders: np.ndarray
    partners: np.ndarray


class MultiStep:
    """Decode steps over one cache, by graphs.

    max_rows, max_blocks: as of Graphs, whose spare page this one's padding writes to as well.
    """

    @torch.inference_mode()
    def __init__(self, model: Model, cache: KVCache, image_tokens: Tensor, max_rows: int, max_blocks: int):
        self.model, self.cache, self.image_tokens = model, cache, image_tokens
        _, num_pages, self.page_size = cache.k.shape[:3]
        self.spare_page = num_pages - 1
        buckets = sorted({graph.bucket_of(rows, rows)[0] for rows in range(1, max_rows + 1)}, reverse=True)
        most, device = buckets[0], model.embed.device

        def full(value: int, *shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full(shape, value, dtype=dtype, device=device)

        self.n_done = full(0, 1)
        self.drawn = full(0, MAX_STEPS * most)
        # Columns of a step: position, slot and place of every row, and seq_lens, two of them in one number.
        self.ahead = full(0, (MAX_STEPS + 1) * _width(most))
        self.now = full(0, _width(most))
        self.tokens = full(0, most)
        self.block_tables = full(self.spare_page, most, max_blocks, dtype=torch.int32)
        self.cu_seqlens = torch.arange(most + 1, dtype=torch.int32, device=device)
        self.draws = full(0, 5, most)  # leader, partner, top_k, seed, image
        self.controls = full(1, 4, most, dtype=torch.float32)  # guidance, temperature, top_p, min_p
        bar = tqdm(self._runs(buckets), "decode graphs", len(buckets), unit="graph", disable=None, leave=False)
        self.recorded = {rows: replay for rows, (replay, _) in zip(buckets, graph.record(bar), strict=True)}

    def _runs(self, buckets: list[int]) -> Iterator[Callable[[], Tensor]]:
        """What is recorded; each run of it writes padding, and leaves zeros for the next."""
        for rows in buckets:
            self.now.narrow(0, rows, rows).fill_(self.spare_page * self.page_size)
            yield partial(self._step, rows)

    @torch.inference_mode()
    def run(self, drawn: Tensor, ahead: Ahead, controls: Controls, keys: NoiseKeys) -> Tensor:
        """Run the steps of `ahead`, the first of which feeds `drawn`.

        drawn: int64 [rows]; what is below 0 tells of logits that are not finite, here and in the result.  controls,
        keys: of a draw for each row; the position of the keys is not looked at.  Returns int64 [n, rows], which hold
        until the next call.
        """
        n, rows = ahead.positions.shape
        padded = graph.bucket_of(rows, rows)[0]
        self._fill(drawn, ahead, controls, keys, padded)
        for _ in range(n):
            self.recorded[padded]()
        return self.drawn.narrow(0, 0, n * padded).view(n, padded).narrow(1, 0, rows)

    def _fill(self, drawn: Tensor, ahead: Ahead, controls: Controls, keys: NoiseKeys, padded: int) -> None:
        n, rows = ahead.positions.shape
        device = drawn.device
        packed = np.zeros((n, _width(padded)), dtype=np.int64)
        columns, seq_lens = packed[:, : 3 * padded].reshape(n, 3, padded), packed[:, 3 * padded :].view(np.int32)
        columns[:, 1] = self.spare_page * self.page_size
        for column, values in enumerate((ahead.positions, ahead.slots, ahead.places)):
            columns[:, column, :rows] = values
        seq_lens[:, :rows] = ahead.positions + 1
        self.ahead.narrow(0, 0, packed.size).copy_(upload(packed.reshape(-1).tolist(), torch.int64, device))
        self.now.narrow(0, 0, _width(padded)).copy_(self.ahead.narrow(0, 0, _width(padded)))

        tables = np.full((padded, self.block_tables.shape[1]), self.spare_page, dtype=np.int32)
        tables[:rows, : ahead.block_tables.shape[1]] = ahead.block_tables
        self.block_tables.narrow(0, 0, padded).copy_(upload(tables.tolist(), torch.int32, device))
        rows_of_draws = upload(np.stack((ahead.leaders, ahead.partners)).tolist(), torch.int64, device)
        whole = (*rows_of_draws.unbind(), controls.top_k, keys.seed, keys.image)
        self.draws.narrow(1, 0, rows).copy_(torch.stack(whole))
        chosen = controls.guidance, controls.temperature, controls.top_p, controls.min_p
        self.controls.narrow(1, 0, rows).copy_(torch.stack(chosen))
        if padded > rows:  # its draws are made from the first row, whatever was here before
            self.draws.narrow(1, rows, padded - rows).zero_()
        self.tokens.narrow(0, 0, rows).copy_(drawn.clamp(min=0))
        self.n_done.zero_()

    def _step(self, rows: int) -> Tensor:
        """Forward, draw, and all that the next step reads. Recorded once; every tensor stays where it is."""
        positions, slots, places, packed = self.now.narrow(0, 0, _width(rows)).split((rows, rows, rows, rows // 2))
        tokens = self.tokens.narrow(0, 0, rows)
        step = Step(
            tokens, positions, slots, self.block_tables.narrow(0, 0, rows), self.cu_seqlens.narrow(0, 0, rows + 1),
            packed.view(torch.int32),
        )  # fmt: skip
        leaders, partners, top_k, seed, image = self.draws.narrow(1, 0, rows).unbind()
        guidance, temperature, top_p, min_p = self.controls.narrow(1, 0, rows).unbind()
        ops = self.model.ops
        logits = ops.linear(self.model.forward(step, self.cache), self.model.image_head)
        drawn = ops.guided_sample(
            logits, leaders, partners, self.image_tokens, Controls(guidance, temperature, top_k, top_p, min_p),
            NoiseKeys(seed, image, places),
        )  # fmt: skip
        self.drawn.narrow(0, 0, MAX_STEPS * rows).view(MAX_STEPS, rows).index_copy_(0, self.n_done, drawn.unsqueeze(0))
        torch.clamp(drawn, min=0, out=tokens)
        self.n_done.add_(1)
        steps = self.ahead.narrow(0, 0, (MAX_STEPS + 1) * _width(rows)).view(MAX_STEPS + 1, -1)
        torch.index_select(steps, 0, self.n_done, out=self.now.narrow(0, 0, _width(rows)).unsqueeze(0))
        return drawn


def _width(rows: int) -> int:
    """Numbers of 8 bytes that one step takes in what is known ahead."""
    return 3 * rows + rows // 2
