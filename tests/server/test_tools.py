"""Tools and schemas through the real clients of three protocols, streamed and not."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import anthropic
import jsonschema
import openai
import pytest
from starlette.testclient import TestClient

from tests.support.serving.served import USER, Served, events, listening, served

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 6}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL: dict[str, Any] = {"name": "weather", "description": "tells the weather", "parameters": SCHEMA}
CHAT_TOOL: Any = {"type": "function", "function": TOOL}
OTHER: Any = {"type": "function", "function": {**TOOL, "name": "clock"}}
MANY = {"temperature": 0, "max_tokens": 400}


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Iterator[Served]:
    with served(folder, max_sequences=2) as one:
        yield one


@pytest.fixture(scope="module")
def address(tiny: Served) -> Iterator[str]:
    with listening(tiny.app) as found:
        yield found


def arguments_hold(text: str) -> dict[str, Any]:
    found = json.loads(text)
    jsonschema.validate(found, SCHEMA)
    return found  # type: ignore[no-any-return]


def test_a_call_through_openai(address: str) -> None:
    gpt = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    asked: Any = {"model": "any", "messages": [USER], "tools": [CHAT_TOOL, OTHER], **MANY}
    forced: Any = {"type": "function", "function": {"name": "weather"}}
    whole = gpt.chat.completions.create(**asked, tool_choice=forced, parallel_tool_calls=False)
    (choice,) = whole.choices
    assert choice.finish_reason == "tool_calls" and choice.message.tool_calls is not None
    (call,) = choice.message.tool_calls
    assert call.type == "function" and call.function.name == "weather" and call.id
    arguments = arguments_hold(call.function.arguments)
    chunks = list(gpt.chat.completions.create(**asked, tool_choice=forced, parallel_tool_calls=False, stream=True))
    pieces = [piece for chunk in chunks for piece in chunk.choices[0].delta.tool_calls or ()]
    assert pieces[0].id and pieces[0].type == "function" and pieces[0].function is not None
    assert pieces[0].index == 0 and pieces[0].function.name == "weather"
    joined = "".join(piece.function.arguments or "" for piece in pieces if piece.function is not None)
    assert json.loads(joined) == arguments
    assert chunks[-1].choices[0].finish_reason == "tool_calls"
    gpt.close()


def test_a_conversation_with_a_result_goes_on(tiny: Served, client: TestClient) -> None:
    call = {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo", "days": 2}'}}
    history = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "rain"},
        {"role": "tool", "tool_call_id": "unknown", "content": "sun"},
    ]
    for tools in ([CHAT_TOOL], []):
        done = client.post("/v1/chat/completions", json={"messages": history, "tools": tools, "max_tokens": 3})
        assert done.status_code == 200, done.text
    written = client.post("/tokenize", json={"messages": history, "tools": [CHAT_TOOL]}).json()["tokens"]
    text = client.post("/detokenize", json={"tokens": written}).json()["content"]
    assert "Oslo" in text and "rain" in text and "sun" in text and "tells the weather" in text


def test_calls_are_refused_where_none_are_wanted(client: TestClient) -> None:
    body = {"messages": [USER], "tools": [CHAT_TOOL], "tool_choice": "none", **MANY, "max_tokens": 30}
    message = client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]
    assert "tool_calls" not in message
    unknown = {**body, "tool_choice": {"type": "function", "function": {"name": "nothing"}}}
    refused = client.post("/v1/chat/completions", json=unknown)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "tool_choice"


def test_a_call_through_responses(address: str) -> None:
    gpt = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
    tool: Any = {"type": "function", **TOOL}
    asked: Any = {"model": "any", "input": "hello", "tools": [tool, {"type": "web_search"}], "tool_choice": "required"}
    with gpt.responses.stream(**asked, parallel_tool_calls=False, temperature=0, max_output_tokens=400) as stream:
        found = list(stream)
        final = stream.get_final_response()
    (item,) = [one for one in final.output if one.type == "function_call"]
    arguments_hold(item.arguments)
    deltas = "".join(one.delta for one in found if one.type == "response.function_call_arguments.delta")
    assert deltas == item.arguments and final.status == "completed"
    history: Any = [
        {"role": "user", "content": "hello"},
        {"type": "function_call", "call_id": item.call_id, "name": item.name, "arguments": item.arguments},
        {"type": "function_call_output", "call_id": item.call_id, "output": "rain"},
    ]
    assert gpt.responses.create(model="any", input=history, tools=[tool], max_output_tokens=3).output is not None
    gpt.close()


def test_a_call_through_anthropic(address: str) -> None:
    claude = anthropic.Anthropic(base_url=address, api_key="none", max_retries=0)
    tool: Any = {"name": "weather", "description": "tells the weather", "input_schema": SCHEMA}
    asked: Any = {
        "model": "any",
        "messages": [{"role": "user", "content": "hello"}],
        "tools": [tool],
        "tool_choice": {"type": "tool", "name": "weather", "disable_parallel_tool_use": True},
        "max_tokens": 400,
        "extra_body": {"temperature": 0},
    }
    whole = claude.messages.create(**asked)
    (call,) = [block for block in whole.content if block.type == "tool_use"]
    jsonschema.validate(call.input, SCHEMA)
    assert whole.stop_reason == "tool_use" and call.name == "weather"
    with claude.messages.stream(**asked) as stream:
        final = stream.get_final_message()
    assert [block.input for block in final.content if block.type == "tool_use"] == [call.input]
    history: Any = [
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": [{"type": "tool_use", "id": call.id, "name": "weather", "input": call.input}]},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": call.id, "content": "rain"}]},
    ]
    again = claude.messages.create(model="any", messages=history, tools=[tool], max_tokens=3)
    assert again.usage.output_tokens == 3
    claude.close()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("seed", [None, 1, 2])
def test_a_schema_is_kept_with_drafts_and_sampled(client: TestClient, seed: int | None, stream: bool) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
    sampled = {"temperature": 0} if seed is None else {"temperature": 1.2, "seed": seed}
    body = {"messages": [USER], "response_format": form, "max_tokens": 400, **sampled}
    whole = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert whole["finish_reason"] == "stop"
    arguments_hold(whole["message"]["content"])
    if stream:
        chunks = events(client.post("/v1/chat/completions", json={**body, "stream": True}).text)
        joined = "".join(c["choices"][0]["delta"].get("content") or "" for c in chunks[:-1])
        assert joined == whole["message"]["content"]


def test_a_schema_that_no_grammar_has_is_named(client: TestClient) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "array", "uniqueItems": True}}}
    done = client.post("/v1/chat/completions", json={"messages": [USER], "response_format": form})
    assert done.status_code == 400 and "uniqueItems" in done.json()["error"]["message"]


def test_a_call_that_the_limit_cuts_is_no_call(client: TestClient) -> None:
    body = {"messages": [USER], "tools": [CHAT_TOOL], "tool_choice": "required", "temperature": 0, "max_tokens": 20}
    choice = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert choice["finish_reason"] == "length" and "tool_calls" not in choice["message"]


def test_logprobs_with_tools_and_a_stream(client: TestClient) -> None:
    body = {"messages": [USER], "tools": [CHAT_TOOL], **MANY, "max_tokens": 8, "logprobs": True}
    whole = client.post("/v1/chat/completions", json=body).json()["choices"][0]
    assert len(whole["logprobs"]["content"]) == 8
    chunks = events(client.post("/v1/chat/completions", json={**body, "stream": True}).text)
    found = [entry for c in chunks[:-1] if (p := c["choices"][0]["logprobs"]) for entry in p["content"]]
    assert found == whole["logprobs"]["content"]
