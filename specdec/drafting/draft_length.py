"""Draft length: who drafts next, and how many tokens, none included.

`AdaptiveLength` weighs what a draft costs against what it wins. With a_i the probability that a source's draft i is
accepted given that the ones before it were, r_k = a_1...a_k, S_k = r_1 + ... + r_k and T(k) = V(k + 1) + c + k d, it
picks the source and the k that maximise (1 + S_k) / T(k): expected tokens a second. V, c and d are measured at load
(`specdec.drafting.calibrate`) and corrected while it runs; every source has an acceptance record of its own, which
outlives the request. Lengths never change a token, only when it comes.

Three things keep that rule from starving and from costing much:

- The prior of a_i is a_{i-1}: where little was seen, a draft goes on as it began. It counts for `PRIOR_ROUNDS` rounds,
  and for fewer the less it fits. With one prior for every position, drafts that were always right stayed short.
- The first position that is not drafted is tried again after `RETRY` to `RETRY_MOST` rounds, if a draft that goes on
  from there could pay at all; so does a source come back. After a try that succeeds against expectation the next one
  follows soon, and what was seen before counts little.
- Credit: an emitted token earns a plain pass, and a round is charged `FLOOR` of what it took. No draft is made that
  would leave a debt if all of it were wrong. So, as far as the costs are true, decoding is never slower than `FLOOR`
  times plain decoding, whatever the drafts, from the first round on. The first draft waits for 3 to 19 plain rounds
  (where a wrong one costs 0.1 to 0.6 of a pass); a suffix match hardly waits.

`tests/drafting/test_draft_length_replay.py` replays recorded and made texts. Mean and worst of 121 made cases against
the best fixed length, from 64 rounds after the start or a change on: 0.994 and 0.97; one prior for all positions and no
credit, as it was, 0.955 and 0.30; without tries 0.933 and 0.20; with a prior that never yields 0.990 and 0.74; without
credit 0.994 and 0.88, and 0.63 of plain decoding in the first rounds. A prior of two rounds that never yields does as
well there, and worse on recorded texts (0.94 instead of 0.96 at worst). Left out: forgetting when a streak was unlikely
(texts that take turns lose up to 15%), tries that are rarer the dearer they are (no gain). Left out earlier, no gain on
recorded texts: stopping a draft where its drafter is unsure (0.99 to 1.01: those steps are paid for by then), the
backbone's margin at the pending token, forgetting faster when a new text begins (0.98 to 1.00).
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

PRIOR = 0.65  # a_1 before anything was seen
PRIOR_ROUNDS, MISFIT = 6, 4.0  # what a prior counts for; half of it where rounds * (seen - prior)^2 is `MISFIT`
MEMORY = 24  # rounds that an average of acceptance goes back: one of fewer is mostly noise, one of more is slow
RETRY, RETRY_MOST = 12, 48  # rounds until a position that is not drafted is tried again; twice as many after a failure
FLOOR = 0.97  # of plain decoding's speed, at least
CREDIT = 12.0  # plain passes that drafts may lose at most, after rounds that won as many
COST_PER_ROW = 0.15  # V(T + 1) - V(T) as a share of V(1), where nothing was measured

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


class _Record:
    """How a source of drafts has done: by position the average of outcomes, from how many rounds; when it was drafted
    last, in rounds of the source, and how many rounds without it are enough."""

    def __init__(self, longest: int) -> None:
        self.rounds = 0  # in which the source could have drafted
        self.average, self.seen = [0.0] * longest, [0] * longest
        self.drafted, self.patience = [0] * longest, [RETRY] * longest
        self.trying: int | None = None  # a position that is tried and not yet heard of

    def acceptance(self) -> list[float]:
        """a_i of every position, from 0."""
        before, chances = PRIOR, []
        for average, seen in zip(self.average, self.seen, strict=True):
            misfit = seen * (average - before) ** 2
            weight = PRIOR_ROUNDS / (1 + misfit / MISFIT)
            before = (weight * before + seen * average) / (weight + seen)
            chances.append(before)
        return chances

    def overdue(self, position: int) -> bool:
        """Whether nobody has drafted `position` for long enough."""
        return self.rounds - self.drafted[position] >= self.patience[position]

    def note(self, position: int, accepted: bool) -> None:
        """A draft reached `position`, and its token there was accepted or not."""
        if position == self.trying:
            self.trying = None
            if accepted:  # the less expected, the less counts what was seen before, and the sooner comes the next try
                expected = self.acceptance()[position]
                self.seen[position] = round(expected * self.seen[position])
                self.patience[position] = max(1, round(expected * RETRY))
            else:
                self.patience[position] = min(max(RETRY, 2 * self.patience[position]), RETRY_MOST)
        elif not accepted:
            self.patience[position] = max(self.patience[position], RETRY)
        self.seen[position] = min(self.seen[position] + 1, MEMORY)
        self.average[position] += (accepted - self.average[position]) / self.seen[position]


class AdaptiveLength:
    """Choose the source and the draft length with the best expected tokens per second, up to `longest` tokens.

    `costs` in seconds as they were measured; without them a guess at their ratios until rounds have been seen. Several
    threads may share an object: what one request learns is for all.
    """

    def __init__(self, costs: Costs | None = None, longest: int = 8) -> None:
        self.longest = longest
        self.threads: int | None = None  # with how many the costs were measured; None: not yet
        self._lock = threading.Lock()  # around each public method's own work; nothing else is called under it
        self._records: dict[str, _Record] = {}
        self._credit = 0.0  # in plain passes
        self._costs = Costs()
        self._pace: float | None = None  # what now takes this many times as long as in `_costs`; None: not known
        if costs is not None:
            self.calibrate(costs)

    def __getstate__(self) -> dict[str, Any]:
        """Let what was learned be copied and pickled, as it is with a model of transformers' that has it."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    def claim(self, threads: int) -> bool:
        """Whether the caller shall measure costs for `threads` threads: true for one of those who ask at once."""
        with self._lock:
            fresh, self.threads = self.threads != threads, threads
            return fresh

    def calibrate(self, costs: Costs) -> None:
        """Take `costs` as they are now; what is known of acceptance stays."""
        table = {rows: costs.of_pass(rows) for rows in range(1, self.longest + 2)}
        with self._lock:
            steps, starts = self._costs.steps | costs.steps, self._costs.starts | costs.starts
            self._costs, self._pace = Costs(table, steps, starts), 1.0

    @property
    def costs(self) -> Costs:
        """What a pass and a drafted token cost now, in seconds."""
        with self._lock:
            table = {rows: self._pass(rows) for rows in self._costs.passes}
            return Costs(table, dict(self._costs.steps), dict(self._costs.starts))

    def choose(self, limits: Mapping[str, int]) -> tuple[str, int]:
        most = {source: min(limit, self.longest) for source, limit in limits.items()}
        with self._lock:
            source, k, rate = next(iter(most)), 0, 1.0
            for one, limit in most.items():
                self._record(one).rounds += limit > 0
                for tokens, its in self._rates(one, limit):
                    if its > rate and self._affordable(self._passes(one, tokens)):
                        source, k, rate = one, tokens, its
            for one, limit in most.items():
                position = k if one == source else 0  # the first that would not be drafted
                if self._worth_a_try(one, position, limit, rate):
                    self._record(one).trying = position
                    source, k = one, position + 1
                    break
            record = self._record(source)
            record.drafted[:k] = [record.rounds] * k
            return source, k

    def extend(self, sources: Sequence[str], source: str, limit: int) -> int:
        with self._lock:
            expected = reach = 1.0
            for name, at in _places(sources[: self.longest]):
                reach *= self._record(name).acceptance()[at]
                expected += reach
            more, rows, plain = 0, len(sources) + 1, self._pass(1)
            passes = (self._pass(rows) + self._costs.of_draft(sources[0], len(sources))) / plain
            for a in self._record(source).acceptance()[: max(0, min(limit, self.longest - len(sources)))]:
                reach *= a
                dearer = (self._pass(rows + 1) - self._pass(rows) + self._costs.steps.get(source, 0.0)) / plain
                if reach * passes <= dearer * expected or not self._affordable(passes + dearer):
                    break
                more, rows, passes, expected = more + 1, rows + 1, passes + dearer, expected + reach
            return more

    def observe(self, sources: Sequence[str], accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        own = sum(source == sources[0] for source in sources)
        with self._lock:
            self._correct(len(sources) + 1, verify_seconds)
            if sources:
                self._correct_draft(sources[0], own, draft_seconds)
            # From the averages: that a neighbour slowed the machine down for a round says nothing about drafts.
            seconds = self._pass(len(sources) + 1) + (self._costs.of_draft(sources[0], own) if sources else 0.0)
            self._credit = min(self._credit + accepted + 1 - FLOOR * seconds / self._pass(1), CREDIT)
            places = _places(sources[: self.longest])
            for i, (source, at) in enumerate(places[: accepted + 1]):  # those that were reached
                self._record(source).note(at, i < accepted)
            for source, at in places:
                self._record(source).drafted[at] = self._record(source).rounds

    def _rates(self, source: str, limit: int, right_from: int | None = None) -> Iterator[tuple[int, float]]:
        """Draft lengths of `source` from 1 to `limit`, and expected tokens a plain pass's time with each; with
        `right_from` those beyond that position alone, and as if every token from there on were right."""
        reach, expected, plain = 1.0, 1.0, self._pass(1)
        start, step = self._costs.starts.get(source, 0.0), self._costs.steps.get(source, 0.0)
        for k, a in enumerate(self._record(source).acceptance()[:limit], start=1):
            hoped = right_from is not None and k > right_from
            reach *= 1.0 if hoped else a
            expected += reach
            if hoped or right_from is None:
                yield k, expected * plain / (self._pass(k + 1) + start + k * step)

    def _worth_a_try(self, source: str, position: int, limit: int, rate: float) -> bool:
        """Whether a draft of `source` shall go as far as `position`, though another one has a better rate."""
        if position >= limit or not self._record(source).overdue(position):
            return False
        hopes = self._rates(source, limit, right_from=position)
        return any(hoped > rate for _, hoped in hopes) and self._affordable(self._passes(source, position + 1))

    def _passes(self, source: str, tokens: int) -> float:
        """What a round with so many tokens of `source` takes, in plain passes."""
        return (self._pass(tokens + 1) + self._costs.of_draft(source, tokens)) / self._pass(1)

    def _affordable(self, passes: float) -> bool:
        """Whether a draft in a round of so many plain passes may be all wrong."""
        return self._credit + 1 >= FLOOR * passes

    def _record(self, source: str) -> _Record:
        if source not in self._records:
            self._records[source] = _Record(self.longest)
        return self._records[source]

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
