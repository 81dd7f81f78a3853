"""A conversation: a cache with the tokens that it holds; and what gives caches to texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from specdec.cache.kv_cache import KVCache, RingCheckpoint

AHEAD = 512  # positions that are reserved for a text beyond those that it has: its cache grows in steps of as many


def needed_positions(length: int, limit: int) -> int:
    """Return the positions that are reserved for a text of `length` tokens, which never has more than `limit`."""
    return min(length + AHEAD, max(length, limit))


class MediaKey(NamedTuple):
    """Tell a run of soft tokens from others: its positions start .. end - 1, and a hash of what it shows."""

    start: int
    end: int
    key: bytes


Keys = Sequence[MediaKey]


@dataclass(eq=False)
class Conversation:
    """Hold a cache, the tokens that it holds, and the marks that it can go back to.

    `tokens` [n] int64: the text, whose first `cache.length` tokens are in the cache. `media`: the text's pictures and
    sound, in their order. `reserved`: bytes that the budget counts for the cache while it is decoded, enough for
    `positions`. `marking`: whether its rings will overwrite the beginning of the text. `pins`: lengths at which later
    texts are likely to part from this one; its marks there are dropped last. `turns`: how often it was gone on from,
    and `used`: the number of the release that was its last. `notes`: the JSON that was saved with it.
    """

    cache: KVCache
    marks: list[RingCheckpoint] = field(default_factory=list)
    tokens: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    reserved: int = 0
    positions: int = 0
    marking: bool = False
    pins: frozenset[int] = frozenset()
    turns: int = 0
    used: int = 0
    notes: dict[str, Any] = field(default_factory=dict)
    media: tuple[MediaKey, ...] = ()

    @property
    def marked(self) -> int:
        """Return the bytes of its marks."""
        return sum(mark.nbytes for mark in self.marks)

    @property
    def loose(self) -> list[RingCheckpoint]:
        """Return its marks that stand at no pin."""
        return [mark for mark in self.marks if mark.length not in self.pins]

    @property
    def nbytes(self) -> int:
        """Return the bytes that count towards the limit: the larger of its cache and what is reserved for it, and its
        marks."""
        return max(self.cache.nbytes, self.reserved) + self.marked


class CacheProvider(Protocol):
    """Give a cache to every text that begins, and take it back when the text ends, from any thread."""

    def acquire(self, prompt: Tensor, longest: int, media: Keys = (), adapter: str = "") -> Conversation:
        """Return a conversation for a text of at most `longest` tokens, with the adapter of this name ("": none). Its
        cache holds at most the first n - 1 tokens of prompt [n], whose soft tokens are those of `media`. Nobody else
        has it until `release`."""

    def reserve(self, conversation: Conversation, positions: int) -> None:
        """Take note that the cache of `conversation` comes to hold `positions`, more than its own."""

    def before_chunk(self, conversation: Conversation, left: int, chunk: int) -> None:
        """Take note that `left` tokens of the prompt are still to be read, and that `chunk` of them come next."""

    def release(self, conversation: Conversation) -> None:
        """Take `conversation` back: its cache holds the first `cache.length` of its `tokens`. Nothing happens when it
        was taken back before."""
