"""Engines that compute nothing, for tests of child processes. Light, for children import it."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

from eval.bench.engines import EngineTiming


class FakeEngine:
    """Takes half a second to the first token and `each` for every other one, on paper."""

    def __init__(self, name: str, each: float = 0.1) -> None:
        self.details, self.each = f"details of {name}", each

    def run(self, ids: Sequence[int], tokens: int) -> EngineTiming:
        return EngineTiming(tokens, 0.5, self.each * (tokens - 1))


def working(each: float) -> FakeEngine:
    return FakeEngine("working", each=each)


def broken() -> FakeEngine:
    raise RuntimeError("no such architecture\nand a long story")


class Refusing(FakeEngine):
    def __init__(self) -> None:
        super().__init__("refusing")

    def run(self, ids: Sequence[int], tokens: int) -> EngineTiming:
        raise ValueError("too long")


class Dying(FakeEngine):
    def __init__(self) -> None:
        super().__init__("dying")

    def run(self, ids: Sequence[int], tokens: int) -> EngineTiming:
        os._exit(7)


class Stubborn(FakeEngine):
    def __init__(self) -> None:
        super().__init__("stubborn")

    def run(self, ids: Sequence[int], tokens: int) -> EngineTiming:
        time.sleep(600)
        raise AssertionError("nobody waits that long")
