"""Experts that are pages of a file: which of them leave the process, and that it holds no others."""

from __future__ import annotations

import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import pytest
import torch

from specdec.memory.system import file_bytes, resident_bytes
from specdec.model.experts import FOLIO, ExpertPages
from specdec.weights.packed import ByteRange, PackedFile, packing

EACH = 4 * FOLIO


@dataclass
class RecordingFile:
    """Record what `ExpertPages` asks of a file. The one part of expert e of layer l is 80 bytes that begin at byte
    `EACH` * (100 * l + e)."""

    said: list[tuple[str, int]]
    nbytes: int = 1 << 40

    def map_small_pages(self) -> None:
        self.said.append(("small pages", 0))

    def byte_range(self, part: torch.Tensor) -> ByteRange:
        return ByteRange(EACH * int(part[0]), EACH * int(part[0]) + 80)

    def forget(self, where: ByteRange) -> None:
        self.said.append(("forget", where.begin // EACH))

    def fetch(self, where: ByteRange) -> None:
        self.said.append(("fetch", where.begin // EACH))


def test_the_experts_that_were_used_longest_ago_make_room() -> None:
    file = RecordingFile([])
    pages = ExpertPages(cast(PackedFile, file), 3 * 80)
    assert file.said == [("small pages", 0)]

    def use(layer: int, *experts: int) -> list[tuple[str, int]]:
        file.said.clear()
        pages.use(layer, experts, lambda expert: (torch.full((10,), 100 * layer + expert, dtype=torch.int64),))
        return list(file.said)

    def around(*parts: int) -> list[tuple[str, int]]:
        return [("forget", part) for part in parts]

    assert use(1, 1, 2) == [("fetch", 101), ("fetch", 102)]
    assert use(2, 1) == [*around(101, 102), ("fetch", 201)]  # what came with the pages of the layer before
    assert use(1, 1) == around(201)
    assert use(2, 2) == [("forget", 102), ("fetch", 202)]
    assert use(1, 1, 2) == [*around(201, 202), ("fetch", 102)]
    assert use(3, 0, 1, 2, 3) == [*around(101, 102, 202), *(("fetch", 300 + i) for i in range(4))]
    assert use(4, 7) == [*around(300, 301, 302, 303), ("fetch", 407)]


@pytest.mark.parametrize("call", range(1, 14))
def test_after_an_interrupt_anywhere_the_limit_holds(call: int) -> None:
    """Each call of the file that a use makes, and what it is told of the experts, is interrupted once."""
    left = [call]

    def interrupted() -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt

    class File(RecordingFile):
        def byte_range(self, part: torch.Tensor) -> ByteRange:
            interrupted()
            return super().byte_range(part)

        def forget(self, where: ByteRange) -> None:
            interrupted()
            super().forget(where)

        def fetch(self, where: ByteRange) -> None:
            interrupted()
            super().fetch(where)

    file = File([])
    pages = ExpertPages(cast(PackedFile, file), 3 * 80)

    def use(layer: int, *experts: int) -> list[tuple[str, int]]:
        file.said.clear()
        pages.use(layer, experts, lambda expert: (torch.full((10,), 100 * layer + expert, dtype=torch.int64),))
        return list(file.said)

    def several() -> None:
        for layer in range(3):
            use(layer, 1, 2)

    with pytest.raises(KeyboardInterrupt):
        several()
    assert file.said[-1] == ("forget", 0)  # the whole file
    assert use(1, 1, 2) == [("fetch", 101), ("fetch", 102)]
    assert use(2, 1) == [("forget", 101), ("forget", 102), ("fetch", 201)]
    assert use(2, 2)[0] == ("forget", 101)


def test_pages_that_come_with_an_expert_leave_and_those_of_its_neighbours_stay() -> None:
    """Parts of 1 MB, side by side: two of them lie in each folio of the largest size."""
    unit = 1 << 20
    found: list[ByteRange] = []

    class File(RecordingFile):
        def byte_range(self, part: torch.Tensor) -> ByteRange:
            return ByteRange(int(part[0]) * unit, (int(part[0]) + 1) * unit)

        def forget(self, where: ByteRange) -> None:
            found.append(where)

    pages = ExpertPages(cast(PackedFile, File([], 100 * unit)), 3 * unit)

    def use(*experts: int) -> list[tuple[float, float]]:
        found.clear()
        pages.use(0, experts, lambda expert: (torch.tensor([expert], dtype=torch.int64),))
        return [(where.begin / unit, where.end / unit) for where in found]

    assert use(4, 7) == []
    assert use(9) == [(5, 7)]  # of 4 to 8, what is neither 4 nor 7
    assert use(20, 21) == [(4, 9)]  # 4 and 7 make room
    assert use(99) == [(8, 10)]
    assert use(99) == [(98, 99)]  # the file ends at 100
    assert use(99) == []


def test_a_part_of_a_file_leaves_the_process_and_comes_back(tmp_path: Path) -> None:
    tensor = torch.arange(4_000_000, dtype=torch.float32)
    with packing(tmp_path / "x.packed", {}) as writer:
        writer.vector("v", tensor)
    file = PackedFile(tmp_path / "x.packed", {})
    found = file.vector("v")
    before = resident_bytes()
    assert float(found.sum()) > 0
    assert resident_bytes() - before > 12_000_000
    file.forget(file.byte_range(found[1_000_000:]))
    if sys.platform == "linux":
        assert resident_bytes() - before < 8_000_000
    assert torch.equal(found, tensor)


@pytest.mark.skipif(sys.platform != "linux", reason="no other system tells the pages of files apart")
def test_a_process_holds_the_pages_of_the_experts_that_it_may_and_few_others(tmp_path: Path) -> None:
    experts, names, part_bytes = 64, "abcd", 1 << 18
    with packing(tmp_path / "x.packed", {}) as writer:
        for name in names:
            writer.vector(name, torch.arange(experts * part_bytes, dtype=torch.int64).to(torch.uint8))
    file = PackedFile(tmp_path / "x.packed", {})
    whole = [file.vector(name).view(experts, part_bytes) for name in names]
    before = file_bytes()
    assert before is not None
    pages, chosen = ExpertPages(file, experts // 2 * len(names) * part_bytes), random.Random(5)
    for _ in range(100):
        used = sorted(chosen.sample(range(experts), 2))
        pages.use(0, used, lambda expert: tuple(part[expert] for part in whole))
        for expert in used:
            for part in whole:
                assert part[expert].view(-1, 256)[:, 9].eq(9).all()
        # of the two that were read last, each part may have come with what is around it
        others = len(used) * len(names) * (2 * FOLIO - part_bytes)
        now = file_bytes()
        assert now is not None
        assert now - before < pages.limit + others / 2
