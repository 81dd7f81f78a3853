"""The server's fuzzer finds nothing, and sees what it looks for: errors, hangs, leaks, replies that the page does not
tell."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from eval.serve.fuzz.bodies import run_bodies
from eval.serve.fuzz.command import main
from eval.serve.fuzz.damage import damaged
from eval.serve.fuzz.leaving import run_leaving
from eval.serve.fuzz.schema import run_schema
from eval.serve.fuzz.target import Target, target, within
from specdec.cache import KVCache
from specdec.server import http
from specdec.server.generation.answer import Answer
from specdec.server.generation.service import Service
from tests.support.tiny_folder import threads_restored

CASES, SEED = 600, 20


@pytest.fixture(scope="module")
def on() -> Iterator[Target]:
    others = [KVCache.__new__(KVCache) for _ in range(2)]  # as other tests of this process leave them
    with threads_restored(), target() as one:
        yield one
    assert len(others) == 2


def nothing() -> None:
    pass


def test_damaged_bodies_are_answered_or_refused(on: Target) -> None:
    found = asyncio.run(run_bodies(on, CASES, SEED, 0.1, nothing)).to_dict()
    assert found["failures"] == [] and found["cases"] == CASES
    assert found["statuses"]["200"] > CASES / 10 and found["statuses"]["400"] > CASES / 3 and found["by_socket"] > 20
    assert {*found["left"].values()} == {0}


def test_a_case_is_the_same_each_time() -> None:
    first = [damaged(SEED, number) for number in range(200)]
    assert first == [damaged(SEED, number) for number in range(200)]
    assert len({one.body for one in first}) > 190 and len({one.path for one in first}) == 7


def test_clients_that_leave_leave_nothing(on: Target) -> None:
    found = asyncio.run(run_leaving(on, 60, SEED, nothing)).to_dict()
    assert found["failures"] == [] and found["requests"] == 60
    assert len(found["ends"]) >= 4 and {*found["left"][60].values()} == {0}


def test_requests_from_the_openapi_page(on: Target) -> None:
    found = run_schema(on, 6, SEED)
    assert found["failures"] == [] and found["requests"] > 80
    assert found["statuses"]["200"] > 20 and found["statuses"]["400"] > 20


def test_a_leak_is_seen(on: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = list[Answer]()
    ask = Service.ask

    def keep(*given: Any, **more: Any) -> Answer:
        kept.append(ask(*given, **more))
        return kept[-1]

    monkeypatch.setattr(Service, "ask", keep)
    found = asyncio.run(run_leaving(on, 20, SEED, nothing))
    assert "left behind" in found.failures[-1]["why"] and "Answer" in found.failures[-1]["why"]


def test_a_reply_that_the_page_does_not_tell_is_seen(on: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    from specdec.server.endpoints import about

    monkeypatch.setattr(about, "reply", lambda data, *more: http.reply({"version": 7}))
    failures = run_schema(on, 2, SEED)["failures"]
    assert any(one["path"] == "GET /version" and "is not of type" in one["why"] for one in failures)


def test_errors_of_the_server_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError("broken")

    monkeypatch.setattr(Service, "tokens", fail)
    with threads_restored():
        code = main(["--parts", "bodies", "--cases", "40", "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert code == 1 and found["bodies"]["failed"] > 0
    assert any("broken" in one["log"] and "got 500" in one["why"] for one in found["bodies"]["failures"])


def test_a_hang_is_seen() -> None:
    began = time.monotonic()
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(within(1, asyncio.sleep(600)))
    assert time.monotonic() - began < 30
    assert asyncio.run(within(5, asyncio.sleep(0, "done"))) == "done"
