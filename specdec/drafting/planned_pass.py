"""A planned pass: how many tokens its drafts are expected to win, and how many seconds they cost."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, islice, repeat
from operator import mul
from typing import NamedTuple

from specdec.drafting.costs import LiveCosts

HOPED = 0.25  # of what drafts would win if all of them were right: most that are tried again are not


class DraftTotal(NamedTuple):
    """Hold the total of a pass's drafts: tokens that they are expected to win, rows, and seconds that they take."""

    expected: float = 0.0
    rows: int = 0
    seconds: float = 0.0

    def __add__(self, other: DraftTotal) -> DraftTotal:  # type: ignore[override]
        return DraftTotal(self.expected + other.expected, self.rows + other.rows, self.seconds + other.seconds)

    def __sub__(self, other: DraftTotal) -> DraftTotal:
        return DraftTotal(self.expected - other.expected, self.rows - other.rows, self.seconds - other.seconds)


class PlannedPass:
    """Plan a pass of `texts` texts, beside `beside` rows of prompts."""

    def __init__(self, costs: LiveCosts, acceptance: Mapping[str, Sequence[float]], texts: int, beside: int) -> None:
        """Prepare sums over drafts. `acceptance`: a_i of every position, by source; `costs` must not change
        meanwhile."""
        self._costs, self.texts, self._rows = costs, texts, texts + beside
        self._plain = costs.of_pass(self._rows, texts)
        self._reach: dict[str, list[float]] = {one: list(accumulate(each, mul)) for one, each in acceptance.items()}
        self._expected = {one: list(accumulate(each, initial=0.0)) for one, each in self._reach.items()}
        self._seconds = dict[int, float]()

    def reach(self, source: str, at: int) -> float:
        """Return the probability that a draft's token at `at`, from 0, is accepted with all tokens before it."""
        return self._reach[source][at]

    def token(self, source: str, at: int) -> DraftTotal:
        """Return the share of the token at `at` in the total of its draft."""
        seconds = self._costs.of_draft(source, at + 1) - self._costs.of_draft(source, at)
        return DraftTotal(self._reach[source][at], 1, seconds)

    def drafts(self, source: str, k: int) -> DraftTotal:
        """Return the total of a draft of `k` tokens."""
        return DraftTotal(self._expected[source][k], k, self._costs.of_draft(source, k))

    def lengths(self, source: str, limit: int) -> Iterator[tuple[int, float, float]]:
        """Yield 1 to `limit` tokens, with `rate` and `passes` of a pass that has a draft of so many and no other.

        Nearly all of a plan's time is spent here, hence no totals.
        """
        expected, step = self._expected[source], self._costs.step(source)
        start = self._costs.of_draft(source, 1) - step
        for k in range(1, limit + 1):
            passes = (self._of_rows(self._rows + k) + start + k * step) / self._plain
            yield k, (1 + expected[k] / self.texts) / passes, passes

    def hope(self, source: str, k: int, known: int, chance: float) -> DraftTotal:
        """Return the total of a draft of `k` tokens if each one after the first `known` were accepted with probability
        `chance`."""
        reach = self._reach[source]
        hoped = accumulate(repeat(chance, k - known), mul, initial=reach[known - 1] if known else 1.0)
        expected = self._expected[source][known] + sum(islice(hoped, 1, None))
        return DraftTotal(expected, k, self._costs.of_draft(source, k))

    def passes(self, drafts: DraftTotal) -> float:
        """Return the time of the pass with `drafts`, in plain passes."""
        return (self._of_rows(self._rows + drafts.rows) + drafts.seconds) / self._plain

    def rate(self, drafts: DraftTotal) -> float:
        """Return the expected tokens per time with `drafts`, as a multiple of those of a plain pass."""
        return (1 + drafts.expected / self.texts) / self.passes(drafts)

    def paying(
        self, others: DraftTotal, source: str, known: int, limit: int, chance: float, expected: float
    ) -> Iterator[int]:
        """Yield the lengths of a draft beyond `known`, beside `others`, that would have a better rate than `expected`
        if all further tokens were accepted with probability `chance`."""
        hopes = ((k, others + self.hope(source, k, known, chance)) for k in range(known + 1, limit + 1))
        return (k for k, hope in hopes if self.rate(hope) > expected)

    def worth(self, source: str, limits: Mapping[str, int], due: bool) -> tuple[int, float]:
        """Return the length of the shortest draft of `source` with a better rate than all drafts of others within
        `limits`, and than none; and the time that a token takes less with the best draft of `source`, in plain passes.
        `due`: a single token will do where drafts would win if they were right, which counts for `HOPED` of the time
        that they would win. 0, 0.0: nothing pays."""
        others = (rate for one, limit in limits.items() if one != source for _, rate, _ in self.lengths(one, limit))
        top = max((1.0, *others))
        found = [(k, 1 / top - 1 / rate) for k, rate, _ in self.lengths(source, limits[source]) if rate > top]
        if due:
            hopes = (self.rate(self.hope(source, k, 0, 1.0)) for k in range(1, limits[source] + 1))
            found += [(1, HOPED * (1 / top - 1 / rate)) for rate in hopes if rate > top]
        return (found[0][0], max(won for _, won in found)) if found else (0, 0.0)

    def _of_rows(self, rows: int) -> float:
        if rows not in self._seconds:
            self._seconds[rows] = self._costs.of_pass(rows, self.texts)
        return self._seconds[rows]
