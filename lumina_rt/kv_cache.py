"""The paged KV cache: its memory, who holds which page, and the prefixes kept for later turns.

A page holds `page_size` tokens of one row in every layer. Pages are reserved when a request is admitted and taken as
its rows grow, so a request that runs never lacks one. A page with more than one holder is copied before it is
written. This file knows token ids only to compare prefixes; it knows nothing of images or requests.
"""

from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush

import numpy as np
import torch

from lumina_rt.kernels.quantization import QuantizedPages


class KVCache:
    """Keys and values of every layer, each [layers, pages, page_size, kv_heads, head_dim].

    In int8 they have scales, float32 [layers, pages, page_size, kv_heads], one for each head of each token.
    """

    def __init__(self, n_layers, num_pages, page_size, kv_heads, head_dim, dtype, device):
        shape = (n_layers, num_pages, page_size, kv_heads, head_dim)
        # Empty, not zeros: on a CPU the system then hands out memory only as pages are written.
        self.k, self.v = (torch.empty(shape, dtype=dtype, device=device) for _ in range(2))
        self.scales: tuple[torch.Tensor, ...] = ()
        if dtype == torch.int8:
            self.scales = tuple(torch.empty(shape[:-1], dtype=torch.float32, device=device) for _ in range(2))

    def layers(self) -> Iterator[tuple]:
        """Pairs (k_pages, v_pages), each [pages, page_size, kv_heads, head_dim], a layer at a time.

        They are tensors, or QuantizedPages where the cache is in int8.
        """
        if not self.scales:
            return zip(self.k, self.v, strict=True)
        return zip(
            *(map(QuantizedPages, *part) for part in zip((self.k, self.v), self.scales, strict=True)), strict=True
        )

    @torch.inference_mode()  # the cache may have been made in it, and could not be written outside
    def copy_page(self, source: int, target: int) -> None:
        for part in (self.k, self.v, *self.scales):
            part[:, target] = part[:, source]


