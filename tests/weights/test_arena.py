"""Placed tensors are copies, whatever their size, and each has memory of its own."""

from __future__ import annotations

import pytest
import torch

from specdec.weights import arena
from specdec.weights.arena import Arena


@pytest.mark.parametrize("region", [arena.REGION, 300])  # 300 bytes: every other tensor needs a new one
def test_placed_tensors_are_aligned_copies_that_do_not_overlap(region: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arena, "REGION", region)
    shelf = Arena()
    given = [
        torch.arange(7, dtype=torch.uint8),
        torch.randn(3, 5).half(),
        torch.randn(9, 4).t(),  # not contiguous
        torch.empty(0, 4),
        torch.randn(40, 10),
        torch.arange(100, dtype=torch.int64),
    ]
    before = [tensor.clone() for tensor in given]
    placed = [shelf.place(tensor) for tensor in given]
    for tensor in given:
        tensor.zero_()
    for found, wanted in zip(placed, before, strict=True):
        assert found.dtype is wanted.dtype and torch.equal(found, wanted)
        assert found.is_contiguous()
        assert not found.numel() or found.data_ptr() % 64 == 0


def test_memory_outlives_the_arena() -> None:
    placed = Arena().place(torch.full((1000, 1000), 3.0))
    other = torch.zeros(4 << 20)  # would take the memory if it were free
    assert float(placed.sum()) == 3e6 and float(other.sum()) == 0.0
