"""The web application: which path is answered by which endpoint, and how errors leave it."""

from __future__ import annotations

import logging
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Lifespan

from specdec.server import dashboard
from specdec.server.body import openapi, replies
from specdec.server.body.bodies import CHAT, COMPLETION, COUNT, DETOKENIZE, RESPONSE, TOKENIZE, TURN
from specdec.server.body.openapi import Endpoint, Operation
from specdec.server.endpoints import about
from specdec.server.endpoints.chat import chat_completions
from specdec.server.endpoints.completions import completions
from specdec.server.endpoints.messages import count_tokens, messages
from specdec.server.endpoints.responses import responses
from specdec.server.errors import ApiError, of_status
from specdec.server.guard import Access, Guard
from specdec.server.http import CLIENT_LEFT, GoneError, reply
from specdec.server.state import ServerState

_log = logging.getLogger(__name__)

_CHAT = Operation(chat_completions, "Answer a conversation.", replies.CHAT, CHAT, (429,), streams=True)
_COMPLETION = Operation(completions, "Continue one text or several.", replies.COMPLETION, COMPLETION, (429,), True)
_RESPONSE = Operation(responses, "Answer a conversation; nothing is kept.", replies.RESPONSE, RESPONSE, (429,), True)
_PAGE = Operation(dashboard.page, "The page of figures.", "text/html")
_HEALTH = Operation(about.health, "Whether requests are taken.", replies.HEALTH)
_MODELS = Operation(about.models, "The model, and each of its adapters.", replies.MODELS)
_PROPS = Operation(about.props, "The settings, as llama-server gives them.", replies.PROPS)

GET: dict[str, Operation] = {
    "/": _PAGE,
    "/dashboard": _PAGE,
    "/dashboard/events": Operation(dashboard.live, "The figures, every second.", "text/event-stream"),
    "/health": _HEALTH,
    "/v1/health": _HEALTH,
    "/v1/models": _MODELS,
    "/models": _MODELS,
    "/v1/models/{name:path}": Operation(about.model, "The model, if it is called so.", replies.MODEL, refusals=(404,)),
    "/props": _PROPS,
    "/v1/props": _PROPS,
    "/version": Operation(about.version, "Which version this is.", replies.VERSION),
    "/metrics": Operation(about.metrics, "Counters for Prometheus.", "text/plain"),
    "/debug/cache": Operation(about.debug_cache, "What is cached, with --debug.", replies.ANY, refusals=(404,)),
    "/openapi.json": Operation(lambda state, request: _openapi(), "This page.", replies.ANY),
}
POST: dict[str, Operation] = {
    "/v1/chat/completions": _CHAT,
    "/chat/completions": _CHAT,
    "/v1/completions": _COMPLETION,
    "/completions": _COMPLETION,
    "/v1/responses": _RESPONSE,
    "/responses": _RESPONSE,
    "/v1/messages": Operation(messages, "Answer a conversation.", replies.TURN, TURN, (429,), streams=True),
    "/v1/messages/count_tokens": Operation(count_tokens, "Count a conversation's tokens.", replies.COUNT, COUNT),
    "/tokenize": Operation(about.tokenize, "Token ids of a text or a conversation.", replies.TOKENS, TOKENIZE),
    "/detokenize": Operation(about.detokenize, "The text of token ids.", replies.TEXT, DETOKENIZE),
}


async def _openapi() -> Response:
    return reply(openapi.page(GET, POST))


def create_app(state: ServerState, access: Access, lifespan: Lifespan[Starlette] | None = None) -> Starlette:
    """Return the application that serves the model of `state` to those whom `access` lets in."""
    routes = [
        Route(path, partial(_answer, state, operation.endpoint), methods=[method])
        for method, operations in (("GET", GET), ("POST", POST))
        for path, operation in operations.items()
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Guard, access=access)],
        exception_handlers={HTTPException: _http_error},
        lifespan=lifespan,
    )


async def _answer(state: ServerState, endpoint: Endpoint, request: Request) -> Response:
    """Return the endpoint's reply, or that of the error that it raised; count it."""
    try:
        response = await endpoint(state, request)
    except (GoneError, ClientDisconnect):
        response = Response(status_code=CLIENT_LEFT)
    except ApiError as error:
        response = error_reply(request, error)
    except Exception:
        _log.exception("%s failed", request.url.path)
        response = error_reply(request, ApiError(500, "the server failed; its log says why", code="internal_error"))
    state.replies[_route(request), response.status_code] += 1
    return response


def error_reply(request: Request, error: ApiError) -> Response:
    """Return the reply of an error, in the shape of the protocol that was spoken."""
    shape = error.anthropic() if request.url.path.startswith("/v1/messages") else error.openai()
    return reply(shape, error.status, error.headers)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    found = of_status(error.status_code)
    if error.status_code == 404:
        found.message = f"there is no {request.url.path[:100]} here; /openapi.json lists what there is"
    response = error_reply(request, found)
    response.headers.update(error.headers or {})
    return response


def _route(request: Request) -> str:
    """Return the path without what a client made up, so that there are few of them."""
    return str(request.url.path) if request.url.path in GET | POST else "other"
