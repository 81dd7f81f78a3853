"""`/v1/completions`: text that goes on."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

from specdec.server.body.bodies import COMPLETION, MOST_PROMPTS
from specdec.server.body.objects import Fields
from specdec.server.endpoints.shapes import (
    DONE,
    failed,
    figures,
    model_name,
    new_id,
    text_logprobs,
    usage,
    wants_usage,
)
from specdec.server.errors import bad_request
from specdec.server.generation.answer import Answer, Collected, collect
from specdec.server.generation.plain_text import PlainText, decode
from specdec.server.generation.sampling import read_logprobs, read_sampling
from specdec.server.generation.service import Service
from specdec.server.http import EventStream, event, json_body, reply, unless_gone
from specdec.server.state import ServerState


async def completions(state: ServerState, request: Request) -> Response:
    """Continue one text or several."""
    service = state.open()
    body = await json_body(request, COMPLETION)
    sampling = read_sampling(body, service.defaults, service.decoder.spec.vocab_size)
    sampling = replace(sampling, logprobs=read_logprobs(body))
    counted, streamed, echo = wants_usage(body), body.get("stream", False), body.get("echo", False)
    given = _given(body)
    prompts = await service.encoded(lambda: [service.tokens(p) if isinstance(p, str) else p for p in given])
    echoed = [p if isinstance(p, str) else decode(service.tokenizer, p) for p in given] if echo else [""] * len(given)
    answer = service.ask(prompts, sampling, lambda: PlainText(service.tokenizer))
    before = [echoed[i // sampling.choices] for i in range(len(answer.outputs))]
    close = partial(state.ended, answer)
    head = {
        "id": new_id("cmpl-"),
        "object": "text_completion",
        "created": int(time.time()),
        "model": model_name(body, service.name),
    }
    if streamed:
        return EventStream(_chunks(service, answer, head, before, counted), failed, close, state.keep_alive)
    choices = await unless_gone(request, collect(answer), close)
    found = [_choice(service, answer, i, choice, before[i]) for i, choice in enumerate(choices)]
    return reply({**head, "choices": found, "usage": usage(answer), **figures(answer)})


def _given(body: Fields) -> Sequence[str | list[int]]:
    """Return the prompts: one or several, each as text or as token ids."""
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return [prompt]
    tokens = [isinstance(one, int) for one in prompt]
    if all(tokens):
        return [prompt]
    if any(tokens) or len(prompt) > MOST_PROMPTS:
        raise bad_request(f"prompt must be a text, token ids, or a list of at most {MOST_PROMPTS} of these", "prompt")
    texts: Sequence[str | list[int]] = prompt
    return texts


def _choice(service: Service, answer: Answer, index: int, choice: Collected, before: str) -> dict[str, Any]:
    logprobs = None
    if answer.logprobs is not None:
        logprobs = text_logprobs(service.tokenizer, choice.logprobs, len(before))
    return {"index": index, "text": before + choice.content, "logprobs": logprobs, "finish_reason": choice.finish}


async def _chunks(
    service: Service, answer: Answer, head: dict[str, Any], before: list[str], counted: bool
) -> AsyncIterator[str]:
    base = {**head, "usage": None} if counted else head
    written = [len(text) for text in before]

    def chunk(index: int, text: str, logprobs: dict[str, Any] | None, finish: str | None, **more: Any) -> str:
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}
        return event({**base, "choices": [choice], **more})

    for index, text in enumerate(before):
        if text:
            yield chunk(index, text, None, None)
    async for piece in answer.pieces():
        logprobs = None
        if piece.logprobs:
            logprobs = text_logprobs(service.tokenizer, piece.logprobs, written[piece.index])
            written[piece.index] += sum(map(len, logprobs["tokens"]))
        more = figures(answer) if piece.finish is not None else {}
        text = "".join(delta.content for delta in piece.deltas)
        yield chunk(piece.index, text, logprobs, piece.finish, **more)
    if counted:
        yield event({**head, "choices": [], "usage": usage(answer)})
    yield DONE
