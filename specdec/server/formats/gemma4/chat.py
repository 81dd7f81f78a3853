"""Gemma 4's chat format: turns, thoughts, calls and their results, all between tokens of their own.

    <|turn>model\n<|channel>thought\n...<channel|>content<|tool_call>call:NAME{arguments}<tool_call|>

The template writes the prompt. A call's result follows the call within the same turn, which is why an answer ends
where a result would begin.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from specdec.server.formats.answer import AnswerParser, Style
from specdec.server.formats.gemma4.schema import GemmaSchema
from specdec.server.formats.gemma4.syntax import QUOTE, GemmaCall
from specdec.server.formats.grammars import Shape, answer_grammar
from specdec.server.formats.messages import Message, conversation, functions
from specdec.server.formats.reader import Marks
from specdec.server.formats.template import Template, turn_pins
from specdec.server.formats.wanted import Wanted

TURN, TURN_END = "<|turn>", "<turn|>"
THINK, THOUGHT, THOUGHT_END = "<|think|>", "<|channel>", "<channel|>"
CALL, CALL_END, RESULT = "<|tool_call>", "<tool_call|>", "<|tool_response>"
_NEEDED = (TURN, TURN_END, THOUGHT, THOUGHT_END, CALL, CALL_END, QUOTE)
_STYLE = Style(THOUGHT, THOUGHT_END, CALL, CALL_END, "thought\n", False, GemmaCall)


class Gemma4Format:
    """Write and read Gemma 4's chat format."""

    name = "gemma4"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, eos_ids: Sequence[int], vocab_size: int) -> None:
        """Take a tokenizer that `speaks` the format. `eos_ids`: the model's own; `vocab_size`: of its logits."""
        self.tokenizer, self.vocab_size = tokenizer, vocab_size
        shown = {name: "" for name in (THOUGHT, THOUGHT_END, CALL, CALL_END)} | {QUOTE: '"'}
        self._marks = Marks(tokenizer, shown)
        self._template = Template(tokenizer, (*_NEEDED, THINK, RESULT))
        self._ids = ids = {token.content: i for i, token in tokenizer.added_tokens_decoder.items()}
        own = (ids[name] for name in (TURN_END, RESULT) if name in ids)
        self.ends = tuple(dict.fromkeys((*eos_ids, *own)))
        self.marks = tuple(ids[name] for name in (*_NEEDED, THINK, RESULT) if name in ids)

    @staticmethod
    def speaks(tokenizer: PreTrainedTokenizerBase) -> bool:
        """Return whether the vocabulary has the format's tokens."""
        return {*_NEEDED} <= {token.content for token in tokenizer.added_tokens_decoder.values()}

    def prompt(self, messages: Sequence[Message], tools: Sequence[Message], options: Mapping[str, Any]) -> list[int]:
        """Return the token ids of a conversation, as `ChatFormat.prompt` says."""
        variables = dict(options.get("chat_template_kwargs") or {})
        if options.get("thinking") is not None:
            variables.setdefault("enable_thinking", options["thinking"])
        told = _results_kept(conversation(list(messages)))
        begun = options.get("add_generation_prompt", True)
        return self._template.encode(told, functions(list(tools)), variables, begun)

    def pins(self, prompt: Sequence[int]) -> list[int]:
        """Return where the second turn and the last user's turn begin."""
        return turn_pins(prompt, self._ids[TURN], self.tokenizer.encode("user", add_special_tokens=False)[0])

    def parser(self, prompt: Sequence[int], tools: Sequence[str] = (), stream_calls: bool = True) -> AnswerParser:
        """Return a parser for the answer to `prompt`, which may have begun a thought."""
        return AnswerParser(self._marks.reader(), _STYLE, self._in_thought(prompt), tools, stream_calls)

    def grammar(self, prompt: Sequence[int], wanted: Wanted) -> str:
        """Return the grammar of the answers that `wanted` allows. Raises ValueError for a schema that has none."""
        rules, ids = "", self._ids
        calls = []
        if wanted.calls != "none":
            for tool in wanted.tools:
                one = GemmaSchema(ids[QUOTE], tool.strict, prefix=f"t{tool.index}_")
                arguments = one.arguments(tool.parameters)
                rules += one.text
                calls.append((f"call:{tool.name}", arguments, ""))
        thinks = ids.get(THINK, -1) in prompt or self._in_thought(prompt)
        shape = Shape(
            call_open=f"<[{ids[CALL]}]>",
            call_close=f"<[{ids[CALL_END]}]>",
            between="",
            thought=(ids[THOUGHT], ids[THOUGHT_END], (ids[CALL], *self.ends)) if thinks else None,
            in_thought=self._in_thought(prompt),
            after_thought="",
            text=f"<[^{','.join(map(str, (ids[CALL], *self.ends)))}]>*",
        )
        return answer_grammar(shape, calls, wanted) + rules

    def _in_thought(self, prompt: Sequence[int]) -> bool:
        marks = {self._ids[name]: name for name in (THOUGHT, THOUGHT_END, TURN)}
        return next((marks[token] for token in reversed(prompt) if token in marks), "") == THOUGHT


def _results_kept(messages: Sequence[Message]) -> list[Message]:
    """Return `messages` with results that follow no call as a user's: the template would leave them out."""
    made: list[Message] = []
    after_call = False
    for message in messages:
        if message["role"] != "tool":
            after_call = bool(message.get("tool_calls"))
        elif not after_call:
            message = {"role": "user", "content": message["content"]}
        made.append(message)
    return made
