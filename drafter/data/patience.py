"""When work on a training set or a head has to end, and how often its files are written.

A `Patience` is the end of one part of a run; `drafter.train.schedule` makes the `Patience` of each part.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

Now = Callable[[], float]


@dataclass(frozen=True)
class Intervals:
    """Keep the seconds between two writes of what a kill would lose: a set's first shard, its later shards, training's
    state."""

    first_shard: float = 20.0
    shard: float = 30.0  # besides, a text is lost that is under way: up to LONGEST_TEXT
    state: float = 90.0


@dataclass(frozen=True)
class Patience:
    """Say when work ends where it is: at `until` on the clock `now`, and each text after `each` seconds of its own."""

    until: float = math.inf
    each: float = math.inf
    now: Now = time.monotonic

    def over(self, began: float | None = None) -> bool:
        """Tell whether the time is up; for a text that started at `began`, also whether the text's own time is up."""
        if math.isinf(self.until) and math.isinf(self.each):
            return False
        now = self.now()
        return now >= self.until or (began is not None and now >= began + self.each)


PATIENT = Patience()  # for ever


USUAL = Intervals()
