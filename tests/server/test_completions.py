"""/v1/completions, and the endpoints about the server."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

import run
from tests.support.serving.served import Served, events

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 12}


def ask(client: TestClient, **body: Any) -> dict[str, Any]:
    done = client.post("/v1/completions", json={"prompt": "once upon", **GREEDY, **body})
    assert done.status_code == 200, done.text
    return done.json()  # type: ignore[no-any-return]


def texts(reply: dict[str, Any]) -> list[str]:
    return [choice["text"] for choice in reply["choices"]]


def test_prompts_as_text_as_ids_and_several(tiny: Served, client: TestClient) -> None:
    (text,) = texts(ask(client))
    inputs = tiny.tokenizer("once upon", return_tensors="pt")
    output = tiny.model.generate(**inputs, max_new_tokens=12, do_sample=False)
    assert text == tiny.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    ids = tiny.tokenizer("once upon")["input_ids"]
    assert texts(ask(client, prompt=ids)) == [text]
    assert texts(ask(client, prompt=["once upon", ids])) == [text, text]
    assert texts(ask(client, echo=True)) == ["once upon" + text]
    (many,) = texts(ask(client, n=2, prompt=["once upon"]))[:1]
    assert many == text


def test_a_stream_adds_up(client: TestClient) -> None:
    (text,) = texts(ask(client))
    done = client.post(
        "/v1/completions",
        json={"prompt": "once upon", **GREEDY, "stream": True, "stream_options": {"include_usage": True}},
    )
    chunks = events(done.text)
    assert chunks[-1] == "[DONE]" and chunks[-2]["usage"]["completion_tokens"] == 12
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks[:-2]) == text
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-2]][-1] == "length"


def test_logprobs_in_the_old_shape(client: TestClient) -> None:
    found = ask(client, logprobs=2)["choices"][0]
    logprobs = found["logprobs"]
    assert "".join(logprobs["tokens"]) == found["text"]
    assert logprobs["text_offset"] == list(range(12)) and len(logprobs["top_logprobs"][0]) == 2
    assert all(p < 0 for p in logprobs["token_logprobs"])


@pytest.mark.parametrize("prompt", [None, [], 7, [[1], 2.5], ["a", None], [10**9], "", [True]])
def test_unusable_prompts(client: TestClient, prompt: Any) -> None:
    done = client.post("/v1/completions", json={"prompt": prompt, **GREEDY})
    assert done.status_code == 400 and done.json()["error"]["param"].partition("[")[0] == "prompt"


def test_the_model_is_described(client: TestClient) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert model["id"] == "tiny" and model["context_length"] == model["max_model_len"] == 8192
    assert client.get("/v1/models/tiny").json() == model
    assert client.get("/v1/models/other/name").json()["error"]["code"] == "model_not_found"
    props = client.get("/props").json()
    assert props["default_generation_settings"]["n_ctx"] == 8192
    assert props["model_settings"] == [] and props["default_generation_settings"]["params"]["temperature"] == 1
    assert client.get("/health").json() == {"status": "ok"}


def test_text_to_ids_and_back(client: TestClient) -> None:
    ids = client.post("/tokenize", json={"content": "héllo 丁"}).json()["tokens"]
    plain = client.post("/tokenize", json={"content": "hello 丁"}).json()
    assert plain["count"] == 7 and len(ids) == 7
    assert client.post("/detokenize", json={"tokens": plain["tokens"]}).json()["content"] == "hello 丁"
    chat = client.post("/tokenize", json={"messages": [{"role": "user", "content": "hello"}]}).json()
    assert chat["count"] == 5 + 3
    assert client.post("/detokenize", json={"tokens": [-1]}).status_code == 400
    assert client.post("/tokenize", json={}).status_code == 400


def test_settings_that_the_model_says_are_told(
    tiny: Served, client: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiny.model.generation_config, "top_k", 64)
    assert client.get("/props").json()["model_settings"] == ["top_k"]


def test_a_long_prompt_is_no_warning(
    tiny: Served, client: TestClient, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The server counts tokens itself, and tells the client."""
    monkeypatch.setattr(tiny.tokenizer, "model_max_length", 100)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    done = client.post("/v1/completions", json={"prompt": "x" * 9000})
    assert done.json()["error"]["code"] == "context_length_exceeded"
    assert "Token indices" not in caplog.text


def test_metrics_are_prometheus_text(client: TestClient) -> None:
    ask(client)
    found = client.get("/metrics").text
    docs = (Path(run.__file__).parent / "docs" / "serve.md").read_text(encoding="utf-8")
    names = {line.split()[2] for line in found.splitlines() if line.startswith("# TYPE")}
    assert len(names) > 10 and [name for name in sorted(names) if f"`{name}`" not in docs] == []
    for line in found.splitlines():
        assert line.startswith(("# HELP specdec:", "# TYPE specdec:", "specdec:")), line
    assert 'specdec:requests_total{path="/v1/completions",status="200"}' in found
    assert "specdec:num_requests_running 0" in found


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/nothing", 404), ("GET", "/v1/chat/completions", 405), ("POST", "/v1/embeddings", 404)],
)
def test_errors_of_paths_are_json(client: TestClient, method: str, path: str, status: int) -> None:
    done = client.request(method, path, json={} if method == "POST" else None)
    assert done.status_code == status
    assert ("/openapi.json lists what there is" in done.json()["error"]["message"]) == (status == 404)


@pytest.mark.parametrize("body", ["", "{", "[]", "null", '{"a":' * 100_000, "\xff", '{"prompt": 1e999}'])
def test_bodies_that_are_no_objects(client: TestClient, body: str) -> None:
    done = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert done.status_code == 400 and done.json()["error"]["type"] == "invalid_request_error"
