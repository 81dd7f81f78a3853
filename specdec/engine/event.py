"""What a pass did for one text."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from specdec.engine.sequence import Sequence
from specdec.engine.verify import Verdict


class Event(NamedTuple):
    """Hold one sequence's result of a pass: the tokens that it emitted, and the logits [emitted, vocab] that chose
    them.

    Without tokens the sequence has ended otherwise: it was cancelled, or `sequence.error` is what its own sampler or
    stop condition raised. `sequence.finish` tells whether it has ended.
    """

    sequence: Sequence
    verdict: Verdict
    logits: Tensor | None = None

    @property
    def tokens(self) -> tuple[int, ...]:
        """Return the emitted token ids."""
        return self.verdict.tokens
