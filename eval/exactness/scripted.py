"""A drafter that knows the answer, for `eval.exactness`: its drafts are ones that no real drafter makes on request."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.cache import KVCache
from specdec.drafting.protocol import Draft
from specdec.engine.sampling import Noise
from specdec.model.decoder import Decoder
from specdec.model.states import States


class ScriptedDrafter:
    """Draft from the plain run's text: all right, all wrong, right up to the middle, in turn.

    `answer`: prompt and emitted tokens. Lengths go round 1..`longest`; 3 kinds and 8 lengths have no common divisor, so
    that every kind meets every length. Where the text has already left `answer`, drafts are simply wrong.
    """

    name = "scripted"
    aux_layers: tuple[int, ...] = ()

    def __init__(self, answer: Sequence[int], vocabulary: int, longest: int = 8) -> None:
        self.answer, self.vocabulary, self.max_draft = list(answer), vocabulary, longest
        self.turn = 0

    def bind(self, backbone: Decoder) -> None:
        """Do nothing: the script needs no model."""

    def start(self, cache: KVCache, noise: Noise | None = None) -> ScriptedDrafter:
        """Begin the script anew, and return the drafter as the text's proposer."""
        self.turn = 0  # one text at a time: the script is of one answer
        return self

    def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
        """Return the next draft of the script, of at most `k` tokens, to follow `tokens`."""
        length = min(1 + self.turn % self.max_draft, k)
        follow = self.answer[len(tokens) : len(tokens) + length]
        right = (len(follow), 0, len(follow) // 2)[self.turn % 3]
        self.turn += 1
        wrong = ((token + 1) % self.vocabulary for token in follow[right:])
        return Draft.by(self.name, (*follow[:right], *wrong))
