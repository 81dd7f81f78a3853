"""A tiny model behind the server's application, for tests of endpoints; and what clients make of streams."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import uvicorn
from starlette.applications import Starlette
from starlette.testclient import TestClient
from torch import Tensor
from transformers import PreTrainedTokenizerBase

import specdec
from specdec.drafting.costs import Costs
from specdec.model.decoder import Decoder
from specdec.server.app import create_app
from specdec.server.generation.service import Service
from specdec.server.guard import Access
from specdec.server.state import ServerState

USER = {"role": "user", "content": "hello abc hello abc"}


class Served:
    """A loaded model, its service and its application. Costs of a tiny model are given, not measured."""

    def __init__(self, folder: Path | str, access: Access | None = None, **settings: Any) -> None:
        drafter = settings.pop("drafter", "auto")
        self.model = specdec.load(folder, device="cpu", drafter=drafter, adapter=settings.pop("adapter", None))
        if isinstance(folder, Path):  # a tiny model: measuring what its passes cost takes longer than a test
            self.model.lengths.calibrate(Costs({1: 1e-3, 2: 1.05e-3}, text=1e-4))
            self.model.lengths.measured_for = torch.get_num_threads(), 64
        self.tokenizer: PreTrainedTokenizerBase = specdec.load_tokenizer(folder)
        self.service = Service(self.model, self.tokenizer, "tiny", **settings)
        self.state = ServerState(self.service)
        self.app = create_app(self.state, access or Access())

    @contextmanager
    def client(self) -> Iterator[TestClient]:
        with TestClient(self.app, base_url="http://localhost", raise_server_exceptions=False) as client:
            yield client

    def generated(self, messages: list[dict[str, Any]], **options: Any) -> str:
        """The text of `generate` for the same conversation, by the library."""
        inputs = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        sampled = {"do_sample": True, "top_k": 0} if "temperature" in options else {"do_sample": False}
        output = self.model.generate(**inputs, **sampled, **options)
        assert isinstance(output, Tensor)
        return str(self.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :].tolist(), skip_special_tokens=True))


@contextmanager
def served(folder: Path | str, access: Access | None = None, **settings: Any) -> Iterator[Served]:
    one = Served(folder, access, **settings)
    try:
        yield one
    finally:
        one.service.close()


@contextmanager
def listening(app: Starlette) -> Iterator[str]:
    """The address of `app` on a free port, for clients that need a real connection."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until(lambda: server.started)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    server.should_exit = True
    thread.join(10)


def until(holds: Callable[[], bool], seconds: float = 20) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.005)


def events(text: str) -> list[Any]:
    """The JSON of a stream's events, [DONE] as a string."""
    found = [line.removeprefix("data: ") for line in text.splitlines() if line.startswith("data: ")]
    return [one if one == "[DONE]" else json.loads(one) for one in found]


def streamed_text(chunks: list[Any]) -> str:
    return "".join(
        choice["delta"].get("content") or "" for chunk in chunks if chunk != "[DONE]" for choice in chunk["choices"]
    )


@contextmanager
def slow_passes(seconds: float) -> Iterator[list[int]]:
    """Every pass takes longer; the list has the rows of each."""
    forward, rows = Decoder.forward_many, list[int]()

    def slow(decoder: Decoder, ids: list[Tensor], *more: Any) -> Any:
        rows.append(sum(map(len, ids)))
        time.sleep(seconds)
        return forward(decoder, ids, *more)

    Decoder.forward_many = slow  # type: ignore[method-assign]
    try:
        yield rows
    finally:
        Decoder.forward_many = forward  # type: ignore[method-assign]
