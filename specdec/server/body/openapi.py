"""The server's OpenAPI page: every path, with the declared fields of its body and what replies have."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from starlette.requests import Request
from starlette.responses import Response

import specdec
from specdec.server.body import replies
from specdec.server.body.kinds import Either, Items, Kind, Schema
from specdec.server.body.objects import Object
from specdec.server.state import ServerState

Endpoint = Callable[[ServerState, Request], Awaitable[Response]]
ANTHROPIC = "/v1/messages"  # with all below it: errors have another shape there
_REFUSALS = (401, 403, 503)  # of any request: no key, a foreign name or page, a server that begins or ends
_BODY_REFUSALS = (400, 413, 415)
_EVENTS = "text/event-stream"
_EVENT: Schema = {
    "type": "object",
    "properties": {"event": {"type": "string"}, "data": {"type": "string"}},
    "required": ["data"],
}


@dataclass(frozen=True)
class Operation:
    """Describe what a path does. `reply`: the schema of its JSON, or the media type of a reply that is none.
    `refusals`: statuses besides those that every path has. `streams`: events come where the body asks for them."""

    endpoint: Endpoint
    about: str
    reply: Schema | str
    body: Object | None = None
    refusals: tuple[int, ...] = ()
    streams: bool = False


def page(get: Mapping[str, Operation], post: Mapping[str, Operation]) -> dict[str, Any]:
    """Return the page of all paths."""
    paths: dict[str, dict[str, Any]] = {}
    for method, operations in (("get", get), ("post", post)):
        for path, operation in operations.items():
            paths.setdefault(path.replace(":path", ""), {})[method] = _described(method, path, operation)
    bodies = [operation.body for operation in post.values() if operation.body is not None]
    schemas = {"Error": replies.ERROR, "AnthropicError": replies.ANTHROPIC_ERROR}
    for body in bodies:
        schemas |= definitions(body)
    return {
        "openapi": "3.1.0",
        "info": {
            "title": "specdec",
            "version": specdec.__version__,
            "description": "A model on this machine. Unknown fields of a body are passed over; null is as left out.",
        },
        "paths": paths,
        "components": {
            "schemas": schemas,
            "securitySchemes": {"bearer": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{}, {"bearer": []}],  # no key is asked for unless the server was given one
    }


def definitions(kind: Kind) -> dict[str, Schema]:
    """Return the schemas of all objects in a kind, by name."""
    if isinstance(kind, Object):
        found = {kind.name: kind.definition}
        for field in kind.fields.values():
            found |= definitions(field.kind)
        return found
    if isinstance(kind, Items):
        return definitions(kind.of)
    if isinstance(kind, Either):
        return {name: one for each in kind.kinds for name, one in definitions(each).items()}
    return {}


def _described(method: str, path: str, operation: Operation) -> dict[str, Any]:
    error = {"$ref": f"#/components/schemas/{'AnthropicError' if path.startswith(ANTHROPIC) else 'Error'}"}
    content: dict[str, Any] = (
        {operation.reply: {"schema": _EVENT if operation.reply == _EVENTS else {"type": "string"}}}
        if isinstance(operation.reply, str)
        else {"application/json": {"schema": operation.reply}}
    )
    if operation.streams:
        content[_EVENTS] = {"schema": _EVENT}
    statuses = {*_REFUSALS, *operation.refusals, *(_BODY_REFUSALS if operation.body is not None else ())}
    responses: dict[str, Any] = {"200": {"description": operation.about, "content": content}}
    for status in sorted(statuses):
        shape = error if path != "/health" and path != "/v1/health" else replies.HEALTH
        if status in (401, 403):
            shape = error
        told = {"description": HTTPStatus(status).phrase, "content": {"application/json": {"schema": shape}}}
        responses[str(status)] = told
    made: dict[str, Any] = {
        "summary": operation.about,
        "operationId": re.sub(r"\W+", "_", f"{method}{path}").strip("_"),
        "responses": responses,
    }
    if names := re.findall(r"{(\w+)(?::path)?}", path):
        made["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": {"type": "string"}} for name in names
        ]
    if operation.body is not None:
        made["requestBody"] = {
            "required": True,
            "content": {"application/json": {"schema": operation.body.schema}},
        }
    return made
