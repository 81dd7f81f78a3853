"""Time on a GPU: launches by the device's own clock, whole calls by the host's, after everything has run.

What: `launch_seconds` captures many launches in one graph, so that the host's share is not in the figure, and gives
each other memory than the launch before, so that nothing comes out of the cache. `call_seconds` is what a caller waits.
`read_bandwidth` reads the device's memory, for the ceiling of every other figure.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch

REPLAYS = 7
BUFFER = 1 << 30  # bytes, many times the cache of any card


def launch_seconds(launches: Sequence[Callable[[], object]], replays: int = REPLAYS) -> float:
    """Return the seconds that one of `launches` takes on the device: the median of `replays` runs of them all, in one
    graph. Each must have run before."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [launch() for launch in launches]
    graph.replay()
    taken: list[float] = []
    for _ in range(replays):
        began, ended = _event(), _event()
        began.record()
        graph.replay()
        ended.record()
        ended.synchronize()
        taken.append(began.elapsed_time(ended) / 1e3)
    del kept
    return median(taken) / len(launches)


def _event() -> Any:
    make: Any = torch.cuda.Event
    return make(enable_timing=True)


def call_seconds(call: Callable[[], object], times: int, warm: int = 3) -> float:
    """Return the median seconds of `call` with all that it launches, after `warm` calls that are not counted: what is
    captured at its second call is replayed by then."""
    taken = []
    for i in range(warm + times):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        if i >= warm:
            taken.append(time.perf_counter() - began)
    return median(taken)


def read_bandwidth() -> float:
    """Return the bytes a second at which the device reads its memory, at best: a sum of a large buffer."""
    buffer = torch.ones(BUFFER // 4, dtype=torch.float32, device="cuda")
    buffer.sum()
    return buffer.nbytes / launch_seconds([buffer.sum] * 3)


def bytes_in_use() -> int | None:
    """Return the bytes of the first GPU's memory that are in use, whoever has them, as its driver counts; None where
    `nvidia-smi` does not say. To ask CUDA would make a context, which takes some of them."""
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "").partition(",")[0] or "0"
    words = ["nvidia-smi", f"--id={first}", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=20, check=True)
        return int(done.stdout) << 20
    except (OSError, subprocess.SubprocessError, ValueError):  # a slice of a GPU has no figure of its own
        return None
