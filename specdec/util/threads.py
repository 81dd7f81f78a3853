"""Threads: the number that torch's own ops take, and the turn to compute.

The kernels have threads of their own (`kernels/csrc/threads.h`), one team for the whole process.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from threadpoolctl import ThreadpoolController


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Run torch ops on the caller's thread alone while the block runs: for small ops.

    Work of a few microseconds costs more when it is shared, torch's other threads go on polling for milliseconds on the
    cores that the next pass needs, and with another process on one of two cores every op waits a time slice.
    """
    threads, outside = torch.get_num_threads(), torch_threads()
    try:
        _narrowed.outside = outside
        _set_own(1)
        yield
    finally:
        _set_own(threads)
        _narrowed.outside = None if threads == outside else outside


_narrowed = threading.local()  # `outside`: how many threads the ops of this thread take when it is not narrowed


def torch_threads() -> int:
    """Return how many threads torch's ops take in this thread, outside of `one_torch_thread`."""
    outside: int | None = getattr(_narrowed, "outside", None)
    return torch.get_num_threads() if outside is None else outside


def is_narrowed() -> bool:
    """Return whether this thread is inside of `one_torch_thread`: times taken there say nothing of a pass."""
    return getattr(_narrowed, "outside", None) is not None


def keep_to_one_thread() -> None:
    """Tell torch that the ops of the calling thread take this thread alone, for as long as it lives: for the threads
    of a pool, each of which has work of its own. Threads that begin later take what they would have taken."""
    torch.get_num_threads()  # a thread's first question sets its number, to that of the process
    _set_own(1)


def _set_own(threads: int) -> None:
    """Tell OpenMP how many threads the ops of the calling thread may take.

    `torch.set_num_threads` would tell the threads that begin meanwhile too, and these would keep to it for ever.
    """
    libraries = _openmp()
    for library in libraries:
        library.set_num_threads(threads)
    if not libraries:  # a build of torch without OpenMP
        torch.set_num_threads(threads)


@cache
def _openmp() -> list[Any]:
    return list(ThreadpoolController().select(user_api="openmp").lib_controllers)


T = TypeVar("T")


class LastOf(Generic[T]):
    """Hold the newest value of each thread; for a thread that has none, the newest of all threads."""

    def __init__(self, first: T) -> None:
        """Begin with `first`, which stands for all threads until one sets a value."""
        self._newest, self._own = first, threading.local()

    def set(self, value: T) -> None:
        """Make `value` the newest of this thread, and of all."""
        self._newest = self._own.value = value

    def get(self) -> T:
        """Return this thread's newest value, or else the newest of all."""
        found: T = getattr(self._own, "value", self._newest)
        return found


class Turns:
    """Give the right to compute to one caller at a time in the order in which callers asked.

    `threading.Lock` is not fair: a thread that decodes would take it again and again, and the others would wait for the
    end of its text. A caller that has the turn may ask for it once more: a drafter may be a model that generates.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[tuple[int, threading.Lock]] = deque()  # identities of threads, and their locks
        self._owner: int | None = None  # identity of the thread whose turn it is

    def __call__(self) -> AbstractContextManager[None]:
        """Wait for the turn, and pass it on at the end of the block."""
        return _Turn(self)

    def owned(self, thread: int) -> bool:
        """Return whether it is the turn of `thread`."""
        return self._owner == thread

    def take(self, thread: int) -> None:
        """Wait until it is the turn of `thread`, the caller."""
        gate = threading.Lock()
        gate.acquire()
        with self._mutex:
            if self._owner is None:
                self._owner = thread
                return
            self._waiting.append((thread, gate))
        gate.acquire()

    def leave(self, thread: int) -> None:
        """Give the turn of `thread` to the next thread that waits; where `thread` still waits itself, end its wait."""
        with self._mutex:
            if self._owner != thread:
                self._waiting = deque(each for each in self._waiting if each[0] != thread)
            elif self._waiting:
                self._owner, gate = self._waiting.popleft()
                gate.release()
            else:
                self._owner = None


class _Turn:
    """Hold the turn of a `with` block. A class, because Ctrl-C can come between a generator's first half and its
    block."""

    def __init__(self, turns: Turns) -> None:
        self._turns, self._taken = turns, False

    def __enter__(self) -> None:
        me = threading.get_ident()
        if self._turns.owned(me):
            return
        try:
            self._taken = True
            self._turns.take(me)
        except BaseException:  # Ctrl-C while waiting
            self._turns.leave(me)
            raise

    def __exit__(self, *_: object) -> None:
        if self._taken:
            self._turns.leave(threading.get_ident())


_turns = Turns()
if hasattr(os, "register_at_fork"):  # a child has none of its parent's threads, to which the turn may belong
    os.register_at_fork(after_in_child=_turns.__init__)  # type: ignore[misc]


def turn_to_compute() -> AbstractContextManager[None]:
    """Take the turn to compute while the block runs: two passes at once take longer than one after the other.

    Nothing waits where a pass takes one thread: such passes run side by side. Drafters are the only code of a user that
    runs inside: they may generate in the thread that asks them, and not in another one.
    """
    return nullcontext() if torch_threads() == 1 else _turns()
