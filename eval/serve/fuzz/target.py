"""A server with a tiny model of random weights, in this process, and two ways to ask it: in process and by a socket."""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import tempfile
import threading
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import uvicorn
from starlette.applications import Starlette
from transformers import LlamaConfig

import specdec
from eval.serve.fuzz.damage import Sent
from eval.synthetic.command import write_model
from specdec.cache import KVCache
from specdec.drafting.costs import Costs
from specdec.engine.grammar import GrammarMatcher
from specdec.engine.sequence import Sequence
from specdec.memory.system import resident_bytes
from specdec.server.app import create_app
from specdec.server.generation.answer import Answer
from specdec.server.generation.engine_thread import Ticket
from specdec.server.generation.service import Service
from specdec.server.guard import Access
from specdec.server.state import ServerState
from specdec.util.heap import trim_heap

T = TypeVar("T")
CONTEXT = 2048
KEPT = 8 << 20  # bytes of conversations
_MODEL: dict[str, Any] = {
    **{"vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT},
    **{"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2},
}
COUNTED = (Answer, Ticket, Sequence, GrammarMatcher, KVCache)


@dataclass(frozen=True)
class Reply:
    """Hold a reply: its status (0: none came), media type and body."""

    status: int
    kind: str = ""
    body: bytes = b""


class Target:
    """Reach the server that is tested. `address`: host and port of its socket."""

    def __init__(self, service: Service, app: Starlette, address: tuple[str, int]) -> None:
        self.service, self.app, self.address = service, app, address
        self.errors = _Errors()
        logging.getLogger("specdec").addHandler(self.errors)
        self._before = dict[str, int]()  # what a program had before, other models' caches say
        self._before = self._alive()

    def left(self, seconds: int = 10) -> dict[str, int]:
        """Return the objects of requests that are alive, by class, and what the engine has: once nothing is left, or
        after so many seconds. A handler may be at its end when the last byte has come."""
        for _ in range(5 * seconds):
            if not any((counts := self._alive()).values()):
                break
            time.sleep(0.2)
        return counts

    def _alive(self) -> dict[str, int]:
        gc.collect()
        alive = [type(one) for one in gc.get_objects()]
        counts = {kind.__name__: alive.count(kind) for kind in COUNTED}
        counts["KVCache"] -= len(self.service.model.conversations.kept)
        counts = {name: max(0, count - self._before.get(name, 0)) for name, count in counts.items()}
        thread = self.service.thread
        return counts | {"running": thread.running, "waiting": thread.waiting, "engine": self.service.engine.in_flight}

    async def ask(self, sent: Sent) -> Reply:
        """Return the reply to a request, without a socket."""
        headers = [(b"host", b"localhost"), (b"content-type", sent.kind.encode("latin-1"))]
        scope = {
            **{"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": "POST", "scheme": "http"},
            **{"path": sent.path, "raw_path": sent.path.encode(), "query_string": b"", "headers": headers},
            **{"client": ("127.0.0.1", 1), "server": ("127.0.0.1", 80), "root_path": ""},
        }
        coming = iter([{"type": "http.request", "body": sent.body, "more_body": False}])
        status, kind, body = 0, "", bytearray()

        async def receive() -> Any:
            if (message := next(coming, None)) is not None:
                return message
            await asyncio.Event().wait()  # the client stays

        async def send(message: Any) -> None:
            nonlocal status, kind
            if message["type"] == "http.response.start":
                status = message["status"]
                kind = dict(message["headers"]).get(b"content-type", b"").decode()
            else:
                body.extend(message.get("body", b""))

        await self.app(scope, receive, send)
        return Reply(status, kind, bytes(body))

    async def ask_by_socket(self, sent: Sent) -> Reply:
        """Return the reply to a request over a connection of its own."""
        reader, writer = await asyncio.open_connection(*self.address)
        try:
            writer.write(request_bytes(sent))
            await writer.drain()
            return parsed(await reader.read())
        finally:
            writer.close()


def request_bytes(sent: Sent) -> bytes:
    """Return a request as it goes over a connection, which the server then closes."""
    head = f"POST {sent.path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: {len(sent.body)}\r\n"
    return head.encode() + b"Content-Type: " + sent.kind.encode("latin-1") + b"\r\n\r\n" + sent.body


def parsed(raw: bytes) -> Reply:
    """Return the reply in all bytes of a connection; chunks stay as they came."""
    head, _, body = raw.partition(b"\r\n\r\n")
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return Reply(int(words[1]) if len(words) > 1 else 0, headers.get("content-type", ""), body)


class _Errors(logging.Handler):
    """Keep what the server logged of its newest failure."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.newest = ""

    def emit(self, record: logging.LogRecord) -> None:
        """Take a record."""
        self.newest = self.format(record)


@contextmanager
def target(max_sequences: int = 4, max_waiting: int = 64) -> Iterator[Target]:
    """Serve a tiny model of random weights, until the end of the block."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="specdec-fuzz-") as place:
        write_model(LlamaConfig(**_MODEL), None, Path(place) / "tiny")
        model = specdec.load(Path(place) / "tiny", device="cpu")
        tokenizer = specdec.load_tokenizer(Path(place) / "tiny")
        model.conversations.limit = KEPT
        model.lengths.calibrate(Costs({1: 1e-3, 2: 1.05e-3}, text=1e-4))
        model.lengths.measured_for = torch.get_num_threads(), 64
        service = Service(model, tokenizer, "tiny", max_sequences, max_waiting)
        app = create_app(ServerState(service), Access())
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="critical", lifespan="off"))
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        try:
            while not server.started:
                time.sleep(0.01)
            yield Target(service, app, server.servers[0].sockets[0].getsockname()[:2])
        finally:
            server.should_exit = True
            thread.join(10)
            service.close()


async def within(seconds: float, work: Coroutine[Any, Any, T]) -> T:
    """Return the result of `work`. Raises asyncio.TimeoutError after so many seconds in which this process ran: a
    system may hold all processes for a while."""
    task = asyncio.ensure_future(work)
    try:
        for _ in range(int(seconds)):
            if (await asyncio.wait({task}, timeout=1))[0]:
                return task.result()
        raise asyncio.TimeoutError
    finally:
        task.cancel()


def resident() -> int:
    """Return the bytes that this process has in memory, after what was freed has gone back to the system."""
    gc.collect()
    trim_heap()
    return resident_bytes()


def complaint(reply: Reply) -> str | None:
    """Return what is wrong with a reply: None where it is an answer, or an error of the request."""
    if reply.status == 0:
        return "no reply"
    if reply.status >= 500:
        return f"status {reply.status}: {reply.body[:300]!r}"
    if reply.kind.startswith("text/event-stream"):
        return "an error in the stream" if b'"server_error"' in reply.body or b'"api_error"' in reply.body else None
    try:
        found = json.loads(reply.body)
    except ValueError:
        return f"status {reply.status} without JSON: {reply.body[:100]!r}"
    if reply.status >= 400 and not (isinstance(found.get("error"), dict) and found["error"].get("message")):
        return f"status {reply.status} without a message"
    return None
