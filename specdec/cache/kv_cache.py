"""The KV cache: per-layer stores whose rollback is a length.

The rows of one pass can overwrite, in a ring, only positions that no row from the pass's first one on may see, so
forgetting rejected rows is a smaller length and never a copy. What a store is, is `stores.py`'s business.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from specdec.cache.stores import LayerStore, StoreShape

MAX_ROWS = 64  # rows of one pass; fixed, so that the layout of a ring never depends on settings


class KVCache:
    """The stores of all layers, and how many positions are committed.

    A pass is `begin(rows)`, one `write` per store, `commit(n)`: the first n of its rows are kept and the others
    forgotten. `stores[i]` is None for a layer that reads another layer's K/V. `dtype`: of what is stored, a float type
    or int8.
    """

    def __init__(
        self,
        shapes: Sequence[StoreShape | None],
        dtype: torch.dtype,
        device: torch.device,
        max_rows: int = MAX_ROWS,
    ) -> None:
        self.max_rows = max_rows
        self.length = 0
        self._pending = 0
        self.stores = [None if s is None else LayerStore(s, max_rows, dtype, device) for s in shapes]
        self._look()

    def begin(self, rows: int) -> int:
        """Open a pass of `rows` rows; returns the position of its first row."""
        assert 0 < rows <= self.max_rows, f"{rows} rows in a pass; the cache was made for {self.max_rows}"
        # A pass that was never committed (Ctrl-C, an error inside a layer) is forgotten like a rejected draft.
        self._pending = rows
        if self.length + rows > self._capacity:
            for store in self.stores:
                if store is not None:
                    store.reserve(self.length + rows)
            self._look()
        return self.length

    def _look(self) -> None:
        # The same object as long as every store stays where it is: who reads through it may keep what it made of it.
        self.views = tuple(None if store is None else store.view for store in self.stores)
        self.nbytes = sum(store.nbytes for store in self.stores if store is not None)
        self._capacity = min((store.capacity for store in self.stores if store is not None), default=math.inf)

    def commit(self, rows: int) -> None:
        """Keep the first `rows` rows of the last pass."""
        assert 0 <= rows <= self._pending, f"commit of {rows} of {self._pending} rows"
        self.length += rows
        self._pending = 0
