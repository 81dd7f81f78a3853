"""A session's model behind HTTP, in this process: a server on a free port, and requests to it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from typing import Any

import uvicorn

from eval.cli.session import Session
from eval.server.client import Streamed, ask, stream
from specdec.drafting.protocol import FixedLength
from specdec.server.app import create_app
from specdec.server.generation.answer import Answer
from specdec.server.generation.service import Service
from specdec.server.guard import Access
from specdec.server.state import ServerState

AT_A_TIME = 4  # texts that are decoded at a time


class _Watched(ServerState):
    """Remember when the newest answer's first token was emitted, on the clock of `time.perf_counter`."""

    def __init__(self, service: Service) -> None:
        super().__init__(service)
        self.first = 0.0
        self.told = threading.Event()  # `first` is that of the newest answer

    def ended(self, answer: Answer) -> None:
        super().ended(answer)
        self.first = answer.outputs[0].times[0] if answer.outputs[0].times else 0.0
        self.told.set()


class Served:
    """Hold a running server, and a client of it."""

    def __init__(self, session: Session, state: _Watched, port: int, client: Executor) -> None:
        self.session, self.port, self._state, self._client = session, port, state, client

    def forget(self) -> None:
        """Let the next prompt be read as a whole."""
        self.session.model.conversations.forget()

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the reply to a chat completion. Raises ValueError where it is an error."""
        return ask(self.port, body)[0]

    def stream(self, body: dict[str, Any]) -> Streamed:
        """Return what comes of a streamed chat completion. Raises ValueError where it is an error."""
        self._state.told.clear()
        found = self._client.submit(stream, self.port, body).result()
        self._state.told.wait(10)
        found.emitted = self._state.first
        return found


@contextmanager
def serving(session: Session) -> Iterator[Served]:
    """Serve the session's model while the block runs."""
    length = session.settings.draft_length
    lengths = None if isinstance(length, str) else FixedLength(length)
    service = Service(session.model, session.tokenizer, session.settings.model, AT_A_TIME, 2 * AT_A_TIME, lengths)
    state = _Watched(service)
    server = uvicorn.Server(uvicorn.Config(create_app(state, Access()), port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
            if not thread.is_alive():
                raise ValueError("the server did not start")
        # A client is a process of its own, as real ones are: in this one it would wait for Python's lock.
        with ProcessPoolExecutor(1, get_context("spawn")) as client:
            yield Served(session, state, server.servers[0].sockets[0].getsockname()[1], client)
    finally:
        server.should_exit = True
        service.close()
        thread.join(10)
