"""From the engine's thread to the event loop: what waits is fetched together, at most so many times a second.

Why: to wake the event loop and to write to a socket costs a third of a millisecond beside a pass that has every core,
4% of the time of a small model. A model of ordinary size makes no more pieces a second than are fetched here.
"""

from __future__ import annotations

import asyncio
import threading
from typing import Generic, TypeVar

PAUSE = 1 / 30  # seconds between two fetches

T = TypeVar("T")


class Mailbox(Generic[T]):
    """Hold items on their way. Made and emptied in an event loop, and filled from any thread."""

    def __init__(self, pause: float = PAUSE) -> None:
        """`pause`: seconds that a fetch comes after the one before at the earliest, unless there is an urgent item."""
        self._pause, self._loop, self._wake = pause, asyncio.get_running_loop(), asyncio.Event()
        self._lock = threading.Lock()  # guards the next three
        self._items: list[T] = []
        self._urgent = False
        self._idle = False  # `fetch` waits for the next item, whatever it is
        self._next = 0.0  # when the next fetch may be, on the loop's clock

    def put(self, item: T, urgent: bool = False) -> None:
        """Add an item. Raises RuntimeError when the loop has ended."""
        with self._lock:
            wakes = self._idle or (urgent and not self._urgent)
            self._items.append(item)
            self._urgent |= urgent
            self._idle = False
        if wakes:
            self._loop.call_soon_threadsafe(self._wake.set)

    async def fetch(self) -> list[T]:
        """Return all items that wait, the oldest first, once there is one. One caller at a time."""
        while True:
            with self._lock:
                rest = 0.0 if self._urgent else self._next - self._loop.time()
                if self._items and rest <= 0:
                    items, self._items, self._urgent = self._items, [], False
                    self._next = self._loop.time() + self._pause
                    return items
                self._wake.clear()
                self._idle = rest <= 0
            timer = self._loop.call_later(rest, self._wake.set) if rest > 0 else None
            try:
                await self._wake.wait()
            finally:
                if timer is not None:
                    timer.cancel()
