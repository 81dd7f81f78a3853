"""Draft length: who drafts next, and how many tokens, none included.

`AdaptiveLength` weighs the cost of a draft against its gain. Let a_i be the probability that a source's token i is
accepted, given that the tokens before it were; r_k = a_1...a_k, S_k = r_1 + ... + r_k and T(k) = V(k + 1) + c + k d.
The source and the k are those that maximise (1 + S_k) / T(k): expected tokens a second. V, c and d are measured at load
(`specdec.drafting.calibrate`) and corrected while the engine runs. Every source has an acceptance record of its own,
which outlives the request. Lengths never change a token, only when it comes.

A head says besides how likely each token of a draft is (`SureProposer`). Such a draft is as long as can be afforded and
ends where going on costs more than it promises; its last tokens get a row only where they are worth one. The rate of
such drafts is that of the latest ones' chances, raised to a power that outcomes teach.

Four things keep that rule from starving and from costing much:
- The prior of a_i is a_{i-1}: where little was seen, a draft goes on as it began. The prior counts for `PRIOR_ROUNDS`
  rounds, and for fewer the less it fits. With one prior for every position, drafts that were always right stayed short.
- The first position that is not drafted is tried again after `RETRY` to `RETRY_MOST` rounds, if a draft that goes on
  from there could pay at all. A source that is not used comes back in the same way. After a try that succeeds against
  expectation the next one follows soon, and earlier outcomes count little. Where the latest drafts were wholly right,
  at least `STREAK` of them, a draft that is long enough to pay if that goes on is tried at once: what is known of its
  later positions may be of another text, and where the next rows are dear no single further token would pay.
- Credit (`costs.py`): an emitted token earns a plain pass, and a round is charged `FLOOR` of its time. No draft is
  made that would leave a debt if all of it were wrong. So, as far as the costs are true, decoding is never slower than
  `FLOOR` times plain decoding, whatever the drafts. The first draft waits for 3 to 19 plain rounds; a suffix match
  hardly.
- Pauses: where a text gets no draft, no plan is made for it until a try is due or the credit may suffice, or for
  `PAUSE` rounds. A plan takes 2% of a small model's pass, and the next one would find the same.

`tests/drafting/test_draft_length_replay.py` replays texts; docs/design.md has what else was tried.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from itertools import accumulate
from math import inf
from operator import mul
from typing import Any, NamedTuple

from specdec.cache import MAX_ROWS
from specdec.drafting.acceptance import AcceptanceRecord, places
from specdec.drafting.costs import Costs, Credit, LiveCosts
from specdec.drafting.planned_pass import PlannedPass, Planner, TokenPrices
from specdec.drafting.protocol import Drafted

PAUSE = 8  # rounds without a draft until costs, which change meanwhile, are looked at again
HORIZON = 128  # tokens within which what is read for drafts has to pay: a text may end sooner


class Learned(NamedTuple):
    """Hold what draft lengths learned: costs, the threads and texts of their measurement, records, and credit."""

    costs: Costs
    measured_for: tuple[int, int] | None
    records: dict[str, AcceptanceRecord]
    credit: float


class AdaptiveLength:
    """Choose each text's source and draft length, up to `longest` tokens, for the most expected tokens per second.

    `costs`: measured costs in seconds; without them the ratios of costs are guessed until rounds have been seen.
    Several threads may share an object: the acceptance seen in one request serves all.
    """

    def __init__(self, costs: Costs | None = None, longest: int = 8) -> None:
        self.longest = longest
        self.measured_for: tuple[int, int] | None = None  # threads and texts; None: costs were not measured
        self._lock = threading.Lock()  # around each public method's own work; nothing else is called under it
        self._records: dict[str, AcceptanceRecord] = {}
        self._credit = Credit()
        self._rate = 1.0  # tokens per time of a lone text's latest plan, as a multiple of plain decoding's, at least 1
        self._plans = 0
        self._paused: dict[tuple[tuple[str, int], ...], int] = {}  # by a lone text's limits: the plan to make next
        self._prices: dict[int, TokenPrices] = {}  # since the latest plan, by the rows beside
        self._costs = LiveCosts()
        if costs is not None:
            self.calibrate(costs)

    def __getstate__(self) -> dict[str, Any]:
        """Return the state without the lock, for copies and pickles: a model of transformers' may hold this object."""
        return {name: value for name, value in vars(self).items() if name != "_lock"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._lock = threading.Lock()

    def claim(self, threads: int, texts: int = 1) -> bool:
        """Return whether costs have to be measured for `threads` threads and `texts` texts; one caller gets True."""
        with self._lock:
            known = self.measured_for
            if known is not None and known[0] == threads and known[1] >= texts and not self._costs.doubtful:
                return False
            self.measured_for = threads, texts if known is None else max(texts, known[1])
            self._costs.trust()
            return True

    def calibrate(self, costs: Costs) -> None:
        """Take `costs` as the costs of now; the acceptance records stay."""
        with self._lock:
            self._paused.clear()
            self._costs.calibrate(costs, self.longest + 1)

    def learned(self) -> Learned:
        """Return a copy of all that was learned so far."""
        with self._lock:
            return Learned(self._costs.now(), self.measured_for, deepcopy(self._records), self._credit.balance)

    def recall(self, learned: Learned) -> None:
        """Go on from `learned`: what an earlier run won by drafts may be lost by drafts of this one."""
        self.calibrate(learned.costs)
        with self._lock:
            self.measured_for, self._records = learned.measured_for, deepcopy(learned.records)
            self._credit = Credit(learned.credit)
            self._paused.clear()

    @property
    def costs(self) -> Costs:
        """Return the costs of a pass and of a drafted token now, in seconds."""
        with self._lock:
            return self._costs.now()

    def may_draft(self, texts: int, beside: int = 0) -> bool:
        """Return whether drafts could pay if all of them were right. Never beside rows of prompts, and beside other
        texts only where the costs of such passes were measured."""
        if texts == 1 or beside:
            return not beside
        with self._lock:
            return self._costs.could_pay(texts, self.longest)

    def plan(self, limits: Sequence[Mapping[str, int]], beside: int = 0, most: int = 64) -> list[tuple[str, int]]:
        """Return source and length of each text's draft: the drafts of the best rate, and a try where one is due."""
        with self._lock:
            bounded = [{one: min(limit, self.longest, most) for one, limit in of.items()} for of in limits]
            sources = {one for of in bounded for one in of}
            for one in {one for of in bounded for one, limit in of.items() if limit > 0}:
                self._record(one).rounds += 1
            self._plans += 1
            lone = tuple(bounded[0].items()) if len(limits) == 1 else ()
            if lone and self._plans < self._paused.get(lone, 0):
                return [(lone[0][0], 0)]
            self._credit.lacking = inf
            self._prices.clear()
            acceptance = {one: self._record(one).acceptance() for one in sources}
            planned = PlannedPass(self._costs, acceptance, len(limits), beside)
            planner = Planner(planned, self._records, self._credit, most)
            plan, self._rate = planner.best(bounded, self._rate)
            plan = planner.with_try(bounded, plan)
            for source, k in plan:
                record = self._record(source)
                record.drafted[:k] = [record.rounds] * k
            if lone and plan[0][1] == 0:
                self._paused[lone] = self._plans + self._pause(bounded[0])
            return plan

    def extend(self, sources: Sequence[str], source: str, limit: int, beside: int = 0) -> int:
        """Return how many more tokens pay, one by one, as far as the credit covers them."""
        with self._lock:
            expected, reach = 1.0 + beside, 1.0
            for name, at in places(sources[: self.longest]):
                reach *= self._record(name).acceptance()[at]
                expected += reach
            more, rows, plain = 0, len(sources) + 1 + beside, self._costs.of_pass(1 + beside)
            passes = (self._costs.of_pass(rows) + self._costs.of_draft(sources[0], len(sources))) / plain
            for a in self._record(source).acceptance()[: max(0, min(limit, self.longest - len(sources)))]:
                reach *= a
                row = self._costs.of_pass(rows + 1) - self._costs.of_pass(rows)
                dearer = (row + self._costs.step(source)) / plain
                if reach * passes <= dearer * expected or not self._credit.covers(passes + dearer):
                    break
                more, rows, passes, expected = more + 1, rows + 1, passes + dearer, expected + reach
            return more

    def floors(self, source: str, k: int, beside: int = 0) -> tuple[float, ...]:
        """Return the products of chances below which a draft ends, token by token; () where little is known of them."""
        with self._lock:
            record = self._record(source)
            if not record.knows_chances:
                return ()
            floors = self._of_tokens(beside).floors(source, record.acceptance(), k)
            return tuple(max(0.0, floor) ** (1 / record.exponent) for floor in floors)  # more rows may cost less

    def worth(self, source: str, chances: Sequence[float], beside: int = 0) -> int:
        """Return how many tokens that `source` takes to be right with `chances` are worth a row."""
        with self._lock:
            record = self._record(source)
            if not record.knows_chances:
                return len(chances)
            return self._of_tokens(beside).kept(list(accumulate(record.right(chances), mul)))

    def may_catch_up(self, limits: Mapping[str, int], source: str, rows: int, spent: float = 0.0) -> bool:
        """Return whether drafts of `source`, expected or hoped for, win within `HORIZON` tokens what reading takes, and
        purse and credit cover a chunk and a draft. A round reads for no longer than a plain pass takes, or a chunk."""
        with self._lock:
            planned = PlannedPass(self._costs, {one: self._record(one).acceptance() for one in limits}, 1, 0)
            bounded, record = {one: min(limit, self.longest) for one, limit in limits.items()}, self._record(source)
            k, gain = planned.worth(source, bounded, record.overdue(0))
            chunk = self._costs.of_reading(source, min(rows, MAX_ROWS)) / (plain := self._costs.of_pass(1))
            passes = planned.passes(planned.drafts(source, k)) + max(0.0, chunk - self._credit.purse)
            pays = k > 0 and chunk * max(1.0, rows / MAX_ROWS) <= HORIZON * gain
            may = pays and (spent == 0 or spent / plain + chunk <= 1) and self._credit.covers(passes)
            record.rounds += not may
            return may

    def observe_reading(self, source: str, rows: int, seconds: float) -> None:
        """Correct the cost of reading, and charge it to the purse, then to the credit."""
        with self._lock:
            self._costs.correct_reading(source, rows, seconds)
            self._credit.charge_reading(self._costs.of_reading(source, rows) / self._costs.of_pass(1))

    def observe_prompt(self, seconds: float) -> None:
        """Let drafters read for what keeps the reading of a prompt, by the backbone and by them, within `FLOOR`."""
        with self._lock:
            self._credit.add_prompt(seconds / self._costs.of_pass(1))

    def observe(self, drafts: Sequence[Drafted], beside: int, draft_seconds: float, verify_seconds: float) -> None:
        """Correct costs, credit and acceptance records by the outcome of a pass whose costs are known."""
        texts = len(drafts)
        with self._lock:
            if beside or (texts > 1 and not self._costs.of_texts):
                return  # what such a pass costs is not known
            rows = texts + sum(len(one.sources) for one in drafts)
            self._costs.correct_pass(rows, verify_seconds, texts)
            # Tokens that a composite added to a draft cost nothing.
            own = [own for one in drafts if (own := one.own) is not None]
            if own:
                self._paused.clear()
            if own and draft_seconds > 0:
                self._costs.correct_drafts(own, draft_seconds)
            # From the averages: that a neighbour slowed the machine down for a round says nothing about drafts.
            seconds = self._costs.of_pass(rows, texts) + sum(self._costs.of_draft(*draft) for draft in own)
            won = sum(one.accepted for one in drafts) / texts
            passes = seconds / self._costs.of_pass(texts, texts)
            self._credit.add_round(won, passes)
            for sources, accepted, chances, given_up in drafts:
                if chances:
                    source = (sources + given_up)[0]
                    checked = sources.count(source)
                    alone = self._costs.of_pass(1 + checked) + self._costs.of_draft(source, len(chances))
                    passes = alone / self._costs.of_pass(1)
                    self._record(source).note_chances(chances, checked, min(accepted, checked), passes)
                begin = 0
                for source, tokens in Counter(sources[: self.longest]).items():  # one source's after the other's
                    record = self._record(source)
                    if begin <= accepted:
                        record.note(tokens, min(accepted - begin, tokens))
                    record.drafted[:tokens] = [record.rounds] * tokens
                    begin += tokens

    def _of_tokens(self, beside: int) -> TokenPrices:
        if beside not in self._prices:
            self._prices[beside] = TokenPrices(self._costs, 1 + beside, self._rate, self.longest)
        return self._prices[beside]

    def _pause(self, limits: Mapping[str, int]) -> int:
        """Return the rounds until a text with these limits, which gets no draft now, may get one."""
        records = [self._record(source) for source, limit in limits.items() if limit > 0]
        tries = [record.patience[0] - (record.rounds - record.drafted[0]) for record in records]
        return min(PAUSE, *(rounds for rounds in tries if rounds > 0), self._credit.rounds_to_save(PAUSE))

    def _record(self, source: str) -> AcceptanceRecord:
        if source not in self._records:
            self._records[source] = AcceptanceRecord(self.longest, source)
        return self._records[source]
