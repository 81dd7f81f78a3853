"""What the server tells of its texts: whole ones alone, once each, and none that a client wants forgotten."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.serving.served import USER, Served, served, slow_passes, until

Told = list[tuple[list[int], int, str]]


@pytest.fixture
def told() -> Told:
    return []


@pytest.fixture
def tiny(folder: Path, told: Told) -> Iterator[Served]:
    with served(folder, on_text=lambda *text: told.append(text)) as one:
        yield one


def test_every_choice_is_told_with_its_prompt(tiny: Served, told: Told) -> None:
    with tiny.client() as client:
        body = {"messages": [USER], "max_tokens": 6, "n": 2, "seed": 1, "logprobs": True}
        reply = client.post("/v1/chat/completions", json=body).json()
        assert reply["usage"]["completion_tokens"] == sum(len(tokens) - prompt for tokens, prompt, _ in told)
        client.post("/v1/completions", json={"prompt": [5, 6, 7], "max_tokens": 4})
        client.post("/v1/responses", json={"input": "hello", "max_output_tokens": 4})
        client.post("/v1/messages", json={"messages": [USER], "max_tokens": 4})
    assert len(told) == 5 and {adapter for *_, adapter in told} == {""}
    assert told[2][0][:3] == [5, 6, 7] and told[2][1] == 3
    assert told[0][0][: told[0][1]] == told[1][0][: told[1][1]], "the prompt of both choices"


@pytest.mark.parametrize("path", ["chat/completions", "completions", "responses", "messages"])
def test_a_client_can_ask_to_be_forgotten(path: str, tiny: Served, told: Told) -> None:
    body = {"messages": [USER], "prompt": "hello", "input": "hello", "max_tokens": 4, "store": False}
    with tiny.client() as client:
        assert client.post(f"/v1/{path}", json=body).status_code == 200
        assert told == []
        assert client.post(f"/v1/{path}", json={**body, "store": True}).status_code == 200
        assert len(told) == 1


def test_half_a_text_is_not_told(tiny: Served, told: Told) -> None:
    with slow_passes(0.02) as passes, tiny.client() as client:
        body = {"messages": [USER], "max_tokens": 400, "stream": True, "ignore_eos": True}
        with client.stream("POST", "/v1/chat/completions", json=body) as reply:
            next(line for line in reply.iter_lines() if len(passes) > 2)
        until(lambda: tiny.service.thread.running == 0)
    assert told == []
