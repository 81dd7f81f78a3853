"""The server as a process: it listens at once, loads the model meanwhile, and ends in good order.

The first signal (Ctrl-C, SIGTERM) stops taking requests, which then get 503, and lets answers end for a while; the
second ends them, with an error event in each stream.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import socket
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from specdec.server.app import create_app
from specdec.server.generation.service import Service
from specdec.server.guard import Access
from specdec.server.http import KEEP_ALIVE
from specdec.server.state import ServerState

GRACE = 30.0  # seconds for answers to end after the first signal
_LOOK = 0.05  # seconds between two looks at whether all answers have ended
_LEAVE = 5  # seconds for connections to end once no answer is under way
_IDLE = 75  # seconds until a connection without a request is closed: longer than clients keep them


@dataclass(frozen=True)
class Listening:
    """Describe where to listen, whom to answer, how long answers may take to end when the server is told to, and after
    how long a silence a stream gets a comment."""

    host: str = "127.0.0.1"
    port: int = 8080
    access: Access = field(default_factory=Access)
    grace: float = GRACE
    debug: bool = False
    keep_alive: float = KEEP_ALIVE

    def open(self) -> socket.socket:
        """Return a socket that listens. Raises ValueError: the address is taken, or open to others without a key."""
        if not is_loopback(self.host) and not self.access.keys:
            raise ValueError(
                f"{self.host} can be reached from other machines; give an --api-key too, or listen on 127.0.0.1"
            )
        try:
            family = socket.AF_INET6 if ":" in self.host else socket.AF_INET
            return socket.create_server((self.host, self.port), family=family)
        except OSError as error:
            raise ValueError(
                f"cannot listen at {self.host}, port {self.port}: {error.strerror or error}; choose another --port"
            ) from error


def is_loopback(host: str) -> bool:
    """Return whether only programs of this machine reach `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(
    load: Callable[[], Service],
    listening: Listening,
    started: Callable[[str, Service], None],
    ending: Callable[[int], None] = lambda answers: None,
) -> None:
    """Serve the model that `load` loads, until a signal comes. `started` is told the address and the service, `ending`
    at the first signal how many answers are under way.

    Raises ValueError: see `Listening.open`; and whatever `load` raises.
    """
    opened = listening.open()
    host, port = opened.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else host
    state = ServerState(debug=listening.debug, keep_alive=listening.keep_alive)
    failures: list[BaseException] = []

    def begin() -> None:
        try:
            service = load()
            state.service = service
            started(f"http://{shown}:{port}", service)
        except BaseException as error:
            failures.append(error)
            server.should_exit = True

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        server.loop = asyncio.get_running_loop()
        threading.Thread(target=begin, name="specdec loading", daemon=True).start()
        yield
        if state.service is not None:
            state.service.close()

    app = create_app(state, listening.access, lifespan)
    config = uvicorn.Config(
        app,
        log_level=logging.WARNING,
        access_log=False,
        ws="none",  # or each request for a web socket would be a line about packages to install
        timeout_keep_alive=_IDLE,
        timeout_graceful_shutdown=_LEAVE,  # for clients that neither send nor read
        server_header=False,
    )
    server = _Server(config, state, listening.grace, ending)
    with opened:
        server.run(sockets=[opened])
    if failures:
        raise failures[0]


class _Server(uvicorn.Server):
    """Run uvicorn's server with the two signals. `loop` is set when it runs."""

    def __init__(self, config: uvicorn.Config, state: ServerState, grace: float, ending: Callable[[int], None]) -> None:
        super().__init__(config)
        self.state, self.grace, self.ending = state, grace, ending
        self.loop: asyncio.AbstractEventLoop | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Take a signal: nothing but notes is made here, wherever the program just is."""
        if self.loop is None:
            self.should_exit = True
        else:
            self.loop.call_soon_threadsafe(self._end_answers if self.state.draining else self._drain)
        self.state.draining = True

    def _drain(self) -> None:
        """Go on listening until the answers have ended, so that whoever asks is told what happens."""
        assert self.loop is not None
        self.ending(self._answers)
        self.loop.call_later(self.grace, self._end_answers)
        self._stop_when_idle()

    def _stop_when_idle(self) -> None:
        assert self.loop is not None
        if self._answers == 0:
            self.should_exit = True
        elif not self.should_exit:
            self.loop.call_later(_LOOK, self._stop_when_idle)

    @property
    def _answers(self) -> int:
        if (service := self.state.service) is None:
            return 0
        return service.thread.running + service.thread.waiting

    def _end_answers(self) -> None:
        self.should_exit = True
        if self.state.service is not None:
            self.state.service.thread.refuse()
        else:
            self.force_exit = True
