"""Drafts that are right as often as one asks: what drafting would win at an acceptance that nobody has measured.

What: a drafter that lets another one do its work, so that drafts cost what they cost, and then replaces what was
proposed by tokens of the plain run's text and by wrong ones, at given rates. With random weights no drafter is ever
right, and time still has to be measured. Figures made so are labelled synthetic wherever they are shown.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from specdec.cache import KVCache
from specdec.drafting import Draft, Drafter, aux_layers_of
from specdec.model.decoder import Decoder
from specdec.sampling import Noise, mix


class SyntheticAcceptance:
    """`drafter`'s drafts, of which token i follows `answer` with probability `rates[i]` where those before it did.

    `answer`: prompt and plain text. The last rate is that of all later tokens. Which drafts are right depends on
    `seed` and on the position alone.
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
        return aux_layers_of(self.drafter)

    def bind(self, backbone: Decoder) -> None:
        self.drafter.bind(backbone)

    def start(self, cache: KVCache, noise: Noise | None = None) -> None:
        self.drafter.start(cache, noise)

    def propose(self, tokens: Sequence[int], hidden: Tensor, k: int) -> Draft:
        self.drafter.propose(tokens, hidden, k)
        drafted: list[int] = []
        for i, token in enumerate(self.answer[len(tokens) : len(tokens) + k]):
            rate = self.rates[min(i, len(self.rates) - 1)]
            chance = mix(mix(self.seed) ^ (len(tokens) << 8) ^ i) / 2**64
            drafted.append(token if chance < rate else (token + 1) % self.vocabulary)
        return Draft.by(self.name, drafted)
