"""Chat formats: how models write turns, thinking and tool calls."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from specdec.server.formats.base import ChatFormat
from specdec.server.formats.chatml import ChatMLFormat
from specdec.server.formats.constraint import constraint_for
from specdec.server.formats.gemma4.chat import Gemma4Format
from specdec.server.formats.messages import FieldError
from specdec.server.formats.wanted import Wanted

__all__ = ["ChatFormat", "FieldError", "Wanted", "constraint_for", "format_for"]


def format_for(tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], vocab_size: int) -> ChatFormat:
    """Return the chat format of a model, which its vocabulary and its template tell.

    `eos_ids`: the tokens that end a text, by the model's generation config; `vocab_size`: of its logits.
    """
    if Gemma4Format.speaks(tokenizer):
        return Gemma4Format(tokenizer, eos_ids, vocab_size)
    return ChatMLFormat(tokenizer, eos_ids, vocab_size)
