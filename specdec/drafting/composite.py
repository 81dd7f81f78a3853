"""Several drafters that compete for every round: suffix matches, and a trained one; and a text's prediction.

What: `CompositeDrafter`, and `CompositeProposer`, its proposer of one text; `PredictedProposer`, which adds an expected
answer to whatever else proposes. The draft length decides which of them drafts, from the acceptance record of each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from specdec.cache import KVCache
from specdec.drafting.protocol import Composite, Draft, Drafter, Proposer, proposer_for
from specdec.drafting.suffix import PredictionMatches, SuffixDrafter, SuffixMatches
from specdec.engine.sampling import Noise
from specdec.model.decoder import Decoder
from specdec.model.states import States


class CompositeDrafter:
    """Let suffix matches and `other` compete for every round. A draft of `other` goes on with a suffix match of `LONG`
    tokens or more, where it leads to one.

    A long match is right more often than most drafters, a short one (`SHORT` tokens or more) less often, and both cost
    next to nothing. The draft length keeps a record of each of the three, and picks the source.
    """

    LONG, SHORT = 3, 2

    def __init__(self, other: Drafter) -> None:
        self.take(other)

    def take(self, other: Drafter) -> None:
        """Draft with `other` from now on; where `other` never proposes, all suffix matches are of one kind."""
        self.other, alone = other, other.max_draft == 0
        self.suffix = SuffixDrafter(self.SHORT if alone else self.LONG)
        self.short = SuffixDrafter(self.SHORT, name="suffix-short")
        self.name = self.suffix.name if alone else f"{self.suffix.name}+{other.name}"
        self.max_draft = max(self.suffix.max_draft, other.max_draft)

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """Return the layers whose outputs the other drafter wants; suffix matches want none."""
        return self.other.aux_layers

    def bind(self, backbone: Decoder) -> None:
        """Bind all drafters. Raises ValueError as the other drafter does."""
        for one in (self.suffix, self.short, self.other):
            one.bind(backbone)

    def start(self, cache: KVCache, noise: Noise | None = None) -> CompositeProposer:
        """Return the proposer of one text, around those of all sources."""
        return CompositeProposer(self.suffix.start(), self.short.start(), self.other.start(cache, noise))


class CompositeProposer:
    """Propose with suffix matches of one text, long and short, or with `other`."""

    def __init__(self, suffix: SuffixMatches, short: SuffixMatches, other: Proposer) -> None:
        self.suffix, self.short, self.other = suffix, short, other
        self.name, self.max_draft = other.name, max(suffix.max_draft, other.max_draft)

    def able(self, tokens: Sequence[int]) -> tuple[Proposer, ...]:
        """Return the sources that can draft now, the preferred first: a long match, the other drafter, a short
        match."""
        if self.suffix.matches(tokens):
            return self.suffix, self.other
        return (self.other, self.short) if self.short.matches(tokens) else (self.other,)

    def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
        """Return the draft of the preferred source."""
        return self.able(tokens)[0].propose(tokens, states, k)

    def extend(self, tokens: Sequence[int], draft: Draft, k: int) -> Draft:
        """Return up to `k` tokens of a long match to follow a draft of the other drafter; none where a match began the
        draft."""
        if draft.sources[0] != self.other.name:
            return Draft()
        return self.suffix.extend(tokens, draft, k)


class PredictedProposer:
    """Propose from a text's `prediction`, or as `other` does.

    Suffix matches and the prediction are looked up alike, and of the two the longer match counts: a file that stands in
    the prompt and in the prediction is one source, and a prediction that does not fit leaves suffix matches alone.
    """

    def __init__(self, prediction: PredictionMatches, other: Proposer) -> None:
        self.prediction, self.other = prediction, other
        self._composite = cast(Composite, other) if hasattr(other, "able") else None
        self.name, self.max_draft = other.name, max(prediction.max_draft, other.max_draft)

    def able(self, tokens: Sequence[int]) -> tuple[Proposer, ...]:
        """Return the sources that can draft now: the prediction before the others where its match is long."""
        others = (self.other,) if self._composite is None else self._composite.able(tokens)
        length = self.prediction.match(tokens)
        matches = [one for one in others if isinstance(one, SuffixMatches)]
        if length == 0 or any(one.match(tokens) > length for one in matches):
            return others
        rest = tuple(one for one in others if one not in matches and one.max_draft > 0)
        return (self.prediction, *rest) if length >= CompositeDrafter.LONG else (*rest, self.prediction)

    def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
        """Return the draft of the preferred source."""
        return self.able(tokens)[0].propose(tokens, states, k)

    def extend(self, tokens: Sequence[int], draft: Draft, k: int) -> Draft:
        """Return up to `k` more tokens as `other` does, where `draft` is its own."""
        return Draft() if self._composite is None else self._composite.extend(tokens, draft, k)


def proposer_of_text(
    drafter: Drafter, backbone: Decoder, cache: KVCache, noise: Noise | None, prediction: Sequence[int], prompt: int
) -> Proposer:
    """Return the proposer of a text of `backbone`, as `drafter` starts it; before it the text's `prediction`, where it
    has one, of an answer to `prompt` tokens. Raises ValueError as `proposer_for` does."""
    proposer = proposer_for(drafter, backbone, cache, noise)
    if not prediction:
        return proposer
    return PredictedProposer(PredictionMatches(prediction, prompt, backbone.spec.media_ids), proposer)
