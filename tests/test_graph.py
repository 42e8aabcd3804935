"""Which bucket a step falls into, and that padding changes nothing: with a stand-in for CUDA's graphs, on a CPU."""

import contextlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lumina_rt.kernels import reference
from op_inputs import randn

from lumina_rt import Engine, graph, runner, sampler, weights
from lumina_rt.graph import MAX_TOKENS, Graphs, bucket_of, buckets
from lumina_rt.kv_cache import KVCache
from lumina_rt.model import Step
from lumina_rt.multi_step import MAX_STEPS, MultiStep

PAGES, PAGE, BLOCKS = 24, 16, 6


def test_a_bucket_holds_its_steps_and_tells_one_token_a_row_from_more():
    known = buckets(64)
    for rows in range(1, 65):
        for tokens in range(rows, MAX_TOKENS + 1):
            bucket = bucket_of(rows, tokens)
            assert bucket[0] >= rows
            assert bucket[1] >= tokens
            assert (bucket[0] == bucket[1]) == (rows == tokens)
            assert bucket_of(*bucket) == bucket
            assert (bucket in known) == (bucket[1] <= MAX_TOKENS)
    assert bucket_of(2, 2) == (2, 2)
    assert bucket_of(3, 4) == (4, 8)
    assert bucket_of(2, 34) == (2, 64)


@pytest.mark.parametrize(("max_rows", "largest", "n"), [(2, 2, 7), (3, 4, 13), (64, 64, 27), (100, 128, 28)])
def test_buckets_are_few_and_reach_the_largest_step(max_rows, largest, n):
    known = buckets(max_rows)
    assert max(rows for rows, _ in known) == largest
    assert len(known) == len(set(known)) == n


@pytest.fixture
def recorded(monkeypatch):
    """Records by keeping what was to be run: a replay runs it, and writes what the first run gave."""
    replayed = []

    def record(runs):
        for run in runs:
            hidden = run().clone()

            def replay(run=run, hidden=hidden):
                replayed.append(tuple(hidden.shape))
                hidden.copy_(run())

            yield replay, hidden

    monkeypatch.setattr(graph, "record", record)
    return replayed


@pytest.fixture
def model(checkpoint):
    return weights.load(checkpoint, reference, range(4, 68), 256, None, "cpu")


def cache_of(model):
    shape = model.config
    cache = KVCache(shape.n_layers, PAGES + 1, PAGE, shape.kv_heads, shape.head_dim, torch.float32, "cpu")
    for part in (cache.k, cache.v):
        part.copy_(randn(*part.shape, seed=5))
    return cache


