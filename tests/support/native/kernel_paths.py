"""Every way in which kernels run here, as fixtures, and random matrices of blocks to run them on."""

from __future__ import annotations

import itertools
import os
import random
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from specdec import kernels
from specdec.kernels import BlockTensor
from specdec.kernels import native as native_module

_library = native_module.load()


AVAILABLE = () if isinstance(_library, str) else _library.available
NATIVE = [f"native:{word}" for word, name in native_module.SETS.items() if name in AVAILABLE]


KINDS = [(4, False), (4, True), (5, False), (5, True), (8, False)]


ZERO = {4: 8, 5: 16, 8: 0}  # the value that means nothing without a minimum


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


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def parts(rows: int, columns: int, bits: int, minimum: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    low, high = (-128, 128) if bits == 8 else (0, 1 << bits)
    values = torch.randint(low, high, (rows, columns), dtype=torch.int16)
    scale = (torch.rand(rows, columns // 32) * 0.02 + 0.001).half()
    return values, scale, -(scale.float() * 7.3).half() if minimum else None


def packed(rows: int, columns: int, bits: int, minimum: bool) -> BlockTensor:
    return kernels.pack_blocks(*parts(rows, columns, bits, minimum), bits)


def dequantised(w: BlockTensor) -> Tensor:
    """float64 [N, K] from the natural layout."""
    values, scale, minimum = kernels.unpack_blocks(w)
    whole = values.double()
    if minimum is None:
        whole = whole - ZERO[w.bits]
    whole = whole * scale.double().repeat_interleave(32, dim=1)
    return whole if minimum is None else whole + minimum.double().repeat_interleave(32, dim=1)


def partitions(rows: int) -> list[list[slice]]:
    """All rows alone, and a few random cuts."""
    cuts = [[slice(t, t + 1) for t in range(rows)]]
    for seed in range(3):
        rng = random.Random(seed)
        edges = [0, *sorted(rng.sample(range(1, rows), min(rows - 1, 4))), rows]
        cuts.append([slice(a, b) for a, b in itertools.pairwise(edges)])
    return cuts
