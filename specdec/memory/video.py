"""The memory of a GPU, as its driver tells it.

What: `video_memory` asks the driver, `CUDA_CONTEXT` is what a process takes on a GPU before a model is there. Left out:
the memory that other processes will take later, and a Mac's GPU, which shares the machine's memory.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Bytes of CUDA's context, with torch's and Triton's compiled kernels. Assumed, and not measured:
# `python -m eval.gpu` counts it with the rest of a model's memory.
CUDA_CONTEXT = 500_000_000


class VideoMemory(NamedTuple):
    """Hold the bytes of a GPU that are free now, and all that it has."""

    free: int
    total: int


def video_memory(device: torch.device | str) -> VideoMemory | None:
    """Return the memory of the CUDA device `device`; None where there is no such device."""
    device = torch.device(device)
    if device.type != "cuda" or not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count():
        return None
    return VideoMemory(*map(int, torch.cuda.mem_get_info(device)))
