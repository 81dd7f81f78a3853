"""Draft length: how many tokens to ask for each round, zero included.

`AdaptiveLength` weighs what a draft costs against what it wins, both measured while it runs, for each source of drafts
apart. With a_i the probability that draft i is accepted given that the ones before it were, r_k = a_1...a_k,
S_k = r_1 + ... + r_k and T(k) = V(k + 1) + k d, it picks the k that maximises (1 + S_k) / T(k): expected tokens a
second. Lengths never change a token, only when it comes.

Left out: costs measured at load, sources joined in one draft.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

PRIOR, PRIOR_ROUNDS = 0.65, 6  # a_i before anything was seen, and how many rounds that counts for
FORGET = 0.03  # weight of the newest round in acceptance, once there are many: an average of fewer is mostly noise
WEIGHT = 0.15  # of the newest round in costs
COST_PER_ROW = 0.15  # V(T + 1) - V(T) as a share of V(1), until both have been measured
RETRY_EVERY = 16  # plain rounds after which one draft is tried again


class DraftLength(Protocol):
    """Chooses the draft length of a round and hears how it went."""

    def choose(self, limit: int, source: str) -> int:
        """Tokens that the drafter `source` is to draft next, 0..limit."""

    def observe(self, source: str, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        """What the last round drafted and accepted, and what its two halves cost."""


class FixedLength:
    """Always the same draft length."""

    def __init__(self, length: int) -> None:
        if length < 0:
            raise ValueError(f"draft_length must be 0 or more, or 'adaptive'; got {length}")
        self.length = length

    def choose(self, limit: int, source: str) -> int:
        return min(self.length, limit)

    def observe(self, source: str, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        pass


@dataclass
class _Record:
    """How a source of drafts has done: a_i, from how many rounds, d in seconds, and plain rounds that it had."""

    acceptance: list[float]
    seen: list[int]
    step_seconds: float = 0.0
    plain_rounds: int = 0


class AdaptiveLength:
    """The draft length with the best expected tokens per second, up to `longest`."""

    def __init__(self, longest: int = 8) -> None:
        self.longest = longest
        self._records: dict[str, _Record] = {}
        self._pass_seconds: dict[int, float] = {}  # rows -> V(rows)

    def choose(self, limit: int, source: str) -> int:
        limit, record = min(limit, self.longest), self._record(source)
        best, best_rate = 0, 1.0 / self._pass_cost(1)
        reach, expected = 1.0, 1.0
        for k in range(1, limit + 1):
            reach *= record.acceptance[k - 1]
            expected += reach
            rate = expected / (self._pass_cost(k + 1) + k * record.step_seconds)
            if rate > best_rate:
                best, best_rate = k, rate
        if best == 0 and limit > 0:
            record.plain_rounds += 1
            if record.plain_rounds % RETRY_EVERY == 0:  # so that 0 is not for ever
                return 1
        return best

    def observe(self, source: str, drafted: int, accepted: int, draft_seconds: float, verify_seconds: float) -> None:
        rows = drafted + 1
        self._pass_seconds[rows] = _blend(self._pass_seconds.get(rows), verify_seconds)
        if not drafted:
            return
        record = self._record(source)
        record.step_seconds = _blend(record.step_seconds or None, draft_seconds / drafted)
        for i in range(min(accepted + 1, drafted, self.longest)):  # only positions that were reached
            record.seen[i] += 1
            weight = max(FORGET, 1 / record.seen[i])
            record.acceptance[i] += weight * (float(i < accepted) - record.acceptance[i])

    def _record(self, source: str) -> _Record:
        if source not in self._records:
            self._records[source] = _Record([PRIOR] * self.longest, [PRIOR_ROUNDS] * self.longest)
        return self._records[source]

    def _pass_cost(self, rows: int) -> float:
        """V(rows): as measured, or scaled from the nearest row count that was."""
        if rows in self._pass_seconds:
            return self._pass_seconds[rows]
        if not self._pass_seconds:
            return 1.0 + COST_PER_ROW * (rows - 1)
        nearest = min(self._pass_seconds, key=lambda known: abs(known - rows))
        return self._pass_seconds[nearest] * (1 + COST_PER_ROW * (rows - 1)) / (1 + COST_PER_ROW * (nearest - 1))


def _blend(average: float | None, newest: float) -> float:
    return newest if average is None else average + WEIGHT * (newest - average)
