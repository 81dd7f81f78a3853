"""Drafters: the protocol, that of draft lengths, the binding of a drafter to a backbone, and plain decoding.

A drafter may propose any tokens, as many as it is asked for or fewer. Verification decides which tokens are emitted, so
a bad drafter costs time and never a word.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from operator import mul
from typing import NamedTuple, Protocol, runtime_checkable

from specdec.cache import KVCache
from specdec.engine.sampling import Noise
from specdec.model.decoder import Decoder
from specdec.model.states import States


@dataclass(frozen=True)
class Draft:
    """Hold the tokens proposed for one round, and the source of each.

    `chances`: how likely the first source takes each of its tokens to be, where it knows. `given_up`: the sources of
    further tokens, which were drafted and are not worth a row; their chances come last.
    """

    tokens: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()
    chances: tuple[float, ...] = ()
    given_up: tuple[str, ...] = ()

    @classmethod
    def by(cls, source: str, tokens: Sequence[int], chances: Sequence[float] = ()) -> Draft:
        """Make a draft whose tokens all come from one source."""
        return cls(tuple(tokens), (source,) * len(tokens), tuple(chances))

    def then(self, more: Draft) -> Draft:
        """Return the draft with the tokens of `more` after its own."""
        return Draft(self.tokens + more.tokens, self.sources + more.sources, self.chances)

    def checked(self, accepted: int) -> Drafted:
        """Return what a draft length learns of the draft, of which `accepted` tokens were accepted."""
        return Drafted(self.sources, accepted, self.chances, self.given_up)

    def first(self, count: int) -> Draft:
        """Return the draft of the first `count` tokens."""
        given_up = self.sources[count:] + self.given_up
        return Draft(self.tokens[:count], self.sources[:count], self.chances, given_up)

    def allowed(self, count: int) -> Draft:
        """Return the draft of the first `count` tokens, where a constraint forbids the next one: its chance, and that
        of each token after it, is 0."""
        if count == len(self.tokens):
            return self
        chances = self.chances[:count] + (0.0,) * len(self.chances[count:])
        return replace(self.first(count), chances=chances)

    def sound(self) -> Draft:
        """Return the draft with chances of at most 1; without chances where one is below 0 or no number, or where there
        is not one for each token of the first source."""
        if not self.chances:
            return self
        own = self.sources.count(self.sources[0]) if self.sources else 0
        sound = len(self.chances) == own and all(chance >= 0 for chance in self.chances)
        return replace(self, chances=tuple(min(float(chance), 1.0) for chance in self.chances) if sound else ())


def tokens_until(chances: Sequence[float], floors: Sequence[float]) -> int:
    """Return how many tokens a draft has that ends after the first one where the product of `chances` so far is below
    its floor; all of them without `floors`."""
    reached = accumulate(chances, mul)
    below = (i for i, (reach, floor) in enumerate(zip(reached, floors, strict=False), 1) if reach < floor)
    return next(below, len(chances))


class Proposer(Protocol):
    """Propose the drafts of one text. Its knowledge of the text is its own: several texts may be decoded at once."""

    name: str  # of its drafts, in statistics and in acceptance records
    max_draft: int  # the longest draft that it can usefully make; 0: never proposes

    def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
        """Return up to `k` tokens to follow `tokens`.

        `tokens`: the whole text so far, the pending token last; pictures and sound are runs of their soft tokens' ids,
        which say nothing of what is in them. `states`: of the row that chose the pending token, the backbone's last
        state and the outputs of the drafter's `aux_layers`, [hidden] each.
        """


class SureProposer(Proposer, Protocol):
    """Say besides how likely each drafted token is. Drafts of texts are asked for by `propose_while` alone.

    The draft length knows from that where further tokens, or the last ones, cost more than they win.
    """

    def propose_while(self, tokens: Sequence[int], states: States, k: int, floors: Sequence[float]) -> Draft:
        """Return a draft as `Proposer.propose` does, with the `chances` of its tokens. It ends after the first token i
        where the product of the chances so far is below floors[i]; (): never."""


class ReadingProposer(Protocol):
    """Read the text before drafting, as a model with a cache of its own has to.

    The draft length decides when it reads more than the few tokens that a round leaves, because a prompt may take
    longer than a draft wins.
    """

    name: str
    max_draft: int

    def behind(self, tokens: Sequence[int]) -> int:
        """Return how many of `tokens`, the whole text so far, are not read; the pending one always is among them."""

    def catch_up(self, tokens: Sequence[int]) -> int:
        """Read the next chunk of `tokens`, without the pending one; return how many tokens that were."""

    def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
        """Return a draft as `Proposer.propose` does, after reading whatever is left to read."""


@runtime_checkable
class Composite(Protocol):
    """Let several proposers compete; the draft length picks one of them for each draft."""

    name: str
    max_draft: int

    def able(self, tokens: Sequence[int]) -> tuple[Proposer, ...]:
        """Return the proposers that can draft after `tokens`, the preferred one first, each of another name."""

    def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
        """Return a draft as `Proposer.propose` does."""

    def extend(self, tokens: Sequence[int], draft: Draft, k: int) -> Draft:
        """Return up to `k` more tokens, of one source, for `draft`, which one of `able` made to follow `tokens`."""


class Drafted(NamedTuple):
    """Hold a draft that was checked: the source of each token, how many tokens were accepted, and what `Draft` says of
    chances and of tokens that were given up."""

    sources: tuple[str, ...]
    accepted: int
    chances: tuple[float, ...] = ()
    given_up: tuple[str, ...] = ()

    @property
    def own(self) -> tuple[str, int] | None:
        """Return the first source and how many tokens it drafted, those that were given up included; None: no draft."""
        made = self.sources + self.given_up
        return (made[0], made.count(made[0])) if made else None


class DraftLength(Protocol):
    """Choose source and length of each draft in a pass, and learn how the drafts did."""

    def may_draft(self, texts: int, beside: int = 0) -> bool:
        """Return whether drafts are worth planning in a pass of `texts` texts; `beside`: further rows of the pass."""

    def plan(self, limits: Sequence[Mapping[str, int]], beside: int = 0, most: int = 64) -> list[tuple[str, int]]:
        """Return, for each text of a pass, the source and the number of tokens to draft.

        `limits`: for each text the sources that may draft, the preferred first, and the longest draft of each;
        `beside`: further rows of the pass; `most`: tokens of all drafts together.
        """

    def extend(self, sources: Sequence[str], source: str, limit: int, beside: int = 0) -> int:
        """Return how many of `limit` more tokens, of `source`, to add to a draft whose tokens `sources` proposed;
        `beside`: the rows of the pass that are not this text's."""

    def floors(self, source: str, k: int, beside: int = 0) -> tuple[float, ...]:
        """Return, for each of the `k` tokens of a draft of `source`, a `SureProposer`, the product of chances below
        which the draft should end there; (): nowhere. `beside`: all rows of the pass but the text's pending one."""

    def worth(self, source: str, chances: Sequence[float], beside: int = 0) -> int:
        """Return how many of the tokens with these `chances`, drafted by `source`, are worth a row of the pass;
        `beside`: as in `floors`."""

    def may_catch_up(self, limits: Mapping[str, int], source: str, rows: int, spent: float = 0.0) -> bool:
        """Return whether `source`, a `ReadingProposer` of one text, should read a chunk of the `rows` tokens that it is
        behind. `limits`: as in `plan`, of the text; `spent`: the seconds that it has read for in this round."""

    def observe_reading(self, source: str, rows: int, seconds: float) -> None:
        """Learn that `source` has read `rows` tokens in so many seconds."""

    def observe_prompt(self, seconds: float) -> None:
        """Learn that the backbone has read a prompt, or a chunk of one, for so many seconds."""

    def observe(self, drafts: Sequence[Drafted], beside: int, draft_seconds: float, verify_seconds: float) -> None:
        """Learn the outcome of each text's draft in a pass, and the seconds of its two halves (of drafts 0: not known).
        `beside`: as in `plan`."""


