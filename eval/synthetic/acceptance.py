"""Drafts that are right as often as one asks: the gain of drafting at an acceptance that nobody has measured.

What: a drafter that lets another drafter do its work, so that drafts have their real cost, and then replaces its
proposals by tokens of the plain run's text and by wrong ones, at given rates. With random weights no drafter is ever
right, and time still has to be measured. Such figures are labelled synthetic wherever they are shown.
"""

from __future__ import annotations

from collections.abc import Sequence

from specdec.cache import KVCache
from specdec.drafting.protocol import Draft, Drafter, Proposer
from specdec.engine.sampling import Noise, mix
from specdec.model.decoder import Decoder
from specdec.model.states import States


class SyntheticAcceptance:
    """Draft at the cost of `drafter`; token i follows `answer` with probability `rates[i]` where the tokens before it
    did.

    `answer`: prompt and plain text. The last rate is that of all later tokens. Which drafts are right depends on `seed`
    and on the position alone.
    """

    name = "synthetic"

    def __init__(
        self, drafter: Drafter, answer: Sequence[int], rates: Sequence[float], vocabulary: int, seed: int = 0
    ) -> None:
        self.drafter, self.answer, self.rates = drafter, list(answer), list(rates)
        self.vocabulary, self.seed = vocabulary, seed
        self.max_draft = max(drafter.max_draft, 1)

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """Return the layers whose outputs the wrapped drafter wants."""
        return self.drafter.aux_layers

    def bind(self, backbone: Decoder) -> None:
        """Bind the wrapped drafter. Raises ValueError as that drafter does."""
        self.drafter.bind(backbone)

    def start(self, cache: KVCache, noise: Noise | None = None) -> SyntheticDrafts:
        """Return the proposer of one text, around the wrapped drafter's."""
        return SyntheticDrafts(self, self.drafter.start(cache, noise))


class SyntheticDrafts:
    """Propose for one text: the proposer of `SyntheticAcceptance`."""

    name = SyntheticAcceptance.name

    def __init__(self, made: SyntheticAcceptance, proposer: Proposer) -> None:
        self.made, self.proposer, self.max_draft = made, proposer, made.max_draft

    def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
        """Let the wrapped proposer draft, for its time, and return up to `k` tokens at the asked rates instead."""
        self.proposer.propose(tokens, states, k)
        made, drafted = self.made, list[int]()
        for i, token in enumerate(made.answer[len(tokens) : len(tokens) + k]):
            rate = made.rates[min(i, len(made.rates) - 1)]
            chance = mix(mix(made.seed) ^ (len(tokens) << 8) ^ i) / 2**64
            drafted.append(token if chance < rate else (token + 1) % made.vocabulary)
        return Draft.by(self.name, drafted)
