"""The constraint that makes an answer what a request wants."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
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


@lru_cache(maxsize=32)
def _compiled(lark: str, tokens: LLTokenizer) -> Grammar:
    grammar = Grammar(lark, tokens)
    if not grammar.start().allowed().any():
        raise ValueError("no text is allowed by it")
    return grammar
