"""Runs a plan: lays it out as a step, feeds it to the model, and draws from it; on a GPU by CUDA graphs."""

import numpy as np
import torch
from torch import Tensor

from lumina_rt.graph import Graphs
from lumina_rt.kv_cache import KVCache
from lumina_rt.model import Model, upload
from lumina_rt.multi_step import MultiStep
from lumina_rt.sampler import Pick, Sampler, read
from lumina_rt.scheduler import Work, build_step, look_ahead
from lumina_rt.vocab import Vocab


class Runner:
    def __init__(self, model: Model, vocab: Vocab, cache: KVCache, page_size: int):
        self.model, self.cache, self.page_size = model, cache, page_size
        self.sampler = Sampler(model, vocab)
        self.graphs: Graphs | None = None
        self.multi_step: MultiStep | None = None

    def record(self, max_rows: int, max_blocks: int) -> None:
        """Record the graphs. The last page of the cache must be nobody's, see `Graphs`."""
        self.graphs = Graphs(self.model, self.cache, max_rows, max_blocks)
        self.multi_step = MultiStep(self.model, self.cache, self.sampler.image_tokens, max_rows, max_blocks)

    def run(self, plan: list[Work]) -> list[int]:
        """Feed and draw what a plan says; return what `Scheduler.commit` takes.

        Raises FloatingPointError when logits are not finite.
        """
        step, picks = build_step(plan, self.page_size, self.model.embed.device), _picks(plan)
        hidden = self.graphs.forward(step) if self.graphs else self.model.forward(step, self.cache)
        if plan[0].n_steps == 1:
            return self.sampler.draw(picks, hidden)
        return self._run_on(plan, picks, hidden)

    def _run_on(self, plan: list[Work], picks: list[Pick], hidden: Tensor) -> list[int]:
        """Draw what the first of several steps has to draw, run the others, and read all of it at once."""
        picks = [pick for pick, work in zip(picks, plan, strict=True) for _ in work.rows()]
        first, ahead = self.sampler.draw_codes(picks, hidden), look_ahead(plan, self.page_size)
        further = self.multi_step.run(first, ahead, *self.sampler.controls_and_keys(picks))
        conditional = upload(np.unique(ahead.leaders).tolist(), torch.int64, hidden.device)
        return read(torch.cat((first.unsqueeze(0), further)).index_select(1, conditional).T.flatten())


def _picks(plan: list[Work]) -> list[Pick]:
    """Which lines of the step's hidden states each draw is made from: those of the token before it."""
    picks, line = [], -1
    for work in plan:
        cond = line + work.n_cond
        line = uncond = cond + work.n_uncond
        for index in work.indices:
            before = work.indices[-1] - index  # tokens fed behind the one that this is drawn from
            picks.append(Pick(work.sample, work.request.seed, index, cond - before, uncond - before))
    return picks
