"""Fields are declared once: checks, /openapi.json and the table in the docs say the same."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from starlette.testclient import TestClient

import run
from specdec.server.app import GET, POST
from specdec.server.body import bodies, replies
from specdec.server.body.kinds import Either, Flag, Items, Kind, Number, Refused, Text, Whole
from specdec.server.body.objects import AnyObject, Fields, Object, TokenNumbers
from specdec.server.body.openapi import definitions
from specdec.server.body.table import WHERE, markdown
from specdec.server.errors import ApiError
from tests.support.serving.served import USER, Served

VALUES: tuple[Any, ...] = (
    *(True, False, 0, 1, -1, 2, 3.0, 0.5, 10**400, -(10**400), 1e300, "", "a", "none", [], ["a"], [1], ["a"] * 3),
    *([None], {}, {"a": 1}, {"1": 1}, {"1": "x"}, {"٣": 1}, {"1" * 12: 1}, {"n": 1}, {"n": None}, {"n": "x"}),
)
KINDS: tuple[Kind, ...] = (
    *(Number(0, 2), Whole(-1, 5, nonzero=True), Whole(1, 1), Flag(), Text(), Text(("a", "none")), AnyObject()),
    *(Items(Text(), "strings"), Items(Whole(0, 1), "numbers", 1, 2), Either(Text(), Items(Text(), "strings", most=2))),
    *(TokenNumbers(1), Object("Inner", bodies._ONE_CHOICE), Refused("is not here", ("",))),
)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.words)
def test_a_kind_reads_what_its_schema_allows(kind: Kind) -> None:
    schema = {**kind.schema, "components": {"schemas": definitions(kind)}}
    for value in VALUES:
        if jsonschema.Draft202012Validator(schema).is_valid(value):
            kind.read(value, "here")
            continue
        with pytest.raises(ApiError) as caught:
            kind.read(value, "here")
        error = caught.value
        assert error.status == 400 and error.param is not None and error.param.startswith("here")
        assert error.message.startswith(error.param) and len(error.message) < 300


def test_fields_are_read_once_by_their_declarations() -> None:
    asked = {"temperature": None, "top_k": 7.0, "messages": [{"role": "user", "extra": 1}], "unheard": {"x": 1}}
    body = bodies.CHAT.read(asked, "")
    assert not body.has("temperature") and body.get("temperature", 0.3) == 0.3
    assert body.get("top_k") == 7 and isinstance(body.get("messages")[0], Fields)
    with pytest.raises(AssertionError, match="not declared"):
        body.get("unheard")
    for wrong, param in (({}, "messages"), ({"messages": [{}]}, "messages[0].role"), ([], None)):
        with pytest.raises(ApiError) as caught:
            bodies.CHAT.read(wrong, "")
        assert caught.value.param == param


def test_the_page_has_every_route_and_every_field(client: TestClient) -> None:
    page = client.get("/openapi.json").json()
    assert page["openapi"].startswith("3.1")
    for method, operations in (("get", GET), ("post", POST)):
        for path, operation in operations.items():
            told = page["paths"][path.replace(":path", "")][method]
            assert told["summary"] == operation.about and "200" in told["responses"]
            if operation.body is not None:
                content = told["requestBody"]["content"]["application/json"]["schema"]
                name = content["$ref"].rpartition("/")[2]
                assert [*page["components"]["schemas"][name]["properties"]] == [*operation.body.fields]
    assert {path for path in page["paths"]} == {path.replace(":path", "") for path in GET | POST}
    assert [*WHERE.values()] == [*dict.fromkeys(one.body for one in POST.values() if one.body is not None)]
    operations = [one for path in page["paths"].values() for one in path.values()]
    assert len({one["operationId"] for one in operations}) == len(operations)


def test_every_reference_of_the_page_leads_somewhere(client: TestClient) -> None:
    text = client.get("/openapi.json").text
    page = json.loads(text)
    names = {part.partition('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert names == {*page["components"]["schemas"]}
    for schema in page["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)
    for body in WHERE.values():
        assert len({id(one) for one in _objects(body) if one.name == body.name}) == 1
    named: dict[str, Object] = {}
    for one in (each for body in WHERE.values() for each in _objects(body)):
        assert named.setdefault(one.name, one) is one, f"two objects are called {one.name}"


def _objects(kind: Kind) -> list[Object]:
    if isinstance(kind, Object):
        return [kind, *(one for field in kind.fields.values() for one in _objects(field.kind))]
    if isinstance(kind, Items):
        return _objects(kind.of)
    return [one for each in kind.kinds for one in _objects(each)] if isinstance(kind, Either) else []


def test_the_table_in_the_docs_is_that_of_the_declarations() -> None:
    docs = (Path(run.__file__).parent / "docs" / "serve.md").read_text(encoding="utf-8")
    table = markdown()
    assert table in docs, "the declarations have changed; the table in docs/serve.md must be:\n" + table
    for body in WHERE.values():
        for field in body.fields.values():
            assert f"| `{field.name}` |" in table and field.about, field.name


def test_fields_without_a_place_in_a_protocol_are_refused(tiny: Served, client: TestClient) -> None:
    """Answers of these protocols have one choice: `n` is not lost in silence, and mixes nothing."""
    for path, body in (
        ("/v1/messages", {"messages": [USER], "max_tokens": 3}),
        ("/v1/responses", {"input": "x", "max_output_tokens": 3}),
    ):
        for stream in (False, True):
            assert client.post(path, json={**body, "n": 1, "stream": stream}).status_code == 200
            refused = client.post(path, json={**body, "n": 2, "stream": stream})
            assert refused.status_code == 400 and refused.json()["error"]["message"] == "n must be 1, got 2"
    assert tiny.service.thread.running == 0


def test_replies_are_those_of_the_page(client: TestClient) -> None:
    limits = {"max_tokens": 3, "temperature": 0}
    asked: dict[str, tuple[dict[str, Any], Any]] = {
        "/v1/chat/completions": ({"messages": [USER], "logprobs": True}, replies.CHAT),
        "/v1/completions": ({"prompt": "a", "n": 2}, replies.COMPLETION),
        "/v1/responses": ({"input": "a"}, replies.RESPONSE),
        "/v1/messages": ({"messages": [USER]}, replies.TURN),
        "/v1/messages/count_tokens": ({"messages": [USER]}, replies.COUNT),
        "/tokenize": ({"content": "a"}, replies.TOKENS),
        "/detokenize": ({"tokens": [5]}, replies.TEXT),
    }
    for path, (body, schema) in asked.items():
        done = client.post(path, json={**limits, **body})
        assert done.status_code == 200, done.text
        jsonschema.validate(done.json(), schema)
        wrong = client.post(path, json=[])
        jsonschema.validate(wrong.json(), replies.ANTHROPIC_ERROR if "messages" in path else replies.ERROR)
