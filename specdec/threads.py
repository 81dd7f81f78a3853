"""How many threads torch's own ops take; the kernels have threads of their own (`kernels/threads.h`)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Small torch ops on the caller's thread alone.

    Work of a few microseconds costs more when it is shared, torch's other threads go on polling for milliseconds on
    the cores that the next pass needs, and with another process on one of two cores every op waits a time slice.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
