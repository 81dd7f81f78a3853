"""The web application: which path is answered by which endpoint, and how errors leave it."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from functools import partial

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Lifespan

from specdec.server import dashboard
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

Endpoint = Callable[[ServerState, Request], Awaitable[Response]]

GET: dict[str, Endpoint] = {
    "/": dashboard.page,
    "/dashboard": dashboard.page,
    "/dashboard/events": dashboard.live,
    "/health": about.health,
    "/v1/health": about.health,
    "/v1/models": about.models,
    "/models": about.models,
    "/v1/models/{name:path}": about.model,
    "/props": about.props,
    "/v1/props": about.props,
    "/version": about.version,
    "/metrics": about.metrics,
    "/debug/cache": about.debug_cache,
}
POST: dict[str, Endpoint] = {
    "/v1/chat/completions": chat_completions,
    "/chat/completions": chat_completions,
    "/v1/completions": completions,
    "/completions": completions,
    "/v1/responses": responses,
    "/responses": responses,
    "/v1/messages": messages,
    "/v1/messages/count_tokens": count_tokens,
    "/tokenize": about.tokenize,
    "/detokenize": about.detokenize,
}


def create_app(state: ServerState, access: Access, lifespan: Lifespan[Starlette] | None = None) -> Starlette:
    """Return the application that serves the model of `state` to those whom `access` lets in."""
    routes = [Route(path, partial(_answer, state, endpoint), methods=["GET"]) for path, endpoint in GET.items()]
    routes += [Route(path, partial(_answer, state, endpoint), methods=["POST"]) for path, endpoint in POST.items()]
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
    except GoneError:
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
    response = error_reply(request, of_status(error.status_code))
    response.headers.update(error.headers or {})
    return response


def _route(request: Request) -> str:
    """Return the path without what a client made up, so that there are few of them."""
    return str(request.url.path) if request.url.path in GET | POST else "other"
