"""A planned pass: what its drafts are expected to win and to cost, and the drafts that promise most, with tries.

`draft_length.py` has the rule, and asks for a plan before each pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from heapq import heapify, heappop, heapreplace
from itertools import accumulate, islice, pairwise, repeat
from operator import mul
from typing import NamedTuple

from specdec.drafting.acceptance import FORCED, AcceptanceRecord
from specdec.drafting.costs import Credit, LiveCosts

Plan = list[tuple[str, int]]  # by text of a pass: who drafts, and how many tokens

HOPE = 0.75  # a_i that a try beside other texts hopes for
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


class TokenPrices:
    """Hold what further tokens of a text's draft cost: the probabilities to be right with which they are worth it."""

    def __init__(self, costs: LiveCosts, rows: int, rate: float, longest: int) -> None:
        """Price up to `longest` tokens beside `rows` others of the pass, the text's own among them. `rate`: tokens per
        time that are to be had, as a multiple of a plain pass's."""
        self._costs = costs
        passes = [costs.of_pass(rows + i) for i in range(longest + 1)]
        # Tokens per second: each row beside is taken for that of another text, which emits one too.
        self._tokens = rate * rows / passes[0]
        self._rows = [self._tokens * (after - before) for before, after in pairwise(passes)]

    def floors(self, source: str, acceptance: Sequence[float], k: int) -> list[float]:
        """Return, for each of `k` tokens, the probability to be right, with all before it, below which nothing should
        follow it: a further token is right in a_i of the cases, and costs its draft and its row."""
        draft = self._tokens * self._costs.step(source)
        return [*(row + draft / max(a, 0.01) for row, a in zip(self._rows[1:k], acceptance[1:k], strict=True)), 0.0]

    def kept(self, reached: Sequence[float]) -> int:
        """Return how many tokens are worth a row, of those that are right, with all before them, with probabilities
        `reached`."""
        return next((i for i, each in enumerate(reached) if each < self._rows[i]), len(reached))


class Planner:
    """Plan the drafts of one pass, from what is `planned` of it, the `records` of all its sources, and the credit."""

    def __init__(
        self, planned: PlannedPass, records: Mapping[str, AcceptanceRecord], credit: Credit, most: int
    ) -> None:
        """Plan at most `most` drafted tokens of all texts together."""
        self._planned, self._records, self._credit, self._most = planned, records, credit, most

    def best(self, limits: Sequence[Mapping[str, int]], rate: float) -> tuple[Plan, float]:
        """Return the drafts with the best rate among those that can be afforded, and that rate: tokens per time, as a
        multiple of a pass without drafts; of several texts `rate`, which is the last one of a lone text.

        A text's source is the one that does best for that text alone. Tokens are then added one by one: each time the
        token, of all texts' next ones, that is most likely to be accepted.
        """
        alone: dict[tuple[tuple[str, int], ...], tuple[str, int]] = {}  # by limits: the best source, and its limit
        for of in limits:
            if (key := tuple(of.items())) not in alone:
                alone[key], best, top = (key[0][0], 0), 0, 1.0
                for source, limit in key:
                    for k, each, passes in self._lengths(source, limit):
                        if each > top and self._credit.covers(passes - (k if source == FORCED else 0)):
                            alone[key], best, top = (source, limit), k, each
                if len(limits) == 1:
                    return [(alone[key][0], best)], top
        sources = [alone[tuple(of.items())] for of in limits]
        most = self._most
        heap = [(-self._planned.reach(source, 0), i) for i, (source, limit) in enumerate(sources) if limit]
        heapify(heap)
        lengths, total, top = [0] * len(sources), DraftTotal(), 1.0
        best, order = 0, list[int]()  # texts whose drafts get a token each; the best plan has the first `best`
        while heap and len(order) < most:
            _, i = heap[0]
            source, limit = sources[i]
            total += self._planned.token(source, lengths[i])
            lengths[i] += 1
            order.append(i)
            if lengths[i] < limit:
                heapreplace(heap, (-self._planned.reach(source, lengths[i]), i))
            else:
                heappop(heap)
            if (each := self._planned.rate(total)) > top and self._credit.covers(self._planned.passes(total)):
                best, top = len(order), each
        return [(source, order[:best].count(i)) for i, (source, _) in enumerate(sources)], rate

    def _lengths(self, source: str, limit: int) -> Iterable[tuple[int, float, float]]:
        """Return lengths of drafts with their rate and the time of the pass if all is drafted and checked; for a source
        that says how sure it is, the longest one that can be afforded."""
        record = self._records[source]
        if not record.knows_chances:
            return self._planned.lengths(source, limit)
        passes = [self._planned.passes(self._planned.drafts(source, k)) for k in range(1, limit + 1)]
        k = next((k for k in range(limit, 0, -1) if self._credit.covers(passes[k - 1])), 0)
        if k == 0:
            return ()
        return [(k, record.rate_by_chances, passes[k - 1])]

    def with_try(self, limits: Sequence[Mapping[str, int]], plan: Plan) -> Plan:
        """Return `plan` with one try in it where one is due: a draft that goes further, or is another source's."""
        total = sum((self._planned.drafts(source, k) for source, k in plan), DraftTotal())
        for i, of in enumerate(limits):
            own, k = plan[i]
            others = total - self._planned.drafts(own, k)
            for source, limit in of.items():
                at = k if source == own else 0  # the first that would not be drafted
                record, limit = self._records[source], min(limit, self._most - others.rows)
                for tried in self._tries(total, others, source, at, limit):
                    if self._covers(others, source, tried):
                        record.begin_try(at)
                        return [*plan[:i], (source, tried), *plan[i + 1 :]]
        return plan

    def _tries(self, total: DraftTotal, others: DraftTotal, source: str, at: int, limit: int) -> Iterator[int]:
        """Yield the lengths of drafts of `source` that are due for a try from position `at` on, in place of the text's
        draft in `total`; `others`: the drafts of the other texts.

        Where drafts of late were wholly right, one that is long enough to pay if that goes on. Where nobody has drafted
        the position for long, one token, if drafts that go on from there would pay if they were right; beside other
        texts, whose tokens a try delays, if they would pay where they are right as often as a fair drafter's.
        """
        planned, record = self._planned, self._records[source]
        expected = planned.rate(total)
        if at >= limit:
            return
        if hoped := record.hope(at):
            longer = list(planned.paying(others, source, at, limit, hoped, expected))
            if longer:
                yield next((k for k in longer if k >= at + record.stride), longer[-1])
        if not record.overdue(at) or not self._covers(others, source, at + 1):
            return
        hoped = 1.0 if planned.texts == 1 else max(HOPE, record.acceptance()[at])
        if any(planned.paying(others, source, at, limit, hoped, expected)):
            lengths = range(limit if record.knows_chances else at + 1, at, -1)
            yield next(k for k in lengths if self._covers(others, source, k))

    def _covers(self, others: DraftTotal, source: str, k: int) -> bool:
        return self._credit.covers(self._planned.passes(others + self._planned.drafts(source, k)))
