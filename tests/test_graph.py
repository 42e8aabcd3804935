"""Which bucket a step falls into, and that padding changes nothing: with a stand-in for CUDA's graphs, on a CPU."""

import numpy as np
import pytest
import torch
from lumina_rt.kernels import reference
from op_inputs import randn

from lumina_rt import Engine, graph, weights
from lumina_rt.graph import MAX_TOKENS, Graphs, bucket_of, buckets
from lumina_rt.kv_cache import KVCache
from lumina_rt.model import Step

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

    monkeypatch.setattr(graph, "_record", record)
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


def test_a_step_larger_than_all_buckets_runs_as_it_is(model, recorded):
    graphs, plain = Graphs(model, cache_of(model), 2, BLOCKS), cache_of(model)
    for rows in ([(0, 90), (0, 60)], [(20, 1), (3, 1), (40, 1)]):
        step = ragged(rows)
        assert torch.equal(graphs.forward(step), model.forward(step, plain))
    assert not recorded


def test_images_are_those_of_an_engine_without_graphs(checkpoint, plain_ops, recorded):
    """Rows that come and go, prompts of other lengths, windows of guesses, and a page shared and copied."""
    options = {"page_size": PAGE, "num_pages": 64, "max_model_len": 256, "speculation": 2, "device": "cpu"}
    plain, graphed = (Engine.from_pretrained(checkpoint, **options) for _ in range(2))
    shape, config = graphed.model.config, graphed.config
    graphed.cache = graphed.scheduler.cache = KVCache(
        shape.n_layers, 65, PAGE, shape.kv_heads, shape.head_dim, torch.float32, "cpu"
    )
    graphed.graphs = Graphs(graphed.model, graphed.cache, config.max_num_seqs, 256 // PAGE)
    texts, size = ["a", "a dog in a waterfall"], {"width": 64, "height": 64, "num_images_per_prompt": 2, "seed": 3}
    expected, found = (made.generate_image(texts, **size, progress=False) for made in (plain, graphed))
    assert len(recorded) > 8
    for ours, theirs in zip(found, expected, strict=True):
        assert all(map(np.array_equal, [a.codes for a in ours.answers], [a.codes for a in theirs.answers]))
