"""Every way in which kernels run here, as fixtures, and random matrices of blocks to run them on."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from specdec import kernels
from specdec.kernels import BlockTensor
from specdec.kernels import native as native_module

_library = native_module.load()


AVAILABLE = () if isinstance(_library, str) else _library.available
NATIVE = [f"native:{word}" for word, name in native_module.SETS.items() if name in AVAILABLE]


class Kind(NamedTuple):
    """A form of blocks, with the name of a table."""

    bits: int
    minimum: bool = False
    table: str | None = None
    sub: bool = False

    def __str__(self) -> str:
        words = [self.table, "minimum" if self.minimum else None, "sub" if self.sub else None]
        return "-".join([f"{self.bits}bit", *filter(None, words)])


PLAIN = [Kind(4), Kind(4, True), Kind(5), Kind(5, True), Kind(8)]
CODED = [
    Kind(4, table="iq4"), Kind(4, table="nf4"), Kind(6, sub=True), Kind(3, sub=True),
    Kind(4, table="fp4", sub=True), Kind(3, table="iq2", sub=True), Kind(2, True, sub=True),
]  # fmt: skip
KINDS = [*PLAIN, *CODED]


ZERO = {3: 4, 4: 8, 5: 16, 6: 32, 8: 0}  # the value that means nothing without a minimum and a table


@pytest.fixture(params=["reference", *NATIVE])
def path(request: pytest.FixtureRequest) -> Iterator[str]:
    kernels.choose(request.param)
    yield request.param
    kernels.choose(os.environ.get("SPECDEC_KERNELS", "native"))


@pytest.fixture(params=[1, 2, 3, 5])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


class Parts(NamedTuple):
    """The arguments of `pack_blocks` before `bits`, and `sub`."""

    values: Tensor
    scale: Tensor
    minimum: Tensor | None
    sub: Tensor | None


def parts(rows: int, columns: int, kind: Kind) -> Parts:
    low, high = (-128, 128) if kind.bits == 8 else (0, 1 << kind.bits)
    values = torch.randint(low, high, (rows, columns), dtype=torch.int16)
    scale = (torch.rand(rows, columns // 32) * 0.02 + 0.001).half()
    minimum = -(scale.float() * 7.3).half() if kind.minimum else None
    sub = None
    if kind.sub:
        low, high, dtype = (0, 256, torch.uint8) if kind.minimum else (-128, 128, torch.int8)
        sub = torch.randint(low, high, (rows, columns // 16), dtype=torch.int16).to(dtype)
        scale = (scale.float() / 16).half()
    return Parts(values, scale, minimum, sub)


def packed(rows: int, columns: int, kind: Kind) -> BlockTensor:
    *most, sub = parts(rows, columns, kind)
    return kernels.pack_blocks(*most, kind.bits, table=kind.table, sub=sub)


def integers(w: BlockTensor) -> Tensor:
    """What the codes mean before scales and minimums: int64 [N, K]."""
    values = kernels.unpack_blocks(w)[0].long()
    if w.table is not None:
        return kernels.TABLES[w.table].numbers.long()[values]
    return values if w.minimum is not None else values - ZERO[w.bits]


def both_factors(w: BlockTensor) -> tuple[Tensor, Tensor]:
    """The factors of scale and of minimum, int64 [N, K / 16] each."""
    sub = kernels.unpack_sub(w)
    if sub is None:
        ones = torch.ones(w.rows, w.columns // 16, dtype=torch.int64)
        return ones, ones
    return ((sub & 15).long(), (sub >> 4).long()) if w.minimum is not None else (sub.long(), torch.zeros_like(sub))


def dequantised(w: BlockTensor) -> Tensor:
    """float64 [N, K] from the natural layout."""
    _, scale, minimum = kernels.unpack_blocks(w)
    of_scale, of_minimum = (factor.double().repeat_interleave(16, dim=1) for factor in both_factors(w))
    unit = 1.0 if w.table is None else kernels.TABLES[w.table].unit
    whole = integers(w).double() * of_scale * unit * scale.double().repeat_interleave(32, dim=1)
    return whole if minimum is None else whole + of_minimum * minimum.double().repeat_interleave(32, dim=1)


def partitions(rows: int) -> list[list[slice]]:
    """All rows alone, and a few random cuts."""
    cuts = [[slice(t, t + 1) for t in range(rows)]]
    for seed in range(3):
        rng = random.Random(seed)
        edges = [0, *sorted(rng.sample(range(1, rows), min(rows - 1, 4))), rows]
        cuts.append([slice(a, b) for a, b in itertools.pairwise(edges)])
    return cuts
