"""Calls as JSON between tags, as Qwen writes them, for ChatML and for every template that has no other way.

    <think>\n...\n</think>\n\ncontent\n<tool_call>\n{"name": "NAME", "arguments": {...}}\n</tool_call>

Tags are tokens where the vocabulary has them, and strings otherwise. A template that writes such calls is given the
tools. For all others, SmolLM2's among them, this module says in the system message what can be called and how, writes
earlier calls into the assistant's text, and results into a user's message.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from specdec.server.formats.answer import AnswerParser, Call, MalformedError, Style
from specdec.server.formats.grammars import Shape, answer_grammar, compact
from specdec.server.formats.messages import FieldError, Message, conversation, functions, tagged
from specdec.server.formats.reader import Item, Marks
from specdec.server.formats.template import Template, turn_pins
from specdec.server.formats.wanted import Wanted

THINK, THINK_END, CALL, CALL_END = "<think>", "</think>", "<tool_call>", "</tool_call>"
_TURNS = ("<|im_start|>", "<start_of_turn>", "<|start_header_id|>")
_ENDS = ("<|im_end|>", "<end_of_turn>", "<|eot_id|>")
_STRING = r'"(?:[^"\\]|\\.)*"'
_HEAD = re.compile(rf'\s*\{{\s*"name"\s*:\s*({_STRING})\s*,\s*"arguments"\s*:\s*(?=\{{)')


class JSONCall:
    """Read what stands between the tags: an object with name and arguments, or a list of such objects."""

    def __init__(self) -> None:
        self.name: str | None = None
        self._text, self._at = "", 0  # `_at`: where the arguments go on that were not given yet
        self._begin = 0
        self._depth, self._string, self._escaped, self._ended = 0, False, False, False

    def feed(self, item: Item) -> str:
        """Return the text of arguments that `item` completes. Raises MalformedError."""
        if not isinstance(item, str):
            raise MalformedError
        self._text += item
        if self.name is None:
            if self._text.lstrip()[:1] not in ("", "{", "["):
                raise MalformedError
            if (head := _HEAD.match(self._text)) is None:
                return ""
            self.name, self._at = _name(head[1]), head.end()
            self._begin = self._at
        begin = self._at
        while self._at < len(self._text) and not self._ended:
            self._character(self._text[self._at])
            self._at += 1
        return self._text[begin : self._at]

    def _character(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif self._string:
            self._escaped, self._string = char == "\\", char != '"'
        elif char == '"':
            self._string = True
        elif char in "{[":
            self._depth += 1
        elif char in "}]":
            self._depth -= 1
            self._ended = self._depth == 0

    def close(self) -> list[Call]:
        """Return the calls. Raises MalformedError where they are not complete."""
        try:
            found = json.loads(self._text)
        except (ValueError, RecursionError) as error:
            raise MalformedError from error
        calls = [_call(one) for one in (found if isinstance(found, list) else [found])]
        if self.name is not None:
            return [Call(self.name, self._text[self._begin : self._at])]  # as it was written
        if not calls:
            raise MalformedError
        return calls


def _name(text: str) -> str:
    try:
        return str(json.loads(text))
    except ValueError as error:
        raise MalformedError from error


def _call(found: Any) -> Call:
    name, arguments = (found.get("name"), found.get("arguments")) if isinstance(found, dict) else (None, None)
    if not isinstance(name, str) or not isinstance(arguments, dict):
        raise MalformedError
    return Call(name, json.dumps(arguments, ensure_ascii=False))


class ChatMLFormat:
    """Write and read calls as JSON between tags, in the turns of the model's template."""

    name = "chatml"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], vocab_size: int) -> None:
        """Take any tokenizer with a chat template. `eos_ids`: the model's own; `vocab_size`: of its logits."""
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        ids = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        self._thinks = {THINK, THINK_END} <= {*ids}
        thought = (THINK, THINK_END) if self._thinks else ()
        self._marks = Marks(tokenizer, {name: name for name in (*thought, CALL, CALL_END)})
        self._template = Template(tokenizer, tuple(self._marks.ids))
        self._turn = next((ids[name] for name in _TURNS if name in ids), None)
        self.ends = tuple(dict.fromkeys((*eos_ids, *(ids[name] for name in _ENDS if name in ids))))
        self.marks = tuple(self._marks.ids.values())
        self.tools_in_template = CALL in self._template.source([{"type": "function"}])
        """Whether the template itself writes tools, calls and results."""

    def prompt(self, messages: Sequence[Message], tools: Sequence[Message], options: Mapping[str, Any]) -> list[int]:
        """Return the token ids of a conversation, as `ChatFormat.prompt` says."""
        if not self._template.source():
            raise FieldError(
                "messages",
                "the model has no chat template: it continues texts and does not converse; ask "
                "/v1/completions, or serve a model that was trained to answer",
            )
        variables = dict(options.get("chat_template_kwargs") or {})
        if options.get("thinking") is not None:
            variables.setdefault("enable_thinking", options["thinking"])
        told, offered = conversation(list(messages)), functions(list(tools))
        if not self.tools_in_template:
            told, offered = tagged(told, offered), []
        return self._template.encode(told, offered, variables, options.get("add_generation_prompt", True))

    def pins(self, prompt: Sequence[int]) -> list[int]:
        """Return where the second turn and the last user's turn begin; none where turns have no token of their own."""
        if self._turn is None:
            return []
        return turn_pins(prompt, self._turn, self.tokenizer.encode("user", add_special_tokens=False)[0])

    def parser(self, prompt: Sequence[int], tools: Sequence[str] = (), stream_calls: bool = True) -> AnswerParser:
        """Return a parser for the answer to `prompt`, which may have begun a thought."""
        style = Style(THINK, THINK_END, CALL, CALL_END, "", True, JSONCall)
        return AnswerParser(self._marks.reader(), style, self._in_thought(prompt), tools, stream_calls)

    def grammar(self, prompt: Sequence[int], wanted: Wanted) -> str:
        """Return the grammar of the answers that `wanted` allows. Raises ValueError for a schema that has none."""
        rules, calls, ids = "", [], self._marks.ids
        if wanted.calls != "none":
            for tool in wanted.tools:
                name = f"arguments{tool.index}"
                rules += f"{name}: %json {json.dumps(compact(tool.parameters, tool.strict))}\n"
                before = f'\n{{"name": {json.dumps(tool.name, ensure_ascii=False)}, "arguments": '
                calls.append((before, name, "}\n"))
        tokens = CALL in ids and CALL_END in ids
        never = (ids[CALL],) if tokens else ()
        shape = Shape(
            call_open=f"<[{ids[CALL]}]>" if tokens else json.dumps(CALL),
            call_close=f"<[{ids[CALL_END]}]>" if tokens else json.dumps(CALL_END),
            between="\n",
            thought=(ids[THINK], ids[THINK_END], (*never, *self.ends)) if self._thinks else None,
            in_thought=self._in_thought(prompt),
            after_thought=r"/\n{0,2}/" if self._thinks else "",
            text=f"<[^{','.join(map(str, (*never, *self.ends)))}]>*" if tokens else "",
        )
        return answer_grammar(shape, calls, wanted) + rules

    def _in_thought(self, prompt: Sequence[int]) -> bool:
        if not self._thinks:
            return False
        marks = {self._marks.ids[name]: name for name in (THINK, THINK_END)} | {self._turn: ""}
        return next((marks[token] for token in reversed(prompt) if token in marks), "") == THINK
