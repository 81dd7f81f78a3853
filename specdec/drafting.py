"""Drafters: whatever proposes tokens. Here the protocol, the two that need no training, and several that compete.

A drafter may propose anything, at any length up to the one asked for: verification decides what is emitted, so a bad
drafter costs time and never a word.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from specdec.cache import KVCache
from specdec.control import DraftLength
from specdec.model.decoder import Decoder
from specdec.sampling import Noise


@dataclass(frozen=True)
class Draft:
    """Tokens proposed for one round, and who proposed each of them."""

    tokens: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()

    @classmethod
    def by(cls, source: str, tokens: Sequence[int]) -> Draft:
        """All of `tokens` are one drafter's."""
        return cls(tuple(tokens), (source,) * len(tokens))


class Drafter(Protocol):
    """Proposes tokens after the pending one.

    `bind` is called before every request, cheaply when the backbone is the last one, and refuses one that the drafter
    was not made for; `start` once per row of a request. One that wants more of the backbone's states names their layers
    in an attribute `aux_layers`, a tuple that may change with `bind`; without it there are none.
    """

    name: str
    max_draft: int  # the longest draft that it can usefully make; 0: never proposes

    def bind(self, backbone: Decoder) -> None:
        """Prepare for `backbone`. Raises ValueError when vocabulary or hidden size do not fit."""

    def start(self, cache: KVCache, noise: Noise | None = None) -> None:
        """A new request begins; `cache` holds its committed K/V from now on.

        `noise`: what its tokens are sampled with, None where they are not. A drafter that has scores of its own may add
        it to them; that it knows the noise cannot be seen in what is emitted, because the noise alone and the
        backbone's scores decide that.
        """

    def propose(self, tokens: Sequence[int], hidden: Tensor, k: int) -> Draft:
        """Up to `k` tokens to follow `tokens`.

        `tokens`: everything so far, the pending token last. `hidden` [hidden_size]: the backbone's state (after its
        final norm) that chose the pending token, followed by what left each of the `aux_layers` at the same position.
        """


def aux_layers_of(drafter: Drafter) -> tuple[int, ...]:
    """The backbone's layers whose outputs `drafter` wants with every state."""
    return tuple(getattr(drafter, "aux_layers", ()))


class NoDraft:
    """Proposes nothing: plain decoding. `aux_layers`: whose states somebody else wants to hear."""

    name = "none"
    max_draft = 0

    def __init__(self, aux_layers: Sequence[int] = ()) -> None:
        self.aux_layers = tuple(aux_layers)

    def bind(self, backbone: Decoder) -> None:
        pass

    def start(self, cache: KVCache, noise: Noise | None = None) -> None:
        pass

    def propose(self, tokens: Sequence[int], hidden: Tensor, k: int) -> Draft:
        return Draft()


