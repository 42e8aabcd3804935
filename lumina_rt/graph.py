"""CUDA graphs of the forward: the launches of a step, hundreds of them, become one.

A graph is recorded for each bucket of (rows, tokens) at start-up; a step is copied into the buffers that all graphs
read and padded up to the smallest bucket that holds it. Steps larger than all buckets run as they are. This file knows
the shapes of a step and not what is computed in it.
"""

from collections.abc import Callable, Iterable, Iterator
from functools import partial

import torch
from torch import Tensor
from tqdm import tqdm

from lumina_rt.kv_cache import KVCache
from lumina_rt.model import Model, Step

MAX_TOKENS = 128  # a step of more is so long that its launches do not count


def bucket_of(rows: int, tokens: int) -> tuple[int, int]:
    """The smallest bucket for a step of so many rows and tokens, of which every row has one at least.

    As many tokens as rows stand for one token a row, alone: attention may rely on that.
    """
    rows_up = max(2, _power_of_two(rows))
    return rows_up, rows_up if tokens == rows else max(2 * rows_up, _power_of_two(tokens))


def buckets(max_rows: int) -> list[tuple[int, int]]:
    """All buckets for steps of up to `max_rows` rows and MAX_TOKENS tokens, in ascending order."""
    steps = ((rows, tokens) for rows in range(1, max_rows + 1) for tokens in range(rows, MAX_TOKENS + 1))
    return sorted({bucket for step in steps if (bucket := bucket_of(*step))[1] <= MAX_TOKENS})


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


class Graphs:
    """Model.forward over one cache, by graphs.

    max_rows, max_blocks: the most rows of a step, and pages of a row.  The last page of the cache must be nobody's:
    the keys and values of padding go there.
    """

    def __init__(self, model: Model, cache: KVCache, max_rows: int, max_blocks: int):
        self.model, self.cache = model, cache
        _, num_pages, page_size = cache.k.shape[:3]
        self.spare_slot = num_pages * page_size - 1
        names = buckets(max_rows)
        most_rows, most_tokens = (max(sizes) for sizes in zip(*names, strict=True))

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=model.embed.device)

        self.buffers = Step(
            tokens=zeros(most_tokens, dtype=torch.int64),
            positions=zeros(most_tokens, dtype=torch.int64),
            slots=torch.full_like(zeros(most_tokens, dtype=torch.int64), self.spare_slot),
            block_tables=zeros(most_rows, max_blocks, dtype=torch.int32),
            cu_seqlens=zeros(most_rows + 1, dtype=torch.int32),
            seq_lens=zeros(most_rows, dtype=torch.int32),
        )
        names = names[::-1]  # the largest first: the others then fit into its memory
        runs = [partial(model.forward, self._view(*bucket), cache) for bucket in names]
        bar = tqdm(runs, desc="graphs", unit="graph", disable=None, leave=False)
        self.recorded = dict(zip(names, record(bar), strict=True))

    @torch.inference_mode()  # the buffers may have been made in it, and could not be written outside
    def forward(self, step: Step) -> Tensor:
        """As Model.forward; the result holds until the next call."""
        tokens, rows = step.tokens.shape[0], step.seq_lens.shape[0]
        bucket = bucket_of(rows, tokens)
        if bucket not in self.recorded:
            return self.model.forward(step, self.cache)
        self._fill(step, *bucket)
        replay, hidden = self.recorded[bucket]
        replay()
        return hidden.narrow(0, 0, tokens)

    def _view(self, rows: int, tokens: int) -> Step:
        """The part of the buffers that a bucket reads."""
        sizes = {"block_tables": rows, "cu_seqlens": rows + 1, "seq_lens": rows}
        return Step(**{name: part.narrow(0, 0, sizes.get(name, tokens)) for name, part in vars(self.buffers).items()})

    def _fill(self, step: Step, rows: int, tokens: int) -> None:
        """Copy a step into the buffers; rows of padding have no tokens, tokens of padding no row."""
        # What else padding reads, and what tables hold behind a row's pages, is of no account.
        padding = {"slots": self.spare_slot, "cu_seqlens": step.tokens.shape[0], "seq_lens": 0}
        for name, part in vars(self._view(rows, tokens)).items():
            given = getattr(step, name)
            size = given.shape[0]
            target = part.narrow(0, 0, size)
            (target.narrow(1, 0, given.shape[1]) if name == "block_tables" else target).copy_(given)
            if name in padding and size < part.shape[0]:
                part.narrow(0, size, part.shape[0] - size).fill_(padding[name])


def record(runs: Iterable[Callable[[], Tensor]]) -> Iterator[tuple[Callable[[], None], Tensor]]:
    """Record a graph of each. Gives what replays it, and the tensor that every replay writes.

    One thread at a time: each recording begins with a wait for the whole GPU, which CUDA refuses while another records.
    """
    pool, stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream()  # torch's own one is shared by all threads
    for run in runs:
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()  # compiles kernels and sets up libraries for this stream, which cannot be recorded
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # What other threads do with the GPU meanwhile, another Engine's for one, is no part of it.
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            hidden = run()
        yield graph.replay, hidden
