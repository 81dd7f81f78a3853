"""The time of calls on a machine that is never quiet: alternated repetitions, and medians.

What: `alternate` runs several calls round robin, so that a slow second falls on all calls and not on one;
`KernelTiming` keeps every repetition; `Neighbours` tells how busy other programs kept the machine, without which no
figure of a shared machine can be judged. Why medians: other processes only ever add time, and now and then. Left out:
the clock's own cost (some 50 ns a call), for no figure here is small enough to show it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeVar

Key = TypeVar("Key")


@dataclass(frozen=True)
class KernelTiming:
    """Keep the repetitions of one call, in seconds, in the order in which they ran; at least one."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Return the seconds of the median repetition."""
        return median(self.seconds)

    @property
    def fastest(self) -> float:
        """Return the seconds of the fastest repetition."""
        return min(self.seconds)


@dataclass(frozen=True)
class Effort:
    """Say how often to repeat each call: at least `least` times, then until `seconds` are spent on it, up to `most`."""

    least: int = 5
    most: int = 60
    seconds: float = 0.15

    def enough(self, taken: list[float]) -> bool:
        """Tell whether a call whose repetitions took the seconds `taken` needs no more of them."""
        return len(taken) >= self.least and (len(taken) >= self.most or sum(taken) >= self.seconds)


def alternate(
    calls: Mapping[Key, Callable[[], object]],
    effort: Effort,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Key, KernelTiming]:
    """Time every call of `calls`, in turn, until `effort` says that it is enough; the first run of each call is
    discarded.

    Every other round goes backwards: a call that always came after the longest one would find its caches emptied. A
    call that needs no more repetitions leaves, so that a slow call does not decide how often the others run. Give calls
    of quite another size a rotation of their own.
    """
    for call in calls.values():
        call()
    taken: dict[Key, list[float]] = {key: [] for key in calls}
    rounds = 0
    while waiting := [key for key in calls if not effort.enough(taken[key])]:
        waiting = waiting[::-1] if rounds % 2 else waiting
        rounds += 1
        for key in waiting:
            began = clock()
            calls[key]()
            taken[key].append(clock() - began)
    return {key: KernelTiming(tuple(seconds)) for key, seconds in taken.items()}


class Neighbours:
    """Count the processors that other programs have used on average since this object was made."""

    def __init__(self, stat: Path = Path("/proc/stat")) -> None:
        """Begin to count. `stat`: where Linux tells the time of all processors."""
        self._stat = stat
        self._began = self._now()

    @property
    def cores(self) -> float | None:
        """Return the processors that others have used, None where the system does not tell (Linux does)."""
        (wall, own, busy), (wall_0, own_0, busy_0) = self._now(), self._began
        if busy is None or busy_0 is None or wall <= wall_0:
            return None
        return max(0.0, (busy - busy_0) - (own - own_0)) / (wall - wall_0)

    def _now(self) -> tuple[float, float, float | None]:
        """Return the seconds of the clock, of this process's processor time, and of all processors (None: not
        known)."""
        busy = busy_seconds(self._stat.read_text(), os.sysconf("SC_CLK_TCK")) if self._stat.is_file() else None
        return time.perf_counter(), time.process_time(), busy


def busy_seconds(stat: str, ticks: int) -> float:
    """Return the seconds that all processors together were not idle, from the first line of /proc/stat.

    The fields of this line are user, nice, system, idle, iowait, irq, softirq and steal, in `ticks` a second (proc(5));
    the fields behind them (guests) are counted in user already.
    """
    times = [int(field) for field in stat.splitlines()[0].split()[1:9]]
    return (sum(times) - sum(times[3:5])) / ticks