class SuffixDrafter:
    """Proposes what followed the longest earlier occurrence of the text's current ending.

    Training-free and nearly free to run; good where the answer repeats the prompt or itself (editing, summaries,
    code, JSON). Known as prompt lookup or n-gram drafting in transformers, vLLM and llama.cpp.

    `min_match`, `max_match`: tokens of the ending that must match; among the latest occurrences of a `min_match`-gram
    (at most `candidates` of them) the longest match wins, then the latest.
    """

    max_draft = 16

    def __init__(self, min_match: int = 2, max_match: int = 24, candidates: int = 16, name: str = "suffix") -> None:
        if not 1 <= min_match <= max_match:
            raise ValueError(f"need 1 <= min_match <= max_match, got {min_match} and {max_match}")
        self.name, self.min_match, self.max_match, self.candidates = name, min_match, max_match, candidates
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._indexed = 0

    def bind(self, backbone: Decoder) -> None:
        pass

    def start(self, cache: KVCache, noise: Noise | None = None) -> None:
        self._ends, self._indexed = {}, 0

    def propose(self, tokens: Sequence[int], hidden: Tensor, k: int) -> Draft:
        self._index(tokens)
        return Draft.by(self.name, self._following(tokens, k))

    def continuing(self, tokens: Sequence[int], draft: Draft, k: int) -> Draft:
        """Up to `k` tokens to follow `draft`, which follows `tokens`; the draft itself is not searched."""
        self._index(tokens)
        return Draft.by(self.name, self._following([*tokens, *draft.tokens], k))

    def matches(self, tokens: Sequence[int]) -> bool:
        """Whether the ending of `tokens` was there before."""
        self._index(tokens)
        return tuple(tokens[-self.min_match :]) in self._ends

    def _following(self, tokens: Sequence[int], k: int) -> Sequence[int]:
        best, length = 0, 0
        for end in reversed(self._ends.get(tuple(tokens[-self.min_match :]), [])[-self.candidates :]):
            match = self._match(tokens, end)
            if match > length:
                best, length = end, match
        # A match is worth about as many tokens as it is long: a short one is often a coincidence.
        return tokens[best : best + min(k, 2 * length)] if length else ()

    def _index(self, tokens: Sequence[int]) -> None:
        """Note where every n-gram ends, the text's own ending excepted: it must not find itself."""
        n = self.min_match
        for end in range(max(n, self._indexed + 1), len(tokens)):
            self._ends.setdefault(tuple(tokens[end - n : end]), []).append(end)
        self._indexed = max(self._indexed, len(tokens) - 1)

    def _match(self, tokens: Sequence[int], end: int) -> int:
        """How many tokens before `end` equal the text's ending."""
        length = self.min_match
        limit = min(self.max_match, end)
        while length < limit and tokens[end - length - 1] == tokens[-length - 1]:
            length += 1
        return length


class Joined:
    """Suffix matches and `other`, which compete for every round; a draft of `other` goes on with a suffix match of
    `LONG` tokens or more where it leads to one.

    A long match is right more often than most drafters, a short one (`SHORT` tokens or more) less often, and both cost
    next to nothing: the draft length keeps a record of each of the three, and picks who drafts.
    """

    LONG, SHORT = 4, 2

    def __init__(self, other: Drafter) -> None:
        self.take(other)

    def take(self, other: Drafter) -> None:
        """`other` from now on; where it never proposes, matches are all of one kind."""
        self.other, alone = other, other.max_draft == 0
        self.suffix = SuffixDrafter(self.SHORT if alone else self.LONG)
        self.short = SuffixDrafter(self.SHORT, name="suffix-short")
        self.name = self.suffix.name if alone else f"{self.suffix.name}+{other.name}"
        self.max_draft = max(self.suffix.max_draft, other.max_draft)

    @property
    def aux_layers(self) -> tuple[int, ...]:
        return aux_layers_of(self.other)

    def bind(self, backbone: Decoder) -> None:
        self.other.bind(backbone)

    def start(self, cache: KVCache, noise: Noise | None = None) -> None:
        for one in (self.suffix, self.short, self.other):
            one.start(cache, noise)

    def proposers(self, tokens: Sequence[int]) -> tuple[Drafter, ...]:
        """Who may draft after `tokens`, the preferred one first."""
        if self.suffix.matches(tokens):
            return self.suffix, self.other
        return (self.other, self.short) if self.short.matches(tokens) else (self.other,)

    def propose(self, tokens: Sequence[int], hidden: Tensor, k: int) -> Draft:
        return self.proposers(tokens)[0].propose(tokens, hidden, k)


def drafted(drafter: Drafter, lengths: DraftLength, tokens: Sequence[int], hidden: Tensor, room: int) -> Draft:
    """A round's draft, of at most `room` tokens: who makes it, and how long it is, `lengths` decide."""
    able = drafter.proposers(tokens) if isinstance(drafter, Joined) else (drafter,)
    by_name = {one.name: one for one in able}
    name, k = lengths.choose({one.name: min(room, one.max_draft) for one in able})
    if k == 0:
        return Draft()
    draft = by_name[name].propose(tokens, hidden, k)
    assert len(draft.tokens) <= k
    if isinstance(drafter, Joined) and draft.tokens and by_name[name] is drafter.other:
        more = drafter.suffix.continuing(tokens, draft, room - len(draft.tokens))
        kept = lengths.extend(draft.sources, drafter.suffix.name, len(more.tokens))
        draft = Draft(draft.tokens + more.tokens[:kept], draft.sources + more.sources[:kept])
    return draft