def ragged(rows):
    """A step of rows (tokens cached before it, tokens it feeds), whose pages lie one behind the other."""
    n_blocks = [-(-(cached + n) // PAGE) for cached, n in rows]
    tables = torch.zeros(len(rows), max(n_blocks), dtype=torch.int32)
    positions, slots, first = [], [], 0
    for row, (cached, n) in enumerate(rows):
        tables[row, : n_blocks[row]] = torch.arange(first, first + n_blocks[row])
        positions += range(cached, cached + n)
        slots += range(first * PAGE + cached, first * PAGE + cached + n)
        first += n_blocks[row]
    assert first <= PAGES
    lengths = [n for _, n in rows]
    return Step(
        tokens=torch.arange(len(positions)) * 7 % 90,
        positions=torch.tensor(positions),
        slots=torch.tensor(slots),
        block_tables=tables,
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        seq_lens=torch.tensor([cached + n for cached, n in rows]).int(),
    )


STEPS = {
    (2, 2): [(20, 1), (3, 1)],
    (4, 4): [(20, 1), (3, 1), (40, 1)],
    (2, 4): [(20, 3)],
    (4, 8): [(20, 1), (3, 2), (40, 1)],
    (2, 64): [(16, 17), (0, 17)],
    (8, 8): [(n, 1) for n in (9, 15, 16, 31, 1)],
}


def test_steps_of_all_kinds_one_after_the_other_are_those_of_the_model(model, recorded):
    """In one go, as what a step leaves in the buffers must not reach the next; the larger first."""
    graphs, plain = Graphs(model, cache_of(model), 8, BLOCKS), cache_of(model)
    for bucket, rows in sorted(STEPS.items(), reverse=True):
        step = ragged(rows)
        expected = model.forward(step, plain)
        hidden = graphs.forward(step)
        assert recorded.pop()[0] == bucket[1]
        torch.testing.assert_close(hidden, expected, rtol=1e-5, atol=1e-5)
        for ours, theirs in ((graphs.cache.k, plain.k), (graphs.cache.v, plain.v)):
            torch.testing.assert_close(ours[:, :PAGES], theirs[:, :PAGES], rtol=1e-5, atol=1e-5)


def test_recording_writes_to_the_spare_page_alone(model, recorded):
    graphs = Graphs(model, cache_of(model), 4, BLOCKS)
    assert torch.equal(graphs.cache.k[:, :PAGES], cache_of(model).k[:, :PAGES])
    assert not torch.equal(graphs.cache.k[:, PAGES], cache_of(model).k[:, PAGES])


def test_recording_several_steps_writes_to_the_spare_page_alone(model, recorded):
    several = MultiStep(model, cache_of(model), torch.arange(4, 68), 4, BLOCKS)
    assert sorted(several.recorded) == [2, 4]
    assert torch.equal(several.cache.k[:, :PAGES], cache_of(model).k[:, :PAGES])
    assert not torch.equal(several.cache.k[:, PAGES], cache_of(model).k[:, PAGES])


def test_each_graph_is_recorded_on_the_stream_that_its_libraries_were_set_up_on(monkeypatch):
    log, current = [], ["default"]

    class Stream:
        names = iter(("own", "another"))

        def __init__(self, name=None):
            self.name = name or next(Stream.names)

        def wait_stream(self, other):
            log.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def on(stream):
        current.append(stream.name)
        yield
        current.pop()

    @contextlib.contextmanager
    def recording(graph, pool, stream, capture_error_mode):
        log.append(f"begin in {pool}, {capture_error_mode}")
        with on(stream):
            yield
        log.append("end")

    for name, value in {
        "Stream": Stream, "current_stream": lambda: Stream(current[-1]), "stream": on, "graph": recording,
        "CUDAGraph": lambda: SimpleNamespace(replay="replay"), "graph_pool_handle": lambda: "a pool",
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    made = graph.record(lambda i=i: log.append(f"{i} on {current[-1]}") or i for i in range(2))
    assert list(made) == [("replay", 0), ("replay", 1)]
    assert log == [
        line
        for i in range(2)
        for line in (
            "own waits for default", f"{i} on own", "default waits for own",
            "begin in a pool, thread_local", f"{i} on own", "end",
        )
    ]  # fmt: skip


def test_a_step_larger_than_all_buckets_runs_as_it_is(model, recorded):
    graphs, plain = Graphs(model, cache_of(model), 2, BLOCKS), cache_of(model)
    for rows in ([(0, 90), (0, 60)], [(20, 1), (3, 1), (40, 1)]):
        step = ragged(rows)
        assert torch.equal(graphs.forward(step), model.forward(step, plain))
    assert not recorded


def engines(checkpoint, **options):
    """An Engine, and one that runs by stand-ins for graphs."""
    options = {"page_size": PAGE, "num_pages": 64, "max_model_len": 256, "device": "cpu"} | options
    plain, graphed = (Engine.from_pretrained(checkpoint, **options) for _ in range(2))
    shape = graphed.model.config
    graphed.cache = graphed.scheduler.cache = graphed.runner.cache = KVCache(
        shape.n_layers, 65, PAGE, shape.kv_heads, shape.head_dim, torch.float32, "cpu"
    )
    graphed.runner.record(graphed.config.max_num_seqs, 256 // PAGE)
    graphed.scheduler.max_steps = MAX_STEPS
    return plain, graphed


def same_codes(found, expected):
    pairs = zip(found, expected, strict=True)
    return all(np.array_equal(a.codes, b.codes) for f, e in pairs for a, b in zip(f.answers, e.answers, strict=True))


TEXTS, SIZE = ["a", "a dog in a waterfall"], {"width": 64, "height": 64, "num_images_per_prompt": 2, "seed": 3}


@pytest.mark.parametrize("speculation", [2, "off", "auto"])
@pytest.mark.parametrize("guidance_scale", [1.0, 3.0])
def test_images_are_those_of_an_engine_without_graphs(checkpoint, plain_ops, recorded, speculation, guidance_scale):
    """Rows that come and go, prompts of other lengths, windows of guesses, and a page shared and copied."""
    plain, graphed = engines(checkpoint, speculation=speculation)
    controls = SIZE | {"guidance_scale": guidance_scale, "temperature": 2.0}
    expected, found = (made.generate_image(TEXTS, **controls, progress=False) for made in (plain, graphed))
    assert len(recorded) > 8
    assert same_codes(found, expected)


@pytest.mark.parametrize("speculation", [2, "off"])
def test_an_engine_made_in_inference_mode_runs_outside_of_it(checkpoint, plain_ops, recorded, speculation):
    """Its tensors are then such that torch lets nobody write them outside."""
    with torch.inference_mode():
        made = engines(checkpoint, speculation=speculation)
    found, expected = (each.generate_image(TEXTS, **SIZE, progress=False) for each in made)
    assert same_codes(found, expected)


def test_a_row_of_latents_is_read_once(checkpoint, plain_ops, recorded, monkeypatch):
    plain, graphed = engines(checkpoint, speculation="off")
    expected, reads = plain.generate_image(TEXTS, **SIZE, progress=False), []
    for module in (runner, sampler):
        monkeypatch.setattr(module, "read", lambda tokens: reads.append(len(tokens)) or tokens.tolist())
    found = graphed.generate_image(TEXTS, **SIZE, progress=False)
    assert same_codes(found, expected)
    assert [output.timings.n_steps for output in found] == [output.timings.n_steps for output in expected]
    # The first image of a prompt is a step ahead of the other, so that a row ends twice.
    assert sum(reads) == 4 * 16
    assert len(reads) == 2 * 4 + 1
    reads.clear()
    recorded.clear()
    graphed.generate_image("a", 64, 64, progress=False)
    assert reads == [1, 3, 4, 4, 4]
    # Behind the first of a row, which feeds the end of the last one as well, a token for each of both rows.
    assert recorded[1:] == [(2, 64)] + 2 * [(2,)] + 3 * ([(4, 64)] + 3 * [(2,)])


def test_whoever_waits_for_room_in_a_step_waits_for_one_step(checkpoint, plain_ops, recorded):
    _, graphed = engines(checkpoint, speculation="off", max_num_batched_tokens=16)
    schedule, several, waiting = graphed.scheduler.schedule, [], 0

    def spy(now):
        nonlocal waiting
        plan = schedule(now)
        several.append(plan[0].n_steps > 1)
        n_running = sum(not s.finish_reason for r in graphed.scheduler.running for s in r.samples)
        waiting += len(plan) < n_running
        assert len(plan) == n_running or not several[-1]
        return plan

    graphed.scheduler.schedule = spy
    graphed.generate(
        ["a dog"] * 8 + ["a dog in a waterfall"], graphed.params(num_images=1, size=(64, 64)), progress=False
    )
    assert waiting
    assert any(several)


def test_images_of_other_widths_and_without_guidance_share_the_steps(checkpoint, plain_ops, recorded):
    """Rows of latents end at other steps; and draws of padding do not read what larger steps have left behind."""
    plain, graphed = engines(checkpoint, speculation="off")
    outputs = []
    for made in (plain, graphed):
        shapes = [((64, 64), 1.0), ((128, 32), 3.0), ((32, 128), 2.0)]
        params = [made.params(num_images=1, size=size, guidance_scale=g, seed=5) for size, g in shapes]
        outputs.append(made.generate(["a", "b c", "d"], params, progress=False))
        outputs[-1] += made.generate(["e"], params[0], progress=False)
    assert same_codes(*outputs)


def test_logits_that_are_not_finite_are_told_after_the_row(checkpoint, plain_ops, recorded):
    _, graphed = engines(checkpoint, speculation="off")
    commit = graphed.scheduler.commit

    def poison(*args):  # behind the first step, which is run alone
        graphed.model.image_head[3] = float("nan")
        return commit(*args)

    graphed.scheduler.commit = poison
    with pytest.raises(FloatingPointError, match="not finite"):
        graphed.generate_image("a", 64, 64, seed=1, progress=False)
    assert graphed.scheduler.pool.n_free == graphed.scheduler.pool.num_pages


def test_an_image_that_is_aborted_ends_after_its_row(checkpoint, plain_ops, recorded):
    _, graphed = engines(checkpoint, speculation="off")
    with graphed.stream("a", graphed.params(num_images=1, size=(64, 64), seed=1)) as events:
        next(events)
    assert graphed.scheduler.pool.n_free == graphed.scheduler.pool.num_pages
    assert graphed.generate_image("a", 64, 64, seed=1, progress=False).images
