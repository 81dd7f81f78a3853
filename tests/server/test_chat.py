"""/v1/chat/completions: requests as clients send them, streams, and the same text as generate()."""

from __future__ import annotations

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.support.serving.served import USER, Served, events, streamed_text

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


def ask(client: TestClient, **body: Any) -> dict[str, Any]:
    done = client.post("/v1/chat/completions", json={"messages": [USER], **GREEDY, **body})
    assert done.status_code == 200, done.text
    return done.json()  # type: ignore[no-any-return]


def content(reply: dict[str, Any]) -> str:
    return reply["choices"][0]["message"]["content"]  # type: ignore[no-any-return]


def stream(client: TestClient, **body: Any) -> list[Any]:
    done = client.post("/v1/chat/completions", json={"messages": [USER], **GREEDY, "stream": True, **body})
    assert done.status_code == 200, done.text
    assert done.headers["content-type"].startswith("text/event-stream")
    return events(done.text)


def test_the_text_is_that_of_generate(tiny: Served, client: TestClient) -> None:
    assert content(ask(client)) == tiny.generated([USER], max_new_tokens=24)
    sampled = {"temperature": 0.9, "top_p": 0.95, "seed": 7}
    assert content(ask(client, **sampled)) == tiny.generated([USER], max_new_tokens=24, **sampled)
    assert content(ask(client, **{**sampled, "seed": 8})) != content(ask(client, **sampled))
    narrow = {"temperature": 1.2, "min_p": 0.05, "repetition_penalty": 1.3, "seed": 3}
    assert content(ask(client, **narrow)) == tiny.generated([USER], max_new_tokens=24, **narrow)


def test_several_choices_are_the_rows_of_generate(tiny: Served, client: TestClient) -> None:
    found = ask(client, temperature=0.9, seed=7, n=3)
    inputs = tiny.tokenizer.apply_chat_template(
        [USER], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    rows = tiny.model.generate(
        **inputs, do_sample=True, temperature=0.9, top_k=0, seed=7, max_new_tokens=24, num_return_sequences=3
    )
    texts = [tiny.tokenizer.decode(row[inputs["input_ids"].shape[1] :], skip_special_tokens=True) for row in rows]
    assert [choice["message"]["content"] for choice in found["choices"]] == texts
    assert len({*texts}) == 3
    assert found["usage"]["completion_tokens"] == 72


def test_a_stream_adds_up_to_the_whole_and_ends_as_it_should(client: TestClient) -> None:
    whole, chunks = ask(client), stream(client)
    assert streamed_text(chunks) == content(whole)
    assert chunks[-1] == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]]
    assert reasons[-1] == "length" and {*reasons[:-1]} == {None}
    assert all("usage" not in chunk for chunk in chunks[:-1])
    assert len({chunk["id"] for chunk in chunks[:-1]}) == 1
    assert chunks[-2]["timings"]["predicted_n"] == 24


@pytest.mark.parametrize("options", [None, {}, {"include_usage": False}, {"include_usage": True}])
def test_stream_options(client: TestClient, options: dict[str, Any] | None) -> None:
    chunks = stream(client, stream_options=options)
    if options and options.get("include_usage"):
        assert chunks[-2]["choices"] == [] and chunks[-2]["usage"]["completion_tokens"] == 24
        assert all(chunk["usage"] is None for chunk in chunks[:-2])
    else:
        assert chunks[-2]["choices"][0]["finish_reason"] == "length"


def test_content_comes_in_many_forms(client: TestClient) -> None:
    whole = content(ask(client))
    halves = [{"type": "text", "text": USER["content"][:5]}, {"type": "text", "text": USER["content"][5:]}]
    assert content(ask(client, messages=[{"role": "user", "content": halves}])) == whole
    null = ask(client, messages=[USER, {"role": "assistant", "content": None}, USER])
    empty = ask(client, messages=[USER, {"role": "assistant", "content": ""}, USER])
    assert content(null) == content(empty)


