"""Prefix reuse: a text that begins as an earlier one did goes on from that one's cache.

What: `Conversations` gives out a cache for every text, with as much of its beginning in it as some earlier text shares,
and takes the cache back when the text ends. The conversation that was used least recently is forgotten first. Why it is
exact: keys and values of a position depend on the tokens up to it alone, to the bit, wherever our kernels compute them.
All pictures have the same token ids, so a text is its ids and the `MediaKey`s of its media; and with another adapter
it is another text. Rows of a picture depend on all of the picture, so two texts have all of it in common or none.

Sliding layers overwrite the beginning of a long text, so their caches go back a few positions only. A `RingCheckpoint`,
taken near the end of a prompt, takes a cache back to there: to ask again, to ask something else about the same
document, or because a chat template repeats an answer in other words than the model's. vLLM and llama.cpp ("context
checkpoints") keep such copies too.

What goes on is worth more than what was asked once: a conversation that was gone on from lately is not dropped, nor cut
short, for a text that begins anew. Programs ask such texts beside a chat, for a title say.

Several texts may be decoded at the same time, from several threads. The caller that begins a text owns its conversation
until it ends, so no other text can go on from a cache that is being written. Left out: sharing between such texts.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor

from specdec.cache.conversation import Conversation, Keys, needed_positions
from specdec.cache.kv_cache import KVCache, RingCheckpoint
from specdec.util.heap import trim_heap

TAIL = 64  # positions that a text which goes on may drop of its conversation; with more to lose, it gets a copy
MARKS = 3  # per conversation, besides those at its pins: a ring's worth of memory each
RECENT = 8  # releases of other texts, after which a conversation that was gone on from counts like any other
EARLY = 256  # tokens before the end of a prompt where the first of them is made: a question about a document is shorter


class _Found(NamedTuple):
    """Say how much of a prompt `conversation` has in its cache, by way of `mark` where there is one."""

    length: int = 0
    mark: RingCheckpoint | None = None
    conversation: Conversation | None = None


class Conversations:
    """Hold the conversations that may go on, in at most `limit` bytes, the most recently used one last."""

    def __init__(
        self, new_cache: Callable[..., KVCache], limit: int = 0, bytes_for: Callable[[int], int] | None = None
    ) -> None:
        """Begin empty. `new_cache(adapter=name)` makes a cache. `limit` 0 keeps nothing. `bytes_for(positions)`: bytes
        of a cache. With it, texts that are being decoded count towards the limit too, with the size that they will soon
        have; without it their marks alone do."""
        self._new_cache, self.limit, self._bytes_for = new_cache, limit, bytes_for
        self.kept: list[Conversation] = []
        self._playing: list[Conversation] = []  # whose texts are being decoded, each by its own caller
        self._released = 0  # how many texts have ended
        self._lock = threading.RLock()  # of both lists; nothing but caches is touched while it is held

    @property
    def nbytes(self) -> int:
        """Return the bytes of the kept conversations, without those of texts that are being decoded."""
        return sum(conversation.nbytes for conversation in list(self.kept))

    def acquire(self, prompt: Tensor, longest: int, media: Keys = (), adapter: str = "") -> Conversation:
        """Return a conversation for a text that begins with prompt [n], whose soft tokens are those of `media`, and has
        `longest` tokens at most, with the adapter of this name ("": none). Its cache holds some of the prompt's first
        n - 1 positions: the last token's state has to be computed anew."""
        prompt = prompt.cpu()
        with self._lock:
            mine = self._take(self._best(prompt, media, adapter), len(prompt), longest, adapter)
            mine.media, mine.positions = tuple(media), needed_positions(len(prompt), longest)
            mine.marking = bool(mine.cache.rings) and longest > min(ring.slots for ring in mine.cache.rings)
            if self.limit:
                self._playing.append(mine)
                try:
                    self._make_room()
                except BaseException:  # Ctrl-C: nobody would give it back
                    self._playing.remove(mine)
                    raise
        return mine

    def reserve(self, conversation: Conversation, positions: int) -> None:
        """Make room for the cache of `conversation` to grow to `positions`."""
        conversation.positions = positions
        if self._bytes_for is not None:
            with self._lock:
                conversation.reserved = self._bytes_for(positions)
                self._make_room()

    def before_chunk(self, conversation: Conversation, left: int, chunk: int) -> None:
        """Make a mark where one is due: `left` tokens of the prompt are to come, and `chunk` of them come next."""
        if not conversation.marking:
            return
        marks, here = conversation.marks, conversation.cache.length
        after_media = bool(conversation.media) and here == conversation.media[-1].end
        pinned = here in conversation.pins
        if left > chunk and not left - chunk < EARLY <= left and not pinned and not after_media:
            return
        rings = sum(ring.nbytes for ring in conversation.cache.rings)
        if here == (marks[-1].length if marks else 0):
            return
        with self._lock:
            if conversation not in self._playing:
                return
            loose = conversation.loose
            if len(loose) == MARKS and not pinned:  # drop the mark whose successor is nearest: it is missed least
                after = [*(mark.length for mark in loose[1:]), here]
                nearest = min(range(MARKS), key=lambda i: after[i] - loose[i].length)
                marks[:] = [mark for mark in marks if mark is not loose[nearest]]
            if conversation.nbytes + rings <= self.limit and self._fit(rings, not conversation.turns):
                marks.append(conversation.cache.mark())

    def release(self, conversation: Conversation) -> None:
        """Take back `conversation`, whose text has ended or was stopped: its cache serves the next text.

        Nothing happens when it was taken back before.
        """
        with self._lock:
            if conversation not in self._playing:
                return
            self._playing.remove(conversation)
            conversation.cache.settle()
            conversation.tokens = conversation.tokens[: conversation.cache.length].cpu().clone()
            conversation.media = tuple(one for one in conversation.media if one.start < conversation.cache.length)
            conversation.reserved = 0
            self._released += 1
            conversation.used = self._released
            if len(conversation.tokens):
                self.add(conversation)

    def add(self, conversation: Conversation) -> None:
        """Keep `conversation`, as the one used last; drop the conversations that it can replace."""
        with self._lock:
            alike = [old for old in self.kept if old.cache.adapter == conversation.cache.adapter]
            served = [old for old in alike if _usable(conversation, old.tokens, old.media)[0] == len(old.tokens)]
            self.kept = [old for old in self.kept if old not in served] + [conversation]
            self._make_room()

    @contextmanager
    def lent(
        self, tokens: Tensor | None = None, media: Keys | None = None, adapter: str | None = None
    ) -> Iterator[Conversation]:
        """Lend a conversation to be read while the block runs: the one that has most of tokens [n], or the one used
        last. `media`: of these tokens; None: whatever they show. `adapter`: of the text; None: any. No text that begins
        meanwhile goes on from it. Raises ValueError when there is none."""
        with self._lock:
            found = self.kept[-1] if self.kept else None
            if tokens is not None:
                found = self._best(tokens.cpu(), media, adapter).conversation
            if found is None:
                raise ValueError(
                    "no such conversation is kept; generate first, and with reuse=True, or wait: a text that another "
                    "thread decodes may be going on from it"
                )
            self.kept.remove(found)
        try:
            yield found
        finally:
            self.add(found)

    def nearest(self, tokens: Tensor, media: Keys = (), adapter: str = "") -> tuple[int, Tensor]:
        """Return how many of tokens [n] the kept conversation with `adapter` that is most like them shares, and its
        tokens [m]. `media`: what the soft tokens among them show, which is compared too."""
        with self._lock:
            alike = [one for one in self.kept if one.cache.adapter == adapter]
            found = [(shared_beginning(tokens, one.tokens, media, one.media), one.tokens) for one in alike]
        return max(found, key=lambda one: one[0], default=(0, tokens[:0]))

    def forget(self) -> None:
        """Give all memory back."""
        with self._lock:
            self.kept.clear()
        trim_heap()

    def _best(self, prompt: Tensor, media: Keys | None, adapter: str | None) -> _Found:
        best = _Found()
        for conversation in (one for one in self.kept if adapter in (None, one.cache.adapter)):
            length, mark = _usable(conversation, prompt[:-1], media)
            if length >= max(1, best.length):  # among equals the conversation used last
                best = _Found(length, mark, conversation)
        return best

    def _take(self, found: _Found, prompt: int, longest: int, adapter: str) -> Conversation:
        """Return a conversation of what was `found` for a text with `adapter` that begins with `prompt` tokens."""
        length, mark, source = found
        reserved = 0 if self._bytes_for is None else self._bytes_for(needed_positions(prompt, longest))
        if source is None:
            return Conversation(self._new_cache(adapter=adapter), reserved=reserved)
        goes_on = 2 * length >= prompt  # most of the text is there: it is the same conversation
        lost, turns = source.cache.length - length, source.turns + 1 if goes_on else 0
        self.kept.remove(source)  # so that it is not dropped to make room for its own copy
        marks = [each for each in source.marks if each.length <= length]
        if lost > TAIL and self._fit(source.nbytes + max(reserved, source.cache.nbytes), not goes_on):
            try:
                return Conversation(source.cache.fork(length, mark), marks, reserved=reserved, turns=turns)
            finally:
                source.turns = 0 if goes_on else source.turns
                self.kept.append(source)
        if lost > TAIL and not goes_on and self._is_going_on(source):
            self.kept.append(source)
            return Conversation(self._new_cache(adapter=adapter), reserved=reserved)
        source.cache.rewind(length, mark)
        source.marks, source.tokens, source.reserved, source.turns = marks, source.tokens[:length], reserved, turns
        return source

    def _is_going_on(self, conversation: Conversation) -> bool:
        """Return whether `conversation` was gone on from, and lately."""
        return conversation.turns > 0 and self._released - conversation.used < RECENT

    def _make_room(self) -> None:
        """Forget what is beyond the limit: conversations that are going on last."""
        if not self._fit(spare=True):
            self._fit()

    def _fit(self, more: int = 0, spare: bool = False) -> bool:
        """Forget the least recently used conversations until `more` bytes are free; return whether they are.

        `spare`: leave conversations that are going on as they are. Marks at no pin go before conversations: without
        them a conversation still goes on.
        """
        kept = len(self.kept)
        whole = self._bytes_for is not None
        playing = sum(c.nbytes if whole else c.marked for c in self._playing)
        while playing + self.nbytes + more > self.limit:
            order = sorted(self.kept, key=self._is_going_on)  # stable: else the least recently used first
            if spare:
                order = [each for each in order if not self._is_going_on(each)]
            if not order:
                break
            if (loose := next((each for each in order if each.loose), None)) is not None:
                first = loose.loose[0]
                loose.marks = [mark for mark in loose.marks if mark is not first]
            elif order[0].marks:
                order[0].marks.pop(0)
            else:
                self.kept.remove(order[0])
        if len(self.kept) < kept:
            trim_heap()
        return playing + more + (self.nbytes if spare else 0) <= self.limit


def _usable(conversation: Conversation, tokens: Tensor, media: Keys | None) -> tuple[int, RingCheckpoint | None]:
    """Return how many of tokens [n] the cache can begin with, and the mark that this takes, if any. `media`: of the
    tokens; None: those that the cache has."""
    media = conversation.media if media is None else media
    shared = shared_beginning(tokens, conversation.tokens, media, conversation.media)
    if conversation.cache.rewindable(shared):
        return shared, None
    marks = [mark for mark in conversation.marks if mark.length <= shared]
    return (marks[-1].length, marks[-1]) if marks else (0, None)


def shared_beginning(a: Tensor, b: Tensor, media_a: Keys = (), media_b: Keys = ()) -> int:
    """Count the tokens that a [n] and b [m] begin with alike, up to the first block that is not wholly in both."""
    most = min(len(a), len(b))
    differs = (a[:most] != b[:most]).nonzero()
    shared = int(differs[0]) if len(differs) else most
    both = {*media_a} & {*media_b}
    cut = (one.start for one in (*media_a, *media_b) if one.end > shared or one not in both)
    return min(shared, min(cut, default=shared))
