"""Continuous batching under random traffic: nothing starves, no page is lost, and no row reads another's tokens.

A stub takes the model's place: it writes the tokens themselves into the cache, so that every row can be compared
with what it ought to hold, and draws whatever the grammar allows.
"""

import re
from collections import Counter, deque
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_request import assert_whole, legal_draw

from lumina_rt import Engine, EngineConfig, SamplingParams, dummy
from lumina_rt.kv_cache import KVCache
from lumina_rt.outputs import RequestOutput
from lumina_rt.prompts import Message
from lumina_rt.request import Draw
from lumina_rt.scheduler import Work, build_step
from lumina_rt.speculative import Pace
from lumina_rt.tokenizer import Tokenizer

PAGE = 16


class Broken(RuntimeError):
    """A failure made for the test."""


def made(event):
    """An event; an output is made when it is read."""
    return event() if callable(event) else event


def is_broken(request):
    return bool(request.events) and isinstance(request.events[-1], Broken)


class TokenModel:
    """In the model's place: what it caches of a token is the token and its position."""

    embed = torch.zeros(1, 1)

    def __init__(self, n_vocab):
        self.config = SimpleNamespace(n_layers=1, kv_heads=1, head_dim=1, vocab_size=n_vocab)
        self.fails = False

    def forward(self, step, cache: KVCache):
        ((k, v),) = cache.layers()
        k, v = k.flatten(), v.flatten()
        assert len(set(step.slots.tolist())) == len(step.slots), "two tokens are written to one place"
        k[step.slots] = step.tokens.float()
        v[step.slots] = step.positions.float()
        if self.fails:
            raise Broken
        rows = zip(step.cu_seqlens[:-1], step.cu_seqlens[1:], step.block_tables, step.seq_lens, strict=True)
        for begin, end, table, length in rows:
            slots = (table[:, None].long() * PAGE + torch.arange(PAGE)).flatten()[:length]
            n = end - begin
            assert n > 0
            assert v[slots].tolist() == list(range(length)), "a row attends to something else than its past"
            assert k[slots][length - n :].tolist() == step.tokens[begin:end].tolist()
        return step.tokens[:, None].float()


class AnyLegal:
    """In the sampler's place: draws at random what the grammar allows, and stops text now and then."""

    def __init__(self, tokenizer, seed):
        self.rng, self.text = np.random.default_rng(seed), tokenizer.encode("abc .")
        self.codes = set(tokenizer.vocab.image_ids.tolist())

    def draw(self, picks, hidden):
        for pick in picks:
            assert hidden[pick.cond] == hidden[pick.uncond]
            if pick.index == len(pick.sample.tokens):
                assert hidden[pick.cond] == pick.sample.tokens[-1]
            assert (pick.cond != pick.uncond) == pick.sample.is_guided
        return [self._draw(pick, int(hidden[pick.cond])) for pick in picks]

    def _draw(self, pick, before):
        # Often the token before, which is what a window guesses.
        if pick.sample.next_draw is Draw.CODE and before in self.codes and self.rng.random() < 0.6:
            return before
        return legal_draw(pick.sample, self.rng, self.text)


