"""Threads: how many torch's own ops take, and whose turn it is to compute.

The kernels have threads of their own (`kernels/threads.h`), one team for the whole process.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Generic, TypeVar

import torch
from threadpoolctl import ThreadpoolController


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Run small torch ops on the caller's thread alone.

    Work of a few microseconds costs more when it is shared, torch's other threads go on polling for milliseconds on
    the cores that the next pass needs, and with another process on one of two cores every op waits a time slice.
    """
    threads = torch.get_num_threads()
    _set_own(1)
    try:
        yield
    finally:
        _set_own(threads)


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
    """The newest of some values: each thread's own, and to a thread that has none the newest of all."""

    def __init__(self, first: T) -> None:
        self._newest, self._own = first, threading.local()

    def set(self, value: T) -> None:
        """Make `value` the newest of this thread, and of all."""
        self._newest = self._own.value = value

    def get(self) -> T:
        """Return this thread's newest value, or else the newest of all."""
        found: T = getattr(self._own, "value", self._newest)
        return found


class Turns:
    """The right to compute, given to one caller at a time in the order in which callers asked.

    `threading.Lock` is not fair: a thread that decodes would take it again and again, and the others would wait for the
    end of its text. A caller who has the turn may ask for it once more: a drafter may be a model that generates.
    """

    def __init__(self) -> None:
        self._mutex = threading.Lock()
        self._waiting: deque[threading.Lock] = deque()
        self._owner: int | None = None  # identity of the thread whose turn it is

    @contextmanager
    def __call__(self) -> Iterator[None]:
        """Wait for the turn, and pass it on at the end of the block."""
        me = threading.get_ident()
        if self._owner == me:
            yield
            return
        with self._mutex:
            gate = None
            if self._owner is None:
                self._owner = me
            else:
                gate = threading.Lock()
                gate.acquire()
                self._waiting.append(gate)
        if gate is not None:
            self._wait(gate)
            self._owner = me
        try:
            yield
        finally:
            self._pass_on()

    def _wait(self, gate: threading.Lock) -> None:
        try:
            gate.acquire()
        except BaseException:  # Ctrl-C while waiting
            with self._mutex:
                waits = gate in self._waiting
                if waits:
                    self._waiting.remove(gate)
            if not waits:
                self._pass_on()
            raise

    def _pass_on(self) -> None:
        with self._mutex:
            if self._waiting:
                self._owner = -1  # the next one's, who says so when it wakes
                self._waiting.popleft().release()
            else:
                self._owner = None


_turns = Turns()


@contextmanager
def turn_to_compute() -> Iterator[None]:
    """Let one pass at a time have the cores: two at once take longer than one after the other.

    Nothing waits where a pass takes one thread: such passes run side by side. No callback of a user's runs inside.
    """
    if torch.get_num_threads() == 1:
        yield
        return
    with _turns():
        yield
