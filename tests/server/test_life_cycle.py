"""Requests that leave, queues that fill, passes that fail; health meanwhile."""

from __future__ import annotations

import gc
import http.client
import json
import random
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import pytest
from starlette.testclient import TestClient

from specdec.cache import KVCache
from specdec.engine.grammar import GrammarMatcher
from specdec.engine.sequence import Sequence
from specdec.server.app import create_app
from specdec.server.generation.answer import Answer
from specdec.server.generation.engine_thread import Ticket
from specdec.server.guard import Access
from specdec.server.state import ServerState
from tests.support.serving.served import USER, Served, events, listening, served, slow_passes, until

LONG = {"messages": [USER], "temperature": 0, "max_tokens": 4000, "ignore_eos": True}


@pytest.fixture(scope="module")
def address(tiny: Served) -> Iterator[str]:
    with listening(tiny.app) as found:
        yield found


def post(address: str, body: dict[str, Any], path: str = "/v1/chat/completions") -> http.client.HTTPConnection:
    """Send a request and wait for nothing."""
    connection = http.client.HTTPConnection(urlparse(address).netloc, timeout=30)
    connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
    return connection


def idle(one: Served) -> bool:
    return one.service.thread.running == one.service.thread.waiting == one.service.engine.in_flight == 0


def caches() -> int:
    return sum(type(one) is KVCache for one in gc.get_objects())


def alive() -> dict[str, int]:
    """How many objects of requests there are, by class."""
    found = [type(one).__name__ for one in gc.get_objects()]
    return {kind.__name__: found.count(kind.__name__) for kind in (Answer, Ticket, Sequence, GrammarMatcher)}


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_ends_its_text(tiny: Served, address: str, stream: bool) -> None:
    with slow_passes(0.01) as rows:
        connection = post(address, {**LONG, "stream": stream})
        until(lambda: tiny.service.thread.running == 1 and len(rows) > 3)
        assert connection.sock is not None
        connection.sock.close()
        connection.close()
        until(lambda: idle(tiny))
    assert len(rows) < 300, "a fraction of what was asked for"


def test_a_client_that_leaves_while_its_prompt_is_read_or_queued(tiny: Served, address: str) -> None:
    tiny.model.conversations.forget()
    long = {"messages": [{"role": "user", "content": "x" * 6000}], "max_tokens": 5}
    with slow_passes(0.02) as rows:
        running = [post(address, long), post(address, {**long, "stream": True})]
        waiting = post(address, LONG)
        until(lambda: tiny.service.thread.waiting == 1 and len(rows) > 2)
        for connection in (waiting, *running):
            connection.close()
        until(lambda: idle(tiny))
    assert sum(rows) < 6000
    # What was read of the prompt serves the next one.
    until(lambda: any(len(one.tokens) >= 64 for one in tiny.model.conversations.kept))


def test_others_are_answered_during_a_generation(tiny: Served, address: str) -> None:
    with slow_passes(0.02):
        connection = post(address, LONG)
        until(lambda: tiny.service.thread.running == 1)
        for path in ("/health", "/v1/models", "/metrics"):
            asked = http.client.HTTPConnection(urlparse(address).netloc, timeout=10)
            asked.request("GET", path)
            assert asked.getresponse().status == 200
            asked.close()
        assert tiny.service.thread.running == 1
        connection.close()
        until(lambda: idle(tiny))


def test_a_full_queue_is_told_with_a_time_to_come_back(tiny: Served, client: TestClient, address: str) -> None:
    with slow_passes(0.02):
        held = [post(address, LONG) for _ in range(4)]  # two run, two wait
        until(lambda: tiny.service.thread.running == 2 and tiny.service.thread.waiting == 2)
        for body in (LONG, {**LONG, "stream": True}):
            full = client.post("/v1/chat/completions", json=body)
            assert full.status_code == 429 and int(full.headers["retry-after"]) > 0
            assert full.json()["error"]["code"] == "queue_full"
        for connection in held:
            connection.close()
        until(lambda: idle(tiny))
    assert client.post("/v1/chat/completions", json={**LONG, "max_tokens": 3}).status_code == 200