def test_developer_is_system_and_no_system_message_is_lost(client: TestClient) -> None:
    system = {"role": "system", "content": "be brief"}
    developer = ask(client, messages=[{**system, "role": "developer"}, USER])
    assert content(developer) == content(ask(client, messages=[system, USER]))
    twice = ask(client, messages=[system, {"role": "developer", "content": "be kind"}, USER])
    joined = ask(client, messages=[{"role": "system", "content": "be brief\n\nbe kind"}, USER])
    assert content(twice) == content(joined)
    later = ask(client, messages=[USER, system, USER])
    assert later["usage"]["prompt_tokens"] > ask(client, messages=[USER, USER])["usage"]["prompt_tokens"]


def test_limits_by_both_names_and_none(tiny: Served, client: TestClient) -> None:
    for limits in ({"max_tokens": 5}, {"max_tokens": None, "max_completion_tokens": 5}, {"max_completion_tokens": 5}):
        found = client.post("/v1/chat/completions", json={"messages": [USER], "temperature": 0, **limits}).json()
        assert found["usage"]["completion_tokens"] == 5 and found["choices"][0]["finish_reason"] == "length"
    assert ask(client, max_tokens=10**6, stop=content(ask(client))[7])["choices"][0]["finish_reason"] == "stop"


def test_null_and_unknown_fields_are_passed_over(client: TestClient) -> None:
    nulls = dict.fromkeys(
        (*("top_p", "n", "stop", "seed", "logit_bias", "tools", "stream_options", "response_format", "user"),)
    )
    more = {"store": False, "prompt_cache_key": "x", "options": {"num_ctx": 1}, "verbosity": "low", "tools": []}
    assert content(ask(client, **nulls)) == content(ask(client, model="any/name:7b", **more)) == content(ask(client))


