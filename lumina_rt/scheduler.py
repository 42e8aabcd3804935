"""Continuous batching: which requests run, and what each of their rows feeds in the next step.

A request is admitted when the pages of its longest possible answer are reserved, in the order of arrival; so what
runs never waits for memory and nothing is evicted half-way. This file knows tokens and pages, not tensors of the
model.
"""

from bisect import bisect_right
from collections import deque
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from lumina_rt.kv_cache import KVCache, PagePool, PrefixStore, Row
from lumina_rt.model import Step, upload
from lumina_rt.multi_step import Ahead
from lumina_rt.params import EngineConfig
from lumina_rt.request import Request, Sample
from lumina_rt.speculative import Pace, accepted


@dataclass
class Work:
    """What one sample feeds in a step: tokens of its conditional and of its unconditional row.

    n_cond, n_uncond: tokens of each row, the draft among them.  indices: of the sample's tokens that the step can draw,
    none unless everything known is fed.  draft: guesses of what stands between the first and the last of them.
    n_steps: steps run in one go, the same of all works of a plan; each but the first feeds what the one before has
    drawn, one token a row.
    """

    request: Request
    sample: Sample
    n_cond: int
    n_uncond: int
    indices: list[int]
    draft: list[int]
    n_steps: int = 1

    def rows(self) -> list[tuple[Row, int]]:
        rows = [(self.sample.cond, self.n_cond), (self.sample.uncond, self.n_uncond)]
        return [(row, n) for row, n in rows if n]


