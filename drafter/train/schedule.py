"""How long each part of a training run may take, so that the whole run ends when it was asked to.

What: `TimeBudget`, the time that was asked for; `Schedule`, which turns the budget into times on a clock (a `Patience`
for each part of the work); `Pace`, how far training is and how large its next step may be for the time that is left.
The only measurement is the backbone's speed, before the first prompt: a slow model answers fewer prompts at a time, so
that no answer is under way for long, and a budget that is too small for the model is refused at once.

A budget covers all sittings of a run that was stopped: of the earlier sittings the time counts that left something
behind.
"""

from __future__ import annotations

import math
import time
from typing import NamedTuple

import torch

from drafter.data.patience import Now, Patience
from drafter.settings import TimeBudget
from specdec.model.decoder import Decoder

TEXT_SECONDS = 25.0  # an answer takes about as long, or fewer are written side by side
LONGEST_TEXT = 90.0  # seconds after which an answer ends where it is, when time is limited
LEAST_ROWS = 8000  # of the backbone, which a run takes that is of any use: answers, evaluations, a few steps
LEAST_SECONDS = 5.0  # besides: files, the head's beginning
LEAST_STEPS = 3  # of training, unless they take OVERRUN of the minutes more; one step in any case
OVERRUN = 0.1
SMALLEST_BATCH = 256  # tokens of a step: of the first, and where larger ones leave no time for AIMED_STEPS
AIMED_STEPS = 10
FITTING = 0.06  # at most, of the minutes, for where a head begins
JUDGING = 0.04  # at most, of the minutes, for each half of an evaluation
LONGEST_PART = 100.0  # seconds at most of each: a kill meanwhile loses no more
_PROBED = 8  # texts side by side, to measure speed
GRACE = 0.05  # of the minutes, for an evaluation that would else have no time at all


class Schedule:
    """Keep the times of a run of `budget` whose process began at `began` on the clock `now`, with `used` seconds of
    earlier sittings. Without minutes no time is ever up."""

    def __init__(self, budget: TimeBudget, used: float, began: float, now: Now) -> None:
        self.budget, self.now, self.began = budget, now, began
        self.whole = math.inf if budget.minutes is None else 60 * budget.minutes  # seconds
        self.deadline = began + self.whole - used

    @property
    def limited(self) -> bool:
        """Tell whether the budget has minutes; with steps alone, time never decides anything."""
        return math.isfinite(self.deadline)

    @property
    def left(self) -> float:
        """Return the seconds to the end; below 0 when the end is past."""
        return self.deadline - self.now()

    def check(self, rows_per_second: float) -> None:
        """Raise a ValueError when the time that is left is too short for a backbone of that speed to be of use."""
        needed = LEAST_SECONDS + LEAST_ROWS / rows_per_second
        if self.left >= needed:
            return
        loading = self.now() - self.began
        enough = 1.2 * (loading + needed) / 60
        raise ValueError(
            f"{self.whole / 60:.3g} minutes are too few: loading took {loading:.0f} s, and at {rows_per_second:.3g} "
            f"tokens a second, which is what this machine does now, answers, training and evaluations need some "
            f"{needed:.0f} s more; give at least {math.ceil(2 * enough) / 2:g} minutes (a better head takes many more)"
        )

    def collecting(self, seconds: float) -> Patience:
        """Return the patience for collecting that took `seconds` already: its share of all time that is not lost to
        loading."""
        if not self.limited:
            return Patience(now=self.now)
        share = self.budget.collecting * (max(0.0, self.left) + seconds)
        return Patience(self.now() + max(0.0, share - seconds), LONGEST_TEXT, self.now)

    def fitting(self) -> Patience:
        """Return the patience for fitting a new head's input projection: at most `FITTING` of the minutes."""
        return self._part(FITTING)

    def judging(self) -> Patience:
        """Return the patience for one evaluation: its share of the time, and some grace where the end is near."""
        part = self._part(JUDGING)
        end = max(self.deadline, self.now() + GRACE * self.whole)
        return part if part.until <= end else Patience(end, now=self.now)

    def _part(self, share: float) -> Patience:
        if not self.limited:
            return Patience(now=self.now)
        return Patience(self.now() + min(LONGEST_PART, share * self.whole), now=self.now)


class Clock:
    """Count the seconds of training, those of earlier runs included."""

    def __init__(self, before: float, now: Now = time.monotonic) -> None:
        """Begin now. `before`: seconds of training in earlier sittings; `now`: the clock, in seconds."""
        self._now, self._began = now, now() - before

    @property
    def seconds(self) -> float:
        """Return the seconds of training so far, earlier sittings included."""
        return self._now() - self._began


class Step(NamedTuple):
    """Describe a step to come: the share of training `done` before the step (1: there is no such step), and its
    tokens."""

    done: float
    tokens: int


class Pace:
    """Choose steps that fit into the time, and leave enough of the time for the last evaluation.

    The first step is small. Each later step is twice as large as long as many of its kind would fit, and half as large
    when too few would. `judging`: seconds of the last evaluation; `step`: of the last step.
    """

    def __init__(self, schedule: Schedule, clock: Clock) -> None:
        self._schedule, self._clock = schedule, clock
        # Until one is over: both halves of it.
        self.judging = 2 * (schedule.judging().until - schedule.now()) if schedule.limited else 0.0
        self.step = 0.0
        self._batch = SMALLEST_BATCH
        self._stepping = 0.0  # seconds of all steps so far

    def stepped(self, seconds: float) -> None:
        """Note a step that took so many seconds."""
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


@torch.inference_mode()
def rows_per_second(backbone: Decoder, now: Now, seconds: float = 0.2) -> float:
    """Measure how many tokens a second the backbone answers: passes over a row of each of 8 texts, logits included."""
    caches = [backbone.new_cache() for _ in range(_PROBED)]
    ids = torch.arange(_PROBED, dtype=torch.int64, device=backbone.device) % backbone.spec.vocab_size

    def one() -> None:
        states = backbone.forward_many(torch.split(ids, 1), caches)
        backbone.logits(states.last).argmax(dim=-1).tolist()  # waits for a GPU

    one()  # the first pass of all warms up
    began, passes = now(), 0
    while passes == 0 or now() - began < seconds:
        one()
        passes += 1
    return passes * _PROBED / max(1e-9, now() - began)


def side_by_side(rows_per_second: float, max_new_tokens: int, most: int) -> int:
    """Return how many answers to write at a time, up to `most`, for one answer to take about TEXT_SECONDS at the
    most."""
    return max(1, min(most, int(TEXT_SECONDS * rows_per_second / max_new_tokens)))
