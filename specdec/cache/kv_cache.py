"""The KV cache: per-layer stores whose rollback is a length.

The rows of one pass can overwrite, in a ring, only positions that no row from the pass's first one on may see. So
forgetting rejected rows is a smaller length and never a copy. The stores themselves are in `stores.py`.

A picture goes through the layers whole, so a pass may have more rows than rings have room for beside their windows. The
rings then are larger until the next ordinary pass, or until the cache is marked, copied, rewound or given back: a video
is many long passes in a row. Otherwise every cache has the same layout.

What a drafter keeps of the same text lies beside the cache (`Companion`), and goes where the cache goes.

A cache can also go back to an earlier length, as far as its rings still hold all that a row there sees. A
`RingCheckpoint`, a copy of the rings at an earlier length, takes it further back. Rows computed from there on have the
bits that they would have had anyway: a position's K and V depend on the tokens up to it and on nothing else.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from specdec.cache.stores import LayerStore, StoreShape

MAX_ROWS = 64  # rows of an ordinary pass; fixed, so that the layout of a ring never depends on settings


class RingCheckpoint(NamedTuple):
    """Hold the rings of a cache as they were at `length` positions, before a longer text overwrites them.

    `reach`: the cache's reach at that time. `rings`: per ring, the parts of its store.
    """

    length: int
    reach: int
    rings: tuple[tuple[Tensor, ...], ...]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the copied rings."""
        return sum(part.nbytes for ring in self.rings for part in ring)


class Companion(Protocol):
    """Keep beside a cache what somebody else needs of its text: a model that drafts keeps a cache of its own.

    A companion knows which tokens it holds, and is told of nothing: its owner compares them with the text.
    """

    @property
    def nbytes(self) -> int:
        """Return the bytes that it takes."""

    def fork(self, length: int) -> Companion | None:
        """Return another companion, of at most the first `length` tokens; None where nothing can be copied."""


