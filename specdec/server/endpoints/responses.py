"""`/v1/responses`, without state: a client sends the whole conversation each time, as Codex does."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from specdec.server.body.bodies import RESPONSE
from specdec.server.body.objects import Fields
from specdec.server.conversation import Conversation, read_options
from specdec.server.endpoints.shapes import figures, model_name, new_id
from specdec.server.errors import ApiError
from specdec.server.formats.base import Delta
from specdec.server.generation.answer import Answer, Piece
from specdec.server.generation.sampling import Sampling, read_sampling
from specdec.server.http import EventStream, event, json_body, reply, unless_gone
from specdec.server.media import read_content
from specdec.server.state import ServerState


async def responses(state: ServerState, request: Request) -> Response:
    """Answer a conversation."""
    service = state.open()
    body = await json_body(request, RESPONSE)
    sampling = read_sampling(body, service.defaults, service.decoder.spec.vocab_size)
    streamed = body.get("stream", False)
    answer = await service.converse(read_input(body), sampling, streamed)
    made = _Response(answer, body, sampling, model_name(body, service.name))
    close = partial(state.ended, answer)
    if streamed:
        return EventStream(made.events(), made.failed, close, state.keep_alive)

    async def whole() -> dict[str, Any]:
        async for piece in answer.pieces():
            for _ in made.take(piece):
                pass
        return made.object

    return reply(await unless_gone(request, whole(), close) | figures(answer))


def read_input(body: Fields) -> Conversation:
    """Return the conversation of a body: `instructions`, and the items of `input`."""
    messages: list[dict[str, Any]] = []
    if instructions := body.get("instructions"):
        messages.append({"role": "system", "content": instructions})
    given = body.get("input", ())
    if isinstance(given, str):
        messages.append({"role": "user", "content": given})
    else:
        for item in given:
            _add(messages, item)
    if not any(message["role"] != "system" for message in messages):
        messages.append({"role": "user", "content": ""})  # Codex asks so whether the server is there
    wanted = {
        "tools": [_tool(tool) for tool in body.raw("tools") or ()],
        "tool_choice": _choice(body.get("tool_choice")),
        "parallel_tool_calls": body.get("parallel_tool_calls"),
        "response_format": _format(_inner(body, "text", "format")),
    }
    return Conversation(messages, wanted, read_options(body))


def _add(messages: list[dict[str, Any]], item: Fields) -> None:
    """Add an item to the messages: calls and thoughts belong to the assistant's message before them."""
    kind = item.get("type", "message")
    if kind == "message":
        role = item.get("role", "")
        before = messages[-1] if messages else {}
        if role == "assistant" and before.get("role") == "assistant" and not before["content"]:
            before["content"] = read_content(item, "content")
        else:
            messages.append({"role": role, "content": read_content(item, "content")})
    elif kind == "function_call":
        call = {"name": item.get("name"), "arguments": item.get("arguments")}
        said = _assistant(messages)
        said.setdefault("tool_calls", []).append({"id": item.get("call_id", ""), "type": "function", "function": call})
    elif kind == "function_call_output":
        messages.append(
            {"role": "tool", "tool_call_id": item.get("call_id", ""), "content": read_content(item, "output")}
        )
    elif kind == "reasoning":
        content = item.get("content", ())
        thought = content if isinstance(content, str) else "".join(map(_text, content))
        if thought:
            messages.append({"role": "assistant", "content": None, "reasoning_content": thought})
    # Other items are about tools that run elsewhere.


def _assistant(messages: list[dict[str, Any]]) -> dict[str, Any]:
    if not messages or messages[-1]["role"] != "assistant":
        messages.append({"role": "assistant", "content": None})
    return messages[-1]


def _text(part: Fields | str) -> str:
    return part if isinstance(part, str) else str(part.get("text", ""))


def _inner(body: Fields, name: str, inner: str) -> Fields | None:
    """Return an object within an object of the body, where both are there."""
    found: Fields | None = body.get(name)
    return None if found is None else found.get(inner)


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function" or "function" in tool:
        return tool
    named = {key: tool[key] for key in ("name", "description", "parameters", "strict") if tool.get(key) is not None}
    return {"type": "function", "function": named}


def _choice(choice: Any) -> Any:
    if isinstance(choice, dict) and choice.get("type") == "function" and "function" not in choice:
        return {"type": "function", "function": {"name": choice.get("name")}}
    return choice


def _format(form: Fields | None) -> dict[str, Any] | None:
    kind = "text" if form is None else form.get("type", "text")
    if form is not None and kind == "json_schema":
        return {"type": kind, "json_schema": {"name": form.get("name"), "schema": form.get("schema")}}
    return None if kind == "text" else {"type": kind}


