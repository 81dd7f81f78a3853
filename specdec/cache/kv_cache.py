"""The KV cache: per-layer stores whose rollback is a length.

Position p of a layer lives in slot `p % slots`, in full and sliding layers alike. A full layer has at least as many
slots as positions, so it never wraps and grows by reallocation. A sliding layer is a ring of `window - 1 + max_rows`
slots and never grows: the rows of one pass can overwrite only positions that no row from the pass's first one on may
see, so forgetting rejected rows is a smaller length and never a copy.

Left out: other dtypes than the compute dtype, a budget, and reuse between requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.kernels import KVView

GROWTH = 256  # slots by which a full layer grows at the least
MAX_ROWS = 64  # rows of one pass; fixed, so that the layout of a ring never depends on settings


class StoreShape(NamedTuple):
    """What a layer stores: `kv_heads` x `head_dim` for K and for V, `window` positions (None: all of them)."""

    kv_heads: int
    head_dim: int
    window: int | None


class LayerStore:
    """K and V of one layer, `[kv_heads, slots, head_dim]` each."""

    def __init__(self, shape: StoreShape, max_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        self.window = shape.window
        slots = GROWTH if shape.window is None else shape.window - 1 + max_rows
        self.keys = torch.zeros(shape.kv_heads, slots, shape.head_dim, dtype=dtype, device=device)
        self.values = torch.zeros_like(self.keys)
        self.view = KVView(self.keys, self.values)

    @property
    def slots(self) -> int:
        return self.keys.shape[1]

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes

    @property
    def capacity(self) -> float:
        """Positions that there is room for; a ring always has room."""
        return math.inf if self.window is not None else self.slots

    def reserve(self, length: int) -> None:
        """Make room for positions below `length`; `view` is another one then."""
        if length <= self.capacity:
            return
        # Doubling keeps copying linear in the final length.
        slots = max(length + GROWTH, 2 * self.slots)
        self.keys, self.values = (_grown(t, slots) for t in (self.keys, self.values))
        self.view = KVView(self.keys, self.values)

    def write(self, start: int, keys: Tensor, values: Tensor) -> None:
        """Store K and V `[T, kv_heads, head_dim]` of positions start .. start + T - 1."""
        for store, rows in ((self.keys, keys), (self.values, values)):
            first = start % self.slots
            head = min(rows.shape[0], self.slots - first)
            by_head = rows.transpose(0, 1)  # [kv_heads, T, head_dim]
            store[:, first : first + head] = by_head[:, :head]
            if head < rows.shape[0]:  # the rows wrap around the end of the ring
                store[:, : rows.shape[0] - head] = by_head[:, head:]


def _grown(tensor: Tensor, slots: int) -> Tensor:
    grown = tensor.new_zeros(tensor.shape[0], slots, tensor.shape[2])
    grown[:, : tensor.shape[1]] = tensor
    return grown


class KVCache:
    """The stores of all layers, and how many positions are committed.

    A pass is `begin(rows)`, one `write` per store, `commit(n)`: the first n of its rows are kept and the others
    forgotten. `stores[i]` is None for a layer that reads another layer's K/V.
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
