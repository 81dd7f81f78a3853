"""The speed at which this machine reads memory: the ceiling for every other figure of `eval.kernels`.

What: bytes a second of one sequential read of a buffer much larger than the caches, with torch's number of threads.
How: several readers are tried (torch reductions that do little per byte, and numpy's over pieces in a pool of as many
threads) and the best pass of all counts, for a ceiling is what is possible. All readers are tried at every reading: the
fastest one changes with the other work of the machine (seen on two threads of a Zen 4 EPYC: 22 to 45 GB/s, numpy's
ahead while another process held a core, torch's when none did). Left out: writes, and random access.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from eval.kernels.timing import Effort, alternate

BUFFER = 512 << 20  # bytes, where the cache is not larger still
PASSES = 3  # of each reader, in turn
PIECES = 8  # a thread: a thread that is held up leaves the rest to the others
_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")


class Bandwidth:
    """Measure the read bandwidth with `threads` threads, as often as asked; `readings` keeps the results, in
    bytes/s."""

    def __init__(self, threads: int, size: int | None = None) -> None:
        """Make the buffer and measure once. `size`: bytes of the buffer, by default 512 MiB or 8 times the last-level
        cache."""
        size = max(BUFFER, 8 * last_level_cache()) if size is None else size
        self.readings: list[float] = []
        self.reader = ""  # of the best reading
        self._buffer = torch.ones(size // 8, dtype=torch.int64)  # ones: pages that were written, so really there
        self._pool = ThreadPoolExecutor(threads)
        self._pieces = np.array_split(self._buffer.numpy(), threads * PIECES)
        self.measure()

    def measure(self) -> float:
        """Measure the bytes a second now."""
        timings = alternate(self._readers(), Effort(least=PASSES, most=PASSES))
        fastest = min(timings, key=lambda name: timings[name].fastest)
        speed = self._buffer.nbytes / timings[fastest].fastest
        if speed > max(self.readings, default=0.0):
            self.reader = fastest
        self.readings.append(speed)
        return speed

    def _readers(self) -> dict[str, Callable[[], object]]:
        floats, pool = self._buffer.view(torch.float32), self._pool
        return {
            "torch sum": lambda: self._buffer.sum(),
            "torch max": lambda: floats.max(),
            "torch norm": lambda: torch.linalg.vector_norm(floats),
            "numpy or": lambda: list(pool.map(np.bitwise_or.reduce, self._pieces)),
            "numpy max": lambda: list(pool.map(np.max, self._pieces)),
        }


def last_level_cache() -> int:
    """Return the bytes of the largest cache that Linux lists for the first processor; 0 where the system does not
    say."""
    sizes = [cache_bytes(file.read_text()) for file in _CACHES.glob("index*/size")]
    return max(sizes, default=0)


def cache_bytes(text: str) -> int:
    """Return the bytes of a size as /sys writes it: "32768K", "32M", or plain bytes."""
    text = text.strip()
    units = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)
