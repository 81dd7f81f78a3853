"""Where the rows of a pass are, in tensors on the device: a captured pass reads them there, other ones each time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from specdec.kernels.layers import Span, StoreRows, Views


@dataclass(frozen=True)
class DeviceSpan:
    """Place rows for the layers of one kind, as `Span` does: `cos`, `sin` [T, head_dim], `first`, `end` int64 [T]."""

    cos: Tensor
    sin: Tensor
    first: Tensor
    end: Tensor


@dataclass(frozen=True)
class DeviceStoreRows:
    """Name the rows of one text among those of a pass, its stores, and the position int64 [1] of its first row."""

    rows: slice
    views: Views
    start: Tensor


@dataclass(frozen=True)
class Places:
    """Place the rows of a pass: for layers of each kind, and in the stores of each text."""

    spans: Mapping[str, DeviceSpan]
    texts: tuple[DeviceStoreRows, ...]


def to_tensors(spans: Mapping[str, Span], texts: Sequence[StoreRows], device: torch.device) -> tuple[Tensor, ...]:
    """Return the tensors of a pass that `from_tensors` makes places of: one of whole numbers, still on the host, and
    the rotations of every kind."""
    numbers = [number for span in spans.values() for bounds in (span.first, span.end) for number in bounds]
    whole = torch.tensor([*numbers, *(text.start for text in texts)], dtype=torch.int64)
    if device.type == "cuda":
        whole = whole.pin_memory()  # so that the copy waits for nothing
    return whole, *(turned for span in spans.values() for turned in (span.cos, span.sin))


def from_tensors(kinds: Sequence[str], views: Sequence[tuple[int, Views]], tensors: Sequence[Tensor]) -> Places:
    """Return the places that `to_tensors` made `tensors` of. `kinds`: of the spans; `views`: the number of rows and the
    stores of each text."""
    whole, *turned = tensors
    rows = sum(count for count, _ in views)
    parts = iter(torch.split(whole, [rows] * 2 * len(kinds) + [1] * len(views)))
    turns = iter(turned)
    spans = {kind: DeviceSpan(next(turns), next(turns), next(parts), next(parts)) for kind in kinds}
    return Places(spans, tuple(DeviceStoreRows(part, view, next(parts)) for part, view in _slices(views)))


def _slices(views: Sequence[tuple[int, Views]]) -> Iterator[tuple[slice, Views]]:
    for end, (count, view) in zip(accumulate(count for count, _ in views), views, strict=True):
        yield slice(end - count, end), view
