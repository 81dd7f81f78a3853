"""When work on a set or a head has to end, and how often its files are written.

`Patience` is the end of one part of a run, for whoever works on it; `drafter.train.schedule` makes them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

Now = Callable[[], float]


@dataclass(frozen=True)
class Intervals:
    """Seconds between two writes of what a kill would lose: a set's first shard, its later ones, training's state."""

    first_shard: float = 20.0
    shard: float = 30.0  # besides, a text is lost that is under way: up to LONGEST_TEXT
    state: float = 90.0


@dataclass(frozen=True)
class Patience:
    """When work ends where it is: at `until` on the clock `now`, and each text after `each` seconds of its own."""

    until: float = math.inf
    each: float = math.inf
    now: Now = time.monotonic

    def over(self, began: float | None = None) -> bool:
        """Tell whether the time is up; for a text that `began` then, its own time too."""
        if math.isinf(self.until) and math.isinf(self.each):
            return False
        now = self.now()
        return now >= self.until or (began is not None and now >= began + self.each)


PATIENT = Patience()  # for ever


USUAL = Intervals()
