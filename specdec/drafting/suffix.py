"""Suffix matches: drafts that repeat the tokens after an earlier occurrence of the text's ending.

What: `SuffixDrafter`, and `SuffixMatches`, its proposer of one text; `PredictionMatches`, which looks for the ending in
a text that somebody expects as the answer. Why an index of short n-grams and not a suffix automaton: only a few
occurrences are looked at, and a dictionary of lists grows by one entry a token.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from specdec.cache import KVCache
from specdec.drafting.protocol import Draft
from specdec.engine.sampling import Noise
from specdec.model.decoder import Decoder
from specdec.model.states import States

PREDICTION = "prediction"  # the source of drafts from an expected answer
_START = -1  # stands before the first token of an answer, and of its prediction; no token


class SuffixDrafter:
    """Propose the tokens that followed the longest earlier occurrence of the text's ending.

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
    """Propose for one text, from its n-grams and where each ends: the proposer of a `SuffixDrafter`."""

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

    def match(self, tokens: Sequence[int]) -> int:
        """Return how many tokens of the ending of `tokens` occurred before."""
        self._index(tokens)
        return self._longest(tokens)[1]

    def _following(self, tokens: Sequence[int], k: int) -> Sequence[int]:
        end, length = self._longest(tokens)
        return following(tokens, end, length, k, self._never)

    def _longest(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Return the end of the longest match of the ending of `tokens`, and how many tokens matched."""
        best, longest = 0, 0
        for end in reversed(self._ends.get(tuple(tokens[-self.min_match :]), [])[-self.candidates :]):
            length = match_length(tokens, end, tokens, self.min_match, self.max_match)
            if length > longest:
                best, longest = end, length
        return best, longest

    def _index(self, tokens: Sequence[int]) -> None:
        """Note the end of every n-gram, but for the text's own ending: it must not find itself."""
        n = self.min_match
        for end in range(max(n, self._indexed + 1), len(tokens)):
            self._ends.setdefault(tuple(tokens[end - n : end]), []).append(end)
        self._indexed = max(self._indexed, len(tokens) - 1)


class PredictionMatches:
    """Propose from an expected answer: what follows there where the answer's ending occurs.

    The answer and its prediction begin at the same place, and where they part, a match of `MIN` tokens brings them
    together again. Of matches of one length, the first from there on wins: a text with repetitions is followed in its
    order.
    """

    MIN, MAX = 2, 24  # tokens that are compared
    CANDIDATES = 16  # occurrences of the ending that are looked at, half of them before the place where both parted
    name, max_draft = PREDICTION, SuffixDrafter.max_draft

    def __init__(self, prediction: Sequence[int], prompt: int, never: frozenset[int] = frozenset()) -> None:
        """Prepare for an answer after a prompt of `prompt` tokens. `never`: tokens that are not proposed."""
        self._text, self._prompt, self._never = [_START, *prediction], prompt, never
        self._ends: dict[tuple[int, ...], list[int]] = {}
        for end in range(self.MIN, len(self._text)):
            self._ends.setdefault(tuple(self._text[end - self.MIN : end]), []).append(end)
        self._at, self._seen = 1, prompt  # how far the prediction was followed, and tokens of the text by then

    def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
        """Return what follows the longest match of the answer's ending: up to `k` tokens, two for each that matched."""
        end, length = self._longest(tokens)
        return Draft.by(self.name, following(self._text, end, length, k, self._never))

    def match(self, tokens: Sequence[int]) -> int:
        """Return how many tokens of the answer's ending the prediction has; the place before the first token counts."""
        return self._longest(tokens)[1]

    def _longest(self, tokens: Sequence[int]) -> tuple[int, int]:
        """Return the end of the longest match of the answer's ending, and how many tokens matched."""
        while self._seen < len(tokens) and self._text[self._at : self._at + 1] == [tokens[self._seen]]:
            self._at, self._seen = self._at + 1, self._seen + 1
        begin = max(self._prompt, len(tokens) - self.MAX)
        ending = [_START, *tokens[begin:]] if begin == self._prompt else tokens[begin:]
        ends = self._ends.get(tuple(ending[-self.MIN :]), [])
        middle, half = bisect_left(ends, self._at), self.CANDIDATES // 2
        best, longest = 0, 0
        for end in (*ends[middle : middle + half], *reversed(ends[max(0, middle - half) : middle])):
            length = match_length(self._text, end, ending, self.MIN, self.MAX)
            if length > longest:
                best, longest = end, length
        if longest:
            self._at, self._seen = best, len(tokens)
        return best, longest


def match_length(text: Sequence[int], end: int, ending: Sequence[int], least: int, most: int) -> int:
    """Return how many tokens of `text` before `end` equal the last ones of `ending`; `least` of them are known to."""
    length = least
    limit = min(most, end, len(ending))
    while length < limit and text[end - length - 1] == ending[-length - 1]:
        length += 1
    return length


def following(text: Sequence[int], end: int, length: int, k: int, never: frozenset[int]) -> Sequence[int]:
    """Return up to `k` tokens of `text` from `end` on, where a match of `length` tokens ends; none of `never`."""
    # A match is worth about as many tokens as it is long: a short one is often a coincidence.
    found = text[end : end + min(k, 2 * length)] if length else ()
    return found[: next((i for i, token in enumerate(found) if token in never), len(found))]
