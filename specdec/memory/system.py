"""The memory of this machine and of this process, as the system tells it.

psutil asks the system, on Linux, macOS and Windows alike. Added here: the limits of Linux's control groups (containers,
systemd), which psutil does not read, and the peak on systems where psutil does not tell it. Left out: swap.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

_GROUPS, _MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
_STATUS = Path("/proc/self/status")
# Version 2 of control groups and version 1: the limit, what is taken, and of it the pages that can be given back.
_V2 = ("memory.max", "memory.current", "inactive_file")
_V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def resident_bytes() -> int:
    """Return the resident bytes of this process now."""
    return int(psutil.Process().memory_info().rss)


def file_bytes() -> int | None:
    """Return the resident bytes that are pages of files, which the system may take back at any time, and shared memory,
    where the system tells (Linux); None elsewhere."""
    found = getattr(psutil.Process().memory_info(), "shared", None)
    return None if found is None else int(found)


def data_bytes() -> int | None:
    """Return the private memory that this process has asked for, used or not, where Linux tells; None elsewhere."""
    found = getattr(psutil.Process().memory_info(), "data", None)
    return None if found is None else int(found)


def peak_bytes() -> int:
    """Return the most resident bytes of this process so far."""
    if sys.platform == "win32":
        return int(psutil.Process().memory_info().peak_wset)
    if _STATUS.is_file() and (found := re.search(r"^VmHWM:\s+(\d+) kB$", _STATUS.read_text(), re.MULTILINE)):
        return int(found[1]) * 1024
    import resource  # on Linux it counts what ran in this process before, too

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, others KiB


def available_bytes() -> int:
    """Return the bytes that this process can take more without swapping, and without its control groups' limits."""
    return max(0, min([int(psutil.virtual_memory().available), *_left_in_groups()]))


def _left_in_groups() -> Iterator[int]:
    """Yield the bytes that each control group around this process leaves, where it has a limit (Linux)."""
    if not _GROUPS.is_file():
        return
    for line in _GROUPS.read_text().splitlines():
        _, controllers, inside = line.split(":", 2)  # hierarchy, controllers (none: version 2), path
        if not controllers:
            mount, names = _MOUNT, _V2
        elif "memory" in controllers.split(","):
            mount, names = _MOUNT / "memory", _V1
        else:
            continue
        group = mount / inside.lstrip("/")
        # A container may see the path that its group has outside, and its own group's files at the mount.
        for folder in (group, *group.parents):
            if folder.is_relative_to(mount):
                yield from _left_in(folder, *names)


def _left_in(group: Path, limit: str, taken: str, cached: str) -> Iterator[int]:
    try:
        most = (group / limit).read_text().strip()
        if most == "max":
            return
        stat = re.search(rf"^{cached} (\d+)$", (group / "memory.stat").read_text(), re.MULTILINE)
        yield int(most) - int((group / taken).read_text()) + (int(stat[1]) if stat else 0)
    except OSError:  # no such group here, or not ours to read
        return