class Traffic:
    """An Engine with the stubs in it, every promise of whose scheduler is checked after every step."""

    def __init__(self, tokenizer, num_pages=24, budget=64, rows=16, seed=0, speculation="off"):
        config = EngineConfig(PAGE, num_pages, 4, rows, budget, max_model_len=320, speculation=speculation)
        vqgan = SimpleNamespace(config=SimpleNamespace(factor=16))
        self.model = TokenModel(tokenizer.vocab.size)
        self.engine = Engine(self.model, tokenizer, vqgan, config, target_sizes=(64, 32))
        self.engine.runner.sampler = AnyLegal(tokenizer, seed)
        self.engine.pictures.read = lambda picture: None
        self.scheduler, self.pool = self.engine.scheduler, self.engine.scheduler.pool
        self.plan: list[Work] = []
        self.requests, self.unserved, self.most_runnable = [], Counter(), 0
        self.n_tokens_left = 0  # the most tokens that can still be fed; each step feeds one at least
        schedule = self.scheduler.schedule
        self.scheduler.schedule = lambda now: self._check_plan(schedule(now))

    def submit(self, conversation, **params):
        request = self.engine._submit(conversation, SamplingParams(**params), deque())
        self.requests.append(request)
        self.n_tokens_left += sum(2 * sample.n_end for sample in request.samples)
        return request

    def step(self, fails=False) -> bool:
        self.model.fails = fails
        running = set(self.scheduler.running)
        ran = self.engine.step()
        if fails and ran:
            affected = {work.request for work in self.plan}
            assert all(is_broken(request) for request in affected)
            assert affected.isdisjoint(self.scheduler.running)
            assert running - affected <= set(self.scheduler.running), "others than those in the step were ended"
        self.check()
        return ran

    def run(self):
        while self.step():
            self.n_tokens_left -= 1
            assert self.n_tokens_left >= 0, "steps go on for ever"
        assert not self.scheduler.waiting
        assert not self.scheduler.running

    def finish(self):
        """Run to the end; every request has its answers or its error, and every page is back."""
        self.run()
        for request in self.requests:
            if is_broken(request):
                continue
            assert isinstance(request.events[-1], RequestOutput)
            for sample in request.samples:
                if sample.finish_reason != "abort":
                    assert_whole(sample, self.engine.tokenizer.vocab)
        while len(self.scheduler.prefixes):
            self.scheduler.prefixes.drop_oldest()
        assert self.pool.n_free == self.pool.num_pages
        assert self.pool.holders == [0] * self.pool.num_pages

    def _check_plan(self, plan):
        self.plan = plan
        config = self.engine.config
        rows = [row for work in plan for row, _ in work.rows()]
        assert len({id(row) for row in rows}) == len(rows) <= config.max_num_seqs
        assert sum(work.n_cond + work.n_uncond for work in plan) <= config.max_num_batched_tokens
        for work in plan:
            sample = work.sample
            assert work.n_cond > 0
            for row, n in work.rows():
                n_pages = -(-(row.n_cached + n) // PAGE)
                # A page that was taken for a wrong draft stays with its row.
                assert len(row.pages) == n_pages or (config.speculation != "off" and len(row.pages) > n_pages)
                written = row.pages[row.n_cached // PAGE : n_pages]
                assert [self.pool.holders[page] for page in written] == [1] * len(written)
            pending = sample.pending(sample.uncond) if sample.is_guided else []
            n_draft = len(work.draft)
            known = work.n_cond - n_draft, work.n_uncond and work.n_uncond - n_draft
            assert (known == (len(sample.pending(sample.cond)), len(pending))) == bool(work.indices)

        served = {id(work.sample) for work in plan}
        runnable = [
            sample
            for request in self.scheduler.running
            for sample in (request.samples if request.has_forked else request.samples[:1])
            if not sample.finish_reason
        ]
        waits = {id(sample): self.unserved[id(sample)] + 1 for sample in runnable if id(sample) not in served}
        self.unserved = Counter(waits)
        self.most_runnable = max(self.most_runnable, len(runnable))
        assert max(waits.values(), default=0) < max(1, self.most_runnable), "a sample starves"
        admitted = [request.request_id for request in self.scheduler.running]
        assert admitted == sorted(admitted)
        if self.scheduler.running and self.scheduler.waiting:
            assert admitted[-1] < self.scheduler.waiting[0].request_id
        self.check()
        return plan

    def check(self):
        """What must hold at any time: the accounts of the pages, and what is in them."""
        for request in self.requests:
            if request.events:
                request.events[-1] = made(request.events[-1])
        pool, cache = self.pool, self.engine.cache
        references, leases = Counter(), 0
        contents = [(ids.tolist(), pages) for ids, pages in self.scheduler.prefixes._rows.values()]
        for request in self.requests:
            if request not in self.scheduler.running:
                assert request.lease.n_left == 0
            leases += request.lease.n_left
            for sample in request.samples:
                assert not sample.closed
                for row in filter(None, (sample.cond, sample.uncond)):
                    if request in self.scheduler.waiting or sample.finish_reason:
                        assert not row.pages
                    start = sample.image_start if row is sample.uncond else 0
                    assert len(row.pages) * PAGE >= row.n_cached
                    contents.append((sample.tokens[start : start + row.n_cached], row.pages))
        for tokens, pages in contents:
            references.update(pages)
            for field, expected in ((cache.k, tokens), (cache.v, range(len(tokens)))):
                assert field[0, pages].flatten()[: len(tokens)].tolist() == list(expected)
        assert pool.holders == [references[page] for page in range(pool.num_pages)]
        free = list(pool._free)
        assert sorted(free) == [page for page in range(pool.num_pages) if not references[page]]
        assert pool._reserved == leases <= len(free)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    dummy.write_tokenizer(folder, 64)
    return Tokenizer.from_file(folder / "tokenizer.json")


SUBMIT = st.fixed_dictionaries(
    {
        # Lengths about the edges of pages; all begin alike, so that each finds a part of what others have left.
        "text": st.tuples(st.sampled_from([1, 9, 13, 14, 15, 30, 47, 90]), st.sampled_from(["", "b", "bb"])),
        "follows": st.booleans(),
        "num_images": st.sampled_from([None, None, 0, 1, 1, 2]),
        "size": st.sampled_from([None, (32, 32), (64, 64), (32, 128)]),
        "n": st.integers(1, 4),
        "guidance_scale": st.sampled_from([1.0, 4.0]),
        "max_tokens": st.sampled_from([1, 2, 17, 60]),
    }
)
OPERATIONS = st.lists(
    st.one_of(SUBMIT, SUBMIT, st.tuples(st.sampled_from(["step", "step", "fail", "abort"]), st.integers(1, 12))),
    min_size=2,
    max_size=14,
)


def follow_up(traffic, question):
    """The dialog of the last request that was answered, its answer, and one question more."""
    for request in reversed(traffic.requests):
        if not request.events or not isinstance(request.events[-1], RequestOutput):
            continue
        answer = request.events[-1].answers[0]
        if answer.text.strip():
            return [*request.asked, answer.message(), question]
    return [question]


def submit(traffic, text, follows, **params):
    question = Message("user", "a" * text[0] + text[1])
    asked = follow_up(traffic, question) if follows else [question]
    before = len(traffic.scheduler.waiting)
    try:
        request = traffic.submit(asked, **params)
    except ValueError as error:
        # Too long, or too large ever to run: told at once, and nothing stays of it.
        if len(traffic.scheduler.waiting) > before or not re.search("expected fewer|needs|are left", str(error)):
            raise
        return
    request.asked = asked


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    operations=OPERATIONS,
    num_pages=st.sampled_from([4, 7, 12, 20, 60]),
    budget=st.sampled_from([16, 17, 24, 40, 256]),
    rows=st.sampled_from([2, 5, 8, 64]),
    seed=st.integers(0, 2**32 - 1),
    speculation=st.sampled_from(["off", 3, 16]),
)
def test_any_traffic_ends_with_whole_answers_and_every_page_back(
    tokenizer, operations, num_pages, budget, rows, seed, speculation
):
    traffic = Traffic(tokenizer, num_pages, budget, rows, seed, speculation)
    for operation in operations:
        match operation:
            case ("step", n):
                for _ in range(n):
                    traffic.step()
            case ("fail", _):
                traffic.step(fails=True)
            case ("abort", n) if traffic.requests:
                traffic.engine.abort(traffic.requests[n % len(traffic.requests)].request_id)
                traffic.check()
            case dict():
                submit(traffic, **operation)
    traffic.finish()


def test_a_long_prompt_is_prefilled_in_chunks_beside_rows_that_decode(tokenizer):
    traffic = Traffic(tokenizer, num_pages=60, budget=24)
    first = traffic.submit("a", num_images=1, size=(64, 64))
    traffic.step()
    second = traffic.submit("b" * 200, num_images=0, max_tokens=4)
    mixed = 0
    while not second.prefilled:
        n_tokens = len(first.samples[0].tokens)
        assert traffic.step()
        chunks = [work for work in traffic.plan if work.request is second and not work.indices]
        if first.samples[0].finish_reason is None and chunks:
            mixed += 1
            assert [work.request for work in traffic.plan] == [first, second], "the decoding row goes first"
            assert len(first.samples[0].tokens) > n_tokens
            assert chunks[0].n_cond == 24 - traffic.plan[0].n_cond - traffic.plan[0].n_uncond
    assert mixed >= 5
    traffic.finish()


def test_a_pace_hears_of_images_and_texts_apart_and_of_no_prompt(tokenizer, monkeypatch):
    asked, told = [], []
    monkeypatch.setattr(Pace, "window", lambda pace, *rows: asked.append(rows) or 1)
    monkeypatch.setattr(Pace, "observe", lambda pace, n_lines, seconds: told.append(n_lines))
    traffic = Traffic(tokenizer, num_pages=60, budget=24, seed=1)  # by 0 the text ends with its first token
    image = traffic.submit("a", num_images=1, size=(64, 64))
    while image.samples[0].layout is None:
        traffic.step()
    asked.clear()
    told.clear()
    text = traffic.submit("b" * 200, num_images=0, max_tokens=20)
    while not text.prefilled:
        assert traffic.step()
    assert len(asked) > 3
    assert set(asked) == {(2, 0)}
    assert not told
    traffic.step()
    assert asked[-1] == (2, 1)
    assert told == [3]


def test_rows_that_decode_go_before_the_prompt_of_an_earlier_request(tokenizer):
    traffic = Traffic(tokenizer, num_pages=60, budget=24)
    first = traffic.submit("b" * 250, num_images=0)
    traffic.step()
    second = traffic.submit("a", num_images=1, size=(64, 64))
    while not second.prefilled:
        traffic.step()
    for _ in range(6):
        n_tokens = len(second.samples[0].tokens)
        traffic.step()
        assert [work.request for work in traffic.plan] == [second, first]
        assert len(second.samples[0].tokens) > n_tokens
    assert not first.prefilled
    traffic.finish()


def test_a_budget_too_small_for_all_serves_them_in_turn(tokenizer):
    traffic = Traffic(tokenizer, num_pages=120, budget=16, rows=64)
    requests = [traffic.submit("a", num_images=1, size=(64, 64)) for _ in range(28)]
    longest = 0
    while not any(request.is_finished for request in requests):
        traffic.step()
        longest = max(longest, *traffic.unserved.values())
    # A sample feeds 9 tokens at first, and later 2 a step, or 4 where a line ends.
    assert longest <= 28 * 9 // 16
    traffic.finish()


def test_samples_share_the_pages_of_their_prompt(tokenizer):
    traffic = Traffic(tokenizer, num_pages=60, budget=256)
    request = traffic.submit("a" * 50, num_images=1, size=(64, 64), n=4)
    traffic.step()
    traffic.step()
    pages = [sample.cond.pages for sample in request.samples]
    assert len({tuple(own[:3]) for own in pages}) == 1
    assert len({own[3] for own in pages}) == 4
    traffic.finish()


# The second turn may take 5 pages, and the first has left a page that is filled in part, of which it takes a copy.
@pytest.mark.parametrize("num_pages", [6, 60])
def test_a_dialog_finds_the_pages_of_its_past_even_in_a_pool_that_just_holds_it(tokenizer, num_pages):
    traffic = Traffic(tokenizer, num_pages, budget=256)
    first = traffic.submit("a" * 40, num_images=1, size=(64, 64), guidance_scale=1.0)
    traffic.run()
    kept = traffic.scheduler.prefixes.longest(first.samples[0].tokens)[1]
    dialog = [Message("user", "a" * 40), first.events[-1].answers[0].message()]
    second = traffic.submit([*dialog, Message("user", "b")], num_images=0, max_tokens=10)
    traffic.step()
    assert kept > 42 + 15
    assert traffic.plan[0].n_cond == second.samples[0].n_prompt - kept
    traffic.finish()


def test_a_request_that_waits_takes_no_prefix_that_would_not_help_it(tokenizer):
    traffic = Traffic(tokenizer, num_pages=14)
    first = traffic.submit("a" * 40, num_images=0, max_tokens=10)
    traffic.run()
    views = {"num_images": 4, "size": (32, 128), "guidance_scale": 1.0}  # 9 pages with their prompt
    running = traffic.submit("b" * 40, **views)
    traffic.step()
    traffic.submit("c" * 40, **views)
    traffic.step()
    assert running.admitted
    assert traffic.scheduler.waiting
    assert traffic.scheduler.prefixes.longest(first.samples[0].tokens)[1] > 40
    traffic.finish()


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_guesses_of_one_image_take_no_place_from_another(tokenizer, guidance):
    traffic = Traffic(tokenizer, num_pages=120, budget=64, rows=64, speculation=64)
    requests = [traffic.submit("a", num_images=1, size=(32, 128), guidance_scale=guidance) for _ in range(8)]
    while not all(request.prefilled for request in requests):
        traffic.step()
    n_drafts = 0
    for _ in range(4):
        traffic.step()
        assert len(traffic.plan) == 8
        n_drafts += sum(len(work.draft) for work in traffic.plan)
    assert n_drafts > 0
    traffic.finish()


@pytest.mark.parametrize("length", [5, 21])
def test_a_request_as_large_as_the_pool_runs_after_one_that_left_part_of_a_page_of_its_prompt(tokenizer, length):
    traffic = Traffic(tokenizer, num_pages=4)
    traffic.submit("a" * length, num_images=0, max_tokens=1)
    traffic.run()
    assert len(traffic.scheduler.prefixes) == 1
    request = traffic.submit("a" * 37, num_images=1, size=(64, 64), guidance_scale=1.0)
    assert request.samples[0].n_end == 4 * PAGE
    assert traffic.step(), "it waits, and there is nothing to run"
    traffic.finish()
    assert len(request.samples[0].images) == 1


def test_requests_run_in_the_order_of_arrival_even_where_a_later_one_would_fit(tokenizer):
    traffic = Traffic(tokenizer, num_pages=8)
    first = traffic.submit("a", num_images=0, max_tokens=90)
    large = traffic.submit("a", num_images=0, max_tokens=90)
    small = traffic.submit("a", num_images=0, max_tokens=2)
    traffic.step()
    assert [request.admitted is not None for request in (first, large, small)] == [True, False, False]
    traffic.finish()
    assert first.admitted < large.admitted <= small.admitted


@pytest.mark.parametrize(("guidance", "n"), [(1.0, 3), (4.0, 6)])
def test_a_request_of_more_rows_than_a_step_has_is_refused_with_need_and_have(tokenizer, guidance, n):
    traffic = Traffic(tokenizer, num_pages=200, rows=n - 1)
    params = {"num_images": 1, "size": (32, 32), "guidance_scale": guidance}
    with pytest.raises(ValueError, match=f"needs (at least )?{n} rows; max_num_seqs is {n - 1}"):
        traffic.submit("a", n=3, **params)
    assert not traffic.scheduler.waiting
    Traffic(tokenizer, num_pages=200, rows=n).submit("a", n=3, **params)


def test_text_takes_one_row_whatever_the_guidance(tokenizer):
    traffic = Traffic(tokenizer, num_pages=80, rows=4)
    traffic.submit("a", num_images=0, guidance_scale=4.0, n=4)
    traffic.finish()


def test_a_request_larger_than_the_pool_is_refused_with_need_and_have(tokenizer):
    # 4 tokens before the answer and 25 in it: two pages; 28 tokens of the unconditional row: two more.
    params = {"num_images": 1, "size": (32, 128)}
    traffic = Traffic(tokenizer, num_pages=3)
    with pytest.raises(ValueError, match="needs 5 pages of 16 tokens; the pool has 3"):
        traffic.submit("ab", **params)
    assert not traffic.scheduler.waiting
    traffic = Traffic(tokenizer, num_pages=5)
    traffic.submit("ab", **params)
    traffic.finish()


def test_an_absurd_number_of_answers_is_refused_at_once(tokenizer):
    with pytest.raises(ValueError, match="1000000000"):
        Traffic(tokenizer).submit("a", n=10**9)


def test_a_failure_while_a_step_is_planned_ends_what_runs_and_nothing_else(tokenizer, monkeypatch):
    traffic = Traffic(tokenizer, num_pages=8)
    running = traffic.submit("a", num_images=0, max_tokens=90)
    waiting = traffic.submit("a", num_images=0, max_tokens=90)
    traffic.step()

    def fail(now):
        raise Broken

    with monkeypatch.context() as patch:
        patch.setattr(traffic.scheduler, "schedule", fail)
        traffic.engine.step()
    traffic.check()
    assert is_broken(running)
    assert not waiting.events
    traffic.finish()
    assert waiting.samples[0].finish_reason


def test_a_request_that_took_no_part_in_a_failed_step_goes_on(tokenizer):
    traffic = Traffic(tokenizer, num_pages=60, budget=16, rows=64)
    for _ in range(10):
        traffic.submit("a", num_images=1, size=(64, 64))
    for _ in range(8):
        traffic.step()
    traffic.step(fails=True)
    failed = [request for request in traffic.requests if is_broken(request)]
    assert 0 < len(failed) < 10
    traffic.finish()


def test_build_step_lays_rows_out_one_after_the_other(tokenizer):
    traffic = Traffic(tokenizer, num_pages=60, budget=256)
    guided = traffic.submit("a" * 20, num_images=1, size=(64, 64))
    plain = traffic.submit("b", num_images=0)
    traffic.engine._apply()
    plan = traffic.scheduler.schedule(0.0)
    step = build_step(plan, PAGE, torch.device("cpu"))
    sample, other = guided.samples[0], plain.samples[0]
    assert step.tokens.tolist() == sample.tokens + sample.tokens[-3:] + other.tokens
    assert step.cu_seqlens.tolist() == [0, 25, 28, 31]
    assert step.seq_lens.tolist() == [25, 3, 3]
    assert step.positions.tolist() == [*range(25), *range(3), *range(3)]
    assert step.block_tables.tolist() == [sample.cond.pages, [*sample.uncond.pages, 0], [*other.cond.pages, 0]]
    slots = [sample.cond.pages[i // PAGE] * PAGE + i % PAGE for i in range(25)]
    assert step.slots.tolist()[:25] == slots
    assert (step.tokens.dtype, step.slots.dtype, step.positions.dtype) == (torch.int64,) * 3
    assert (step.block_tables.dtype, step.cu_seqlens.dtype, step.seq_lens.dtype) == (torch.int32,) * 3
