"""The cache that a draft model keeps of one text, beside the backbone's cache of it.

What: `DraftCache`, a `Companion` of the backbone's cache. It knows the tokens that it holds and compares them with the
text in every round, so nobody tells it of rejected drafts, of suffix matches, of a conversation that another text goes
on from. All of these are a length, as in the backbone's cache. Where rings no longer hold what an earlier length sees,
a mark near the end of a former prompt takes the cache back (as in `specdec/cache/reuse.py`), else it begins anew.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from specdec.cache import KVCache, RingCheckpoint
from specdec.model.decoder import Decoder
from specdec.model.states import States

EARLY = 256  # tokens before the end of what is read where the first mark is made, as `Conversations` does
MARKS = 2


class DraftCache:
    """Hold keys and values of a text's first tokens, in the draft model's own cache, which is made with the first
    row."""

    def __init__(self, new_cache: Callable[[], KVCache]) -> None:
        """Begin without a token."""
        self._new_cache = new_cache
        self._cache: KVCache | None = None
        self._tokens: list[int] = []  # of which the cache holds the first `length`
        self._marks: list[RingCheckpoint] = []
        self._agreed = 0  # tokens of the text that were compared: a text only grows

    @property
    def length(self) -> int:
        """Return how many tokens the cache holds."""
        return 0 if self._cache is None else self._cache.length

    @property
    def nbytes(self) -> int:
        """Return the bytes of the cache and of its marks."""
        held = 0 if self._cache is None else self._cache.nbytes
        return held + sum(mark.nbytes for mark in self._marks)

    def begin(self) -> None:
        """Compare the next text from its first token on: it may be another one."""
        self._agreed = 0

    def agree(self, tokens: Sequence[int]) -> int:
        """Forget what is not the beginning of `tokens`, and the last token of them too; return how many are left to
        read. `tokens` begin with those of the call before, unless `begin` came between."""
        shared = min(self._agreed, self.length)
        most = min(self.length, len(tokens) - 1)
        if self._tokens[shared:most] == list(tokens[shared:most]):
            shared = max(shared, most)
        else:
            while self._tokens[shared] == tokens[shared]:
                shared += 1
        shared = min(shared, most)
        if shared < self.length:
            self._go_back(shared)
        self._agreed = self.length
        return len(tokens) - self.length

    def _go_back(self, length: int) -> None:
        assert self._cache is not None
        marks = [mark for mark in self._marks if mark.length <= length]
        if self._cache.rewindable(length):
            self._cache.rewind(length)
        elif marks:
            self._cache.rewind(marks[-1].length, marks[-1])
        else:
            self._cache = None
        self._marks = marks

    def read(self, decoder: Decoder, tokens: Sequence[int]) -> States:
        """Read `tokens` at the next positions, at most `MAX_ROWS` of them; return the states of their rows. Tokens that
        are not in the model's vocabulary are read as its first one."""
        if self._cache is None:
            self._cache = self._new_cache()
        known = decoder.spec.vocab_size
        ids = [token if token < known else 0 for token in tokens]
        self._tokens[self._cache.length :] = tokens  # before they are committed: Ctrl-C may come between
        states = decoder.forward(torch.tensor(ids, dtype=torch.int64, device=decoder.device), self._cache)
        self._cache.commit(len(ids))
        return states

    def mark(self, left: int, chunk: int, end: int) -> None:
        """Make a mark where one is due: `left` tokens of a text of `end` are to be read, and `chunk` of them next."""
        cache = self._cache
        if cache is None or not cache.rings or end <= min(ring.slots for ring in cache.rings):
            return
        if left > chunk and not left - chunk < EARLY <= left:
            return
        if cache.length != (self._marks[-1].length if self._marks else 0):
            self._marks = [*self._marks[1 - MARKS :], cache.mark()]

    def fork(self, length: int) -> DraftCache | None:
        """Return a cache of its own with at most the first `length` tokens; None where it would have none."""
        cache = self._cache
        if cache is None:
            return None
        length = min(length, cache.length)
        marks = [mark for mark in self._marks if mark.length <= length]
        mark = None if cache.rewindable(length) else (marks[-1] if marks else None)
        if mark is None and not cache.rewindable(length):
            return None
        copy = DraftCache(self._new_cache)
        copy._cache = cache.fork(length if mark is None else mark.length, mark)
        copy._tokens, copy._marks = self._tokens[: copy.length], marks
        return copy
