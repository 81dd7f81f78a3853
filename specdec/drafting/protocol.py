"""Drafters: the protocol, the binding of a drafter to a backbone, and plain decoding.

A drafter may propose any tokens, as many as it is asked for or fewer. Verification decides which tokens are emitted, so
a bad drafter costs time and never a word.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from specdec.cache import KVCache
from specdec.engine.sampling import Noise
from specdec.model.decoder import Decoder
from specdec.model.states import States


@dataclass(frozen=True)
class Draft:
    """The tokens proposed for one round, and the source of each."""

    tokens: tuple[int, ...] = ()
    sources: tuple[str, ...] = ()

    @classmethod
    def by(cls, source: str, tokens: Sequence[int]) -> Draft:
        """Make a draft whose tokens all come from one source."""
        return cls(tuple(tokens), (source,) * len(tokens))


class Proposer(Protocol):
    """Proposes the drafts of one text. Its knowledge of the text is its own: several texts may be decoded at once."""

    name: str  # of its drafts, in statistics and in acceptance records
    max_draft: int  # the longest draft that it can usefully make; 0: never proposes

    def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
        """Return up to `k` tokens to follow `tokens`.

        `tokens`: the whole text so far, the pending token last; pictures and sound are runs of their soft tokens' ids,
        which say nothing of what is in them. `states`: of the row that chose the pending token, the backbone's last
        state and the outputs of the drafter's `aux_layers`, [hidden] each.
        """


@runtime_checkable
class Composite(Protocol):
    """A proposer with several proposers inside that compete; the draft length picks one of them for each draft."""

    name: str
    max_draft: int

    def able(self, tokens: Sequence[int]) -> tuple[Proposer, ...]:
        """Return the proposers that can draft after `tokens`, the preferred one first, each of another name."""

    def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
        """Return a draft as `Proposer.propose` does."""

    def extend(self, tokens: Sequence[int], draft: Draft, k: int) -> Draft:
        """Return up to `k` more tokens, of one source, for `draft`, which one of `able` made to follow `tokens`."""


class Drafter(Protocol):
    """Makes a `Proposer` for every text.

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
    """Proposes nothing: plain decoding. `aux_layers`: layers whose outputs somebody else wants."""

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