@pytest.mark.parametrize(
    ("wrong", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.5}, "top_p"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"n": 0}, "n"),
        ({"seed": True}, "seed"),
        ({"stop": [1]}, "stop[0]"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 5000: 1}}, "logit_bias"),
        ({"temperature": 10**400}, "temperature"),
        ({"seed": 10**400}, "seed"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs.chat_template"),
        ({"logit_bias": {"999999": 1}}, "logit_bias"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stream": "yes"}, "stream"),
        ({"messages": []}, "messages"),
        ({"messages": [7]}, "messages[0]"),
        ({"messages": [{"role": "king", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "a\ud800"}]}, None),
        ({"reasoning_effort": "heroic"}, "reasoning_effort"),
        ({"prediction": "x"}, "prediction"),
        ({"prediction": {"type": "guess", "content": "x"}}, "prediction.type"),
        ({"prediction": {"content": 7}}, "prediction.content"),
        ({"prediction": {"content": [{"type": "image_url"}]}}, "prediction.content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}]},
            "messages[0].content[0]",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_a_wrong_field_is_named(client: TestClient, wrong: dict[str, Any], param: str | None) -> None:
    text = json.dumps({"messages": [USER], **GREEDY, **wrong})
    done = client.post("/v1/chat/completions", content=text, headers={"content-type": "application/json"})
    assert done.status_code == 400
    error = done.json()["error"]
    assert error["param"] == param and error["type"] == "invalid_request_error" and error["message"]


def test_a_prompt_that_is_too_long_is_told_with_both_numbers(tiny: Served, client: TestClient) -> None:
    long = {"role": "user", "content": "x" * 9000}
    done = client.post("/v1/chat/completions", json={"messages": [long]})
    error = done.json()["error"]
    assert done.status_code == 400 and error["code"] == "context_length_exceeded"
    assert "8192" in error["message"] and "9003" in error["message"]


def test_stop_strings_across_tokens_leave_nothing(client: TestClient) -> None:
    whole = content(ask(client))
    stop = whole[9:12]  # three tokens of a character each
    expected = whole[: whole.index(stop)]
    cut = ask(client, stop=["never", stop])
    assert content(cut) == expected and cut["choices"][0]["finish_reason"] == "stop"
    assert streamed_text(stream(client, stop=stop)) == expected
    assert cut["usage"]["completion_tokens"] == whole.index(stop) + 3
    almost = whole[9:11] + "\n\n"
    assert content(ask(client, stop=almost)) == whole


def test_biases_and_penalties_change_the_choice(tiny: Served, client: TestClient) -> None:
    whole = content(ask(client))
    first = tiny.tokenizer.convert_tokens_to_ids(whole[0])
    assert content(ask(client, logit_bias={str(first): -100}))[0] != whole[0]
    wanted = tiny.tokenizer.convert_tokens_to_ids("Q")
    assert content(ask(client, logit_bias={str(wanted): 100})) == "Q" * 24
    varied = content(ask(client, logit_bias={str(wanted): 50}, frequency_penalty=2, presence_penalty=2))
    assert varied != "Q" * 24


def test_logprobs_are_those_of_the_model(tiny: Served, client: TestClient) -> None:
    found = ask(client, logprobs=True, top_logprobs=3)["choices"][0]["logprobs"]["content"]
    assert len(found) == 24
    assert "".join(one["token"] for one in found) == content(ask(client))
    for one in found:
        assert one["top_logprobs"][0]["logprob"] == one["logprob"] and len(one["top_logprobs"]) == 3
        assert bytes(one["bytes"]).decode() == one["token"]
    chunks = stream(client, logprobs=True, top_logprobs=3)
    gathered = [entry for c in chunks[:-1] if (p := c["choices"][0]["logprobs"]) for entry in p["content"]]
    assert gathered == found


def test_counts_of_drafts_add_up(tiny: Served, client: TestClient) -> None:
    before = tiny.service.engine.stats.drafted, tiny.service.engine.stats.accepted
    timings = [ask(client, max_tokens=200)["timings"] for _ in range(2)]
    drafted = sum(one.get("draft_n", 0) for one in timings)
    accepted = sum(one.get("draft_n_accepted", 0) for one in timings)
    assert (before[0] + drafted, before[1] + accepted) == (
        tiny.service.engine.stats.drafted,
        tiny.service.engine.stats.accepted,
    )
    assert accepted <= drafted


def test_cached_tokens_are_exact(tiny: Served, client: TestClient) -> None:
    tiny.model.conversations.forget()
    first = ask(client)
    assert first["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    prompt = first["usage"]["prompt_tokens"]
    again = ask(client)
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == again["timings"]["cache_n"]
    assert 0 < again["timings"]["cache_n"] < prompt
    assert again["timings"]["cache_n"] + again["timings"]["prompt_n"] == prompt


def test_a_prediction_is_drafted_from_counted_and_changes_nothing(tiny: Served, client: TestClient) -> None:
    """Behaviour 16: a right prediction is accepted, a wrong one changes nothing."""
    limits: dict[str, Any] = {"max_tokens": 120, "temperature": 0.7, "seed": 11}
    whole = ask(client, **limits)
    text = content(whole)
    details = whole["usage"]["completion_tokens_details"]
    assert (details["accepted_prediction_tokens"], details["rejected_prediction_tokens"]) == (0, 0)

    def predicted(found: Any) -> tuple[int, int]:
        again = ask(client, **limits, prediction={"type": "content", "content": found})
        assert content(again) == text
        assert again["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"] == 120
        details = again["usage"]["completion_tokens_details"]
        rejected = details["rejected_prediction_tokens"]
        assert details["accepted_prediction_tokens"] + rejected <= again["timings"].get("draft_n", 0)
        return details["accepted_prediction_tokens"], rejected

    accepted, rejected = predicted(text)
    assert accepted > 50 and rejected < accepted / 4
    halves = [{"type": "text", "text": text[:50]}, {"type": "text", "text": text[50:]}]
    assert predicted(halves)[0] > 50
    accepted, rejected = predicted("something else " * 40)
    assert accepted + rejected < 40
    assert predicted(None) == predicted("") == predicted([]) == (0, 0)
    chunks = stream(
        client, **limits, prediction={"type": "content", "content": text}, stream_options={"include_usage": True}
    )
    assert streamed_text(chunks) == text
    assert chunks[-2]["usage"]["completion_tokens_details"]["accepted_prediction_tokens"] > 50
