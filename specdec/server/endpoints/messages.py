"""`/v1/messages` and `/v1/messages/count_tokens`: Anthropic's protocol, as Claude Code speaks it."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from specdec.server.body.bodies import COUNT, TURN
from specdec.server.body.objects import Fields
from specdec.server.conversation import Conversation, read_options
from specdec.server.endpoints.shapes import figures, model_name, new_id
from specdec.server.errors import ApiError, bad_request
from specdec.server.formats.base import Delta
from specdec.server.generation.answer import Answer, Collected, collect
from specdec.server.generation.sampling import read_sampling
from specdec.server.http import EventStream, event, json_body, reply, unless_gone
from specdec.server.media import media_part, read_content
from specdec.server.state import ServerState

_BILLING = "x-anthropic-billing-header"  # begins a system block that differs in every request, and says nothing
_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
_CHOICES = {"any": "required", "auto": "auto", "none": "none"}


async def messages(state: ServerState, request: Request) -> Response:
    """Answer a conversation."""
    service = state.open()
    body = await json_body(request, TURN)
    sampling = read_sampling(body, service.defaults, service.decoder.spec.vocab_size)
    streamed = body.get("stream", False)
    answer = await service.converse(read_turns(body), sampling, streamed)
    close = partial(state.ended, answer)
    head = {"id": new_id("msg_"), "type": "message", "role": "assistant", "model": model_name(body, service.name)}
    if streamed:
        return EventStream(_Blocks(answer, head).events(), _failed, close, state.keep_alive)
    (choice,) = await unless_gone(request, collect(answer), close)
    return reply({**head, "content": _content(choice), **_ending(answer, choice.finish), **figures(answer)})


async def count_tokens(state: ServerState, request: Request) -> Response:
    """Count the tokens of a conversation."""
    service = state.ready()
    prompt = await service.prompt(read_turns(await json_body(request, COUNT)))
    return reply({"input_tokens": len(prompt)})


def read_turns(body: Fields) -> Conversation:
    """Return the conversation of a body, in OpenAI's form."""
    made: list[dict[str, Any]] = []
    system = body.get("system", ())
    texts = [system] if isinstance(system, str) else [_text(block) for block in system]
    if texts := [text for text in texts if not text.lstrip().startswith(_BILLING)]:
        made.append({"role": "system", "content": "\n\n".join(texts)})
    for message in body.get("messages", ()):
        made += _messages(message)
    choice, config = body.get("tool_choice"), body.get("output_config")
    kind = "auto" if choice is None else choice.get("type", "auto")
    wanted = {
        "tools": [_tool(tool) for tool in body.get("tools", ())],
        "tool_choice": _CHOICES[kind] if kind in _CHOICES else _named_choice(choice),
        "parallel_tool_calls": choice is None or not choice.get("disable_parallel_tool_use"),
        "response_format": (None if config is None else config.raw("format")) or body.raw("output_format"),
    }
    return Conversation(made, wanted, read_options(body))


def _text(block: Fields | str) -> str:
    return block if isinstance(block, str) else str(block.get("text", ""))


def _named_choice(choice: Fields) -> dict[str, Any]:
    return {"type": "function", "function": {"name": choice.get("name", "")}}


def _tool(tool: Fields) -> dict[str, Any]:
    if (kind := tool.get("type", "custom")) not in ("custom", "function"):
        return {"type": kind}  # run by Anthropic's servers alone
    named = {"name": tool.get("name", ""), "parameters": tool.get("input_schema")}
    if tool.has("description"):
        named["description"] = tool.get("description")
    return {"type": "function", "function": named}


def _messages(message: Fields) -> Iterator[dict[str, Any]]:
    """Yield the messages that a turn is in OpenAI's form: results of tools are messages of their own."""
    role, content = message.get("role"), message.get("content")
    if isinstance(content, str) or content is None:
        yield {"role": role, "content": content}
        return
    parts, thoughts, calls = list[dict[str, Any]](), list[str](), list[dict[str, Any]]()
    for block in content:
        kind = block.get("type", "")
        if kind == "text":
            if not _text(block).lstrip().startswith(_BILLING):
                parts.append({"type": "text", "text": _text(block)})
        elif kind == "image":
            parts.append(media_part(block.values, kind, block.where))
        elif kind == "thinking":
            thoughts.append(block.get("thinking", ""))
        elif kind == "tool_use":
            function = {"name": block.get("name", ""), "arguments": block.get("input", {})}
            calls.append({"id": block.get("id", ""), "type": "function", "function": function})
        elif kind == "tool_result":
            yield {"role": "tool", "tool_call_id": block.get("tool_use_id", ""), "content": _result(block)}
        elif kind != "redacted_thinking":
            raise bad_request(f"{block.where}: blocks of type {kind!r} are not read here", block.where)
    made: dict[str, Any] = {"role": role, "content": parts}
    if thoughts:
        made["reasoning_content"] = "".join(thoughts)
    if calls:
        made["tool_calls"] = calls
    if parts or thoughts or calls:
        yield made


