"""Pages: who holds which, and that nobody writes into a page that another holds."""

import pytest
import torch

from lumina_rt.kv_cache import KVCache, Lease, PagePool, PrefixStore, Row

PAGE = 4


def filled_cache(num_pages=8, n_layers=2):
    cache = KVCache(n_layers, num_pages, PAGE, 2, 3, torch.float32, "cpu")
    cache.k.copy_(torch.arange(cache.k.numel()).reshape(cache.k.shape))
    cache.v.copy_(-cache.k)
    return cache


def lease_of(pool, n):
    lease = Lease(pool)
    lease.open(n)
    return lease


def row_of(n_tokens, pool, cache):
    """A row with its own pages, as after `n_tokens` tokens were fed."""
    row = Row()
    row.make_room(n_tokens, lease_of(pool, -(-n_tokens // PAGE)), cache, PAGE)
    row.n_cached = n_tokens
    return row


def test_layers_are_views_of_the_pages_one_layer_at_a_time():
    cache = filled_cache()
    layers = list(cache.layers())
    assert [k.shape for k, v in layers] == [(8, PAGE, 2, 3)] * 2
    layers[1][0][5, 2] = 99
    layers[1][1][5, 2] = 98
    assert (cache.k[1, 5, 2] == 99).all()
    assert (cache.v[1, 5, 2] == 98).all()


def test_copy_page_copies_every_layer_of_one_page_and_touches_no_other():
    cache = filled_cache()
    k, v = cache.k.clone(), cache.v.clone()
    k[:, 6], v[:, 6] = k[:, 2], v[:, 2]
    cache.copy_page(2, 6)
    assert torch.equal(cache.k, k)
    assert torch.equal(cache.v, v)


def test_the_lowest_free_page_goes_first_so_that_memory_is_touched_as_it_is_needed():
    pool = PagePool(6)
    pool.reserve(6)
    assert [pool.take() for _ in range(4)] == [0, 1, 2, 3]
    pool.release([3, 0])
    pool.reserve(2)
    assert [pool.take() for _ in range(4)] == [0, 3, 4, 5]


def test_a_reserved_page_is_promised_and_a_taken_one_is_held():
    pool = PagePool(3)
    pool.reserve(2)
    assert pool.n_free == 1
    page = pool.take()
    assert pool.n_free == 1
    assert pool.holders[page] == 1
    pool.unreserve(1)
    assert pool.n_free == 2
    pool.release([page])
    assert pool.n_free == 3
    assert pool.holders == [0, 0, 0]


def test_every_page_is_given_out_once():
    pool = PagePool(5)
    pool.reserve(5)
    assert sorted(pool.take() for _ in range(5)) == [0, 1, 2, 3, 4]


def test_a_shared_page_is_free_when_its_last_holder_has_gone():
    pool = PagePool(2)
    pool.reserve(1)
    page = pool.take()
    pool.share([page])
    pool.release([page])
    assert (pool.holders[page], pool.n_free) == (1, 1)
    pool.release([page])
    assert (pool.holders[page], pool.n_free) == (0, 2)


def test_mistakes_in_the_accounts_do_not_pass():
    pool = PagePool(2)
    with pytest.raises(AssertionError, match="nobody had reserved"):
        pool.take()
    with pytest.raises(AssertionError, match="3 pages asked for, 2 free"):
        pool.reserve(3)
    with pytest.raises(AssertionError, match="-1 pages asked for"):
        pool.reserve(-1)
    pool.reserve(1)
    with pytest.raises(AssertionError, match="2 pages asked for, 1 free"):
        pool.reserve(2)
    with pytest.raises(AssertionError, match="2 pages given back, 1 reserved"):
        pool.unreserve(2)
    page = pool.take()
    pool.release([page])
    with pytest.raises(AssertionError, match=f"page {page} was released twice"):
        pool.release([page])
    with pytest.raises(AssertionError, match=f"page {page} is free and cannot be shared"):
        pool.share([page])


def test_a_lease_gives_out_what_it_reserved_and_no_more():
    pool = PagePool(4)
    lease = lease_of(pool, 2)
    lease.take()
    lease.take()
    with pytest.raises(AssertionError, match="outgrew its reservation"):
        lease.take()
    assert pool.n_free == 2


def test_a_closed_lease_gives_back_what_was_never_taken():
    pool = PagePool(4)
    lease = lease_of(pool, 3)
    lease.take()
    lease.close()
    assert (pool.n_free, lease.n_left) == (3, 0)
    lease.close()
    assert pool.n_free == 3


def test_a_refunded_row_can_be_taken_again_by_the_same_request_only():
    pool, cache = PagePool(4), filled_cache(4)
    lease, row = lease_of(pool, 2), Row()
    row.make_room(2 * PAGE, lease, cache, PAGE)
    row.n_cached = 2 * PAGE
    lease.refund(row)
    assert (row.pages, row.n_cached) == ([], 0)
    assert (lease.n_left, pool.n_free) == (2, 2)
    row.make_room(2 * PAGE, lease, cache, PAGE)
    assert len(row.pages) == 2


@pytest.mark.parametrize("n_cached", range(9))
@pytest.mark.parametrize("n_tokens", range(1, 10))
def test_a_row_has_exactly_the_pages_that_its_tokens_need(n_cached, n_tokens):
    pool, cache = PagePool(8), filled_cache()
    row = row_of(n_cached, pool, cache)
    before = list(row.pages)
    row.make_room(n_tokens, lease_of(pool, 8 - len(before)), cache, PAGE)
    assert len(row.pages) == -(-(n_cached + n_tokens) // PAGE)
    assert row.pages[: len(before)] == before
    assert all(pool.holders[page] == 1 for page in row.pages)


def test_a_row_adopts_only_the_pages_of_the_tokens_it_takes_over():
    pool, cache = PagePool(8), filled_cache()
    first = row_of(12, pool, cache)
    for n_tokens, n_pages in [(0, 0), (1, 1), (4, 1), (5, 2), (12, 3)]:
        row = Row()
        row.adopt(first.pages, n_tokens, pool, PAGE)
        assert (row.pages, row.n_cached) == (first.pages[:n_pages], n_tokens)
        assert [pool.holders[page] for page in first.pages] == [2] * n_pages + [1] * (3 - n_pages)
        row.clear(pool)
    with pytest.raises(AssertionError, match="only an empty row"):
        first.adopt([], 0, pool, PAGE)


def test_a_shared_page_is_copied_before_it_is_written_and_its_other_holder_keeps_it_bit_for_bit():
    pool, cache = PagePool(8), filled_cache()
    first = row_of(6, pool, cache)
    row = Row()
    row.adopt(first.pages, 5, pool, PAGE)
    k, v = cache.k.clone(), cache.v.clone()
    row.make_room(5, lease_of(pool, 2), cache, PAGE)

    shared, own = first.pages[1], row.pages[1]
    assert row.pages[0] == first.pages[0], "a whole page that is not written stays shared"
    assert own != shared
    assert torch.equal(cache.k[:, own], k[:, shared])
    assert torch.equal(cache.v[:, own], v[:, shared])
    cache.k[:, row.pages[1:]] = 7
    cache.v[:, row.pages[1:]] = 7
    assert torch.equal(cache.k[:, first.pages], k[:, first.pages])
    assert torch.equal(cache.v[:, first.pages], v[:, first.pages])
    assert [pool.holders[page] for page in (first.pages[0], shared, *row.pages[1:])] == [2, 1, 1, 1]


def test_a_page_whose_other_holder_has_gone_is_written_in_place():
    pool, cache = PagePool(8), filled_cache()
    first = row_of(6, pool, cache)
    row = Row()
    row.adopt(first.pages, 5, pool, PAGE)
    pages = list(first.pages)
    first.clear(pool)
    row.make_room(3, lease_of(pool, 0), cache, PAGE)
    assert row.pages == pages


def test_clearing_a_row_gives_its_pages_back():
    pool, cache = PagePool(8), filled_cache()
    row = row_of(9, pool, cache)
    row.clear(pool)
    assert (row.pages, row.n_cached, pool.n_free) == ([], 0, 8)
    row.clear(pool)
    assert pool.n_free == 8


def keep(store, cache, tokens, n_cached=None):
    """Keep a row of these tokens as a finished request does; return its pages."""
    row = row_of(len(tokens) if n_cached is None else n_cached, store.pool, cache)
    pages = list(row.pages)
    store.keep(tokens, row)
    row.clear(store.pool)
    return pages


def test_the_longest_common_beginning_is_found_down_to_part_of_a_page():
    store, cache = PrefixStore(PagePool(32), PAGE), filled_cache(32)
    short = keep(store, cache, [1, 2, 3, 4, 5])
    long = keep(store, cache, [1, 2, 3, 4, 5, 6, 7, 8, 9])
    other = keep(store, cache, [2, 2])
    assert store.longest([1, 2, 3, 4, 5, 6, 7, 8, 9, 10]) == (long, 9)
    assert store.longest([1, 2, 3, 4, 5, 6, 0]) == (long[:2], 6)
    assert store.longest([1, 2, 3, 4]) in [(short[:1], 4), (long[:1], 4)]
    assert store.longest([1]) in [(short[:1], 1), (long[:1], 1)]
    assert store.longest([2, 2, 2]) == (other, 2)
    assert store.longest([3, 2]) == ([], 0)
    assert store.longest([]) == ([], 0)


def test_only_what_is_cached_of_the_tokens_is_kept():
    store, cache = PrefixStore(PagePool(8), PAGE), filled_cache()
    pages = keep(store, cache, [1, 2, 3, 4, 5, 6], n_cached=4)
    assert store.longest([1, 2, 3, 4, 5, 6]) == (pages, 4)
    keep(store, cache, [9, 9], n_cached=0)
    assert len(store) == 1


def test_kept_pages_are_held_once_and_free_after_they_are_dropped():
    pool, cache = PagePool(8), filled_cache()
    store = PrefixStore(pool, PAGE)
    pages = keep(store, cache, [1, 2, 3, 4, 5])
    assert [pool.holders[page] for page in pages] == [1, 1]
    again = keep(store, cache, [1, 2, 3, 4, 5])
    assert len(store) == 1
    assert [pool.holders[page] for page in again] == [0, 0]
    store.drop_oldest()
    assert (len(store), pool.n_free) == (0, 8)


def test_the_prefix_used_longest_ago_goes_first():
    pool, cache = PagePool(8), filled_cache()
    store = PrefixStore(pool, PAGE)
    for token in (1, 2, 3):
        keep(store, cache, [token] * 3)
    store.longest([1, 1, 5])
    order = []
    while len(store):
        before = {token for token in (1, 2, 3) if any(token == ids[0] for ids, _ in store._rows.values())}
        store.drop_oldest()
        after = {token for token in (1, 2, 3) if any(token == ids[0] for ids, _ in store._rows.values())}
        order += before - after
    assert order == [2, 3, 1]


def test_no_more_prefixes_are_kept_than_the_limit():
    pool, cache = PagePool(80), filled_cache(80, n_layers=1)
    store = PrefixStore(pool, PAGE)
    for token in range(store.MAX_PREFIXES + 3):
        keep(store, cache, [token, 100])
    assert len(store) == store.MAX_PREFIXES
    assert pool.n_free == 80 - store.MAX_PREFIXES
    assert [store.longest([token, 100])[1] for token in (0, 2, 3, store.MAX_PREFIXES + 2)] == [0, 0, 2, 2]


def test_a_copied_page_of_int8_takes_its_scales_along():
    cache = KVCache(2, 3, PAGE, 2, 4, torch.int8, "cpu")
    for part, value in zip((cache.k, cache.v, *cache.scales), (1, 2, 0.5, 0.25), strict=True):
        part.zero_()
        part[:, 1] = value
    cache.copy_page(1, 2)
    for (k, v), _ in zip(cache.layers(), range(2), strict=True):
        assert (k.values[2] == 1).all()
        assert (v.values[2] == 2).all()
        assert (k.scales[2] == 0.5).all()
        assert (v.scales[2] == 0.25).all()
        assert (k.values[0] == 0).all()
