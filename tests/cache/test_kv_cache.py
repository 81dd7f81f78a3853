"""The cache: slots, rings, growth, and rollback as a length."""

from __future__ import annotations

import pytest
import torch

from specdec.cache import KVCache, StoreShape

CPU = torch.device("cpu")


def rows(start: int, count: int) -> torch.Tensor:
    """K rows whose content is their position: [count, 2, 4]."""
    return torch.arange(start, start + count).float()[:, None, None].expand(count, 2, 4)


def write(cache: KVCache, start: int, count: int) -> None:
    for store in cache.stores:
        assert store is not None
        store.write(start, rows(start, count), -rows(start, count))


@pytest.mark.parametrize("window", [None, 8])
def test_positions_are_where_attention_looks(window: int | None) -> None:
    cache = KVCache([StoreShape(2, 4, window)], torch.float32, CPU, max_rows=5)
    store = cache.stores[0]
    assert store is not None
    for step in range(400):
        count = 1 + step % 5
        start = cache.begin(count)
        write(cache, start, count)
        cache.commit(1 + step % count)
        for position in range(max(0, cache.length - (window or cache.length)), cache.length):
            slot = position % store.slots
            assert store.keys[0, slot, 0] == position
            assert store.values[1, slot, 3] == -position


def test_a_sliding_layer_has_window_minus_one_plus_rows_slots_and_never_grows() -> None:
    cache = KVCache([StoreShape(1, 4, 1024), StoreShape(1, 4, None)], torch.float32, CPU, max_rows=16)
    sliding, full = cache.stores
    assert sliding is not None
    assert full is not None
    before = sliding.nbytes
    assert sliding.slots == 1023 + 16
    for _ in range(200):
        cache.begin(16)
        cache.commit(16)
    assert sliding.nbytes == before
    assert full.slots >= 3200


def test_rejected_rows_overwrite_nothing_that_is_still_visible() -> None:
    window, drafts = 8, 5
    cache = KVCache([StoreShape(2, 4, window)], torch.float32, CPU, max_rows=drafts)
    store = cache.stores[0]
    assert store is not None
    for _ in range(50):
        start = cache.begin(drafts)
        write(cache, start, drafts)
        # The first row of the next pass sees window - 1 positions before it; all must still be there.
        cache.commit(1)
        for position in range(max(0, cache.length - window + 1), cache.length):
            assert store.keys[0, position % store.slots, 0] == position


def test_a_pass_wider_than_the_cache_was_made_for_is_a_bug() -> None:
    cache = KVCache([StoreShape(1, 4, 8)], torch.float32, CPU, max_rows=4)
    with pytest.raises(AssertionError, match="made for 4"):
        cache.begin(5)
    cache.begin(4)
    with pytest.raises(AssertionError, match="commit of 5"):
        cache.commit(5)