class KVCache:
    """Hold the stores of all layers, and how many positions are committed.

    A pass is `begin(rows)`, one `write` per store, `commit(n)`: the first n of its rows are kept and the others
    forgotten. `stores[i]` is None for a layer that reads another layer's K/V. `dtype`: the type in which K and V are
    kept, a float type or int8. `adapter`: the name of the adapter whose K and V these are, "" for none.
    """

    def __init__(
        self,
        shapes: Sequence[StoreShape | None],
        dtype: torch.dtype,
        device: torch.device,
        max_rows: int = MAX_ROWS,
        adapter: str = "",
    ) -> None:
        """Allocate empty stores. `shapes`: None for a layer that reads another one's K/V; `max_rows`: of an ordinary
        pass."""
        self.max_rows, self.adapter = max_rows, adapter
        self.length = 0
        self.reach = 0  # rings hold what a pass leaves whose rows end here: one past the last position ever written
        self._pending = 0
        self._room = max_rows  # rows of a pass that the rings have room for now
        self._made = shapes, dtype, device, max_rows, adapter
        # Replaced as a whole: other threads add up their bytes.
        self._companions: tuple[tuple[weakref.ref[object], Companion], ...] = ()
        self.stores = [None if s is None else LayerStore(s, max_rows, dtype, device) for s in shapes]
        self._look()

    def begin(self, rows: int) -> int:
        """Open a pass of `rows` rows, and return the position of its first row."""
        assert rows > 0, "a pass has rows"
        # A pass that was never committed (Ctrl-C, an error inside a layer) is forgotten like a rejected draft.
        self._pending = rows
        if rows > self._room or rows <= self.max_rows < self._room:
            self._make_room(max(rows, self.max_rows))
        if self.length + rows > self._capacity:
            for store in self.stores:
                if store is not None:
                    store.reserve(self.length + rows)
            self._look()
        self.reach = max(self.reach, self.length + rows)
        return self.length

    def _look(self) -> None:
        # `views` stays one object while every store stays where it is: a caller may keep records of it that long.
        self.views = tuple(None if store is None else store.view for store in self.stores)
        self._nbytes = sum(store.nbytes for store in self.stores if store is not None)
        self._capacity = min((store.capacity for store in self.stores if store is not None), default=math.inf)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all stores, and of what lies beside the cache."""
        return self._nbytes + sum(companion.nbytes for _, companion in self._living())

    def companion(self, owner: object) -> Companion | None:
        """Return what `owner` put beside the cache; None where it has put nothing."""
        return next((companion for of, companion in self._living() if of() is owner), None)

    def accompany(self, owner: object, companion: Companion) -> None:
        """Put `companion` beside the cache, in the place of what `owner` put there before; it goes with `owner`."""
        others = [one for one in self._living() if one[0]() is not owner]
        self._companions = (*others, (weakref.ref(owner, self._part), companion))

    def _part(self, of: weakref.ref[object]) -> None:
        self._companions = tuple(one for one in self._companions if one[0] is not of)

    def _living(self) -> list[tuple[weakref.ref[object], Companion]]:
        return [one for one in self._companions if one[0]() is not None]

    def commit(self, rows: int) -> None:
        """Keep the first `rows` rows of the last pass."""
        assert 0 <= rows <= self._pending, f"commit of {rows} of {self._pending} rows"
        self.length += rows
        self._pending = 0

    def settle(self) -> None:
        """Forget the rows that are not committed, and the room in the rings that a long pass took."""
        self._pending = 0
        if self._room != self.max_rows:
            self._make_room(self.max_rows)

    def _make_room(self, rows: int) -> None:
        """Give all rings room for `rows` rows of a pass beside their windows."""
        reach = [ring.resize(ring.window - 1 + rows, self.length, self.reach) for ring in self.rings if ring.window]
        self.reach, self._room = max(reach, default=self.length), rows
        self._look()

    # Going back

    @property
    def rings(self) -> tuple[LayerStore, ...]:
        """Return the stores of sliding layers."""
        return tuple(store for store in self.stores if store is not None and store.window is not None)

    def rewindable(self, length: int) -> bool:
        """Return whether the cache still has all that a row at position `length` may see."""
        return length <= self.length and all(ring.holds(length, self.reach) for ring in self.rings)

    @torch.inference_mode()
    def mark(self) -> RingCheckpoint:
        """Make a ring checkpoint of the cache as it is now."""
        self.settle()
        return RingCheckpoint(self.length, self.reach, tuple(ring.copy_of_parts() for ring in self.rings))

    @torch.inference_mode()  # in place: the cache may have been made in that mode
    def rewind(self, length: int, mark: RingCheckpoint | None = None) -> None:
        """Forget all from position `length` on; where it is not `rewindable`, by way of `mark`, made at that length."""
        self.settle()
        if mark is None:
            assert self.rewindable(length), f"the rings no longer hold what position {length} sees"
        else:
            assert mark.length == length <= self.length
            for ring, parts in zip(self.rings, mark.rings, strict=True):
                ring.put_back(parts)
            self.reach = mark.reach
        self.length = length

    @torch.inference_mode()
    def fork(self, length: int, mark: RingCheckpoint | None = None) -> KVCache:
        """Return another cache that holds the first `length` positions, under the conditions of `rewind`."""
        self.settle()
        assert mark is not None or self.rewindable(length)
        copy = KVCache(*self._made)
        for mine, theirs in zip(self.stores, copy.stores, strict=True):
            if mine is not None and theirs is not None and (mark is None or mine.window is None):
                theirs.copy_from(mine, length)
        copy.restore(self.length, self.reach)
        copy.rewind(length, mark)
        for of, companion in self._living():
            if (owner := of()) is not None and (copied := companion.fork(length)) is not None:
                copy.accompany(owner, copied)
        return copy

    def restore(self, length: int, reach: int) -> None:
        """Set the length and reach of the cache, after its stores were filled with the content of such a cache."""
        self.length, self.reach = length, reach
        self._look()
