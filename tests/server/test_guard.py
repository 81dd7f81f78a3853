"""Who is refused: foreign hosts and pages, bodies that need no preflight, missing keys, and bodies without end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from starlette.testclient import TestClient

from specdec.server.app import create_app
from specdec.server.guard import Access, Guard
from specdec.server.listen import Listening
from tests.support.serving.served import USER, Served

BODY = {"messages": [USER], "max_tokens": 2}


@pytest.mark.parametrize(
    ("host", "status"),
    [
        *[(host, 200) for host in ("localhost", "LOCALHOST:8080", "127.0.0.1:1", "[::1]:8080", "my.localhost")],
        *[(host, 200) for host in ("192.168.0.7:8080", "known.example")],
        *[(host, 403) for host in ("evil.example", "localhost.evil.example", "evil.example:8080", "127.0.0.1.nip.io")],
    ],
)
def test_the_name_that_a_request_calls_the_server_by(tiny: Served, host: str, status: int) -> None:
    with TestClient(create_app(tiny.state, Access(hosts=("known.example",))), base_url="http://localhost") as client:
        assert client.get("/v1/models", headers={"host": host}).status_code == status


def test_pages_of_other_sites_are_refused(client: TestClient) -> None:
    assert client.get("/health", headers={"origin": "https://evil.example"}).status_code == 403
    assert client.get("/health", headers={"origin": "null"}).status_code == 403
    assert client.get("/health", headers={"origin": "http://localhost"}).status_code == 200
    preflight = {"origin": "https://evil.example", "access-control-request-method": "POST"}
    assert client.options("/v1/chat/completions", headers=preflight).status_code == 403


def test_pages_that_were_allowed_may_ask(tiny: Served) -> None:
    access = Access(keys=("k",), origins=("https://app.example",))
    with TestClient(create_app(tiny.state, access), base_url="http://localhost") as client:
        headers = {"origin": "https://app.example", "access-control-request-method": "POST"}
        preflight = client.options("/v1/chat/completions", headers=headers)
        assert preflight.status_code == 200
        assert preflight.headers["access-control-allow-origin"] == "https://app.example"
        done = client.post(
            "/v1/chat/completions", json=BODY, headers={"origin": "https://app.example", "x-api-key": "k"}
        )
        assert done.status_code == 200 and done.headers["access-control-allow-origin"] == "https://app.example"


@pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded", "multipart/form-data"])
def test_bodies_must_be_declared_as_json(client: TestClient, kind: str) -> None:
    done = client.post("/v1/chat/completions", content=b"{}", headers={"content-type": kind})
    assert done.status_code == 415 and done.json()["error"]["code"] == "unsupported_media_type"


def test_a_charset_is_no_other_type(client: TestClient) -> None:
    done = client.post(
        "/tokenize", content=b'{"content": "a"}', headers={"content-type": "Application/JSON; charset=utf-8"}
    )
    assert done.status_code == 200


def test_keys(tiny: Served) -> None:
    with TestClient(create_app(tiny.state, Access(keys=("one", "zwei-ü"))), base_url="http://localhost") as client:
        for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": "on"}, {"authorization": "Bearer "}):
            done = client.post("/v1/chat/completions", json=BODY, headers=headers)
            assert done.status_code == 401 and done.json()["error"]["code"] == "invalid_api_key"
        for path in ("/v1/models", "/metrics", "/props"):
            assert client.get(path).status_code == 401
        assert client.get("/health").status_code == client.get("/v1/health").status_code == 200
        for given in ({"authorization": "Bearer one"}, {"x-api-key": "one"}, {"x-api-key": "zwei-ü".encode()}):
            assert client.post("/v1/chat/completions", json=BODY, headers=given).status_code == 200


@pytest.mark.parametrize("keys", [("",), ("one", " ")])
def test_an_empty_key_is_none(keys: tuple[str, ...]) -> None:
    with pytest.raises(ValueError, match="API key is empty"):
        Access(keys=keys)


@pytest.mark.parametrize("origin", ["example.org", "https://", "https://example.org/", "null", ""])
def test_what_is_no_origin_is_told_at_once(origin: str) -> None:
    with pytest.raises(ValueError, match="is no origin: write a scheme and a host"):
        Access(origins=("https://known.example:8443", "*", origin))


def test_a_page_that_may_ask_can_read_why_it_was_refused(tiny: Served) -> None:
    access = Access(keys=("k",), origins=("https://app.example",))
    with TestClient(create_app(tiny.state, access), base_url="http://localhost") as client:
        done = client.get("/v1/models", headers={"origin": "https://app.example"})
        assert done.status_code == 401 and done.headers["access-control-allow-origin"] == "https://app.example"
        refused = client.get("/v1/models", headers={"origin": "https://b.example"})
        assert refused.status_code == 403 and "access-control-allow-origin" not in refused.headers


def test_without_keys_any_key_will_do(client: TestClient) -> None:
    for key in ("Bearer undefined", "Bearer ", ""):
        assert client.get("/v1/models", headers={"authorization": key}).status_code == 200


@pytest.mark.parametrize("declared", [True, False])
def test_bodies_are_bounded(tiny: Served, declared: bool) -> None:
    app = create_app(tiny.state, Access())
    app.user_middleware[0].kwargs["most_body"] = 1000
    assert app.user_middleware[0].cls is Guard

    def parts() -> Iterator[bytes]:
        for _ in range(3):
            yield b"x" * 500

    with TestClient(app, base_url="http://localhost") as client:
        body = b"x" * 1500 if declared else parts()
        done = client.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
        assert done.status_code == 413 and done.json()["error"]["message"]


def test_another_address_needs_a_key() -> None:
    with pytest.raises(ValueError, match="--api-key"):
        Listening(host="0.0.0.0", port=0).open()
    Listening(host="0.0.0.0", port=0, access=Access(keys=("k",))).open().close()
    taken = Listening(port=0).open()
    with taken, pytest.raises(ValueError, match="choose another --port"):
        Listening(port=taken.getsockname()[1]).open()
