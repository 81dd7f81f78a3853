"""Costs of passes and drafts: V(rows, texts), and c + k d of a draft of k tokens; measured, and corrected by passes.
And the credit, which bounds what drafts may lose.

V(rows, texts) = V(rows) + (texts - 1) s: the rows of a further text cost what rows of the same text cost, and s for
its cache. The matrices do not know whose rows they multiply, and nearly all of a pass is theirs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from math import ceil, inf, log2

COST_PER_ROW = 0.15  # V(T + 1) - V(T) as a share of V(1), where nothing was measured

# Weights of the newest round: the machine's pace changes for all row counts at once, their ratios hardly.
PACE, SHAPE = 0.1, 0.01
NEAR = 0.5  # of a correction of one row count, what a count twice or half as large gets: one cause made both wrong
# Costs that passes contradict by more are measured anew, after so many seconds of passes, and then after twice as many:
# measuring takes a second.
DOUBT, DOUBT_SECONDS = 1.3, 50.0


FLOOR = 0.97  # of plain decoding's speed, at least
CREDIT = 12.0  # plain passes that drafts may lose at most, after rounds that won as many


@dataclass
class Costs:
    """Hold costs in seconds, by number of rows and by source. `passes`: V(rows), for two numbers of rows or more.
    `steps`: d of a drafted token. `starts`: c, the rest of a draft's cost. `readings`: e of a token that a source reads
    without drafting, after the first of a pass, which takes d. `text`: s of a further text in a pass; None: not
    known."""

    passes: dict[int, float] = field(default_factory=lambda: {1: 1.0, 2: 1.0 + COST_PER_ROW})
    steps: dict[str, float] = field(default_factory=dict)
    starts: dict[str, float] = field(default_factory=dict)
    text: float | None = None
    readings: dict[str, float] = field(default_factory=dict)

    def of_reading(self, source: str, tokens: int) -> float:
        """Return d + (tokens - 1) e, of one pass; 0 for a source that nobody has measured."""
        return self.steps.get(source, 0.0) + (tokens - 1) * self.readings.get(source, 0.0)

    def of_draft(self, source: str, tokens: int) -> float:
        """Return c + tokens * d; 0 for a source that nobody has measured."""
        return self.starts.get(source, 0.0) + tokens * self.steps.get(source, 0.0) if tokens else 0.0

    def of_pass(self, rows: int, texts: int = 1) -> float:
        """Return V(rows, texts), from the measured V(rows), or the line through the two nearest, or beyond the last
        two."""
        return self._of_rows(rows) + (texts - 1) * (self.text or 0.0)

    def _of_rows(self, rows: int) -> float:
        if rows in self.passes:
            return self.passes[rows]
        known = sorted(self.passes)
        above = next((i for i, one in enumerate(known) if one > rows), len(known) - 1)
        left, right = known[above - 1], known[above]
        slope = (self.passes[right] - self.passes[left]) / (right - left)
        return self.passes[left] + slope * (rows - left)


class LiveCosts:
    """Scale the measured costs, in seconds, by the machine's pace now."""

    def __init__(self) -> None:
        self._costs = Costs()
        self._measured = Costs()  # as they were before corrections
        self._pace: float | None = None  # seconds now / seconds in `_costs`; None: not known
        self._seconds = 0.0  # of passes since the costs were measured
        self._enough = DOUBT_SECONDS  # until they may be doubted

    def calibrate(self, costs: Costs, rows: int) -> None:
        """Take `costs` as the costs of now, and make a figure for every pass of up to `rows` rows."""
        table = {n: costs.of_pass(n) for n in {*range(1, rows + 1), *costs.passes}}
        steps, starts = self._costs.steps | costs.steps, self._costs.starts | costs.starts
        readings = self._costs.readings | costs.readings
        self._costs, self._pace, self._seconds = Costs(table, steps, starts, costs.text, readings), 1.0, 0.0
        self._measured = Costs(dict(table), text=costs.text)

    def now(self) -> Costs:
        """Return a copy of the costs of a pass and of a drafted token now."""
        table = {rows: self.of_pass(rows) for rows in self._costs.passes}
        text = None if self._costs.text is None else (self._pace or 1.0) * self._costs.text
        return Costs(table, dict(self._costs.steps), dict(self._costs.starts), text, dict(self._costs.readings))

    @property
    def of_texts(self) -> bool:
        """Return whether the costs of passes of several texts are known."""
        return self._costs.text is not None

    def trust(self) -> None:
        """Doubt the costs no more, because they are being measured anew; wait longer before the next doubt."""
        self._enough *= 2 if self.doubtful else 1
        self._seconds = 0.0

    @property
    def doubtful(self) -> bool:
        """Return whether many passes have contradicted what was measured: something else ran then, or runs now."""
        if self._pace is None or self._seconds < self._enough:
            return False
        ratios = [self._costs.passes[rows] / seconds for rows, seconds in self._measured.passes.items()]
        return not 1 / DOUBT < self._pace < DOUBT or max(ratios) > DOUBT * min(ratios)

    def could_pay(self, texts: int, longest: int) -> bool:
        """Return whether drafts of up to `longest` tokens, for one of several texts or for all of them, would pay if
        all of them were right; not where the costs of such passes are not known."""
        plain = self.of_pass(texts, texts)
        drafts = [n * k for k in range(1, longest + 1) for n in (1, texts)]
        return self.of_texts and any((1 + k / texts) * plain > self.of_pass(texts + k, texts) for k in drafts)

    def of_pass(self, rows: int, texts: int = 1) -> float:
        """Return V(rows, texts), the seconds of a pass over `rows` rows of `texts` texts now."""
        return (self._pace or 1.0) * self._costs.of_pass(rows, texts)

    def of_draft(self, source: str, tokens: int) -> float:
        """Return c + tokens * d; 0 for a source that nobody has measured."""
        return self._costs.of_draft(source, tokens)

    def step(self, source: str) -> float:
        """Return d, the seconds of a drafted token; 0 for a source that nobody has measured."""
        return self._costs.steps.get(source, 0.0)

    def of_reading(self, source: str, tokens: int) -> float:
        """Return d + (tokens - 1) e; 0 for a source that nobody has measured."""
        return self._costs.of_reading(source, tokens)

    def correct_reading(self, source: str, tokens: int, seconds: float) -> None:
        """Learn that `source` has read `tokens` tokens in so many seconds."""
        expected = self.of_reading(source, tokens)
        newest = max(0.0, seconds - self.step(source)) / max(1, tokens - 1)
        if expected <= 0:
            self._costs.readings[source] = newest
        elif tokens > 1:
            shift = _blend(1.0, seconds / expected, PACE) * expected - self.step(source)
            self._costs.readings[source] = max(0.0, shift) / (tokens - 1)

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

    def correct_pass(self, rows: int, seconds: float, texts: int = 1) -> None:
        """Learn that a pass over `rows` rows of `texts` texts took `seconds`: mostly the machine's pace, a little these
        rows, and still less their neighbours, which may never be seen. What a pass of several texts shows is shared by
        its rows and its texts."""
        costs, self._seconds = self._costs, self._seconds + seconds
        if self._pace is None:
            self._pace = seconds / costs.of_pass(rows, texts)
            return
        slower = seconds / self.of_pass(rows, texts)
        self._pace = _blend(self._pace, self._pace * slower, PACE)
        factor = _blend(1.0, slower, SHAPE) if texts == 1 else _blend(1.0, slower, SHAPE / 2)
        if texts > 1 and costs.text is not None:
            costs.text = max(0.0, costs.text + (factor - 1) * costs.of_pass(rows, texts) / (texts - 1))
        costs.passes[rows] = costs.of_pass(rows)
        nearness = _nearness(tuple(costs.passes), rows)
        costs.passes = {
            near: (1 + (factor - 1) * weight) * seconds
            for (near, seconds), weight in zip(costs.passes.items(), nearness, strict=True)
        }


