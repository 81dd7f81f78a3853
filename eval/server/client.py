"""A client of the server: requests by the standard library alone, so that its process starts in an instant."""

from __future__ import annotations

import http.client
import json
import time
from dataclasses import dataclass, field
from typing import Any

_SECONDS = 600  # a request may take


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


def stream(port: int, body: dict[str, Any]) -> Streamed:
    """Return what comes of a streamed chat completion, `emitted` left open. Raises ValueError where it is an error."""
    found = Streamed(time.perf_counter())
    for line in post(port, {**body, "stream": True, "stream_options": {"include_usage": True}}):
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
    return found


def ask(port: int, body: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Return the reply to a chat completion, and the seconds that it took. Raises ValueError where it is an error."""
    began = time.perf_counter()
    found: dict[str, Any] = json.loads(post(port, body).read())
    return found, time.perf_counter() - began


def post(port: int, body: dict[str, Any]) -> http.client.HTTPResponse:
    """Return the reply to a chat completion. Raises ValueError where it is an error."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=_SECONDS)
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    reply = connection.getresponse()
    if reply.status != 200:
        raise ValueError(f"the server answered {reply.status}: {reply.read(500).decode(errors='replace')}")
    return reply
