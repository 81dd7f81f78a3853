"""Suffix matches: drafts that repeat the tokens after an earlier occurrence of the text's ending.

What: `SuffixDrafter`, and `SuffixMatches`, its proposer of one text. Why an index of short n-grams and not a suffix
automaton: only the latest few occurrences are looked at, and a dictionary of lists grows by one entry a token.
"""

from __future__ import annotations

from collections.abc import Sequence

from specdec.cache import KVCache
from specdec.drafting.protocol import Draft
from specdec.engine.sampling import Noise
from specdec.model.decoder import Decoder
from specdec.model.states import States


class SuffixDrafter:
    """Proposes the tokens that followed the longest earlier occurrence of the text's ending.

    It needs no training and costs next to nothing. It is good where the answer repeats the prompt or itself (editing,
    summaries, code, JSON). transformers, vLLM and llama.cpp call it prompt lookup or n-gram drafting.

    `min_match`, `max_match`: the least and the most tokens of the ending that are compared. Among the latest
    occurrences of a `min_match`-gram (at most `candidates` of them) the longest match wins, then the latest. A draft
    ends before a token of pictures or sound: a prompt has such tokens, and no answer does.
    """

    max_draft = 16
    aux_layers: tuple[int, ...] = ()

    def __init__(self, min_match: int = 2, max_match: int = 24, candidates: int = 16, name: str = "suffix") -> None:
        """Set the lengths of matches. Raises ValueError unless 1 <= min_match <= max_match."""
        if not 1 <= min_match <= max_match:
            raise ValueError(f"need 1 <= min_match <= max_match, got {min_match} and {max_match}")
        self.name, self.min_match, self.max_match, self.candidates = name, min_match, max_match, candidates
        self.never = frozenset[int]()  # tokens that are not proposed

    def bind(self, backbone: Decoder) -> None:
        """Note which tokens stand for media in the model's prompts."""
        self.never = backbone.spec.media_ids

    def start(self, cache: KVCache | None = None, noise: Noise | None = None) -> SuffixMatches:
        """Return the proposer of one text, which has no n-grams yet."""
        return SuffixMatches(self)


class SuffixMatches:
    """The n-grams of one text, and where each ends: the proposer of a `SuffixDrafter`."""

    def __init__(self, drafter: SuffixDrafter) -> None:
        self.name, self.max_draft = drafter.name, drafter.max_draft
        self.min_match, self.max_match, self.candidates = drafter.min_match, drafter.max_match, drafter.candidates
        self._never = drafter.never
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._indexed = 0

    def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
        """Return what followed the longest match of the ending of `tokens`: up to `k` tokens, two for each that
        matched."""
        self._index(tokens)
        return Draft.by(self.name, self._following(tokens, k))

    def extend(self, tokens: Sequence[int], draft: Draft, k: int) -> Draft:
        """Return up to `k` tokens to follow `draft`, which follows `tokens`; the draft itself is not searched."""
        self._index(tokens)
        return Draft.by(self.name, self._following([*tokens, *draft.tokens], k))

    def matches(self, tokens: Sequence[int]) -> bool:
        """Return whether the ending of `tokens` occurred before."""
        self._index(tokens)
        return tuple(tokens[-self.min_match :]) in self._ends

    def _following(self, tokens: Sequence[int], k: int) -> Sequence[int]:
        best, length = 0, 0
        for end in reversed(self._ends.get(tuple(tokens[-self.min_match :]), [])[-self.candidates :]):
            match = self._match(tokens, end)
            if match > length:
                best, length = end, match
        # A match is worth about as many tokens as it is long: a short one is often a coincidence.
        following = tokens[best : best + min(k, 2 * length)] if length else ()
        cut = next((i for i, token in enumerate(following) if token in self._never), len(following))
        return following[:cut]

    def _index(self, tokens: Sequence[int]) -> None:
        """Note the end of every n-gram, but for the text's own ending: it must not find itself."""
        n = self.min_match
        for end in range(max(n, self._indexed + 1), len(tokens)):
            self._ends.setdefault(tuple(tokens[end - n : end]), []).append(end)
        self._indexed = max(self._indexed, len(tokens) - 1)

    def _match(self, tokens: Sequence[int], end: int) -> int:
        """Return how many tokens before `end` equal the text's ending."""
        length = self.min_match
        limit = min(self.max_match, end)
        while length < limit and tokens[end - length - 1] == tokens[-length - 1]:
            length += 1
        return length