def _result(block: Fields) -> Any:
    """Return the content of a tool's result: a text, or parts that are text and pictures."""
    content = block.get("content", "")
    if isinstance(content, str):
        return content
    if other := next((kind for part in content if (kind := part.get("type", "text")) not in ("text", "image")), None):
        raise bad_request(f"{block.path('content')}: blocks of type {other!r} are not read here", block.path("content"))
    return read_content(block, "content")


def _content(choice: Collected) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if choice.reasoning:
        blocks.append({"type": "thinking", "thinking": choice.reasoning, "signature": ""})
    if choice.content or not choice.calls:
        blocks.append({"type": "text", "text": choice.content})
    for _, call in sorted(choice.calls.items()):
        blocks.append({"type": "tool_use", "id": call["id"], "name": call["name"], "input": _input(call["arguments"])})
    return blocks


def _input(arguments: str) -> dict[str, Any]:
    """Return a call's arguments; those that no format should let through, as the text that they are."""
    try:
        found = json.loads(arguments or "{}")
    except ValueError:
        found = None
    return found if isinstance(found, dict) else {"arguments": arguments}


def _ending(answer: Answer, finish: str | None) -> dict[str, Any]:
    found = answer.outputs[0].stops.found
    reason = "stop_sequence" if found is not None else _REASONS[finish or "stop"]
    return {"stop_reason": reason, "stop_sequence": found, "usage": _usage(answer)}


def _usage(answer: Answer) -> dict[str, int]:
    usage = answer.usage
    return {
        "input_tokens": usage.prompt - usage.cached,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.cached,
        "output_tokens": usage.completion,
    }


def _failed(error: ApiError) -> str:
    return event(error.anthropic(), "error")


class _Blocks:
    """Make the events of a stream: content blocks that open, grow and close one after another."""

    def __init__(self, answer: Answer, head: dict[str, Any]) -> None:
        self.answer, self.head = answer, head
        self._index = -1
        self._open: tuple[str, int] | None = None  # the kind of the block that grows, and the index of a call

    async def events(self) -> AsyncIterator[str]:
        """Yield the events of the answer."""
        begun = {**self.head, "content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(self.answer)}
        yield _named({"type": "message_start", "message": begun})
        async for piece in self.answer.pieces():
            text = "".join(part for delta in piece.deltas for part in self._take(delta))
            if piece.finish is not None:
                if self._index < 0:
                    text += self._begin(("text", 0), {"type": "text", "text": ""})
                ending = _ending(self.answer, piece.finish)
                usage = ending.pop("usage")
                text += self._close() + _named({"type": "message_delta", "delta": ending, "usage": usage})
                text += _named({"type": "message_stop"})
            if text:
                yield text

    def _take(self, delta: Delta) -> Iterator[str]:
        if (call := delta.tool_call) is not None:
            if self._open != ("call", call.index):
                begun: dict[str, Any] = {"type": "tool_use", "id": call.id, "name": call.name, "input": {}}
                yield self._begin(("call", call.index), begun)
            change = {"type": "input_json_delta", "partial_json": call.arguments}
        elif delta.content:
            if self._open != ("text", 0):
                yield self._begin(("text", 0), {"type": "text", "text": ""})
            change = {"type": "text_delta", "text": delta.content}
        else:
            if self._open != ("thinking", 0):
                yield self._begin(("thinking", 0), {"type": "thinking", "thinking": "", "signature": ""})
            change = {"type": "thinking_delta", "thinking": delta.reasoning}
        yield _named({"type": "content_block_delta", "index": self._index, "delta": change})

    def _begin(self, kind: tuple[str, int], block: dict[str, Any]) -> str:
        closed = self._close()
        self._open, self._index = kind, self._index + 1
        return closed + _named({"type": "content_block_start", "index": self._index, "content_block": block})

    def _close(self) -> str:
        if self._open is None:
            return ""
        self._open = None
        return _named({"type": "content_block_stop", "index": self._index})


def _named(data: dict[str, Any]) -> str:
    return event(data, data["type"])
