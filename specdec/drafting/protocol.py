"""Drafters: whatever proposes tokens. Here the protocol, the two that need no training, and several that compete.

A drafter may propose anything, at any length up to the one asked for: verification decides what is emitted, so a bad
drafter costs time and never a word.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from torch import Tensor

from specdec.cache import KVCache
from specdec.drafting.draft_length import DraftLength
from specdec.engine.sampling import Noise
from specdec.model.decoder import Decoder


@dataclass(frozen=True)
class Draft:
    """Tokens proposed for one round, and who proposed each of them."""

    tokens: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()

    @classmethod
    def by(cls, source: str, tokens: Sequence[int]) -> Draft:
        """All of `tokens` are one drafter's."""
        return cls(tuple(tokens), (source,) * len(tokens))


class Proposer(Protocol):
    """Proposes the drafts of one text. What it knows of the text is its own: several texts may be decoded at once."""

    name: str  # what its drafts are called in statistics and in acceptance records
    max_draft: int  # the longest draft that it can usefully make; 0: never proposes

    def propose(self, tokens: Sequence[int], hidden: Tensor, k: int) -> Draft:
        """Up to `k` tokens to follow `tokens`.

        `tokens`: everything so far, the pending token last. `hidden` [hidden_size]: the backbone's state (after its
        final norm) that chose the pending token, followed by what left each of the drafter's `aux_layers` at the same
        position.
        """


@runtime_checkable
class Composite(Protocol):
    """A proposer whose drafts are made by several proposers that compete; the draft length picks one of them."""

    name: str
    max_draft: int

    def able(self, tokens: Sequence[int]) -> tuple[Proposer, ...]:
        """Return who may draft after `tokens`, the preferred one first, each of another name."""

    def propose(self, tokens: Sequence[int], hidden: Tensor, k: int) -> Draft:
        """See `Proposer`."""

    def extend(self, tokens: Sequence[int], draft: Draft, k: int) -> Draft:
        """Return up to `k` more tokens, of one source, for `draft`, which one of `able` made to follow `tokens`."""


class Drafter(Protocol):
    """Makes a `Proposer` for every text.

    `bind` is called before `start`, cheaply when the backbone is the last one, and refuses one that the drafter was not
    made for; `start` for every text. No other thread calls either between the two. A drafter that wants more of the
    backbone's states names their layers in an attribute `aux_layers`, a tuple that may change with `bind`; without it
    there are none.
    """

    name: str
    max_draft: int  # of its proposers

    def bind(self, backbone: Decoder) -> None:
        """Prepare for `backbone`. Raises ValueError when vocabulary or hidden size do not fit."""

    def start(self, cache: KVCache, noise: Noise | None = None) -> Proposer:
        """Begin a text; `cache` holds its committed K/V from now on.

        The proposer may be the drafter itself where nothing is remembered of a text. `noise`: what the text's tokens
        are sampled with, None where they are not. A drafter that has scores of its own may add the noise to them; that
        it knows the noise cannot be seen in what is emitted, because the noise alone and the backbone's scores decide
        that.
        """


def aux_layers_of(drafter: Drafter) -> tuple[int, ...]:
    """The backbone's layers whose outputs `drafter` wants with every state."""
    return tuple(getattr(drafter, "aux_layers", ()))


_binding = threading.RLock()  # taken inside of `turn_to_compute`, never the other way round


@contextmanager
def bind_drafter(drafter: Drafter, backbone: Decoder) -> Iterator[Drafter]:
    """`drafter`, bound to `backbone` until the end of the block: one drafter object may serve several models."""
    with _binding:
        drafter.bind(backbone)
        yield drafter


def proposer_for(drafter: Drafter, backbone: Decoder, cache: KVCache, noise: Noise | None) -> Proposer:
    """What proposes for a text of `backbone`. Raises ValueError for a drafter whose `start` gives nothing."""
    with bind_drafter(drafter, backbone):
        proposer = drafter.start(cache, noise)
    if not callable(getattr(proposer, "propose", None)):
        raise ValueError(
            f"{type(drafter).__name__}.start returned {proposer!r}; it has to return what proposes for the text that "
            "begins: an object with name, max_draft and propose (see specdec.drafting.protocol.Proposer)"
        )
    return proposer


