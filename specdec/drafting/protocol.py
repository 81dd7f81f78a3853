"""Drafters: whatever proposes tokens. Here the protocol, what binds a drafter to a backbone, and plain decoding.

A drafter may propose anything, at any length up to the one asked for: verification decides what is emitted, so a bad
drafter costs time and never a word.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from specdec.cache import KVCache
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