class Scheduler:
    """max_steps: the most steps that are run in one go; 1 where the host looks at every token."""

    max_steps = 1

    def __init__(self, config: EngineConfig, cache: KVCache, num_pages: int):
        self.config, self.cache = config, cache
        self.pool = PagePool(num_pages)
        self.prefixes = PrefixStore(self.pool, config.page_size)
        self.pace = Pace(config.speculation)
        self.waiting: deque[Request] = deque()
        self.running: deque[Request] = deque()

    def check(self, request: Request) -> None:
        """Raise ValueError, naming need and have, when a request can never run. Reads no state: any thread may call."""
        rows, pages = self._n_rows(request), self._n_pages(request, n_matched=0)
        if rows > self.config.max_num_seqs:
            raise ValueError(f"the request needs {rows} rows; max_num_seqs is {self.config.max_num_seqs}")
        if pages > self.pool.num_pages:
            raise ValueError(
                f"the request needs {pages} pages of {self.config.page_size} tokens; the pool has {self.pool.num_pages}"
            )

    def shorten(self, request: Request) -> None:
        """Let a new request's answers be only as long as the whole pool has pages for, but a token at least."""
        leader = request.samples[0]

        def n_pages(n_end: int) -> int:
            leader.n_end = n_end
            return self._n_pages(request, n_matched=0)

        lengths = range(leader.n_prompt + 1, leader.n_end + 1)
        n_fitting = bisect_right(lengths, self.pool.num_pages, key=n_pages)
        for sample in request.samples:
            sample.n_end = lengths[max(0, n_fitting - 1)]

    def add(self, request: Request) -> None:
        """Queue a request that `check` let pass."""
        self.waiting.append(request)

    def schedule(self, now: float) -> list[Work]:
        """Admit what fits, then share out the tokens of one step; every page that it writes is owned afterwards."""
        self._admit(now)
        budget = self.config.max_num_batched_tokens
        runnable = [(request, sample) for request in self.running for sample in self._runnable(request)]
        n_rows = sum(sample.n_rows for _, sample in runnable)
        n_draws = self.pace.window(
            sum(sample.n_rows for _, sample in runnable if sample.layout),
            sum(sample.n_rows for _, sample in runnable if not (sample.layout or sample.is_prefilling)),
        )
        # Rows that decode go before prompts, so that a long prompt stops no image; but who has waited longest goes
        # first of all, so that a small budget starves nobody.
        runnable.sort(key=lambda pair: (-pair[1].n_waited, pair[1].is_prefilling))
        plan: list[Work] = []
        for request, sample in runnable:
            work = self._share_out(request, sample, budget, n_draws, budget // n_rows)
            n_rows -= sample.n_rows  # left to those behind it
            sample.n_waited = 0 if work else sample.n_waited + 1
            if work is None:
                continue
            budget -= work.n_cond + work.n_uncond
            plan.append(work)
        n_steps = self._n_steps(plan) if n_draws == 1 and len(plan) == len(runnable) else 1
        for work in plan:
            work.n_steps = n_steps
            for row, n in work.rows():
                row.make_room(n + n_steps - 1, work.request.lease, self.cache, self.config.page_size)
        return plan

    def _n_steps(self, plan: list[Work]) -> int:
        """How many steps draw nothing but codes: up to the nearest end of a row of latents."""
        if not all(work.indices and work.sample.layout for work in plan):
            return 1
        if any(work.request.prefilled is None for work in plan):
            return 1  # so that prefill is timed alone, and the other samples of a prompt begin after it
        left = (work.sample.layout.codes_left(len(work.sample.tokens) - work.sample.image_start) for work in plan)
        return min([self.max_steps, *left])

    def _runnable(self, request: Request) -> list[Sample]:
        samples = request.samples if request.has_forked else request.samples[:1]
        return [sample for sample in samples if not sample.finish_reason]

    def _share_out(self, request: Request, sample: Sample, budget: int, n_draws: int, share: int) -> Work | None:
        """What a sample feeds: all that is known, where `budget` holds it, and guesses up to `share` tokens a row."""
        n_cond = len(sample.tokens) - sample.cond.n_cached
        n_uncond = len(sample.pending(sample.uncond)) if sample.is_guided else 0
        if n_cond + n_uncond <= budget:
            draft, indices = sample.draft(n_draws, share - max(n_cond, n_uncond))
            n_draft = len(draft)
            return Work(request, sample, n_cond + n_draft, n_uncond and n_uncond + n_draft, indices, draft)
        # A chunk leaves at least one token, so that both rows end, and the draw is made, in the same step.
        n_chunk = min(n_cond - 1, budget)
        return Work(request, sample, n_chunk, 0, [], []) if n_chunk > 0 else None

    def observe(self, plan: list[Work], seconds: float) -> None:
        """Take in how long a plan took. Prompts are left out: theirs are the first steps, and touch memory for the
        first time.
        """
        if all(work.request.prefilled for work in plan):
            n_lines = sum(len(work.indices) * len(work.rows()) for work in plan)
            self.pace.observe(n_lines, seconds / plan[0].n_steps)

    def commit(self, plan: list[Work], drawn: list[int]) -> list[list[int]]:
        """Count what the step has cached, and let the other samples of a prefilled request begin.

        drawn: a token for each index of each work, in order, and for each further step.  Returns for each work the
        tokens that hold, which are those whose past was guessed right.
        """
        for request in {id(work.request): work.request for work in plan}.values():
            request.n_steps += plan[0].n_steps
        tokens, held = iter(drawn), []
        for work in plan:
            held.append(self._keep(work, list(islice(tokens, len(work.indices) + work.n_steps - 1))))
            if held[-1] and not work.request.has_forked:
                self._fork(work.request)
        return held

    def _keep(self, work: Work, drawn: list[int]) -> list[int]:
        n_held, n_wrong = len(drawn), 0
        if work.draft:
            n_held = accepted(work.draft, work.indices, drawn)
            n_wrong = work.indices[-1] - work.indices[n_held - 1]  # tokens fed behind the last draw that holds
            work.sample.note(work.indices[n_held:], drawn[n_held:])
            self.pace.learn(len(drawn), n_held)
        for row, n_fed in work.rows():
            row.n_cached += n_fed + work.n_steps - 1 - n_wrong
        return drawn[:n_held]

    def _fork(self, request: Request) -> None:
        request.has_forked = True
        leader = request.samples[0]
        for sample in request.samples[1:]:
            # The last shared token is fed again: its output is what each sample draws from.
            sample.cond.adopt(leader.cond.pages, leader.n_shared - 1, self.pool, self.config.page_size)

    def settle(self, request: Request, sample: Sample) -> None:
        """Give back the pages that a sample needs no more: of finished images, and its own when it is finished.

        The row of a finished sample is kept as a prefix for as long as nobody needs its pages. What it was promised
        and did not take is free as well, and so are its places in a step.
        """
        for row in sample.closed:
            request.lease.refund(row)
        sample.closed.clear()
        if sample.finish_reason:
            self.prefixes.keep(sample.tokens, sample.cond)
            self._clear(sample)
            request.lease.keep(self._n_live(request) * sum(self._n_pages_of_rows(request)))

    def remove(self, request: Request) -> None:
        """Forget a request, finished or not, and give back all its pages."""
        for sample in request.samples:
            self._clear(sample)
        request.lease.close()
        for queue in (self.waiting, self.running):
            if request in queue:
                queue.remove(request)

    def _clear(self, sample: Sample) -> None:
        for row in (sample.cond, sample.uncond, *sample.closed):
            if row:
                row.clear(self.pool)

    def _admit(self, now: float) -> None:
        n_rows = sum(self._n_rows(request) for request in self.running)
        while self.waiting:
            request = self.waiting[0]
            n_rows += self._n_rows(request)
            if n_rows > self.config.max_num_seqs or not self._reserve(request):
                return
            request.admitted = now
            self.running.append(self.waiting.popleft())

    def _reserve(self, request: Request) -> bool:
        leader = request.samples[0]
        pages, n_matched = self.prefixes.longest(leader.tokens[: leader.n_shared - 1])
        if n_matched:
            leader.cond.adopt(pages, n_matched, self.pool, self.config.page_size)
        n_pages = self._n_pages(request, n_matched)
        if not self.prefixes.make_room(n_pages):
            # An adopted page that is filled in part is held beside its copy; without it the pool may just do.
            leader.cond.clear(self.pool)
            n_pages = self._n_pages(request, n_matched=0)
            if not self.prefixes.make_room(n_pages):
                return False
        request.lease.open(n_pages)
        return True

    def _n_rows(self, request: Request) -> int:
        leader = request.samples[0]
        is_guided = leader.params.guidance_scale != 1 and leader.n_largest_image > 0
        return self._n_live(request) * (1 + is_guided)

    def _n_live(self, request: Request) -> int:
        return sum(not sample.finish_reason for sample in request.samples)

    def _n_pages_of_rows(self, request: Request) -> tuple[int, int]:
        """The pages of the conditional and of the unconditional row of one sample, at their longest."""
        page_size, leader = self.config.page_size, request.samples[0]
        n_uncond = -(-leader.n_largest_image // page_size) if leader.params.guidance_scale != 1 else 0
        return -(-leader.n_end // page_size), n_uncond

    def _n_pages(self, request: Request, n_matched: int) -> int:
        """The pages that a request takes at most, beside those it adopts."""
        page_size, n_samples = self.config.page_size, len(request.samples)
        n_shared = (request.samples[0].n_shared - 1) // page_size  # whole pages that all samples have in common
        n_most = n_samples * sum(self._n_pages_of_rows(request))
        return n_most - (n_samples - 1) * n_shared - n_matched // page_size


def build_step(plan: list[Work], page_size: int, device: torch.device) -> Step:
    """Lay out the rows of a plan as one ragged batch."""
    tokens, positions, slots, lengths, seq_lens, tables = [], [], [], [0], [], []
    for work in plan:
        for row, n in work.rows():
            places = range(row.n_cached, row.n_cached + n)
            tokens += (work.sample.pending(row) + work.draft)[:n]
            positions += places
            slots += [row.pages[place // page_size] * page_size + place % page_size for place in places]
            lengths.append(lengths[-1] + n)
            seq_lens.append(row.n_cached + n)
            tables.append(row.pages)
    return Step(
        *upload([tokens, positions, slots], torch.int64, device).unbind(),
        *(upload(values, torch.int32, device) for values in (_padded(tables), lengths, seq_lens)),
    )


def look_ahead(plan: list[Work], page_size: int) -> Ahead:
    """Lay out the steps of a plan that follow its first, one token a row."""
    steps = np.arange(plan[0].n_steps - 1)
    positions, slots, places, tables, leaders, partners = [], [], [], [], [], []
    for work in plan:
        pair = work.rows()
        leader = len(tables)
        for row, n in pair:
            fed = row.n_cached + n + steps
            positions.append(fed)
            slots.append(np.array(row.pages)[fed // page_size] * page_size + fed % page_size)
            places.append(work.indices[0] + 1 + steps)
            tables.append(row.pages)
            leaders.append(leader)
            partners.append(leader + len(pair) - 1)
    columns = (np.stack(column, axis=1) for column in (positions, slots, places))
    return Ahead(*columns, np.array(_padded(tables)), np.array(leaders), np.array(partners))


def _padded(tables: list[list[int]]) -> list[list[int]]:
    n_blocks = max(len(table) for table in tables)
    return [table + [0] * (n_blocks - len(table)) for table in tables]
