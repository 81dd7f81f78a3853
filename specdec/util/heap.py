"""Give freed memory back to the system, where the allocator would have kept it for later."""

from __future__ import annotations

import ctypes
import sys


def trim_heap() -> None:
    """Return the free pages of malloc's heap to the system.

    Caches grow through many sizes, and their freed memory fits no later one: after two hundred conversations glibc held
    a twentieth more than a budget allowed. Nothing happens where libc has no such call: other allocators return pages
    by themselves.
    """
    if sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # musl has none
        if trim is not None:
            trim(0)