def bytes_a_token(n_layers: int, kv_heads: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of the keys and values of one token in all layers, their scales included."""
    return 2 * n_layers * kv_heads * (head_dim * dtype.itemsize + (4 if dtype == torch.int8 else 0))


class PagePool:
    """Which pages are free, how many holders each of the others has, and how many are promised."""

    def __init__(self, num_pages: int):
        self.num_pages = num_pages
        self.holders = [0] * num_pages
        self._free = list(range(num_pages))  # a heap: the lowest goes first, so that what is not needed is not touched
        self._reserved = 0

    @property
    def n_free(self) -> int:
        """Pages that nobody holds and nobody was promised."""
        return len(self._free) - self._reserved

    def reserve(self, n: int) -> None:
        assert 0 <= n <= self.n_free, f"{n} pages asked for, {self.n_free} free"
        self._reserved += n

    def unreserve(self, n: int) -> None:
        assert 0 <= n <= self._reserved, f"{n} pages given back, {self._reserved} reserved"
        self._reserved -= n

    def take(self) -> int:
        """Take one of the reserved pages."""
        assert self._reserved > 0, "a page was taken that nobody had reserved"
        self._reserved -= 1
        page = heappop(self._free)
        self.holders[page] = 1
        return page

    def share(self, pages: Sequence[int]) -> None:
        for page in pages:
            assert self.holders[page] > 0, f"page {page} is free and cannot be shared"
            self.holders[page] += 1

    def release(self, pages: Sequence[int]) -> None:
        for page in pages:
            assert self.holders[page] > 0, f"page {page} was released twice"
            self.holders[page] -= 1
            if self.holders[page] == 0:
                heappush(self._free, page)


@dataclass
class Lease:
    """The pages that one request was promised and has not taken yet."""

    pool: PagePool
    n_left: int = 0

    def open(self, n: int) -> None:
        self.pool.reserve(n)
        self.n_left = n

    def take(self) -> int:
        assert self.n_left > 0, "a request outgrew its reservation"
        self.n_left -= 1
        return self.pool.take()

    def refund(self, row: "Row") -> None:
        """Take back the pages of a row that nobody shares, for later rows of the same request."""
        n = len(row.pages)
        row.clear(self.pool)
        self.pool.reserve(n)
        self.n_left += n

    def keep(self, n: int) -> None:
        """Give back all but `n` pages of what is left."""
        n_over = max(0, self.n_left - n)
        self.pool.unreserve(n_over)
        self.n_left -= n_over

    def close(self) -> None:
        self.keep(0)


@dataclass
class Row:
    """One sequence in the cache: the pages that hold its first `n_cached` tokens, in order."""

    pages: list[int] = field(default_factory=list)
    n_cached: int = 0

    def adopt(self, pages: Sequence[int], n_tokens: int, pool: PagePool, page_size: int) -> None:
        """Begin with the first `n_tokens` tokens that `pages` hold, sharing these pages."""
        assert not self.pages, "only an empty row can adopt a prefix"
        self.pages = list(pages[: -(-n_tokens // page_size)])
        self.n_cached = n_tokens
        pool.share(self.pages)

    def make_room(self, n_tokens: int, lease: Lease, cache: KVCache, page_size: int) -> None:
        """Own every page that the next `n_tokens` tokens will be written to."""
        first, end = self.n_cached // page_size, -(-(self.n_cached + n_tokens) // page_size)
        for block in range(first, end):
            if block == len(self.pages):
                self.pages.append(lease.take())
            elif lease.pool.holders[self.pages[block]] > 1:
                shared, self.pages[block] = self.pages[block], lease.take()
                lease.pool.release([shared])  # it has another holder, so it stays what it is until it is copied
                cache.copy_page(shared, self.pages[block])

    def clear(self, pool: PagePool) -> None:
        pool.release(self.pages)
        self.pages, self.n_cached = [], 0


class PrefixStore:
    """Finished rows whose pages nobody needs yet, so that a dialog's next turn finds its past.

    Holds at most `MAX_PREFIXES` rows; the one used longest ago goes first, and all go as soon as a request needs
    their pages.
    """

    MAX_PREFIXES = 64

    def __init__(self, pool: PagePool, page_size: int):
        self.pool, self.page_size = pool, page_size
        self._rows: OrderedDict[bytes, tuple[np.ndarray, list[int]]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._rows)

    def keep(self, tokens: Sequence[int], row: Row) -> None:
        """Hold the pages of `row`, which cache the first `row.n_cached` of `tokens`."""
        ids = np.asarray(tokens[: row.n_cached], dtype=np.int64)
        key = ids.tobytes()
        if len(ids) == 0 or key in self._rows:
            return
        self.pool.share(row.pages)
        self._rows[key] = ids, list(row.pages)
        if len(self._rows) > self.MAX_PREFIXES:
            self.drop_oldest()

    def longest(self, tokens: Sequence[int]) -> tuple[list[int], int]:
        """Pages and length of the longest kept prefix of `tokens`; ([], 0) when there is none."""
        wanted = np.asarray(tokens, dtype=np.int64)
        best_key, best_length = None, 0
        for key, (ids, _) in self._rows.items():
            n = min(len(ids), len(wanted))
            differs = np.flatnonzero(ids[:n] != wanted[:n])
            length = int(differs[0]) if len(differs) else n
            if length > best_length:
                best_key, best_length = key, length
        if best_key is None:
            return [], 0
        self._rows.move_to_end(best_key)
        pages = self._rows[best_key][1]
        return pages[: -(-best_length // self.page_size)], best_length

    def make_room(self, n_pages: int) -> bool:
        """Drop the oldest until so many pages are free; none where all of them would not do."""
        if self.pool.n_free < n_pages and self.pool.n_free + self._n_own_pages() < n_pages:
            return False
        while self.pool.n_free < n_pages:
            self.drop_oldest()
        return True

    def _n_own_pages(self) -> int:
        """Pages that nobody but the store holds."""
        held = Counter(page for _, pages in self._rows.values() for page in pages)
        return sum(self.pool.holders[page] == n for page, n in held.items())

    def drop_oldest(self) -> None:
        _, (_, pages) = self._rows.popitem(last=False)
        self.pool.release(pages)