class Drafter(Protocol):
    """Make a `Proposer` for every text.

    `bind` is called before `start`; `start` is called for every text. `bind` is cheap when the backbone is the last
    one, and refuses a backbone that the drafter was not made for. No other thread calls either between the two.
    """

    name: str
    max_draft: int  # of its proposers

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """Return the backbone's layers whose outputs `propose` wants besides the last state; () for none.

        A plain attribute does. `bind` may change it.
        """

    def bind(self, backbone: Decoder) -> None:
        """Prepare for `backbone`. Raises ValueError when vocabulary or hidden size do not fit."""

    def start(self, cache: KVCache, noise: Noise | None = None) -> Proposer:
        """Begin a text, and return its proposer; `cache` holds the text's committed K/V from now on.

        The proposer may be the drafter itself where it remembers nothing of a text. `noise`: the noise that the text's
        tokens are sampled with; None for greedy decoding. A drafter that has scores of its own may add the noise to
        them. The emitted tokens do not show it, because the noise and the backbone's scores alone decide them.
        """


_binding = threading.RLock()  # taken inside of `turn_to_compute`, never the other way round


@contextmanager
def bind_drafter(drafter: Drafter, backbone: Decoder) -> Iterator[Drafter]:
    """Lock the drafter to `backbone` while the block runs, and give it: one drafter object may serve several models."""
    with _binding:
        drafter.bind(backbone)
        yield drafter


