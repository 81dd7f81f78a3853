"""A session's model behind HTTP, in this process: a server on a free port, and requests to it."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

from eval.cli.session import Session
from specdec.drafting.draft_length import FixedLength
from specdec.server.app import create_app
from specdec.server.generation.answer import Answer
from specdec.server.generation.service import Service
from specdec.server.guard import Access
from specdec.server.state import ServerState

AT_A_TIME = 4  # texts that are decoded at a time
_SECONDS = 600  # a request may take


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


@dataclass
class Streamed:
    """Keep what came of a stream. Times are on the clock of `time.perf_counter`: `emitted` when the engine had the
    first token, `first` when its bytes were here."""

    began: float
    text: str = ""
    emitted: float = 0.0
    first: float = 0.0
    ended: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)
    timings: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Return the number of emitted tokens."""
        return int(self.usage["completion_tokens"])

    @property
    def seconds(self) -> float:
        """Return the seconds from the request to the last byte."""
        return self.ended - self.began


class Served:
    """A running server, and a client of it."""

    def __init__(self, session: Session, state: _Watched, port: int) -> None:
        self.session, self.port, self._state = session, port, state

    def forget(self) -> None:
        """Let the next prompt be read as a whole."""
        self.session.model.conversations.forget()

    def ask(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return the reply to a chat completion. Raises ValueError where it is an error."""
        found: dict[str, Any] = json.loads(self._post(body).read())
        return found

    def stream(self, body: dict[str, Any]) -> Streamed:
        """Return what comes of a streamed chat completion. Raises ValueError where it is an error."""
        self._state.told.clear()
        found = Streamed(time.perf_counter())
        reply = self._post({**body, "stream": True, "stream_options": {"include_usage": True}})
        for line in reply:
            if not line.startswith(b"data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise ValueError(chunk["error"]["message"])
            found.usage = chunk.get("usage") or found.usage
            found.timings = chunk.get("timings") or found.timings
            for choice in chunk["choices"]:
                if text := choice["delta"].get("content"):
                    found.first = found.first or time.perf_counter()
                    found.text += text
        found.ended = time.perf_counter()
        self._state.told.wait(10)
        found.emitted = self._state.first
        return found

    def _post(self, body: dict[str, Any]) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=_SECONDS)
        connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
        reply = connection.getresponse()
        if reply.status != 200:
            raise ValueError(f"the server answered {reply.status}: {reply.read(500).decode(errors='replace')}")
        return reply


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
        yield Served(session, state, server.servers[0].sockets[0].getsockname()[1])
    finally:
        server.should_exit = True
        service.close()
        thread.join(10)