def test_more_choices_than_the_queue_has_room_for_are_refused_as_one(
    tiny: Served, client: TestClient, address: str
) -> None:
    never = client.post("/v1/chat/completions", json={**LONG, "n": 5})  # trying again later would not help
    assert never.status_code == 400 and never.json()["error"]["param"] == "n"
    assert "at most 4" in never.json()["error"]["message"]
    with slow_passes(0.02):
        held = post(address, LONG)
        until(lambda: tiny.service.thread.running == 1)
        assert client.post("/v1/chat/completions", json={**LONG, "n": 4}).status_code == 429
        held.close()
        until(lambda: idle(tiny))
    assert idle(tiny)
    assert client.post("/v1/chat/completions", json={**LONG, "n": 4, "max_tokens": 2}).status_code == 200


def test_a_failed_pass_ends_its_texts_and_nothing_else(
    tiny: Served, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patched:
        patched.setattr(type(tiny.service.decoder), "forward_many", fail)
        done = client.post("/v1/chat/completions", json={**LONG, "max_tokens": 3})
        assert done.status_code == 500 and "no room" in done.json()["error"]["message"]
        streamed = events(client.post("/v1/chat/completions", json={**LONG, "stream": True}).text)
        assert streamed[-1]["error"]["type"] == "server_error" and "[DONE]" not in streamed
    assert idle(tiny)
    assert client.post("/v1/chat/completions", json={**LONG, "max_tokens": 3}).status_code == 200


def test_a_failed_pass_leaves_those_that_wait(
    tiny: Served, client: TestClient, address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, broken = type(tiny.service.decoder).forward_many, threading.Event()

    def fail_once(*arguments: Any) -> Any:
        if tiny.service.thread.waiting and not broken.is_set():
            broken.set()
            raise MemoryError("no room")
        return real(*arguments)

    with slow_passes(0.01):
        held = [post(address, LONG) for _ in range(2)]
        until(lambda: tiny.service.thread.running == 2)
        waiting = post(address, {**LONG, "max_tokens": 3})
        until(lambda: tiny.service.thread.waiting == 1)
        monkeypatch.setattr(type(tiny.service.decoder), "forward_many", fail_once)
        assert waiting.getresponse().status == 200
        assert [connection.getresponse().status for connection in held] == [500, 500]
    assert broken.is_set() and idle(tiny)


@pytest.mark.parametrize("stream", [True, False])
def test_a_piece_that_cannot_be_made_is_an_error_and_no_silence(
    tiny: Served, client: TestClient, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("broken")

    monkeypatch.setattr("specdec.server.generation.answer.Output.piece", broken)
    done = client.post("/v1/chat/completions", json={**LONG, "stream": stream})
    error = events(done.text)[-1]["error"] if stream else done.json()["error"]
    assert error["type"] == "server_error" and done.status_code == (200 if stream else 500)
    until(lambda: idle(tiny))


def test_requests_that_wait_to_be_read_are_bounded_too(tiny: Served, address: str, client: TestClient) -> None:
    held = threading.Event()
    tiny.service._encoding.submit(held.wait, 20)
    try:
        waiting = [post(address, {**LONG, "max_tokens": 2}) for _ in range(tiny.service.thread.places)]
        until(lambda: tiny.service._preparing == tiny.service.thread.places)
        full = client.post("/v1/chat/completions", json=LONG)
        assert full.status_code == 429 and full.json()["error"]["code"] == "queue_full"
    finally:
        held.set()
    assert [connection.getresponse().status for connection in waiting] == [200] * len(waiting)


def test_an_error_of_one_text_ends_that_one_alone(
    tiny: Served, address: str, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    from specdec.server.generation.answer import Output

    stop = Output.stop

    def breaks(output: Output, tokens: Any, choice: Any) -> bool:
        if output.stops.strings == ["BREAK"]:
            raise ZeroDivisionError("broken")
        return stop(output, tokens, choice)

    monkeypatch.setattr(Output, "stop", breaks)
    with slow_passes(0.005):
        other = post(address, {**LONG, "max_tokens": 40})
        until(lambda: tiny.service.thread.running == 1)
        done = client.post("/v1/chat/completions", json={**LONG, "stop": "BREAK"})
        assert done.status_code == 500 and "broken" in done.json()["error"]["message"]
        assert json.loads(other.getresponse().read())["usage"]["completion_tokens"] == 40
    assert idle(tiny)


def test_texts_beside_each_other_are_those_of_texts_alone(tiny: Served, client: TestClient) -> None:
    bodies = [
        {"messages": [{"role": "user", "content": f"tell {i} tell {i}"}], "max_tokens": 40, "seed": i, "temperature": t}
        for i, t in enumerate((0, 0.8, 0, 1.1))
    ]
    alone = [client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"] for body in bodies]
    tiny.model.conversations.forget()
    beside: list[Any] = [None] * 4

    def one(i: int) -> None:
        beside[i] = client.post("/v1/chat/completions", json=bodies[i]).json()["choices"][0]["message"]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert beside == alone


def test_keep_alive_comments_come_while_a_prompt_is_read(
    tiny: Served, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.state, "keep_alive", 0.03)
    tiny.model.conversations.forget()
    with slow_passes(0.05):
        body = {"messages": [{"role": "user", "content": "y" * 300}], "max_tokens": 2, "stream": True}
        text = client.post("/v1/chat/completions", json=body).text
    assert ": keep-alive\n\n" in text and events(text)[-1] == "[DONE]"


def test_while_the_model_is_loaded_and_while_it_ends(tiny: Served) -> None:
    state = ServerState()
    with TestClient(create_app(state, Access()), base_url="http://localhost") as client:
        for path in ("/health", "/v1/models", "/metrics"):
            done = client.get(path)
            assert done.status_code == 503 and "retry-after" in done.headers
        assert client.post("/v1/chat/completions", json=LONG).status_code == 503
        state.service = tiny.service
        assert client.get("/health").status_code == 200
        state.draining = True
        assert client.get("/health").status_code == 503
        assert client.post("/v1/chat/completions", json=LONG).json()["error"]["code"] == "shutting_down"
        assert client.get("/v1/models").status_code == 200


def test_random_requests_and_disconnects_leave_nothing_behind(tiny: Served, address: str) -> None:
    tiny.model.conversations.forget()
    gc.collect()  # what the errors of other tests hold
    before, others = caches(), alive()
    chance = random.Random(5)
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    tool = {"type": "function", "function": {"name": "f", "parameters": schema}}
    kinds: list[dict[str, Any]] = [
        {**LONG, "max_tokens": 6},
        {**LONG, "max_tokens": 6, "stream": True},
        {**LONG, "n": 2, "max_tokens": 4, "logprobs": True},
        {**LONG, "temperature": -3},
        {**LONG, "max_tokens": 6, "response_format": {"type": "json_schema", "json_schema": {"schema": schema}}},
        {**LONG, "max_tokens": 6, "stream": True, "tools": [tool], "tool_choice": "required"},
    ]
    for _ in range(40):
        connections = [post(address, chance.choice(kinds)) for _ in range(3)]
        for connection in connections:
            if chance.random() < 0.5:
                connection.close()
        for connection in connections:
            if connection.sock is not None:
                connection.getresponse().read()
                connection.close()
    until(lambda: idle(tiny))
    assert tiny.model.conversations._playing == []
    assert tiny.service.thread._running == {} and not tiny.service.thread._waiting
    tiny.model.conversations.forget()
    # Without a run of the collector: nothing that waits for one may hold a cache.
    until(lambda: caches() <= before)
    gc.collect()
    assert alive() == others


def test_closing_ends_streams_with_an_error(folder: Path) -> None:
    with served(folder, drafter=None) as one, listening(one.app) as at, slow_passes(0.01):
        connection = post(at, {**LONG, "stream": True})
        until(lambda: one.service.thread.running == 1)
        one.service.close()
        found = events(connection.getresponse().read().decode())
        assert found[-1]["error"]["code"] == "shutting_down"
        refused = post(at, LONG).getresponse()
        assert refused.status == 503
    assert not one.service.thread._thread.is_alive()
