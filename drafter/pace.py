"""How far training is, and how large its next step may be for the time that is left."""

from __future__ import annotations

import time
from typing import NamedTuple

from drafter.schedule import AIMED_STEPS, LEAST_STEPS, SMALLEST_BATCH, Now, Schedule


class Clock:
    """Seconds of training, those of earlier runs included."""

    def __init__(self, before: float, now: Now = time.monotonic) -> None:
        self._now, self._began = now, now() - before

    @property
    def seconds(self) -> float:
        return self._now() - self._began


class Step(NamedTuple):
    """A step to come: how much of training is done before it (at 1 there is none), and its tokens."""

    done: float
    tokens: int


class Pace:
    """Steps that fit into the time, and leave enough of it for the last evaluation.

    `judging`: seconds of the last evaluation; `step`: of the last step.
    """

    def __init__(self, schedule: Schedule, clock: Clock) -> None:
        self._schedule, self._clock = schedule, clock
        self.judging = 2 * (schedule.judging().until - schedule.now()) if schedule.limited else 0.0  # until one is over
        self.step = 0.0
        self._tokens = self._seconds = 0.0  # of the steps so far
        self._here = 0  # steps of this sitting

    def stepped(self, tokens: int, seconds: float) -> None:
        self.step = seconds
        self._tokens, self._seconds, self._here = self._tokens + tokens, self._seconds + seconds, self._here + 1

    def next(self, number: int, most: int) -> Step:
        """Step `number` (from 0), of at most `most` tokens."""
        left = self._schedule.left - self.judging
        passed = self._clock.seconds
        done = 1.0 if left < self.step / 2 else passed / max(1e-9, passed + left)
        if number < LEAST_STEPS:
            done = min(done, 0.5)
        if not self._here:
            return Step(done, min(most, SMALLEST_BATCH))  # how long a token takes is not known yet
        span = left + self._seconds
        fitting = span * self._tokens / max(1e-9, self._seconds) / AIMED_STEPS
        return Step(done, min(most, max(SMALLEST_BATCH, int(fitting))))
