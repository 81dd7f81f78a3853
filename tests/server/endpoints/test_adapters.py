"""Adapters by the names of models: each request has its own, and texts with others share the passes."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from tests.support.adapters.tiny_adapter import make_peft
from tests.support.serving.served import Served, served

GREEDY: dict[str, Any] = {"temperature": 0, "max_tokens": 24}
ASKED = {"tiny": "none", "tiny:one": "one", "tiny:two": "two", "two": "two", "gpt-9": "one"}


@pytest.fixture(scope="module")
def adapted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = tmp_path_factory.mktemp("adapters")
    adapters = {"one": make_peft(made / "one", "gemma3", 1), "two": make_peft(made / "two", "gemma3", 2)}
    with served(folder, adapter=adapters, max_sequences=4, max_waiting=8) as one:
        yield one


@pytest.fixture
def client(adapted: Served) -> Iterator[TestClient]:
    with adapted.client() as client:
        yield client


def test_the_model_and_its_adapters_are_listed(client: TestClient) -> None:
    listed = client.get("/v1/models").json()["data"]
    assert [one["id"] for one in listed] == ["tiny", "tiny:one", "tiny:two"]
    assert [one.get("parent") for one in listed] == [None, "tiny", "tiny"]
    assert client.get("/v1/models/tiny:two").json() == listed[2]
    missing = client.get("/v1/models/tiny:three")
    assert missing.status_code == 404 and "'tiny:one'" in missing.json()["error"]["message"]


def test_each_request_has_the_adapter_that_it_names_beside_others(adapted: Served, client: TestClient) -> None:
    messages = [{"role": "user", "content": "hello abc hello abc"}]
    expected = {name: adapted.generated(messages, max_new_tokens=24, adapter=name) for name in ("none", "one", "two")}
    assert len({*expected.values()}) == 3

    def ask(model: str) -> dict[str, Any]:
        body = {"model": model, "messages": messages, **GREEDY}
        reply: dict[str, Any] = client.post("/v1/chat/completions", json=body).json()
        return reply

    with ThreadPoolExecutor(len(ASKED)) as pool:
        for asked, reply in zip(ASKED, pool.map(ask, ASKED), strict=True):
            assert reply["choices"][0]["message"]["content"] == expected[ASKED[asked]], asked
            assert reply["model"] == asked
    again = ask("tiny:two")
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert again["choices"][0]["message"]["content"] == expected["two"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "hello", **GREEDY}),
        ("/v1/responses", {"input": "hello", "temperature": 0, "max_output_tokens": 24}),
        ("/v1/messages", {"messages": [{"role": "user", "content": "hello"}], **GREEDY}),
    ],
)
def test_every_protocol_names_adapters_so(client: TestClient, path: str, body: dict[str, Any]) -> None:
    def words(model: str) -> str:
        reply = client.post(path, json={"model": model, **body}).json()
        found = reply.get("choices") or reply.get("output") or reply["content"]
        return str([one.get("text") or one.get("content") for one in found if one.get("type") != "reasoning"])

    assert len({words(model) for model in ("tiny", "tiny:one", "tiny:two")}) == 3
    refused = client.post(path, json={"model": "tiny:three", **body})
    assert refused.status_code == 404 and "tiny:two" in refused.json()["error"]["message"]


def test_without_adapters_any_name_will_do(tiny: Served) -> None:
    with tiny.client() as client:
        body = {"prompt": "hello", **GREEDY}
        replies = [client.post("/v1/completions", json={"model": name, **body}).json() for name in ("tiny", "tiny:x")]
        assert replies[0]["choices"] == replies[1]["choices"]
        assert [one["id"] for one in client.get("/v1/models").json()["data"]] == ["tiny"]


def test_conversations_with_adapters_are_kept_between_runs(folder: Path, tmp_path: Path) -> None:
    made = {"one": make_peft(tmp_path / "one", "gemma3", 1)}
    asked = {"prompt": "abcdefgh" * 12, **GREEDY}
    texts = []
    for cached in (False, True):
        with served(folder, adapter=made, kept_in=tmp_path) as one, one.client() as client:
            replies = [client.post("/v1/completions", json={"model": m, **asked}).json() for m in ("tiny", "tiny:one")]
            counts = [reply["usage"]["prompt_tokens_details"]["cached_tokens"] for reply in replies]
            assert [count > 64 for count in counts] == [cached, cached]
            texts.append([reply["choices"][0]["text"] for reply in replies])
    assert texts[0] == texts[1] and texts[0][0] != texts[0][1]
