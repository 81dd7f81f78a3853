"""The cache: slots, rings, growth, and rollback as a length."""

from __future__ import annotations

import random

import pytest
import torch

from specdec.cache import KVCache, LayerStore, StoreShape
from specdec.kernels import read_kv

CPU = torch.device("cpu")


def rows(start: int, count: int) -> torch.Tensor:
    """K rows whose content is their position, below 100: [count, 2, 4]."""
    return (torch.arange(start, start + count) % 100).float()[:, None, None].expand(count, 2, 4)


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
            assert store.keys[0, slot, 0] == position % 100
            assert store.values[1, slot, 3] == -(position % 100)


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
            assert store.keys[0, position % store.slots, 0] == position % 100


@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.int8])
@torch.inference_mode()
def test_a_long_pass_finds_room_and_leaves_the_layout_as_it_was(kept: torch.dtype) -> None:
    """Passes of all lengths, committed in part, wholly or not at all: what the next row sees is always there."""
    window, most = 8, 5
    cache = KVCache([StoreShape(2, 4, window), StoreShape(2, 4, None)], kept, CPU, max_rows=most)
    ring, full = cache.stores
    assert ring is not None
    assert full is not None
    bytes_of_the_ring, dice = ring.nbytes, random.Random(4)

    def positions(store: LayerStore, low: int, high: int) -> list[int]:
        keys, values = read_kv(store.view, low, high)
        assert torch.equal(keys, -values)
        return keys[1, :, 3].round().int().tolist()  # type: ignore[no-any-return]

    for _ in range(80):
        count = dice.choice((1, 3, most, most + 1, 9, 12, 30))
        start = cache.begin(count)
        assert ring.slots >= window - 1 + max(count, most)
        assert count > most or ring.nbytes == bytes_of_the_ring
        write(cache, start, count)
        seen = range(max(0, start - window + 1), start + count)  # rows of a picture see all of it
        assert positions(ring, seen.start, seen.stop) == [p % 100 for p in seen]
        if dice.random() < 0.8:
            cache.commit(dice.choice((count, 1, count // 2)))
        for copy in (cache, cache.fork(cache.length)) if dice.random() < 0.5 else ():
            sliding = copy.stores[0]
            assert sliding is not None
            assert sliding.nbytes == bytes_of_the_ring
            for length in range(cache.length + 1):
                low = max(0, length - window + 1)
                if low < length and copy.rewindable(length):
                    assert positions(sliding, low, length) == [p % 100 for p in range(low, length)]
            assert copy.rewindable(cache.length)
    assert cache.length > 200
    assert positions(full, 0, cache.length) == [p % 100 for p in range(cache.length)]


def test_more_rows_than_a_pass_had_are_not_committed() -> None:
    cache = KVCache([StoreShape(1, 4, 8)], torch.float32, CPU, max_rows=4)
    cache.begin(4)
    with pytest.raises(AssertionError, match="commit of 5"):
        cache.commit(5)
