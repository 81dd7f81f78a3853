"""Endpoints about the server: health, models, settings, metrics, and text to token ids and back."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response

import specdec
from specdec.server.body.bodies import DETOKENIZE, TOKENIZE
from specdec.server.conversation import read_conversation
from specdec.server.errors import ApiError, bad_request
from specdec.server.generation.plain_text import decode
from specdec.server.generation.sampling import Defaults
from specdec.server.generation.service import Service
from specdec.server.http import json_body, reply
from specdec.server.state import ServerState


async def health(state: ServerState, request: Request) -> Response:
    """Say whether requests are taken."""
    if state.service is None:
        return reply({"status": "loading model"}, 503, {"Retry-After": "2"})
    if state.draining:
        return reply({"status": "shutting down"}, 503, {"Retry-After": "2"})
    return reply({"status": "ok"})


async def models(state: ServerState, request: Request) -> Response:
    """List the model, and once more with each of its adapters."""
    service = state.ready()
    return reply({"object": "list", "data": [_model(service, name) for name in service.models]})


async def model(state: ServerState, request: Request) -> Response:
    """Describe the model, or the model with an adapter, if it is called so."""
    service = state.ready()
    asked = request.path_params["name"]
    if asked not in service.models:
        known = ", ".join(map(repr, service.models))
        raise ApiError(404, f"there is no model {asked[:100]!r} here, but {known}", "model", "model_not_found")
    return reply(_model(service, asked))


def _model(service: Service, name: str) -> dict[str, Any]:
    return {
        **({"parent": service.name} if name != service.name else {}),
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "specdec",
        "context_length": service.context,
        "max_model_len": service.context,
        "meta": {"n_ctx_train": service.decoder.spec.max_positions, "n_vocab": service.decoder.spec.vocab_size},
    }


async def props(state: ServerState, request: Request) -> Response:
    """Describe the settings, in llama-server's shape. `model_settings`: those that the model says itself; others are
    settings that leave its own probabilities as they are."""
    service = state.ready()
    defaults = service.defaults
    return reply(
        {
            "default_generation_settings": {
                "n_ctx": service.context,
                "params": {
                    "temperature": defaults.temperature,
                    "top_k": defaults.top_k,
                    "top_p": defaults.top_p,
                    "min_p": defaults.min_p,
                    "repeat_penalty": defaults.repetition_penalty,
                },
            },
            "model_settings": sorted(Defaults.told(service.model.generation_config)),
            "total_slots": service.engine.max_batch,
            "model_path": service.name,
            "model_alias": service.name,
            "drafter": service.model.drafter.name,
            "chat_template": service.tokenizer.chat_template or "",
            "build_info": f"specdec {specdec.__version__}",
        }
    )


async def version(state: ServerState, request: Request) -> Response:
    """Say which version this is."""
    return reply({"version": specdec.__version__})


async def metrics(state: ServerState, request: Request) -> Response:
    """Give counters to Prometheus."""
    return PlainTextResponse(state.metrics(), media_type="text/plain; version=0.0.4")


async def debug_cache(state: ServerState, request: Request) -> Response:
    """Show the kept conversations, and where the newest prompts parted from them: texts of other clients among them."""
    service = state.ready()
    if not state.debug:
        raise ApiError(404, "start the server with --debug to see texts of its clients", code="not_found")
    return reply(service.partings.view(service.tokenizer))


async def tokenize(state: ServerState, request: Request) -> Response:
    """Return the token ids of `content` (without special tokens, as llama-server), `prompt` or `messages`."""
    service = state.ready()
    body = await json_body(request, TOKENIZE)
    if body.has("messages"):
        asked = read_conversation(body)
        more = {"add_generation_prompt": body.get("add_generation_prompt", True)}
        tokens = await service.prompt(replace(asked, options={**asked.options, **more}))
    elif body.has("content") or body.has("prompt"):
        name = "content" if body.has("content") else "prompt"
        text = body.get(name)
        special = body.get("add_special" if name == "content" else "add_special_tokens", name == "prompt")
        tokens = await service.encoded(lambda: service.tokens(text, special))
    else:
        raise bad_request("give content, prompt or messages", "content")
    return reply({"tokens": tokens, "count": len(tokens), "max_model_len": service.context})


async def detokenize(state: ServerState, request: Request) -> Response:
    """Return the text of token ids."""
    service = state.ready()
    tokens = (await json_body(request, DETOKENIZE)).get("tokens", ())
    most = service.decoder.spec.vocab_size
    if max(tokens, default=0) >= most:
        raise bad_request(f"tokens must be token ids below {most}", "tokens")
    text = await service.encoded(lambda: decode(service.tokenizer, tokens))
    return reply({"content": text, "prompt": text})
