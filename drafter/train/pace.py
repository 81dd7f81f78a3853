"""How far training is, and how large its next step may be for the time that is left."""

from __future__ import annotations

import time
from typing import NamedTuple

from drafter.data.patience import Now
from drafter.train.schedule import AIMED_STEPS, LEAST_STEPS, OVERRUN, SMALLEST_BATCH, Schedule


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

    The first step is a small one; each later one is twice as large as long as many of its kind would fit, and half as
    large when too few would. `judging`: seconds of the last evaluation; `step`: of the last step.
    """

    def __init__(self, schedule: Schedule, clock: Clock) -> None:
        self._schedule, self._clock = schedule, clock
        # Until one is over: both halves of it.
        self.judging = 2 * (schedule.judging().until - schedule.now()) if schedule.limited else 0.0
        self.step = 0.0
        self._batch = SMALLEST_BATCH
        self._stepping = 0.0  # seconds of all steps so far

    def stepped(self, seconds: float) -> None:
        """Take note of a step, which took so many seconds."""
        self.step = seconds
        self._stepping += seconds
        span = self._schedule.left - self.judging + self._stepping
        if span >= 2 * AIMED_STEPS * seconds:
            self._batch *= 2
        elif span < AIMED_STEPS * seconds:
            self._batch = max(SMALLEST_BATCH, self._batch // 2)

    def next(self, number: int, most: int) -> Step:
        """Return step `number` (from 0), of at most `most` tokens."""
        left = self._schedule.left - self.judging
        passed = self._clock.seconds
        done = 1.0 if left < self.step / 2 else passed / max(1e-9, passed + left)
        if number == 0 or (number < LEAST_STEPS and left - self.step > -OVERRUN * self._schedule.whole):
            done = min(done, 0.5)
        self._batch = min(self._batch, max(most, SMALLEST_BATCH))
        return Step(done, min(most, self._batch))
