"""The same text and the same numbers whatever is drafted; counts that add up; limits; and what serving costs."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from specdec.drafting.protocol import FixedLength
from tests.support.serving.served import USER, Served, events, served, slow_passes

TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {"a": {"enum": ["one", "two"]}}}},
}
BODIES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 0.9, "top_p": 0.9, "seed": 4},
    "tools": {"temperature": 0.7, "seed": 5, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False},
}


@pytest.fixture(scope="module")
def several(folder: Path) -> Iterator[dict[str, Served]]:
    """The same model, plainly decoded and with drafts of several kinds."""
    with ExitStack() as stack:
        yield {
            "plain": stack.enter_context(served(folder, drafter=None, lengths=FixedLength(0))),
            "suffix": stack.enter_context(served(folder, drafter="suffix", lengths=FixedLength(5))),
            "adaptive": stack.enter_context(served(folder)),
            "model": stack.enter_context(served(folder, drafter=str(folder), lengths=FixedLength(4))),
        }


def reply(one: Served, path: str = "/v1/chat/completions", **body: Any) -> Any:
    with one.client() as client:
        done = client.post(path, json={"messages": [USER], "max_tokens": 60, **body})
        assert done.status_code == 200, done.text
        return events(done.text) if body.get("stream") else done.json()


def without_ids(choice: dict[str, Any]) -> dict[str, Any]:
    for call in choice["message"].get("tool_calls", []):
        call.pop("id")
    return choice


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_text_and_logprobs_are_the_same_with_every_drafter(several: dict[str, Served], body: dict[str, Any]) -> None:
    """Behaviours 13 and 14: also with tools, and streamed."""
    logged = {**body, "logprobs": True, "top_logprobs": 2}
    message = reply(several["plain"], **body)["choices"][0]["message"]
    expected = message["content"] or str(message["tool_calls"])
    logged["prediction"] = {"type": "content", "content": expected}
    found = {name: reply(one, **logged) for name, one in several.items()}
    choices = [without_ids(one["choices"][0]) for one in found.values()]
    assert choices[0] == choices[1] == choices[2]
    assert len(choices[0]["logprobs"]["content"]) > 10
    assert "draft_n" not in found["plain"]["timings"] and found["suffix"]["timings"]["draft_n_accepted"] > 0
    for one in several.values():
        chunks = reply(one, **logged, stream=True)
        entries = [e for c in chunks[:-1] if (p := c["choices"][0]["logprobs"]) for e in p["content"]]
        assert entries == choices[0]["logprobs"]["content"]


def test_counts_equal_those_of_the_metrics(several: dict[str, Served]) -> None:
    """Behaviour 15: draft counts and all prompt tokens, cached or not, add up to what /metrics says."""

    def counters(client: TestClient) -> dict[str, float]:
        text = client.get("/metrics").text
        return {
            name: float(value)
            for name, value in re.findall(r"^specdec:(\w+)\{model_name=\"tiny\"\} (\S+)$", text, re.M)
        }

    one = several["suffix"]
    with one.client() as client:
        before = counters(client)
        found = [reply(one, **{**body, "max_tokens": 50 + i}) for i, body in enumerate((*BODIES.values(), {"n": 2}))]
        after = counters(client)
    grown = {name: after[name] - before[name] for name in after}
    for reply_ in found:
        assert reply_["timings"].get("draft_n", 0) >= reply_["timings"].get("draft_n_accepted", 0)
        assert reply_["timings"]["cache_n"] + reply_["timings"]["prompt_n"] == reply_["usage"]["prompt_tokens"]
    drafts = [one["metrics"]["speculative_decoding"] for one in found]
    assert grown["spec_decode_num_draft_tokens_total"] == sum(one["num_draft_tokens"] for one in drafts) > 0
    assert grown["spec_decode_num_accepted_tokens_total"] == sum(one["num_accepted_draft_tokens"] for one in drafts)
    assert grown["generation_tokens_total"] == sum(one["usage"]["completion_tokens"] for one in found)
    prompts = [one["usage"]["prompt_tokens"] * len(one["choices"]) for one in found]
    assert grown["prompt_tokens_total"] == sum(prompts)


def test_limits_reach_to_the_end_of_the_context(several: dict[str, Served]) -> None:
    """Behaviour 3: null and what is too much are the context's end."""
    one = several["plain"]
    long = [{"role": "user", "content": "x" * 8150}]
    for limit in ({"max_tokens": None}, {"max_tokens": 65536}, {"max_completion_tokens": 65536}):
        found = reply(one, **{"messages": long, "temperature": 0, "ignore_eos": True, "max_tokens": None, **limit})
        assert found["usage"]["total_tokens"] == one.service.context == 8192
        assert found["choices"][0]["finish_reason"] == "length"


def test_serving_costs_little_beside_the_passes(several: dict[str, Served]) -> None:
    """Behaviour 17: with passes of 20 ms, an answer over HTTP takes as long as its passes, and little more."""
    one = several["plain"]
    body = {"temperature": 0, "max_tokens": 50, "ignore_eos": True, "stream": True}
    reply(one, **body)
    with slow_passes(0.02) as rows:
        began = time.perf_counter()
        assert reply(one, **body)[-2]["timings"]["predicted_n"] == 50
        seconds = time.perf_counter() - began
    assert len(rows) == 50
    assert seconds < 50 * 0.02 * 1.5 + 0.5
