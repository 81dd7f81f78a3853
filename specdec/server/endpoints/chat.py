"""`/v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from specdec.server.body.bodies import CHAT
from specdec.server.conversation import read_conversation
from specdec.server.endpoints.shapes import (
    DONE,
    chat_logprobs,
    failed,
    figures,
    model_name,
    new_id,
    usage,
    wants_usage,
)
from specdec.server.formats.base import Delta
from specdec.server.generation.answer import Answer, Collected, TokenLogprob, collect
from specdec.server.generation.sampling import read_logprobs, read_sampling
from specdec.server.generation.service import Service
from specdec.server.http import EventStream, event, json_body, reply, unless_gone
from specdec.server.state import ServerState


async def chat_completions(state: ServerState, request: Request) -> Response:
    """Answer a conversation."""
    service = state.open()
    body = await json_body(request, CHAT)
    sampling = read_sampling(body, service.defaults, service.decoder.spec.vocab_size)
    sampling = replace(sampling, logprobs=read_logprobs(body))
    counted, streamed = wants_usage(body), body.get("stream", False)
    answer = await service.converse(read_conversation(body), sampling, streamed)
    close = partial(state.ended, answer)
    head = {"id": new_id("chatcmpl-"), "created": int(time.time()), "model": model_name(body, service.name)}
    if streamed:
        return EventStream(_chunks(service, answer, head, counted), failed, close, state.keep_alive)
    choices = await unless_gone(request, collect(answer), close)
    return reply(
        {
            **head,
            "object": "chat.completion",
            "choices": [_choice(service, answer, i, choice) for i, choice in enumerate(choices)],
            "usage": usage(answer),
            **figures(answer),
        }
    )


def message_of(choice: Collected) -> dict[str, Any]:
    """Return the assistant's message of a whole choice."""
    message: dict[str, Any] = {"role": "assistant", "content": choice.content, "refusal": None}
    if choice.reasoning:
        message |= {"reasoning_content": choice.reasoning, "reasoning": choice.reasoning}
    if choice.calls:
        message["content"] = choice.content or None
        message["tool_calls"] = [
            {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
            for _, call in sorted(choice.calls.items())
        ]
    return message


def _choice(service: Service, answer: Answer, index: int, choice: Collected) -> dict[str, Any]:
    logprobs = None if answer.logprobs is None else chat_logprobs(service.tokenizer, choice.logprobs)
    return {"index": index, "message": message_of(choice), "logprobs": logprobs, "finish_reason": choice.finish}


async def _chunks(service: Service, answer: Answer, head: dict[str, Any], counted: bool) -> AsyncIterator[str]:
    head = {**head, "object": "chat.completion.chunk"}
    base = {**head, "usage": None} if counted else head
    held: dict[int, list[TokenLogprob]] = {i: [] for i in range(len(answer.outputs))}  # until their text comes

    def chunk(index: int, delta: dict[str, Any], finish: str | None = None, **more: Any) -> str:
        found = held[index] if delta or finish else []
        held[index] = []
        logprobs = chat_logprobs(service.tokenizer, found) if found else None
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        return event({**base, "choices": [choice], **more})

    for index in held:
        yield chunk(index, {"role": "assistant", "content": ""})
    async for piece in answer.pieces():
        held[piece.index] += piece.logprobs
        text = "".join(chunk(piece.index, _delta(delta)) for delta in piece.deltas)
        if piece.finish is not None:
            text += chunk(piece.index, {}, piece.finish, **figures(answer))
        if text:
            yield text
    if counted:
        yield event({**head, "choices": [], "usage": usage(answer)})
    yield DONE


def _delta(delta: Delta) -> dict[str, Any]:
    if delta.content:
        return {"content": delta.content}
    if delta.reasoning:
        return {"reasoning_content": delta.reasoning, "reasoning": delta.reasoning}
    call = delta.tool_call
    assert call is not None
    function = {"arguments": call.arguments} if call.name is None else {"name": call.name, "arguments": call.arguments}
    begun = {} if call.id is None else {"id": call.id, "type": "function"}
    return {"tool_calls": [{"index": call.index, **begun, "function": function}]}
