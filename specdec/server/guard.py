"""Who may ask, and with what: the checks before any endpoint.

A page of a foreign site that a browser on this machine shows can send requests here. Its name in `Host` (after DNS
rebinding), its `Origin`, or a body that is not declared as JSON (which needs no preflight) gives it away.
"""

from __future__ import annotations

import hmac
import ipaddress
import re
import socket
from collections.abc import Collection
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from specdec.server.errors import ApiError
from specdec.server.http import reply

MOST_BODY = 32 * 2**20  # bytes
# They hold nothing of anybody's: no key is asked for.
OPEN_PATHS = frozenset({"/", "/dashboard", "/health", "/v1/health", "/openapi.json"})


@dataclass(frozen=True)
class Access:
    """Say who may ask. `keys`: one of them must come with a request, where there are any. `hosts`: names of this server
    besides those of the loopback and addresses in digits. `origins`: sites whose pages may ask."""

    keys: Collection[str] = ()
    hosts: Collection[str] = ()
    origins: Collection[str] = ()

    def __post_init__(self) -> None:
        """Raise a ValueError for an empty key, which a request without one would have."""
        if not all(key.strip() for key in self.keys):
            raise ValueError("the API key is empty; is the variable that should hold it set?")
        for origin in self.origins:
            if origin != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[^/\s]+", origin):
                raise ValueError(f"{origin!r} is no origin: write a scheme and a host, like https://example.org")

    def refusal(self, scope: Scope) -> ApiError | None:
        """Return why a request is refused; None for one that is not."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_ours(host_name(host)):
            return ApiError(403, f"this server is not called {host[:100]!r}; see --allow-host", code="host_not_allowed")
        origin = headers.get("origin")
        if origin is not None and not self.allows(origin, host):
            return ApiError(
                403, f"pages of {origin[:100]!r} may not ask; see --allow-origin", code="origin_not_allowed"
            )
        if scope["method"] == "POST" and headers.get("content-type", "").partition(";")[0].strip().lower() != (
            "application/json"
        ):
            return ApiError(
                415,
                "the body must be declared as JSON: send the header Content-Type: application/json",
                code="unsupported_media_type",
            )
        if self.keys and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
            given = (headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer ")).strip()
            # All are compared, so that the time says nothing about which. Headers come decoded as Latin-1.
            if not any([hmac.compare_digest(given.encode("latin-1"), key.strip().encode()) for key in self.keys]):
                return ApiError(401, "the API key is missing or wrong", code="invalid_api_key")
        return None

    def allows(self, origin: str, host: str) -> bool:
        """Return whether a page of `origin` may ask: one of this server itself, or of a site that was allowed."""
        return origin.partition("://")[2] == host or origin in self.origins or "*" in self.origins

    def _is_ours(self, name: str) -> bool:
        # DNS rebinding needs a name: an address in digits cannot be pointed somewhere else.
        try:
            ipaddress.ip_address(name)
            return True
        except ValueError:
            known = {"localhost", socket.gethostname().lower(), *(host.lower() for host in self.hosts)}
            return name in known or name.endswith(".localhost")


def host_name(host: str) -> str:
    """Return the name or address in a Host header, without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0].lower()


class Guard:
    """Refuse what `access` refuses, and bodies of more than `most_body` bytes; answer preflights. A middleware."""

    def __init__(self, app: ASGIApp, access: Access, most_body: int = MOST_BODY) -> None:
        self.app, self.access, self.most_body = app, access, most_body

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        origin = headers.get("origin")
        allowed = origin is not None and self.access.allows(origin, headers.get("host", ""))
        allow = _cors(origin) if allowed and origin is not None else {}
        refusal = self.access.refusal(scope)
        if refusal is None and _length(headers) > self.most_body:
            refusal = self._too_large()
        if refusal is not None:
            anthropic = scope["path"].startswith("/v1/messages")
            body = refusal.anthropic() if anthropic else refusal.openai()
            await reply(body, refusal.status, {**(refusal.headers or {}), **allow})(scope, receive, send)
            return
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers:
            await reply({}, 200, allow)(scope, receive, send)
            return
        taken = 0

        async def bounded() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self.most_body:
                raise self._too_large()
            return message

        async def labelled(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [
                    *message.get("headers", ()),
                    (b"x-content-type-options", b"nosniff"),
                    *((name.lower().encode(), value.encode()) for name, value in allow.items()),
                ]
            await send(message)

        await self.app(scope, bounded, labelled)

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.most_body} bytes", code="request_too_large")


def _length(headers: Headers) -> int:
    text = headers.get("content-length", "0")
    return int(text) if text.isascii() and text.isdigit() else 0


def _cors(origin: str) -> dict[str, str]:
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Allow-Methods": "GET, POST, OPTIONS",
        "Access-Control-Allow-Headers": "*, Authorization, Content-Type, x-api-key",
        "Vary": "Origin",
    }
