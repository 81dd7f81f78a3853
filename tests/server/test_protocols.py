"""The real clients against a running server: OpenAI's chat and responses, Anthropic's messages."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from starlette.testclient import TestClient

from tests.support.serving.served import USER, Served, events, listening

LIMITS: dict[str, Any] = {"temperature": 0, "max_tokens": 16}
TEXT = USER["content"]


@pytest.fixture(scope="module")
def address(tiny: Served) -> Iterator[str]:
    with listening(tiny.app) as found:
        yield found


@pytest.fixture(scope="module")
def gpt(address: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture(scope="module")
def claude(address: str) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=address, api_key="none", max_retries=0) as client:
        yield client


def test_openai_chat(tiny: Served, gpt: openai.OpenAI) -> None:
    messages: Any = [USER]
    whole = gpt.chat.completions.create(model="any", messages=messages, **LIMITS)
    assert whole.choices[0].message.content == tiny.generated([USER], max_new_tokens=16)
    stream = gpt.chat.completions.create(
        model="any", messages=messages, stream=True, stream_options={"include_usage": True}, **LIMITS
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 16
    assert [model.id for model in gpt.models.list()] == ["tiny"]
    with pytest.raises(openai.BadRequestError) as refused:
        gpt.chat.completions.create(model="any", messages=messages, temperature=-1)
    assert refused.value.param == "temperature"


def test_openai_responses(tiny: Served, gpt: openai.OpenAI) -> None:
    limits: Any = {"temperature": 0, "max_output_tokens": 16}
    whole = gpt.responses.create(model="any", input=TEXT, **limits)
    assert whole.output_text == tiny.generated([USER], max_new_tokens=16)
    assert whole.status == "incomplete" and whole.usage is not None and whole.usage.output_tokens == 16
    with gpt.responses.stream(model="any", input=TEXT, **limits) as stream:
        found = list(stream)
    deltas = "".join(one.delta for one in found if one.type == "response.output_text.delta")
    assert deltas == whole.output_text
    assert [one.sequence_number for one in found] == list(range(len(found)))
    kinds = [one.type for one in found if not one.type.endswith(".delta")]
    assert kinds == [
        *("response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"),
        *("response.output_text.done", "response.content_part.done", "response.output_item.done"),
        "response.incomplete",
    ]


def test_responses_take_a_whole_conversation(tiny: Served, client: TestClient) -> None:
    items = [
        {"type": "message", "role": "developer", "content": [{"type": "input_text", "text": "be brief"}]},
        {"role": "user", "content": TEXT},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "hm"}]},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "yes"}]},
        {"type": "web_search_call", "id": "x"},
        {"role": "user", "content": TEXT},
    ]
    body = {"instructions": "be kind", "input": items, "temperature": 0, "max_output_tokens": 8}
    found = client.post("/v1/responses", json=body)
    assert found.status_code == 200, found.text
    system = {"role": "system", "content": "be kind\n\nbe brief"}
    expected = tiny.generated([system, USER, {"role": "assistant", "content": "yes"}, USER], max_new_tokens=8)
    assert found.json()["output"][0]["content"][0]["text"] == expected
    assert client.post("/v1/responses", json={"input": [], "max_output_tokens": 1}).status_code == 200
    stateful = client.post("/v1/responses", json={"input": "x", "previous_response_id": "resp_1"})
    assert stateful.status_code == 400 and stateful.json()["error"]["param"] == "previous_response_id"


def test_anthropic_messages(tiny: Served, claude: anthropic.Anthropic) -> None:
    messages: Any = [USER]
    system: Any = [{"type": "text", "text": "be brief"}]
    limits: Any = {"max_tokens": 16, "extra_body": {"temperature": 0}}
    whole = claude.messages.create(model="any", messages=messages, system=system, **limits)
    expected = tiny.generated([{"role": "system", "content": "be brief"}, USER], max_new_tokens=16)
    assert whole.content[0].type == "text" and whole.content[0].text == expected
    assert whole.stop_reason == "max_tokens" and whole.usage.output_tokens == 16
    with claude.messages.stream(model="any", messages=messages, system=system, **limits) as stream:
        assert "".join(stream.text_stream) == expected
        final = stream.get_final_message()
    assert final.stop_reason == "max_tokens" and final.usage.output_tokens == 16
    counted = claude.messages.count_tokens(model="any", messages=messages, system=system)
    read = whole.usage.cache_read_input_tokens or 0
    assert counted.input_tokens == whole.usage.input_tokens + read
    stopped = claude.messages.create(
        model="any", messages=messages, system=system, stop_sequences=[expected[5:7]], **limits
    )
    assert stopped.stop_reason == "stop_sequence" and stopped.stop_sequence == expected[5:7]
    with pytest.raises(anthropic.BadRequestError) as refused:
        claude.messages.create(model="any", messages=messages, max_tokens=3, extra_body={"temperature": -1})
    assert "temperature" in str(refused.value)


def test_a_billing_header_that_changes_costs_nothing(client: TestClient) -> None:
    def ask(header: str) -> int:
        system = [{"type": "text", "text": f"x-anthropic-billing-header: cch={header}"}, {"type": "text", "text": "s"}]
        body = {"system": system, "messages": [USER], **LIMITS, "max_tokens": 2}
        return client.post("/v1/messages", json=body).json()["usage"]["input_tokens"]  # type: ignore[no-any-return]

    ask("a1")
    assert ask("b22") == 1, "all but the last token of the prompt was cached"


def test_blocks_of_anthropic_turns(tiny: Served, client: TestClient) -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]},
        {"role": "assistant", "content": [{"type": "thinking", "thinking": "hm", "signature": "x"}]},
        {"role": "user", "content": [{"type": "text", "text": TEXT}]},
    ]
    done = client.post("/v1/messages", json={"messages": turns, **LIMITS}).json()
    expected = tiny.generated(
        [{"role": "user", "content": "onetwo"}, {"role": "assistant", "content": ""}, USER], max_new_tokens=16
    )
    assert done["content"] == [{"type": "text", "text": expected}]
    picture = {"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "file:///etc/passwd"}}]}
    refused = client.post("/v1/messages", json={"messages": [picture], "max_tokens": 1})
    assert refused.status_code == 400 and refused.json()["type"] == "error"
    assert "messages[0].content[0]" in refused.json()["error"]["message"]


def test_errors_in_each_protocols_stream(
    tiny: Served, client: TestClient, monkeypatch: pytest.MonkeyPatch, gpt: openai.OpenAI, claude: anthropic.Anthropic
) -> None:
    def fail(*_: Any) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(type(tiny.service.decoder), "forward_many", fail)
    body = {"messages": [USER], "max_tokens": 2, "stream": True}
    assert events(client.post("/v1/messages", json=body).text)[-1]["error"]["type"] == "api_error"
    messages: Any = [USER]
    with pytest.raises(openai.APIError, match="no room"):
        list(gpt.chat.completions.create(model="any", messages=messages, stream=True))
    with pytest.raises(openai.APIError, match="no room"):
        list(gpt.responses.create(model="any", input="x", stream=True))
    with pytest.raises(anthropic.APIError, match="no room"):
        list(claude.messages.create(model="any", messages=messages, max_tokens=2, stream=True))