def proposer_for(drafter: Drafter, backbone: Decoder, cache: KVCache, noise: Noise | None) -> Proposer:
    """Return the proposer of a text of `backbone`. Raises ValueError for a drafter whose `start` returns none."""
    with bind_drafter(drafter, backbone):
        proposer = drafter.start(cache, noise)
    if not callable(getattr(proposer, "propose", None)):
        raise ValueError(
            f"{type(drafter).__name__}.start returned {proposer!r}; it has to return what proposes for the text that "
            "begins: an object with name, max_draft and propose (see specdec.drafting.protocol.Proposer)"
        )
    return proposer


class NoDraft:
    """Propose nothing: plain decoding. `aux_layers`: layers whose outputs somebody else wants."""

    name = "none"
    max_draft = 0

    def __init__(self, aux_layers: Sequence[int] = ()) -> None:
        self.aux_layers = tuple(aux_layers)

    def bind(self, backbone: Decoder) -> None:
        """Do nothing: no model is needed."""

    def start(self, cache: KVCache, noise: Noise | None = None) -> NoDraft:
        """Return the object itself as the proposer of every text."""
        return self

    def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
        """Return an empty draft."""
        return Draft()


class FixedLength:
    """Choose one draft length for all drafts, from the preferred source."""

    def __init__(self, length: int) -> None:
        """Draft `length` tokens each time, where a source drafts as many. Raises ValueError below 0."""
        if length < 0:
            raise ValueError(f"draft_length must be 0 or more, or 'adaptive'; got {length}")
        self.length = length

    def may_draft(self, texts: int, beside: int = 0) -> bool:
        """Return whether there is a length to draft."""
        return self.length > 0

    def plan(self, limits: Sequence[Mapping[str, int]], beside: int = 0, most: int = 64) -> list[tuple[str, int]]:
        """Return the preferred source of each text with the length, or an equal share of `most` tokens."""
        each = min(self.length, most // len(limits))
        return [(source, min(each, of[source])) for of in limits for source in [next(iter(of))]]

    def extend(self, sources: Sequence[str], source: str, limit: int, beside: int = 0) -> int:
        """Return how many tokens are missing to the length, at most `limit`."""
        return min(self.length - len(sources), limit)

    def floors(self, source: str, k: int, beside: int = 0) -> tuple[float, ...]:
        """Return (): a fixed length does not depend on chances."""
        return ()

    def worth(self, source: str, chances: Sequence[float], beside: int = 0) -> int:
        """Return the number of `chances`: all tokens are checked."""
        return len(chances)

    def may_catch_up(self, limits: Mapping[str, int], source: str, rows: int, spent: float = 0.0) -> bool:
        """Return True: whoever fixes the length wants the drafts."""
        return True

    def observe_reading(self, source: str, rows: int, seconds: float) -> None:
        """Learn nothing: the length is fixed."""

    def observe_prompt(self, seconds: float) -> None:
        """Learn nothing: the length is fixed."""

    def observe(self, drafts: Sequence[Drafted], beside: int, draft_seconds: float, verify_seconds: float) -> None:
        """Learn nothing: the length is fixed."""
