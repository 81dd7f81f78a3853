"""The store of one layer of a text: K and V, or V alone, as floats or as int8 with a scale per head and position.

Position p lives in slot `p % slots`, in full and sliding layers alike. A full layer has at least as many slots as
positions, so it never wraps, and grows a block at a time. A sliding layer is a ring of `window - 1 + max_rows` slots
and larger only for the time of passes with more rows. Why V alone: Gemma 4's full layers make K and V from one
projection, so that K = rope(V * weight), and half of a long text's memory is saved.

K and V are rounded to the store's dtype before any row reads them, also in the pass that wrote them: a row's bits do
not depend on which pass it came with.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from specdec.kernels import KeyFromValue, KVView, quantise_store

GROWTH = 256  # slots by which a full layer grows at first, as it doubles
BLOCK = 2048  # slots by which it grows at the most: copying 32k positions sixteen times takes a second, once


class StoreShape(NamedTuple):
    """Describe the shape of a layer's store: `kv_heads` x `head_dim` for K and for V, `window` positions (None: all of
    them).

    `key_from_value(n)`: the means to make K from V for positions below n; K is then not stored. None: K is stored.
    """

    kv_heads: int
    head_dim: int
    window: int | None
    key_from_value: Callable[[int], KeyFromValue] | None = None


class LayerStore:
    """Store K and V of one layer, [kv_heads, slots, head_dim] each; int8 ones with their scales [kv_heads, slots]."""

    def __init__(self, shape: StoreShape, max_rows: int, dtype: torch.dtype, device: torch.device) -> None:
        """Allocate the first slots, zeroed. `max_rows`: of one pass; a ring has room for them beside its window."""
        assert shape.window is None or shape.key_from_value is None, "slots of a ring are not positions"
        self.window, self._key_from_value = shape.window, shape.key_from_value
        slots = GROWTH if shape.window is None else shape.window - 1 + max_rows
        size, scaled = (shape.kv_heads, slots, shape.head_dim), dtype is torch.int8
        self.values = _zeros(size, dtype, device)
        self.keys = _zeros(size, dtype, device) if shape.key_from_value is None else None
        self.value_scale = _zeros(size[:2], torch.float32, device) if scaled else None
        self.key_scale = _zeros(size[:2], torch.float32, device) if scaled and self.keys is not None else None
        self._look()

    @property
    def slots(self) -> int:
        """Return how many positions the store holds now."""
        return self.values.shape[1]

    @property
    def nbytes(self) -> int:
        """Return the bytes of K, V and their scales."""
        return sum(part.nbytes for part in self.parts)

    @property
    def capacity(self) -> float:
        """Return the number of positions that there is room for; a ring always has room."""
        return math.inf if self.window is not None else self.slots

    @property
    def parts(self) -> tuple[Tensor, ...]:
        """Return the tensors that there are of K, V and their scales, [kv_heads, slots, ...] each."""
        return tuple(part for part in (self.keys, self.values, self.key_scale, self.value_scale) if part is not None)

    def holds(self, length: int, reach: int) -> bool:
        """Return whether the store has all that a row at `length` sees, once positions below `reach` were written."""
        return self.window is None or reach - self.slots <= max(0, length - (self.window - 1))

    def copy_of_parts(self) -> tuple[Tensor, ...]:
        """Return copies of `parts`, for `put_back`."""
        return tuple(part.clone() for part in self.parts)

    def put_back(self, parts: Sequence[Tensor]) -> None:
        """Write the tensors of `copy_of_parts` back into the first slots."""
        for mine, theirs in zip(self.parts, parts, strict=True):
            mine[:, : theirs.shape[1]] = theirs

    def copy_from(self, other: LayerStore, length: int) -> None:
        """Copy the positions below `length` of `other`, a store of this shape; of a ring, copy all slots."""
        self.reserve(length)
        self.put_back([part if self.window is not None else part[:, :length] for part in other.parts])

    def reserve(self, length: int) -> None:
        """Make room for positions below `length`; where the store grows, `view` becomes another object."""
        if length <= self.capacity:
            return
        slots = slots_for(length, self.slots)
        # One part at a time: only one part of one layer is in memory twice.
        self.values = _grown(self.values, slots)
        self.keys = None if self.keys is None else _grown(self.keys, slots)
        self.value_scale = None if self.value_scale is None else _grown(self.value_scale, slots)
        self.key_scale = None if self.key_scale is None else _grown(self.key_scale, slots)
        self._look()

    def resize(self, slots: int, length: int, reach: int) -> int:
        """Give a ring `slots` slots, with the last positions below `length` that it holds; return its reach then.

        `reach`: as in `holds`. `view` becomes another object.
        """
        assert self.window is not None, "a full layer grows by `reserve`"
        low = max(0, reach - self.slots, length - slots)
        # One part at a time: only one part of one layer is in memory twice.
        self.values = _relaid(self.values, slots, low, length)
        self.keys = None if self.keys is None else _relaid(self.keys, slots, low, length)
        self.value_scale = None if self.value_scale is None else _relaid(self.value_scale, slots, low, length)
        self.key_scale = None if self.key_scale is None else _relaid(self.key_scale, slots, low, length)
        self._look()
        return max(length, low + slots) if low else length

    def write(self, start: int, keys: Tensor | None, values: Tensor) -> None:
        """Store K and V [T, kv_heads, head_dim] of positions start .. start + T - 1; a store of V alone takes no K."""
        for store, scale, rows in (
            (self.keys, self.key_scale, keys),
            (self.values, self.value_scale, values),
        ):
            if store is None:
                continue
            assert rows is not None
            data = rows.transpose(0, 1)  # [kv_heads, T, head_dim]
            if scale is not None:
                data, scales = quantise_store(data)
                _put(scale, start, scales)
            _put(store, start, data)

    def _look(self) -> None:
        key_from_value = None if self._key_from_value is None else self._key_from_value(self.slots)
        self.view = KVView(self.keys, self.values, self.key_scale, self.value_scale, key_from_value)


def store_bytes(kv_heads: int, head_dim: int, slots: int, dtype: torch.dtype, values_alone: bool) -> int:
    """Return the bytes of a store of so many slots."""
    head = head_dim * dtype.itemsize + (4 if dtype is torch.int8 else 0)  # a float32 scale for each
    return kv_heads * slots * head * (1 if values_alone else 2)


def slots_for(length: int, slots: int = GROWTH) -> int:
    """Return the slots of a full layer that had `slots` of them, once it has room for `length` positions."""
    while slots < length:
        slots += min(slots, BLOCK)
    return slots


def _put(store: Tensor, start: int, rows: Tensor) -> None:
    """Write rows [H, T, ...] into the slots of store [H, S, ...] from position `start` on."""
    slots, count = store.shape[1], rows.shape[1]
    first = start % slots
    head = min(count, slots - first)
    store[:, first : first + head] = rows[:, :head]
    if head < count:  # the rows wrap around the end of the ring
        store[:, : count - head] = rows[:, head:]


def _relaid(ring: Tensor, slots: int, low: int, high: int) -> Tensor:
    """Return a ring [H, slots, ...] with positions low .. high - 1 of `ring` [H, S, ...]."""
    relaid = _zeros((ring.shape[0], slots, *ring.shape[2:]), ring.dtype, ring.device)
    while low < high:
        first = low % ring.shape[1]
        count = min(high - low, ring.shape[1] - first)
        _put(relaid, low, ring[:, first : first + count])
        low += count
    return relaid


def _zeros(size: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return zeros; on the CPU without torch's threads, for which a busy machine lets each of many stores wait."""
    if device.type != "cpu":
        return torch.zeros(*size, dtype=dtype, device=device)
    raw = torch.from_numpy(np.zeros(math.prod(size) * dtype.itemsize, dtype=np.uint8))
    return raw.view(dtype).view(*size)


def _grown(tensor: Tensor, slots: int) -> Tensor:
    grown = _zeros((tensor.shape[0], slots, *tensor.shape[2:]), tensor.dtype, tensor.device)
    for head, old in zip(grown, tensor, strict=True):  # one at a time: mostly too small for torch's threads
        head[: len(old)] = old
    return grown
