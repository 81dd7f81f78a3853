"""Costs of passes and drafts: V(rows), and c + k d of a draft of k tokens; measured, and corrected as passes go by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

COST_PER_ROW = 0.15  # V(T + 1) - V(T) as a share of V(1), where nothing was measured

# Weights of the newest round: the machine's pace changes for all row counts at once, their ratios hardly.
PACE, SHAPE = 0.1, 0.01


@dataclass
class Costs:
    """Seconds, by number of rows and by source. `passes`: V(rows), for two numbers of rows or more. `steps`: d of a
    drafted token. `starts`: c, the rest of a draft's cost."""

    passes: dict[int, float] = field(default_factory=lambda: {1: 1.0, 2: 1.0 + COST_PER_ROW})
    steps: dict[str, float] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)

    def of_draft(self, source: str, tokens: int) -> float:
        """Return c + tokens * d; 0 for a source that nobody has measured."""
        return self.starts.get(source, 0.0) + tokens * self.steps.get(source, 0.0) if tokens else 0.0

    def of_pass(self, rows: int) -> float:
        """Return V(rows): the measured figure, else one on the line through the two nearest, or beyond the last two."""
        if rows in self.passes:
            return self.passes[rows]
        known = sorted(self.passes)
        above = next((i for i, one in enumerate(known) if one > rows), len(known) - 1)
        left, right = known[above - 1], known[above]
        slope = (self.passes[right] - self.passes[left]) / (right - left)
        return self.passes[left] + slope * (rows - left)


class LiveCosts:
    """Costs in seconds that follow the machine: the measured costs, times the machine's pace now."""

    def __init__(self) -> None:
        self._costs = Costs()
        self._pace: float | None = None  # seconds now / seconds in `_costs`; None: not known

    def calibrate(self, costs: Costs, rows: int) -> None:
        """Take `costs` as the costs of now, and make a figure for every pass of up to `rows` rows."""
        table = {n: costs.of_pass(n) for n in {*range(1, rows + 1), *costs.passes}}
        steps, starts = self._costs.steps | costs.steps, self._costs.starts | costs.starts
        self._costs, self._pace = Costs(table, steps, starts), 1.0

    def now(self) -> Costs:
        """Return a copy of the costs of a pass and of a drafted token now."""
        table = {rows: self.of_pass(rows) for rows in self._costs.passes}
        return Costs(table, dict(self._costs.steps), dict(self._costs.starts))

    def of_pass(self, rows: int) -> float:
        """Return V(rows), the seconds of a pass over `rows` rows now."""
        return (self._pace or 1.0) * self._costs.of_pass(rows)

    def of_draft(self, source: str, tokens: int) -> float:
        """Return c + tokens * d; 0 for a source that nobody has measured."""
        return self._costs.of_draft(source, tokens)

    def step(self, source: str) -> float:
        """Return d, the seconds of a drafted token; 0 for a source that nobody has measured."""
        return self._costs.steps.get(source, 0.0)

    def correct_drafts(self, drafts: Sequence[tuple[str, int]], seconds: float) -> None:
        """Learn that `drafts` (source and tokens of each) took `seconds` together. c and d keep their ratio, because
        drafts of one length at a time cannot tell them apart."""
        steps, starts = self._costs.steps, self._costs.starts
        expected = sum(self.of_draft(source, tokens) for source, tokens in drafts)
        if expected <= 0:
            steps |= dict.fromkeys((source for source, _ in drafts), seconds / sum(tokens for _, tokens in drafts))
            return
        factor = _blend(1.0, seconds / expected, PACE)
        for source in {source for source, _ in drafts}:
            steps[source] = factor * steps.get(source, 0.0)
            starts[source] = factor * starts.get(source, 0.0)

    def correct_pass(self, rows: int, seconds: float) -> None:
        """Learn that a pass over `rows` rows took `seconds`: mostly the machine's pace, and a little these rows."""
        if self._pace is None:
            self._pace = seconds / self._costs.of_pass(rows)
            return
        slower, table = seconds / self.of_pass(rows), self._costs.passes
        self._pace = _blend(self._pace, self._pace * slower, PACE)
        table[rows] = _blend(self._costs.of_pass(rows), self._costs.of_pass(rows) * slower, SHAPE)


def _blend(average: float, newest: float, weight: float) -> float:
    """Return a moving average. A figure beyond twice or below half of the average counts as twice or half of it: the
    machine was doing something else."""
    return average + weight * (min(max(newest, average / 2), average * 2) - average)