class _Response:
    """Grow a response object with an answer's pieces, and make the events of its growth."""

    def __init__(self, answer: Answer, body: Fields, sampling: Sampling, model: str) -> None:
        self.answer, form = answer, _inner(body, "text", "format")
        self.object: dict[str, Any] = {
            "id": new_id("resp_"),
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "instructions": body.get("instructions"),
            "max_output_tokens": sampling.max_tokens,
            "model": model,
            "output": [],
            "parallel_tool_calls": body.get("parallel_tool_calls") is not False,
            "previous_response_id": None,
            "reasoning": {"effort": _inner(body, "reasoning", "effort"), "summary": None},
            "store": False,
            "temperature": sampling.temperature,
            "text": {"format": {"type": "text"} if form is None else form.values},
            "tool_choice": body.get("tool_choice") or "auto",
            "tools": body.raw("tools") or [],
            "top_p": sampling.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": body.get("user"),
            "metadata": body.get("metadata", {}),
        }
        self._sent = 0
        self._open: tuple[str, int] | None = None  # kind of the item that grows, and the index of a call

    async def events(self) -> AsyncIterator[str]:
        """Yield the events of the answer."""
        yield self._event("response.created", response=self.object) + self._event(
            "response.in_progress", response=self.object
        )
        async for piece in self.answer.pieces():
            if text := "".join(self.take(piece)):
                yield text

    def failed(self, error: ApiError) -> str:
        """Return the event that ends the stream with an error."""
        return self._event("error", code=error.code, message=error.message, param=error.param, **error.openai())

    def take(self, piece: Piece) -> Iterator[str]:
        """Add a piece, and yield its events."""
        for delta in piece.deltas:
            yield from self._take(delta)
        if piece.finish is not None:
            yield from self._close()
            whole = piece.finish != "length"
            usage = self.answer.usage
            self.object |= {
                "status": "completed" if whole else "incomplete",
                "incomplete_details": None if whole else {"reason": "max_output_tokens"},
                "usage": {
                    "input_tokens": usage.prompt,
                    "input_tokens_details": {"cached_tokens": usage.cached},
                    "output_tokens": usage.completion,
                    "output_tokens_details": {"reasoning_tokens": usage.reasoning},
                    "total_tokens": usage.prompt + usage.completion,
                },
            }
            yield self._event("response.completed" if whole else "response.incomplete", response=self.object)

    def _take(self, delta: Delta) -> Iterator[str]:
        if (call := delta.tool_call) is not None:
            if self._open != ("call", call.index):
                begun = {"id": new_id("fc_"), "call_id": call.id, "name": call.name, "arguments": ""}
                yield from self._begin(("call", call.index), {"type": "function_call", **begun})
            self._item["arguments"] += call.arguments
            yield self._event("response.function_call_arguments.delta", **self._at, delta=call.arguments)
            return
        kind, text = ("message", delta.content) if delta.content else ("reasoning", delta.reasoning)
        if self._open != (kind, 0):
            yield from self._begin((kind, 0), _empty_item(kind))
            if kind == "message":
                yield self._event("response.content_part.added", **self._at, content_index=0, part=self._part)
        self._part["text"] += text
        more: dict[str, Any] = {"logprobs": []} if kind == "message" else {}
        name = "output_text" if kind == "message" else "reasoning_text"
        yield self._event(f"response.{name}.delta", **self._at, content_index=0, delta=text, **more)

    def _begin(self, kind: tuple[str, int], item: dict[str, Any]) -> Iterator[str]:
        yield from self._close()
        self._open = kind
        self.object["output"].append({**item, "status": "in_progress"})
        shown = {**self._item, "content": []} if kind[0] != "call" else self._item
        yield self._event("response.output_item.added", output_index=self._at["output_index"], item=shown)

    def _close(self) -> Iterator[str]:
        """End the item that grows."""
        if self._open is None:
            return
        kind, _ = self._open
        self._item["status"] = "completed"
        if kind == "call":
            arguments = {"name": self._item["name"], "arguments": self._item["arguments"]}
            yield self._event("response.function_call_arguments.done", **self._at, **arguments)
        elif kind == "reasoning":
            yield self._event("response.reasoning_text.done", **self._at, content_index=0, text=self._part["text"])
        else:
            text = self._part["text"]
            yield self._event("response.output_text.done", **self._at, content_index=0, text=text, logprobs=[])
            yield self._event("response.content_part.done", **self._at, content_index=0, part=self._part)
        yield self._event("response.output_item.done", output_index=self._at["output_index"], item=self._item)
        self._open = None

    @property
    def _item(self) -> dict[str, Any]:
        item: dict[str, Any] = self.object["output"][-1]
        return item

    @property
    def _part(self) -> dict[str, Any]:
        part: dict[str, Any] = self._item["content"][0]
        return part

    @property
    def _at(self) -> dict[str, Any]:
        return {"item_id": self._item["id"], "output_index": len(self.object["output"]) - 1}

    def _event(self, kind: str, **fields: Any) -> str:
        self._sent += 1
        return event({"type": kind, "sequence_number": self._sent - 1, **fields}, kind)


def _empty_item(kind: str) -> dict[str, Any]:
    if kind == "reasoning":
        content: dict[str, Any] = {"type": "reasoning_text", "text": ""}
        return {"id": new_id("rs_"), "type": "reasoning", "summary": [], "content": [content]}
    content = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
    return {"id": new_id("msg_"), "type": "message", "role": "assistant", "content": [content]}
