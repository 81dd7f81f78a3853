"""The constraint that makes an answer what a request wants."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from specdec.engine.constraints import Constraint
from specdec.engine.grammar import Grammar, grammar_tokens
from specdec.server.formats.base import ChatFormat
from specdec.server.formats.messages import FieldError
from specdec.server.formats.wanted import ANYTHING, Tool, Wanted

if TYPE_CHECKING:
    from llguidance import LLTokenizer


def constraint_for(chat: ChatFormat, prompt: Sequence[int], wanted: Wanted) -> Constraint | None:
    """Return the constraint under which the answer to `prompt` is what is `wanted`; None where it may be anything.

    Raises FieldError for a schema that cannot be kept; a tool's only where it is strict: otherwise any object is
    allowed in its place.
    """
    if wanted.free:
        return None
    wanted.check()
    tokens = grammar_tokens(chat.tokenizer, chat.vocab_size, chat.ends, chat.marks)
    try:
        return _compiled(chat.grammar(prompt, wanted), tokens)
    except ValueError:
        kept = tuple(_kept(chat, prompt, tool, tokens) for tool in wanted.tools)
    wanted = replace(wanted, tools=kept)
    try:
        return _compiled(chat.grammar(prompt, wanted), tokens)
    except ValueError as error:
        field = "tools" if wanted.schema is None else "response_format.json_schema.schema"
        raise FieldError(field, str(error)) from error


def _kept(chat: ChatFormat, prompt: Sequence[int], tool: Tool, tokens: LLTokenizer) -> Tool:
    """Return `tool`, with any object as its arguments where its own schema cannot be kept."""
    try:
        _compiled(chat.grammar(prompt, Wanted((tool,), "required")), tokens)
    except ValueError as error:
        if tool.strict:
            raise FieldError(f"tools[{tool.index}].function.parameters", str(error)) from error
        return replace(tool, parameters=ANYTHING)
    return tool


class Compiled:
    """Compile grammars, and keep those that were used last: `most` at the most, whose texts have `letters` letters
    together. A compiled grammar of plain words takes 500 bytes for each letter."""

    def __init__(self, most: int = 32, letters: int = 200_000) -> None:
        self._most, self._letters = most, letters
        self._lock = threading.Lock()  # guards the next one; never held while a grammar is compiled
        self._kept: OrderedDict[tuple[str, LLTokenizer], Grammar] = OrderedDict()

    def __call__(self, lark: str, tokens: LLTokenizer) -> Grammar:
        """Return the grammar `lark`. Raises ValueError for one that llguidance refuses, or that allows no text."""
        with self._lock:
            if (known := self._kept.get((lark, tokens))) is not None:
                self._kept.move_to_end((lark, tokens))
                return known
        grammar = Grammar(lark, tokens)
        if not grammar.start().allowed().any():
            raise ValueError("no text is allowed by it")
        if len(lark) > self._letters:
            return grammar
        with self._lock:
            self._kept[lark, tokens] = grammar
            while len(self._kept) > self._most or sum(len(text) for text, _ in self._kept) > self._letters:
                self._kept.popitem(last=False)
        return grammar

    @property
    def kept(self) -> tuple[str, ...]:
        """Return the texts of the grammars that are kept, the one that was used last at the end."""
        with self._lock:
            return tuple(text for text, _ in self._kept)


_compiled = Compiled()