class NoDraft:
    """Proposes nothing: plain decoding. `aux_layers`: whose states somebody else wants to hear."""

    name = "none"
    max_draft = 0

    def __init__(self, aux_layers: Sequence[int] = ()) -> None:
        self.aux_layers = tuple(aux_layers)

    def bind(self, backbone: Decoder) -> None:
        pass

    def start(self, cache: KVCache, noise: Noise | None = None) -> NoDraft:
        return self

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

    def bind(self, backbone: Decoder) -> None:
        pass

    def start(self, cache: KVCache | None = None, noise: Noise | None = None) -> SuffixMatches:
        return SuffixMatches(self)


class SuffixMatches:
    """The n-grams of one text, and what followed them: the proposer of a `SuffixDrafter`."""

    def __init__(self, drafter: SuffixDrafter) -> None:
        self.name, self.max_draft = drafter.name, drafter.max_draft
        self.min_match, self.max_match, self.candidates = drafter.min_match, drafter.max_match, drafter.candidates
        self._ends: dict[tuple[int, ...], list[int]] = {}
        self._indexed = 0

    def propose(self, tokens: Sequence[int], hidden: Tensor, k: int) -> Draft:
        self._index(tokens)
        return Draft.by(self.name, self._following(tokens, k))

    def extend(self, tokens: Sequence[int], draft: Draft, k: int) -> Draft:
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


class CompositeDrafter:
    """Suffix matches and `other`, which compete for every round; a draft of `other` goes on with a suffix match of
    `LONG` tokens or more where it leads to one.

    A long match is right more often than most drafters, a short one (`SHORT` tokens or more) less often, and both cost
    next to nothing: the draft length keeps a record of each of the three, and picks who drafts.
    """

    LONG, SHORT = 4, 2

    def __init__(self, other: Drafter) -> None:
        self.take(other)

    def take(self, other: Drafter) -> None:
        """Draft with `other` from now on; where it never proposes, matches are all of one kind."""
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

    def start(self, cache: KVCache, noise: Noise | None = None) -> CompositeProposer:
        return CompositeProposer(self.suffix.start(), self.short.start(), self.other.start(cache, noise))


class CompositeProposer:
    """Propose with suffix matches of one text, long and short, or with `other`."""

    def __init__(self, suffix: SuffixMatches, short: SuffixMatches, other: Proposer) -> None:
        self.suffix, self.short, self.other = suffix, short, other
        self.name, self.max_draft = other.name, max(suffix.max_draft, other.max_draft)

    def able(self, tokens: Sequence[int]) -> tuple[Proposer, ...]:
        if self.suffix.matches(tokens):
            return self.suffix, self.other
        return (self.other, self.short) if self.short.matches(tokens) else (self.other,)

    def propose(self, tokens: Sequence[int], hidden: Tensor, k: int) -> Draft:
        return self.able(tokens)[0].propose(tokens, hidden, k)

    def extend(self, tokens: Sequence[int], draft: Draft, k: int) -> Draft:
        if draft.sources[0] != self.other.name:
            return Draft()
        return self.suffix.extend(tokens, draft, k)


class OpenEnd(NamedTuple):
    """A text whose next tokens are to be drafted.

    `tokens`: everything so far, the pending token last; `hidden` [hidden]: the state that chose it; `room`: the longest
    draft that can be used.
    """

    proposer: Proposer
    tokens: Sequence[int]
    hidden: Tensor
    room: int


def propose_together(texts: Sequence[OpenEnd], lengths: DraftLength, beside: int = 0, most: int = 64) -> list[Draft]:
    """Return a draft for each of `texts`, which share a pass; who makes it, and how long it is, `lengths` decide.

    `beside`: further rows of that pass. `most`: drafted tokens of all texts together.
    """
    able = [
        text.proposer.able(text.tokens) if isinstance(text.proposer, Composite) else (text.proposer,) for text in texts
    ]
    limits = [{one.name: min(text.room, one.max_draft) for one in ones} for text, ones in zip(texts, able, strict=True)]
    drafts = []
    rows = beside + len(texts)  # of the pass, as far as it is known
    for text, ones, (name, k) in zip(texts, able, lengths.plan(limits, beside, most), strict=True):
        draft = Draft()
        if k > 0:
            draft = next(one for one in ones if one.name == name).propose(text.tokens, text.hidden, k)
            assert len(draft.tokens) <= k
        if draft.tokens and isinstance(text.proposer, Composite):
            more = text.proposer.extend(text.tokens, draft, min(text.room, most) - len(draft.tokens))
            if more.tokens:
                kept = lengths.extend(draft.sources, more.sources[0], len(more.tokens), rows - 1)
                draft = Draft(draft.tokens + more.tokens[:kept], draft.sources + more.sources[:kept])
        rows, most = rows + len(draft.tokens), most - len(draft.tokens)
        drafts.append(draft)
    return drafts
