"""Where prompts parted from the cached texts that were most like them: why a prompt was read anew."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from specdec.cache import Conversations
from specdec.server.generation.answer import Answer
from specdec.server.generation.detokenizer import decode

NEWEST = 32  # requests
_AROUND = 24  # tokens that are shown on each side


class Partings:
    """The newest prompts, each with the place where it parted from the kept conversation that was most like it."""

    def __init__(self, conversations: Conversations) -> None:
        self.conversations = conversations
        self._newest: deque[tuple[Answer, int, int, list[list[int]]]] = deque(maxlen=NEWEST)

    def note(self, prompt: Sequence[int], answer: Answer) -> None:
        """Take note of a prompt, before its text begins."""
        tokens = torch.tensor(prompt, dtype=torch.int64)  # [n]
        shared, kept = self.conversations.nearest(tokens)
        around = [prompt[max(0, shared - _AROUND) : shared], kept[shared : shared + _AROUND].tolist()]
        self._newest.append((answer, len(prompt), shared, [*map(list, around), list(prompt[shared:][:_AROUND])]))

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
                    "tokens": length,
                    "cached": answer.usage.cached,
                    "shared": shared,
                    "before": tokenizer.decode(before),
                    "was": tokenizer.decode(was),
                    "is": tokenizer.decode(now),
                }
                for answer, length, shared, (before, was, now) in list(self._newest)
            ],
        }
