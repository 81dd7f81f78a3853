"""Check every op against the reference, and that a row has the same bits whatever other rows there are.

What: random inputs go through `specdec.kernels` on the device and through the reference on the CPU. `error` is the
largest difference over the largest number of the reference; `bound` is what rounding explains, 0 where the arithmetic
is one and the same. Row counts go through tiles of every size, and past them. Left out: whole passes and drafts, which
texts go through.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from eval.synthetic.random_weights import random_blocks
from specdec import kernels
from specdec.cache.stores import LayerStore, StoreShape
from specdec.kernels import KeyFromValue, pack_low_rank, reference
from specdec.kernels.low_rank import low_rank
from specdec.kernels.triton.check import failure
from specdec.kernels.triton.passes.check import check_choice
from specdec.kernels.triton.product import KERNEL_FORMS
from specdec.util.text import describe_error

ROWS, FEW = (1, 2, 3, 4, 5, 8, 9, 16, 17, 33), (1, 2, 5, 17)
# what rounding explains: of float32 sums, and of numbers that are stored as bfloat16
FLOAT, HALF = 2e-5, 2.0**-7


@dataclass(frozen=True)
class Finding:
    """Keep what a check found of the op `kernel` in the case `what`. `alike`: whether each row had the same bits among
    every number of rows. The error is infinite where a result was no number, or the op failed."""

    kernel: str
    what: str
    error: float
    bound: float
    alike: bool

    @property
    def ok(self) -> bool:
        """Return whether the kernel may be used."""
        return self.alike and self.error <= self.bound

    def to_dict(self) -> dict[str, Any]:
        """Return the finding in JSON types."""
        return {**asdict(self), "ok": self.ok}


@dataclass(frozen=True)
class Checks:
    """Make the checks for a device. `small`: a few small shapes, as the interpreter has time for."""

    device: torch.device
    small: bool

    def __iter__(self) -> Iterator[Finding]:
        """Yield the findings of all checks, one after the other; where an op fails, that, and those of the others."""
        for group in (self._products, self._elementwise, self._attention, self._stores, self._choice):
            try:
                yield from group()
            except Exception as error:  # one op must not cost the findings of all others
                yield Finding(group.__name__.strip("_"), describe_error(error), math.inf, 0.0, False)

    @property
    def _rows(self) -> tuple[int, ...]:
        return FEW if self.small else ROWS

    @property
    def _dtype(self) -> torch.dtype:
        """Return the type of rows, as a model on the device has it."""
        return torch.float32 if self.small else torch.bfloat16

    def _products(self) -> Iterator[Finding]:
        # all forms in one shape: each form, and each number of blocks that is no multiple of four, is compiled apart
        shapes = ((48, 64),) if self.small else ((4096, 3840), (3840, 15360), (100, 96))
        for rows, columns in shapes:
            x = _random(max(self._rows), columns).to(self._dtype)
            for form in sorted(KERNEL_FORMS):
                if rows != shapes[0][0] and (form.bits != 4 or form.table):
                    continue
                w = random_blocks(rows, columns, form.bits, form.minimum, table="iq4" if form.table else None)
                there, exact = w.to(self.device), reference.block_linear(x, w)
                what = f"{rows}x{columns} {form.bits} bits{', minimum' * form.minimum}{', table' * form.table}"
                yield self._compare("block_linear", what, x, exact, 0.0, partial(kernels.block_linear, w=there))
                ids = torch.arange(0, rows, 3, dtype=torch.int64)
                found = kernels.block_rows(ids.to(self.device), there, torch.float32).cpu()
                yield Finding("block_rows", what, _error(found, reference.block_rows(ids, w, torch.float32)), 0.0, True)
            for dtype, bound in ((torch.float32, FLOAT), (torch.bfloat16, HALF)):
                y, plain = x.float().to(dtype), _random(rows, columns).to(dtype)
                exact, moved = y.float() @ plain.float().t(), plain.to(self.device)
                what = f"{rows}x{columns} {_name(dtype)}"
                yield self._compare("dense_linear", what, y, exact, bound, partial(kernels.dense_linear, w=moved))

    def _elementwise(self) -> Iterator[Finding]:
        part = pack_low_rank(_random(8, 96), _random(80, 8), 0.5)
        x, there = _random(max(self._rows), 96), part.to(self.device)
        adapt = partial(kernels.low_rank, part=there)
        yield self._compare("low_rank", "80x96 of rank 8", x, low_rank(x, part), 0.0, adapt)
        width, heads, head_dim = (96, 4, 32) if self.small else (3840, 16, 256)
        x, weight = _random(max(self._rows), width), _random(width)
        exact = reference.rms_norm(x, weight, 1e-6)
        norm = partial(kernels.rms_norm, weight=weight.to(self.device), eps=1e-6)
        yield self._compare("rms_norm", f"{width} columns", x, exact, 0.0, norm)
        for kind in ("silu", "gelu_tanh"):
            exact = reference.gated(x, x + 1, kind)
            yield self._compare("gated", kind, x, exact, FLOAT, partial(_gated, activation=kind))
        q, angles = _random(max(self._rows), heads, head_dim), _random(max(self._rows), head_dim)
        cos, sin = angles.cos(), angles.sin()
        turns = cos.to(self.device), sin.to(self.device)
        exact = reference.rope(q, cos, sin)
        yield self._compare(
            "rope",
            f"{heads} heads of {head_dim}",
            q,
            exact,
            0.0,
            lambda q: kernels.rope(q, *(t[: len(q)] for t in turns)),
        )

    def _attention(self) -> Iterator[Finding]:
        shapes = ((4, 2, 32, 40, 24),) if self.small else ((16, 8, 256, 1500, 1087), (16, 1, 512, 4000, 4096))
        for heads, kv_heads, width, positions, slots in shapes:
            for kept in (torch.float32, torch.bfloat16, torch.int8):
                for alone in (False, True):
                    if alone and positions > slots:
                        continue  # slots of a ring are not positions
                    yield self._attend(heads, kv_heads, width, positions, slots, kept, alone)
        if self.small:
            yield self._attend(4, 1, 64, 150, 256, torch.bfloat16, True)

    def _attend(
        self, heads: int, kv_heads: int, width: int, positions: int, slots: int, kept: torch.dtype, alone: bool
    ) -> Finding:
        rows = max(self._rows)
        store = _filled(kv_heads, width, positions, slots, kept, alone)
        there = store.view.to(self.device)
        q, scale = _random(rows, heads, width).to(self._dtype), width**-0.5
        end = [positions - rows + i + 1 for i in range(rows)]
        first = [max(0, one - (slots - rows)) for one in end]
        exact = reference.attention(q, store.view, first, end, scale)
        where = f"{positions} positions {'round a ring of' if positions > slots else 'in'} {slots} slots"
        what = f"{heads} heads over {kv_heads} of {width}, {where}, {_name(kept)}{', keys made from values' * alone}"

        def attend(q: Tensor) -> Tensor:
            return kernels.attention(q, there, first[: len(q)], end[: len(q)], scale)

        return self._compare("attention", what, q, exact, FLOAT if self.small else HALF, attend)

    def _stores(self) -> Iterator[Finding]:
        for kept in (torch.float32, torch.bfloat16, torch.int8):
            here, there = (LayerStore(StoreShape(2, 32, 16), 8, kept, device) for device in (_CPU, self.device))
            error = 0.0
            for start, rows in ((0, 5), (5, 8), (13, 8), (21, 1)):  # around the end of the ring
                k, v = _random(rows, 2, 32), _random(rows, 2, 32) * start
                here.write(start, k, v)
                there.write(start, k.to(self.device), v.to(self.device))
                pairs = zip(here.parts, there.parts, strict=True)
                error = max([error, *(_error(found.cpu(), part) for part, found in pairs)])
            yield Finding("LayerStore.write (torch)", _name(kept), error, 0.0, True)

    def _choice(self) -> Iterator[Finding]:
        """Check the choice of a drafted token, greedy and sampled, which has no op of its own."""
        why = failure(check_choice, self.device)
        yield Finding(
            "choice of a drafted token", why or "3 rows of 2,500 scores, and the noise of 7 keys", 0.0, 0.0, not why
        )

    def _compare(
        self, kernel: str, what: str, x: Tensor, exact: Tensor, bound: float, call: Callable[[Tensor], Tensor]
    ) -> Finding:
        """Compare `call` over all rows of x with `exact`, and over fewer rows with itself."""
        given = x.to(self.device)
        whole = call(given)
        alike = all(torch.equal(call(given[:rows].contiguous()), whole[:rows]) for rows in self._rows)
        return Finding(kernel, what, _error(whole.cpu(), exact), bound, alike)


_CPU = torch.device("cpu")


def _gated(x: Tensor, activation: str) -> Tensor:
    return kernels.gated(x, x + 1, activation)


def _filled(kv_heads: int, width: int, positions: int, slots: int, kept: torch.dtype, alone: bool) -> LayerStore:
    """Return a store of random keys and values; a ring where there are more positions than slots."""
    angles = _random(slots, width // 8)
    made = KeyFromValue(_random(width), angles.cos(), angles.sin())
    ring = positions > slots
    window = slots - 7 if ring else None
    shape = StoreShape(kv_heads, width, window, (lambda _: made) if alone else None)
    store = LayerStore(shape, 8, kept, _CPU)
    store.reserve(positions)
    for start in range(0, positions, 8):
        rows = min(8, positions - start)
        store.write(start, _random(rows, kv_heads, width), _random(rows, kv_heads, width) + start / positions)
    return store


def _error(found: Tensor, exact: Tensor) -> float:
    """Return the largest difference over the largest number of `exact`; infinity where one of both is no number."""
    gap = (found.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1e-30)
    return float(gap) if bool(gap.isfinite()) else float("inf")


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
