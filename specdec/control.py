"""Draft length: who drafts next, and how many tokens, none included.

`AdaptiveLength` weighs what a draft costs against what it wins. With a_i the probability that a source's draft i is
accepted given that the ones before it were, r_k = a_1...a_k, S_k = r_1 + ... + r_k and T(k) = V(k + 1) + c + k d, it
picks the source and the k that maximise (1 + S_k) / T(k): expected tokens a second. V, c and d are measured at load
(`specdec.calibrate`) and corrected while it runs; every source has an acceptance record of its own, which outlives the
request. Lengths never change a token, only when it comes.

Left out, because replaying recorded texts showed no gain: stopping a draft where its drafter is unsure (0.99x to 1.01x:
the steps that told so are paid for by then), the backbone's own margin at the pending token, and forgetting faster when
a new text begins (0.98x to 1.00x).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

PRIOR, PRIOR_ROUNDS = 0.65, 6  # a_i before anything was seen, and how many rounds that counts for
FORGET = 0.03  # weight of the newest round in acceptance, once there are many: an average of fewer is mostly noise
COST_PER_ROW = 0.15  # V(T + 1) - V(T) as a share of V(1), where nothing was measured
RETRY, RETRY_MOST = 16, 64  # rounds without a source until it is tried again; twice as many after each failure

# Weights of the newest round in costs: the machine's pace changes for all row counts at once, their ratios hardly.
PACE, SHAPE = 0.1, 0.01


class DraftLength(Protocol):
    """Chooses who drafts in a round and how much, and hears how it went."""

    def choose(self, limits: Mapping[str, int]) -> tuple[str, int]:
        """One of the sources that may draft, the preferred first, and how many tokens of at most `limits[source]`."""

    def extend(self, sources: Sequence[str], source: str, limit: int) -> int:
        """How many of `limit` more tokens, of `source`, to add to a draft whose tokens `sources` proposed."""

    def observe(self, sources: Sequence[str], accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        """Who proposed the last round's tokens, how many were accepted, and what the round's two halves cost."""


class FixedLength:
    """Always the same draft length, from the preferred source."""

    def __init__(self, length: int) -> None:
        if length < 0:
            raise ValueError(f"draft_length must be 0 or more, or 'adaptive'; got {length}")
        self.length = length

    def choose(self, limits: Mapping[str, int]) -> tuple[str, int]:
        source = next(iter(limits))
        return source, min(self.length, limits[source])

    def extend(self, sources: Sequence[str], source: str, limit: int) -> int:
        return min(self.length - len(sources), limit)

    def observe(self, sources: Sequence[str], accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        pass


@dataclass
class Costs:
    """Seconds: V(rows) of a pass, for two numbers of rows or more; by source d of a drafted token, and c, what a draft
    costs besides."""

    passes: dict[int, float] = field(default_factory=lambda: {1: 1.0, 2: 1.0 + COST_PER_ROW})
    steps: dict[str, float] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)

    def of_draft(self, source: str, tokens: int) -> float:
        """c + tokens * d; 0 for a source that nobody has measured."""
        return self.starts.get(source, 0.0) + tokens * self.steps.get(source, 0.0) if tokens else 0.0

    def of_pass(self, rows: int) -> float:
        """V(rows): as measured, on a line between the nearest that were, or beyond the last two."""
        if rows in self.passes:
            return self.passes[rows]
        known = sorted(self.passes)
        above = next((i for i, one in enumerate(known) if one > rows), len(known) - 1)
        left, right = known[above - 1], known[above]
        slope = (self.passes[right] - self.passes[left]) / (right - left)
        return self.passes[left] + slope * (rows - left)


@dataclass
class _Record:
    """How a source of drafts has done: a_i, and from how many rounds; rounds without it, and how many are enough."""

    acceptance: list[float]
    seen: list[int]
    idle: int = 0
    patience: int = RETRY

    def note(self, position: int, accepted: bool) -> None:
        self.seen[position] += 1
        weight = max(FORGET, 1 / self.seen[position])
        self.acceptance[position] += weight * (accepted - self.acceptance[position])

    def retried(self) -> None:
        """It has its chance again: what was seen long ago counts for no more than a prior."""
        self.idle, self.patience = 0, min(2 * self.patience, RETRY_MOST)
        self.seen = [min(n, PRIOR_ROUNDS) for n in self.seen]


class AdaptiveLength:
    """The source and the draft length with the best expected tokens per second, up to `longest` tokens.

    `costs` in seconds as they were measured; without them a guess at their ratios until rounds have been seen.
    """

    def __init__(self, costs: Costs | None = None, longest: int = 8) -> None:
        self.longest = longest
        self.threads: int | None = None  # with how many the costs were measured; None: not yet
        self._records: dict[str, _Record] = {}
        self._costs = Costs()
        self._pace: float | None = None  # what now takes this many times as long as in `_costs`; None: not known
        if costs is not None:
            self.calibrate(costs)

    def calibrate(self, costs: Costs) -> None:
        """Costs as they are now; what is known of acceptance stays."""
        table = {rows: costs.of_pass(rows) for rows in range(1, self.longest + 2)}
        steps, starts = self._costs.steps | costs.steps, self._costs.starts | costs.starts
        self._costs, self._pace = Costs(table, steps, starts), 1.0

    @property
    def costs(self) -> Costs:
        """What a pass and a drafted token cost now, in seconds."""
        table = {rows: self._pass(rows) for rows in self._costs.passes}
        return Costs(table, dict(self._costs.steps), dict(self._costs.starts))

    def choose(self, limits: Mapping[str, int]) -> tuple[str, int]:
        best, best_rate = (next(iter(limits)), 0), 1 / self._pass(1)
        for source, limit in limits.items():
            k, rate = self._best(source, limit)
            if k and rate > best_rate:
                best, best_rate = (source, k), rate
        for source, limit in limits.items():
            record = self._record(source)
            if best[1] and source == best[0]:
                record.idle, record.patience = 0, RETRY
            elif limit:
                record.idle += 1
                if record.idle >= record.patience:  # so that never is not for ever
                    record.retried()
                    return source, 1
        return best

    def extend(self, sources: Sequence[str], source: str, limit: int) -> int:
        expected = reach = 1.0
        for a in self._chances(sources):
            reach *= a
            expected += reach
        more, rows = 0, len(sources) + 1
        seconds = self._pass(rows) + self._costs.of_draft(sources[0], len(sources))
        for a in self._record(source).acceptance[: max(0, min(limit, self.longest - len(sources)))]:
            reach *= a
            dearer = self._pass(rows + 1) - self._pass(rows) + self._costs.steps.get(source, 0.0)
            if reach * seconds <= dearer * expected:
                break
            more, rows, seconds, expected = more + 1, rows + 1, seconds + dearer, expected + reach
        return more

    def observe(self, sources: Sequence[str], accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        self._correct(len(sources) + 1, verify_seconds)
        if not sources:
            return
        first, own = sources[0], sum(source == sources[0] for source in sources)
        self._correct_draft(first, own, draft_seconds)
        for i, (source, at) in enumerate(
            _places(sources[: min(accepted + 1, self.longest)])
        ):  # those that were reached
            self._record(source).note(at, i < accepted)
        if accepted:
            self._record(first).patience = RETRY

    def _best(self, source: str, limit: int) -> tuple[int, float]:
        """The best length for a draft of `source`, and expected tokens a second with it."""
        best, best_rate = 0, 0.0
        reach = expected = 1.0
        for k, a in enumerate(self._record(source).acceptance[:limit], start=1):
            reach *= a
            expected += reach
            rate = expected / (self._pass(k + 1) + self._costs.of_draft(source, k))
            if rate > best_rate:
                best, best_rate = k, rate
        return best, best_rate

    def _record(self, source: str) -> _Record:
        if source not in self._records:
            self._records[source] = _Record([PRIOR] * self.longest, [PRIOR_ROUNDS] * self.longest)
        return self._records[source]

    def _chances(self, sources: Sequence[str]) -> list[float]:
        return [self._record(source).acceptance[at] for source, at in _places(sources[: self.longest])]

    def _pass(self, rows: int) -> float:
        return (self._pace or 1.0) * self._costs.of_pass(rows)

    def _correct_draft(self, source: str, tokens: int, seconds: float) -> None:
        """A draft took so long: c and d keep their ratio, which one length after the other could not tell."""
        steps, starts = self._costs.steps, self._costs.starts
        if (expected := self._costs.of_draft(source, tokens)) <= 0:
            steps[source] = seconds / tokens
            return
        factor = _blend(1.0, seconds / expected, PACE)
        steps[source] = factor * steps.get(source, 0.0)
        starts[source] = factor * starts.get(source, 0.0)

    def _correct(self, rows: int, seconds: float) -> None:
        """A pass over `rows` rows took so long: mostly the machine's pace, and a little this number of rows."""
        if self._pace is None:
            self._pace = seconds / self._costs.of_pass(rows)
            return
        slower, table = seconds / self._pass(rows), self._costs.passes
        self._pace = _blend(self._pace, self._pace * slower, PACE)
        table[rows] = _blend(self._costs.of_pass(rows), self._costs.of_pass(rows) * slower, SHAPE)


def _places(sources: Sequence[str]) -> list[tuple[str, int]]:
    """Each token's source, and which token of that source it is, from 0."""
    counts: dict[str, int] = {}
    places = []
    for source in sources:
        counts[source] = counts.get(source, -1) + 1
        places.append((source, counts[source]))
    return places


def _blend(average: float, newest: float, weight: float) -> float:
    """An average that moves on; a figure twice or half of it counts as that: the machine was doing something else."""
    return average + weight * (min(max(newest, average / 2), average * 2) - average)
