"""The page and its figures."""

from __future__ import annotations

import json
import re

import pytest
from starlette.testclient import TestClient

from specdec.server import dashboard
from specdec.server.app import create_app
from specdec.server.guard import Access
from tests.support.serving.served import USER, Served, listening


def test_the_page_asks_nobody_else_and_has_every_part_that_its_script_fills(client: TestClient) -> None:
    page = client.get("/").text
    assert client.get("/dashboard").text == page
    assert not re.search(r"https?://|//[a-z]|@import|url\(", page.replace("// Reads", "")), "no other address"
    assert "/*style*/" not in page and "/*script*/" not in page
    ids = {*re.findall(r'id="([\w-]+)"', page)}
    assert {*re.findall(r'(?:at|rows)\("(\w+)"', page)} <= ids
    for title in re.findall(r'aria-labelledby="([\w-]+)"', page):
        assert title in ids
    assert "default-src 'none'" in client.get("/").headers["content-security-policy"]


def test_figures_come_live_and_count_what_was_done(tiny: Served, client: TestClient) -> None:
    client.post("/v1/chat/completions", json={"messages": [USER], "max_tokens": 9})
    with listening(tiny.app) as address:
        import httpx2

        with httpx2.stream("GET", f"{address}/dashboard/events", timeout=20) as stream:
            line = next(line for line in stream.iter_lines() if line.startswith("data: "))
    found = json.loads(line.removeprefix("data: "))
    assert found["emitted"] == tiny.service.engine.stats.emitted >= 9
    assert found["running"] == 0 and found["places"] == 2 and found["texts"] == []
    assert {*found["first"]} == {"0.5", "0.9", "0.99"}
    assert found == json.loads(json.dumps(found, allow_nan=False))


def test_the_page_is_open_and_its_figures_are_not(tiny: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dashboard, "PERIOD", 0.01)
    with TestClient(create_app(tiny.state, Access(keys=("k",))), base_url="http://localhost") as client:
        assert client.get("/").status_code == 200
        assert client.get("/dashboard/events").status_code == 401
