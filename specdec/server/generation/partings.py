"""Where prompts parted from the cached texts that were most like them: why a prompt was read anew."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from specdec.cache import Conversations
from specdec.cache.conversation import Keys
from specdec.server.generation.answer import Parting
from specdec.server.generation.plain_text import decode

NEWEST = 32  # requests
_AROUND = 24  # tokens that are shown on each side


class Partings:
    """Hold the newest prompts, each with the place where it parted from the kept conversation that was most like it."""

    def __init__(self, conversations: Conversations) -> None:
        self.conversations = conversations
        self._newest: deque[Parting] = deque(maxlen=NEWEST)

    def note(self, prompt: Sequence[int], media: Keys = (), adapter: str = "") -> Parting:
        """Take note of a prompt with these pictures and sounds and this adapter, before its text begins."""
        shared, kept = self.conversations.nearest(torch.tensor(prompt, dtype=torch.int64), media, adapter)
        before, was = prompt[max(0, shared - _AROUND) : shared], kept[shared : shared + _AROUND]
        found = Parting(len(prompt), shared, list(before), was.tolist(), list(prompt[shared : shared + _AROUND]))
        self._newest.append(found)
        return found

    def view(self, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        """Return the kept conversations and the newest prompts' partings, in JSON types."""
        return {
            "limit_bytes": self.conversations.limit,
            "kept_bytes": self.conversations.nbytes,
            "conversations": [
                {
                    "tokens": len(one.tokens),
                    "bytes": one.nbytes,
                    "marks": [mark.length for mark in one.marks],
                    "pins": sorted(one.pins),
                    "turns": one.turns,
                    "begins": decode(tokenizer, one.tokens[:_AROUND].tolist()),
                    "ends": decode(tokenizer, one.tokens[-_AROUND:].tolist()),
                }
                for one in list(self.conversations.kept)
            ],
            "prompts": [
                {
                    "tokens": one.tokens,
                    "cached": one.cached,
                    "shared": one.shared,
                    "before": tokenizer.decode(one.before),
                    "was": tokenizer.decode(one.was),
                    "is": tokenizer.decode(one.now),
                }
                for one in list(self._newest)
            ],
        }
