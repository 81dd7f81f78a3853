"""Engines that compute nothing: for tests of turns, figures and child processes. Light, for children import it."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence

from eval.engines import Timing


class FakeEngine:
    """Takes `first` seconds to the first token and `each` for every other one, on paper; `runs` notes the requests."""

    def __init__(
        self, name: str, first: float = 0.5, each: float = 0.1, process: int = 0, log: list[str] | None = None
    ) -> None:
        self.name, self.details, self.process = name, f"details of {name}", process
        self.first, self.each = first, each
        self.log: list[str] = [] if log is None else log
        self.runs: list[tuple[tuple[int, ...], int]] = []
        self.before: Callable[[], None] = lambda: None
        self.cpu = 0.0
        self.closed = False

    def run(self, ids: Sequence[int], tokens: int) -> Timing:
        self.before()
        self.log.append(self.name)
        self.runs.append((tuple(ids), tokens))
        return Timing(tokens, self.first, self.each * (tokens - 1))

    def cpu_seconds(self) -> float:
        return self.cpu

    def close(self) -> None:
        self.closed = True


def working(each: float) -> FakeEngine:
    return FakeEngine("working", each=each)


def broken() -> FakeEngine:
    raise RuntimeError("no such architecture\nand a long story")


class Refusing(FakeEngine):
    def __init__(self) -> None:
        super().__init__("refusing")

    def run(self, ids: Sequence[int], tokens: int) -> Timing:
        raise ValueError("too long")


class Dying(FakeEngine):
    def __init__(self) -> None:
        super().__init__("dying")

    def run(self, ids: Sequence[int], tokens: int) -> Timing:
        os._exit(7)


class Stubborn(FakeEngine):
    def __init__(self) -> None:
        super().__init__("stubborn")

    def run(self, ids: Sequence[int], tokens: int) -> Timing:
        time.sleep(600)
        raise AssertionError("nobody waits that long")
