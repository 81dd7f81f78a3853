"""The outcomes of one source's drafts: acceptance by position, and when a position is due to be tried again."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from copy import copy
from itertools import accumulate
from math import exp, log
from operator import mul
from typing import Any

PRIOR = 0.65  # a_1 before anything was seen
FORCED = "grammar"  # the source of tokens that a constraint leaves no choice about, in statistics and in records
CERTAIN = 0.99  # its a_1: the model may write the same characters in other tokens, and hardly ever does
PRIOR_ROUNDS, MISFIT = 6, 4.0  # what a prior counts for; half of it where rounds * (seen - prior)^2 is `MISFIT`
MEMORY = 24  # rounds that an average of acceptance goes back: one of fewer is mostly noise, one of more is slow
RETRY, RETRY_MOST = 12, 48  # rounds until a position that is not drafted is tried again; twice as many after a failure
STREAK, STREAK_MOST = 3, 192  # wholly right drafts in a row until a longer one is tried; four times as many likewise
GOING_WELL = 0.85  # a_i of the last position that is drafted, where such tries are made
TRUST = 0.1  # how far one outcome moves what a source's chances are raised to: a step against its squared error
TRUST_MOST = 4.0  # that exponent, at most, and one over the least
FEW = 4  # drafts whose chances have to be known before the draft length goes by chances
# Drafts that count besides those, and their rate: a source that is not used teaches nothing. One that reaches 0.91 is
# still tried, which the credit bounds.
DOUBTED, HOPED_RATE = 8, 1.3


class AcceptanceRecord:
    """Hold the outcomes of one source's drafts, by position: `average` outcome, over how many rounds (`seen`), and the
    source's round of the last draft (`drafted`). A try is due after `patience` rounds without a draft, or `streaks`
    drafts in a row that were wholly right."""

    def __init__(self, longest: int, source: str = "") -> None:
        """Begin without outcomes, for drafts of up to `longest` tokens; of forced ones the best is expected."""
        self._prior = CERTAIN if source == FORCED else PRIOR
        self.rounds = 0  # in which the source could have drafted
        self.average, self.seen = [0.0] * longest, [0] * longest
        self.drafted, self.patience, self.streaks = [0] * longest, [RETRY] * longest, [STREAK] * longest
        self.streak = 0  # drafts that were wholly right, since the last one that was not
        self.stride = 1  # tokens of the next try
        self.trying: int | None = None  # the first position of a try that is not yet heard of
        self.stale = [False] * longest  # positions that had not been drafted for long when the try began
        # Of the latest rounds with chances: the tokens to expect, and the time in plain rounds.
        self._rounds: deque[tuple[float, float]] = deque(maxlen=MEMORY)
        self.exponent = 1.0  # chance ** exponent: how often such tokens are right
        self._acceptance: list[float] = []  # what `acceptance` returned for the outcomes so far

    def to_dict(self) -> dict[str, Any]:
        """Return what is worth keeping for another run, as JSON types."""
        names = ("rounds", "average", "seen", "drafted", "patience", "streaks", "exponent")
        return {name: copy(getattr(self, name)) for name in names}

    @classmethod
    def from_dict(cls, kept: Mapping[str, Any], longest: int, source: str) -> AcceptanceRecord:
        """Make the record of `source` of what `to_dict` returned. Raises ValueError, TypeError or KeyError where that
        is damaged."""
        record = cls(longest, source)
        record.rounds = int(kept["rounds"])
        record.average = [float(one) for one in kept["average"]]
        record.seen, record.drafted = list(map(int, kept["seen"])), list(map(int, kept["drafted"]))
        record.patience, record.streaks = list(map(int, kept["patience"])), list(map(int, kept["streaks"]))
        record.exponent = float(kept.get("exponent", 1.0))
        within: list[tuple[list[float] | list[int], float, float]] = [
            (record.average, 0, 1),
            (record.seen, 0, MEMORY),
            (record.drafted, 0, record.rounds),
            (record.patience, 1, RETRY_MOST),
            (record.streaks, 1, STREAK_MOST),
            ([record.exponent] * longest, 1 / TRUST_MOST, TRUST_MOST),
        ]
        if not all(len(each) == longest and all(low <= one <= high for one in each) for each, low, high in within):
            raise ValueError("a record of acceptance has impossible values")
        return record

    def acceptance(self) -> list[float]:
        """Return a_i of every position, from 0."""
        if self._acceptance:
            return self._acceptance
        before, chances = self._prior, self._acceptance
        for average, seen in zip(self.average, self.seen, strict=True):
            misfit = seen * (average - before) ** 2
            weight = PRIOR_ROUNDS / (1 + misfit / MISFIT)
            before = (weight * before + seen * average) / (weight + seen)
            chances.append(before)
        return chances

    def overdue(self, position: int) -> bool:
        """Return whether nobody has drafted `position` for long enough."""
        return self.rounds - self.drafted[position] >= self.patience[position]

    def hope(self, position: int) -> float:
        """Return the chance that a token from `position` on is hoped to be accepted with, because the latest drafts,
        which ended before `position`, were wholly right; 0 where they were not, or too few."""
        if position == 0 or self.streak < self.streaks[position] or self.rounds == self.drafted[position]:
            return 0.0
        wrong = 1 - self.acceptance()[position - 1]
        return 1 - 2 * wrong**2 if wrong <= 1 - GOING_WELL else 0.0

    def begin_try(self, position: int) -> None:
        """Note that a draft goes on from `position`, to learn whether that would pay."""
        self.trying, self.stale = position, [self.rounds - round_ >= RETRY for round_ in self.drafted]

    def note(self, drafted: int, accepted: int) -> None:
        """Note that the first `accepted` of the `drafted` tokens of a draft were accepted, and the next one was not."""
        first = len(self.seen) if self.trying is None else self.trying
        for position in range(min(accepted + 1, drafted)):
            right = position < accepted
            if position >= first:
                self._note_try(position, right)
            elif not right:
                self.patience[position] = max(self.patience[position], RETRY)
                self.streaks[position] = max(self.streaks[position], STREAK)
            self.seen[position] = min(self.seen[position] + 1, MEMORY)
            self.average[position] += (right - self.average[position]) / self.seen[position]
            self._acceptance = []
        self.streak = self.streak + 1 if accepted == drafted else 0
        if first < drafted and accepted >= first:
            self.trying = None
            self.stride = 2 * self.stride if accepted == drafted else 1

    @property
    def knows_chances(self) -> bool:
        """Return whether it is known how sure the source is of its drafts."""
        return len(self._rounds) >= FEW

    @property
    def rate_by_chances(self) -> float:
        """Return the expected tokens per time with drafts that end as the source is sure of them, in multiples of plain
        decoding's."""
        known, expected, passes = len(self._rounds), *map(sum, zip(*self._rounds, strict=True))
        return (known * expected / passes + DOUBTED * HOPED_RATE) / (known + DOUBTED)

    def right(self, chances: Sequence[float]) -> list[float]:
        """Return the probabilities with which tokens are right that the source takes to be so with `chances`."""
        return [chance**self.exponent for chance in chances]

    def note_chances(self, chances: Sequence[float], checked: int, accepted: int, passes: float) -> None:
        """Note how likely the source took its tokens to be, of which the first `checked` were checked and the first
        `accepted` of these were right, in a round that takes as long as `passes` plain ones. Where all of them were
        right, the next one counts as right as often as tokens of its chance are."""
        self._rounds.append((1 + sum(accumulate(self.right(chances[:checked]), mul)), passes))
        for i, chance in enumerate(chances[: min(accepted + 1, checked)]):
            right = chance**self.exponent
            slope = -right * log(chance) if chance > 0 else 0.0  # none of a chance of 1, which no power changes
            step = TRUST * slope * (right - (i < accepted))
            self.exponent = min(max(self.exponent * exp(step), 1 / TRUST_MOST), TRUST_MOST)
        if accepted >= checked and checked < min(len(chances), len(self.seen)):
            self.seen[checked] = min(self.seen[checked] + 1, MEMORY)
            self.average[checked] += (chances[checked] ** self.exponent - self.average[checked]) / self.seen[checked]
            self._acceptance = []
        if checked == 0 and self.trying == 0:
            self.trying = None
            self._note_try(0, right=False)

    def _note_try(self, position: int, right: bool) -> None:
        if right:  # the less expected, the less earlier outcomes count, and the sooner the next try
            expected = self.acceptance()[position]
            if self.stale[position]:
                self.seen[position] = round(expected * self.seen[position])
                self._acceptance = []
            self.patience[position] = max(1, round(expected * RETRY))
            self.streaks[position] = max(1, self.streaks[position] // 4)
        else:
            self.patience[position] = min(max(RETRY, 2 * self.patience[position]), RETRY_MOST)
            self.streaks[position] = min(max(STREAK, 4 * self.streaks[position]), STREAK_MOST)


def places(sources: Sequence[str]) -> list[tuple[str, int]]:
    """Return each token's source, and the token's number among those of the source, from 0."""
    counts: dict[str, int] = {}
    places = []
    for source in sources:
        counts[source] = counts.get(source, -1) + 1
        places.append((source, counts[source]))
    return places
