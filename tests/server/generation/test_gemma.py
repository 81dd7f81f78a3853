"""Gemma 4's format from request to reply: its ends, calls, types and thoughts, with several tokens a round."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from specdec.drafting.protocol import FixedLength
from specdec.server.formats.gemma4.syntax import written
from tests.support.formats.tiny_chat import gemma_tokenizer
from tests.support.serving.scripted_model import make_chat_folder, saying
from tests.support.serving.served import Served, events, served, streamed_text

ASKED = [{"role": "user", "content": "hi"}]
VALUES: dict[str, Any] = {
    "s": "1e5", "n": "null", "b": "true", "number": 1e5, "whole": 42, "flag": False, "none": None,
    "text": 'a "quote" {brace}, [x]: y\n\\ <x|> \u6f22\U0001f642',
}  # fmt: skip
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "look",
        "parameters": {
            "type": "object",
            "properties": {
                **{name: {"type": "string"} for name in ("s", "n", "b", "text")},
                "number": {"type": "number"}, "whole": {"type": "integer"}, "flag": {"type": "boolean"},
                "none": {"type": "null"},
            },
        },
    },
}  # fmt: skip
OTHER: Any = {
    "type": "function",
    "function": {
        "name": "other",
        "parameters": {"type": "object", "properties": {"on": {"type": "boolean"}}, "required": ["on"]},
    },
}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder: Path = make_chat_folder(tmp_path_factory.mktemp("gemma"), gemma_tokenizer())
    with served(folder, drafter="suffix", lengths=FixedLength(6)) as one:
        assert one.service.format.name == "gemma4"
        yield one


@pytest.fixture
def client(gemma: Served) -> Iterator[TestClient]:
    with gemma.client() as client:
        yield client


def ids(text: str) -> list[int]:
    return list(gemma_tokenizer().encode(text, add_special_tokens=False))


def ask(client: TestClient, says: str, **body: Any) -> tuple[dict[str, Any], list[Any]]:
    """The choice, and the chunks of the same answer streamed; drafts come from the answer itself, told beforehand."""
    sent = {"messages": ASKED, "temperature": 0, "max_tokens": 600, "prediction": {"content": says}, **body}
    with saying(ids(says)):
        done = client.post("/v1/chat/completions", json=sent)
        assert done.status_code == 200, done.text
        chunks = events(client.post("/v1/chat/completions", json={**sent, "stream": True}).text)
    return done.json(), chunks


def calls_of(reply: dict[str, Any]) -> list[tuple[str, str]]:
    calls = reply["choices"][0]["message"].get("tool_calls", [])
    return [(call["function"]["name"], call["function"]["arguments"]) for call in calls]


def streamed_calls(chunks: list[Any]) -> dict[int, dict[str, str]]:
    calls: dict[int, dict[str, str]] = {}
    for chunk in chunks[:-1]:
        for piece in chunk["choices"][0]["delta"].get("tool_calls", []):
            first = piece["index"] not in calls
            call = calls.setdefault(piece["index"], {"id": piece.get("id", ""), "name": "", "arguments": ""})
            assert first == ("id" in piece) == ("name" in piece["function"]) == ("type" in piece)
            call["name"] += piece["function"].get("name", "")
            call["arguments"] += piece["function"]["arguments"]
    return calls


def call(arguments: dict[str, Any], name: str = "look") -> str:
    return f"<|tool_call>call:{name}{written(arguments)}<tool_call|>"


@pytest.mark.parametrize("end", ["<turn|>", "<|tool_response>", "<eos>"])
def test_every_end_of_the_format_ends_an_answer(client: TestClient, end: str) -> None:
    """Behaviour 10: what stands in a list of ends as 50 too; no special token is content."""
    reply, chunks = ask(client, f"It rains.{end}response:look{{value:1}} and it went on")
    choice = reply["choices"][0]
    assert choice["message"]["content"] == streamed_text(chunks) == "It rains."
    assert choice["finish_reason"] == "stop" and reply["timings"]["draft_n_accepted"] > 0
    loud, _ = ask(client, "It<bos> ra<|tool>ins<pad>.<turn|>")
    assert loud["choices"][0]["message"]["content"] == "It rains."


def test_a_stop_string_across_tokens_and_rounds(client: TestClient) -> None:
    """Behaviour 10: nothing of a stop string leaks, however many tokens a round accepts."""
    text = "one two three four five six seven <turn|>"
    for stop in ("three four", "e two", "seven", " f"):
        reply, chunks = ask(client, text, stop=[stop, "never"])
        expected = text[: text.index(stop)]
        assert reply["choices"][0]["message"]["content"] == streamed_text(chunks) == expected
        assert reply["usage"]["completion_tokens"] == len(ids(expected + stop))


def test_parallel_calls_of_one_function_are_all_there(client: TestClient) -> None:
    """Behaviours 18 and 19: distinct ids and indices, and no call is lost where a round accepts several tokens."""
    wanted = [{"s": "a" * n, "whole": n} for n in range(1, 5)]
    reply, chunks = ask(client, "".join(map(call, wanted)) + "<turn|>", tools=[TOOL])
    assert [(name, json.loads(text)) for name, text in calls_of(reply)] == [("look", one) for one in wanted]
    assert reply["choices"][0]["finish_reason"] == chunks[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert reply["timings"]["draft_n_accepted"] > 40
    streamed = streamed_calls(chunks)
    assert [*streamed] == [0, 1, 2, 3] and len({one["id"] for one in streamed.values()}) == 4
    assert [(one["name"], json.loads(one["arguments"])) for one in streamed.values()] == [("look", w) for w in wanted]


def test_types_are_those_of_the_schema(client: TestClient) -> None:
    """Behaviour 20: strings that look like numbers stay strings; quotes, braces, breaks and backslashes survive."""
    for tools in ([TOOL], [{**TOOL, "function": {"name": "look"}}]):
        says = call(VALUES) if "parameters" in TOOL["function"] and tools[0] is TOOL else call({})
        reply, chunks = ask(client, f"{says}<turn|>", tools=tools)
        ((name, arguments),) = calls_of(reply)
        expected = VALUES if tools[0] is TOOL else {}
        assert name == "look" and json.loads(arguments) == expected
        assert {key: type(value) for key, value in json.loads(arguments).items()} == {
            key: type(value) for key, value in expected.items()
        }
        assert json.loads(streamed_calls(chunks)[0]["arguments"]) == expected


def test_choices_of_tools_hold_against_the_model(client: TestClient) -> None:
    """Behaviour 21: none, required, named, and one call at most, whatever the model would say."""
    insists = call({"s": "x"}) * 3 + "<turn|>"
    none, chunks = ask(client, insists, tools=[TOOL], tool_choice="none", max_tokens=40)
    assert calls_of(none) == [] == [*streamed_calls(chunks)]
    one, chunks = ask(client, insists, tools=[TOOL], parallel_tool_calls=False)
    assert len(calls_of(one)) == 1 == len(streamed_calls(chunks))
    assert len(calls_of(ask(client, insists, tools=[TOOL])[0])) == 3
    second: Any = {"type": "function", "function": {**OTHER["function"], "name": "second"}}
    for choice, names in (
        ("required", {"other", "second"}),
        ({"type": "function", "function": {"name": "other"}}, {"other"}),
    ):
        asked: dict[str, Any] = {"tools": [second, OTHER], "tool_choice": choice, "parallel_tool_calls": False}
        talks, chunks = ask(client, "No, I will not.<turn|>", **asked)
        ((name, arguments),) = calls_of(talks)
        assert name in names and isinstance(json.loads(arguments)["on"], bool)
        assert not talks["choices"][0]["message"]["content"] and len(streamed_calls(chunks)) == 1


@pytest.mark.parametrize("inside", ["call:look{s:", "look at", "call:look{s:1}<tool_call|>", ""])
def test_a_call_that_nobody_can_take_is_content(client: TestClient, inside: str) -> None:
    """Behaviour 24: neither an error nor an answer without anything."""
    reply, chunks = ask(client, f"So: <|tool_call>{inside}<turn|>")
    choice = reply["choices"][0]
    assert choice["finish_reason"] == "stop" and "tool_calls" not in choice["message"]
    expected = f"So: {inside.removesuffix('<tool_call|>')}"
    assert choice["message"]["content"] == streamed_text(chunks) == expected


@pytest.mark.parametrize("content", ["It is sunny.", ""])
def test_thoughts_are_split_from_content(client: TestClient, content: str) -> None:
    """Behaviour 23: streamed and whole, counted, and none where thinking is off."""
    says = f"<|channel>thought\nThe user\nsays hi.\n<channel|>{content}<turn|>"
    reply, chunks = ask(client, says, reasoning_effort="high")
    message = reply["choices"][0]["message"]
    assert message["reasoning_content"] == message["reasoning"] == "The user\nsays hi."
    assert message["content"] == streamed_text(chunks) == content
    deltas = [chunk["choices"][0]["delta"] for chunk in chunks[:-1]]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "The user\nsays hi."
    thought = len(ids(says.split("<channel|>")[0])) + 1
    assert reply["usage"]["completion_tokens_details"]["reasoning_tokens"] == thought
    silent = ask(client, "Hello.<turn|>", reasoning_effort="none")[0]
    assert "reasoning_content" not in silent["choices"][0]["message"]
    assert silent["usage"]["completion_tokens_details"]["reasoning_tokens"] == 0
    back = [*ASKED, {"role": "assistant", "content": content, "reasoning_content": "The user says hi."}, *ASKED]
    assert ask(client, "Hello.<turn|>", messages=back)[0]["choices"][0]["message"]["content"] == "Hello."


def tool_loop(thought: str = "I look.") -> list[dict[str, Any]]:
    asked = {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"s": "x"}'}}
    return [
        {"role": "system", "content": "be brief. " * 30},
        {"role": "user", "content": "what is it like? " * 20},
        {"role": "assistant", "content": None, "reasoning_content": thought, "tool_calls": [asked]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny " * 30},
    ]


def test_a_thought_right_after_a_tools_result(client: TestClient) -> None:
    """Behaviour 23: the prompt has opened the thought there, and not in a fresh turn."""
    says = "It was found.\n<channel|>Sunny.<turn|>"
    reply, chunks = ask(client, says, messages=tool_loop(), tools=[TOOL], reasoning_effort="high")
    message = reply["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("It was found.", "Sunny.")
    assert streamed_text(chunks) == "Sunny."
    fresh = ask(client, "It was found.<turn|>", reasoning_effort="high")[0]["choices"][0]["message"]
    assert (fresh.get("reasoning_content"), fresh["content"]) == (None, "It was found.")


def test_after_a_tool_loop_the_next_turn_is_read_from_the_last_users_on(gemma: Served, client: TestClient) -> None:
    """Behaviour 26: the template drops the thoughts of the loop, and the cache goes back to before the user's turn."""
    gemma.model.conversations.forget()
    body: dict[str, Any] = {"tools": [TOOL], "reasoning_effort": "high"}
    loop = tool_loop()
    written = client.post("/tokenize", json={"messages": loop[:1], **body, "add_generation_prompt": False}).json()
    first, _ = ask(
        client, "<|channel>thought\nI look.\n<channel|>" + call({"s": "x"}) + "<turn|>", messages=loop[:2], **body
    )
    assert json.loads(calls_of(first)[0][1]) == {"s": "x"}
    ask(client, "Aha.\n<channel|>Sunny.<turn|>", messages=loop, **body)
    goes_on = [
        *loop,
        {"role": "assistant", "content": "Sunny.", "reasoning_content": "Aha."},
        {"role": "user", "content": "and?"},
    ]
    with saying(ids("Fine.<turn|>")):
        done = client.post(
            "/v1/chat/completions", json={"messages": goes_on, "max_tokens": 20, "temperature": 0, **body}
        )
    usage = done.json()["usage"]
    cached = usage["prompt_tokens_details"]["cached_tokens"]
    assert written["count"] <= cached < usage["prompt_tokens"]
    assert cached > 300, "the system turn with the tools, and no less"