class Credit:
    """Keep account of what drafts may still lose, so that decoding is never slower than `FLOOR` times plain decoding.

    An emitted token earns a plain pass, and a round is charged `FLOOR` of its time; all figures are in plain passes.
    `balance`: of all texts that share a draft length; `purse`: for what drafters read, which prompts fill.
    """

    def __init__(self, balance: float = 0.0) -> None:
        """Begin with what an earlier run won, `CREDIT` at most."""
        self.balance, self.purse = min(balance, CREDIT), 0.0
        self.lacking = inf  # the least that was asked for and not covered, since somebody last set it

    def covers(self, passes: float) -> bool:
        """Return whether a round that takes `passes` may be made, with every draft in it wrong."""
        if self.balance + 1 >= FLOOR * passes:
            return True
        self.lacking = min(self.lacking, passes)
        return False

    def rounds_to_save(self, most: int) -> int:
        """Return after how many plain rounds, 1 to `most`, the credit covers what it lacked."""
        missing = FLOOR * self.lacking - 1 - self.balance
        return max(1, ceil(min(missing / (1 - FLOOR), most)))  # a plain round earns 1, and is charged `FLOOR`

    def add_round(self, won: float, passes: float) -> None:
        """Book a round that took `passes` and won as many tokens besides the one that a plain pass gives."""
        self.balance = min(self.balance + won + 1 - FLOOR * passes, CREDIT)

    def add_prompt(self, passes: float) -> None:
        """Book the reading of a prompt, by the backbone, for `passes`: others may read for what keeps it in `FLOOR`."""
        self.purse = min(self.purse + (1 - FLOOR) * passes, CREDIT)

    def charge_reading(self, passes: float) -> None:
        """Charge what a drafter has read, in `passes`, to the purse, then to the balance."""
        cost = FLOOR * passes
        self.balance -= max(0.0, cost - self.purse)
        self.purse = max(0.0, self.purse - cost)


@lru_cache(maxsize=4096)
def _nearness(known: tuple[int, ...], rows: int) -> tuple[float, ...]:
    """Return what each of the row counts `known` gets of a correction of `rows`."""
    return tuple(float(NEAR ** abs(log2(near / rows))) for near in known)


def _blend(average: float, newest: float, weight: float) -> float:
    """Return a moving average. A figure beyond twice or below half of the average counts as twice or half of it: the
    machine was doing something else."""
    return average + weight * (min(max(newest, average / 2), average * 2) - average)
