"""What the system tells of memory: psutil's figures, and the control groups that psutil does not see."""

from __future__ import annotations

import mmap
import sys
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

from specdec.memory import system
from specdec.memory.plan import KEPT_SHARE, conversations_of
from specdec.model.decoder import MemoryLimits
from tests.support.tiny_decoder import of

FREE = 8_000_000_000


def group(folder: Path, limit: tuple[str, str], taken: tuple[str, int], cached: tuple[str, int]) -> None:
    """Write the files of a control group."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / limit[0]).write_text(f"{limit[1]}\n")
    (folder / taken[0]).write_text(f"{taken[1]}\n")
    (folder / "memory.stat").write_text(f"anon 7\n{cached[0]} {cached[1]}\nactive_file 9\n")


def v2(folder: Path, limit: str, taken: int, cached: int) -> None:
    group(folder, ("memory.max", limit), ("memory.current", taken), ("inactive_file", cached))


def v1(folder: Path, limit: int, taken: int, cached: int) -> None:
    names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    group(folder, (names[0], str(limit)), (names[1], taken), (names[2], cached))


@pytest.fixture
def mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with FREE bytes free, and no control group with a limit yet."""
    monkeypatch.setattr(system.psutil, "virtual_memory", lambda: SimpleNamespace(available=FREE))
    monkeypatch.setattr(system, "_MOUNT", tmp_path / "cgroup")
    monkeypatch.setattr(system, "_GROUPS", tmp_path / "groups")
    return tmp_path / "cgroup"


def inside(mount: Path, lines: str) -> None:
    (mount.parent / "groups").write_text(lines)


def test_without_control_groups_psutil_decides(mount: Path) -> None:
    assert system.available_bytes() == FREE  # macOS, Windows
    inside(mount, "0::/\n")
    assert system.available_bytes() == FREE  # the root of version 2 has no limit


def test_the_narrowest_group_around_the_process_decides(mount: Path) -> None:
    inside(mount, "0::/user.slice/job\n")
    v2(mount / "user.slice" / "job", "max", 1_000_000_000, 0)
    assert system.available_bytes() == FREE
    v2(mount / "user.slice", "3000000000", 1_000_000_000, 250_000_000)
    assert system.available_bytes() == 2_250_000_000  # cached pages can be given back
    v2(mount / "user.slice" / "job", "1500000000", 1_000_000_000, 0)
    assert system.available_bytes() == 500_000_000
    v2(mount / "user.slice" / "job", "1500000000", 1_600_000_000, 0)
    assert system.available_bytes() == 0
    v2(mount.parent, "5", 0, 0)  # above the mount nothing is a group
    v2(mount / "user.slice" / "job", "1500000000", 1_000_000_000, 0)
    assert system.available_bytes() == 500_000_000


def test_version_1_and_a_container_that_sees_its_path_outside(mount: Path) -> None:
    inside(mount, "5:cpu:/x\n4:memory,hugetlb:/docker/abc\n0::/\n")
    v1(mount / "memory", 2_000_000_000, 600_000_000, 100_000_000)
    assert system.available_bytes() == 1_500_000_000
    v1(mount / "memory", 0x7FFFFFFFFFFFF000, 600_000_000, 0)  # how version 1 writes "no limit"
    assert system.available_bytes() == FREE


def test_a_process_is_as_large_as_what_it_holds() -> None:
    before = system.resident_bytes()
    # Pages of its own: what earlier tests freed may be resident still, and an allocator would hand it out again.
    private = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    block = torch.frombuffer(mmap.mmap(-1, 64 << 20, **private), dtype=torch.uint8).fill_(1)
    grown = system.resident_bytes() - before
    assert 60 << 20 < grown < 200 << 20
    if sys.platform == "linux":
        data = system.data_bytes()
        assert data is not None and data > block.nbytes
    del block
    assert system.peak_bytes() > before + (56 << 20)  # Linux counts in lots: a moment's figures are not of one moment


def test_the_peak_on_systems_without_proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("resource")
    monkeypatch.setattr(system, "_STATUS", tmp_path / "none")
    assert 50e6 < system.peak_bytes() < 1e12  # in bytes, whatever the system counts in
    monkeypatch.setattr(system.sys, "platform", "win32")
    told = SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=5, peak_wset=12345))
    monkeypatch.setattr(system.psutil, "Process", lambda: told)
    assert (system.peak_bytes(), system.resident_bytes(), system.data_bytes()) == (12345, 5, None)


def test_conversations_take_a_share_of_what_is_free_on_every_system(mount: Path) -> None:
    decoder = of("gemma3", torch.float32)
    assert conversations_of(decoder).limit == FREE // KEPT_SHARE
    decoder.room = MemoryLimits(512, 1_000_000)
    assert conversations_of(decoder).limit == 1_000_000


def test_psutil_sees_this_machine() -> None:
    assert 0 < system.available_bytes() <= psutil.virtual_memory().total
