"""The outcomes of one source's drafts: acceptance by position, and when a position is due to be tried again."""

from __future__ import annotations

PRIOR = 0.65  # a_1 before anything was seen
PRIOR_ROUNDS, MISFIT = 6, 4.0  # what a prior counts for; half of it where rounds * (seen - prior)^2 is `MISFIT`
MEMORY = 24  # rounds that an average of acceptance goes back: one of fewer is mostly noise, one of more is slow
RETRY, RETRY_MOST = 12, 48  # rounds until a position that is not drafted is tried again; twice as many after a failure


class AcceptanceRecord:
    """The outcomes of one source's drafts, by position: `average` outcome, over how many rounds (`seen`), the source's
    round of the last draft (`drafted`), and how many rounds without one are enough (`patience`)."""

    def __init__(self, longest: int) -> None:
        """Begin without outcomes, for drafts of up to `longest` tokens."""
        self.rounds = 0  # in which the source could have drafted
        self.average, self.seen = [0.0] * longest, [0] * longest
        self.drafted, self.patience = [0] * longest, [RETRY] * longest
        self.trying: int | None = None  # a position that is tried and not yet heard of

    def acceptance(self) -> list[float]:
        """Return a_i of every position, from 0."""
        before, chances = PRIOR, []
        for average, seen in zip(self.average, self.seen, strict=True):
            misfit = seen * (average - before) ** 2
            weight = PRIOR_ROUNDS / (1 + misfit / MISFIT)
            before = (weight * before + seen * average) / (weight + seen)
            chances.append(before)
        return chances

    def overdue(self, position: int) -> bool:
        """Return whether nobody has drafted `position` for long enough."""
        return self.rounds - self.drafted[position] >= self.patience[position]

    def note(self, position: int, accepted: bool) -> None:
        """Note that a draft reached `position`, and whether its token there was accepted."""
        if position == self.trying:
            self.trying = None
            if accepted:  # the less expected, the less earlier outcomes count, and the sooner the next try
                expected = self.acceptance()[position]
                self.seen[position] = round(expected * self.seen[position])
                self.patience[position] = max(1, round(expected * RETRY))
            else:
                self.patience[position] = min(max(RETRY, 2 * self.patience[position]), RETRY_MOST)
        elif not accepted:
            self.patience[position] = max(self.patience[position], RETRY)
        self.seen[position] = min(self.seen[position] + 1, MEMORY)
        self.average[position] += (accepted - self.average[position]) / self.seen[position]
