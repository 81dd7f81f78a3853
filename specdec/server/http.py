"""Replies that end when the client leaves: server-sent events, and JSON that is waited for."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from specdec.server.body.objects import Fields, Object
from specdec.server.errors import ApiError, bad_request, of_exception
from specdec.util.json_text import parse_json

KEEP_ALIVE = 10.0  # seconds: clients and proxies give up on silence
CLIENT_LEFT = 499  # nginx's status for a reply that nobody reads

T = TypeVar("T")


class GoneError(Exception):
    """Report that the client has left."""


class EventStream(Response):
    """Stream server-sent events. A client that leaves ends them at once, during a long prompt too.

    `events`: the texts of the events. `failed` makes the event of an error, with which the stream ends. `close` is
    called in the end, however it comes. `keep_alive`: seconds without an event, after which a comment is sent.
    """

    def __init__(
        self,
        events: AsyncIterator[str],
        failed: Callable[[ApiError], str],
        close: Callable[[], None],
        keep_alive: float = KEEP_ALIVE,
    ) -> None:
        super().__init__(media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        del self.headers["content-length"]
        self._events, self._failed, self._close, self._keep_alive = events, failed, close, keep_alive
        self._newest = time.monotonic()  # when something was sent
        self._over = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the events."""
        tasks: list[asyncio.Future[None]] = []
        try:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            # They live as long as the stream: a task for each event would cost more than the event.
            tasks += map(asyncio.ensure_future, (self._send_events(send), _left(receive), self._send_comments(send)))
            await asyncio.wait(tasks[:2], return_when=asyncio.FIRST_COMPLETED)
            for task in tasks[:2]:
                if task.done():
                    task.result()
        finally:
            for task in tasks:
                task.cancel()
            self._close()

    async def _send_events(self, send: Send) -> None:
        try:
            async for text in self._events:
                await self._put(send, text)
            last = ""
        except Exception as error:
            last = self._failed(of_exception(error))
        self._over = True
        await self._put(send, last, more=False)

    async def _send_comments(self, send: Send) -> None:
        while not self._over:
            await asyncio.sleep(self._newest + self._keep_alive - time.monotonic())
            if not self._over and time.monotonic() >= self._newest + self._keep_alive:
                await self._put(send, ": keep-alive\n\n")

    async def _put(self, send: Send, text: str, more: bool = True) -> None:
        self._newest = time.monotonic()
        await send({"type": "http.response.body", "body": text.encode(), "more_body": more})


async def unless_gone(request: Request, work: Awaitable[T], close: Callable[[], None]) -> T:
    """Return the result of `work`. Raises GoneError, after `close`, when the client leaves before."""
    gone = asyncio.ensure_future(_left(request.receive))
    working = asyncio.ensure_future(work)
    try:
        await asyncio.wait({working, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise GoneError
        return working.result()
    finally:
        gone.cancel()
        working.cancel()
        close()


async def _left(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def json_body(request: Request, declared: Object) -> Fields:
    """Return the declared fields of a request's JSON body. Raises ApiError when the body is no such JSON object."""
    try:
        values = parse_json(await request.body())
    except ValueError as error:
        raise bad_request(f"the body cannot be read: {error}", code="invalid_json") from error
    return declared.read(values, "")


def event(data: dict[str, Any], name: str | None = None) -> str:
    """Return a server-sent event."""
    head = "" if name is None else f"event: {name}\n"
    return f"{head}data: {json.dumps(data, ensure_ascii=False, separators=(',', ':'))}\n\n"


def reply(data: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON reply."""
    return JSONResponse(data, status, headers)
