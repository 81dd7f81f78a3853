"""The page in a real Chromium while texts are decoded: it lives, complains of nothing, asks nobody else; for all."""

from __future__ import annotations

import http.client
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import urlparse

import pytest

from eval.browser import Page, find_browser, opened
from specdec.server import dashboard
from specdec.server.app import create_app
from specdec.server.guard import Access
from tests.support.serving.served import USER, Served, listening, slow_passes, until

try:
    BROWSER, WHY = find_browser(), ""
except ValueError as reason:
    BROWSER, WHY = "", str(reason)
pytestmark = [
    pytest.mark.skipif(not BROWSER, reason=WHY),
    pytest.mark.skipif(sys.platform == "win32", reason="the browser is spoken to through pipes, which Windows has not"),
]
LONG = {"messages": [USER], "temperature": 0, "max_tokens": 4000, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def address(tiny: Served) -> Iterator[str]:
    with pytest.MonkeyPatch.context() as patched, listening(tiny.app) as found:
        patched.setattr(dashboard, "PERIOD", 0.1)
        yield found


@pytest.fixture(scope="module")
def new_page() -> Iterator[Callable[[], Page]]:
    with opened(BROWSER) as found:
        yield found


@pytest.fixture(scope="module")
def page(address: str, new_page: Callable[[], Page]) -> Page:
    found = new_page()
    found.show(1000, 800)
    found.open(f"{address}/dashboard")
    found.wait("document.getElementById('state').textContent === 'Live'")
    return found


def text(page: Page, name: str) -> str:
    return str(page.value(f"document.getElementById('{name}').textContent"))


def background(page: Page) -> str:
    return str(page.value("getComputedStyle(document.body).backgroundColor"))


def test_figures_live_while_texts_are_decoded(tiny: Served, address: str, page: Page) -> None:
    connections = []
    with slow_passes(0.01):
        for i in range(3):  # two places: one waits
            connection = http.client.HTTPConnection(urlparse(address).netloc, timeout=30)
            connection.request("POST", "/v1/chat/completions", json.dumps(LONG), {"Content-Type": "application/json"})
            connections.append(connection)
            until(lambda i=i: tiny.service.thread.running + tiny.service.thread.waiting == i + 1)
        page.wait("document.querySelectorAll('#texts tr').length === 2")
        page.wait("parseFloat(document.getElementById('speed').textContent) > 0")
        assert text(page, "running") == "2" and "of 2 places, 1 waiting" in text(page, "waiting")
        emitted = "parseInt(document.querySelector('#texts td:nth-child(3)').textContent)"
        before = page.value(emitted)
        page.wait(f"{emitted} > {before}")
        assert "plain, which is about" in text(page, "against") or not text(page, "against")
        for connection in connections:
            connection.close()
        page.wait("document.querySelectorAll('#texts tr').length === 0 && !document.getElementById('idle').hidden")
    page.wait("document.querySelectorAll('#latencies tr').length === 3")
    for table in ("positions", "sources"):
        shares = page.value(f"[...document.querySelectorAll('#{table} td:nth-child(3)')].map((one) => one.textContent)")
        assert shares and all(share.endswith("%") for share in shares)
    for name in ("length", "rate", "hits", "memory", "free", "kept", "up", "prompt-tokens", "cached-tokens"):
        assert any(letter.isdigit() for letter in text(page, name)), name
    assert len(page.value("document.getElementById('curve').getAttribute('points')").split()) > 3


def test_nothing_is_complained_of_and_nobody_else_is_asked(address: str, page: Page) -> None:
    assert page.complaints == []
    asked = {one for one in page.requests if not one.startswith("data:")}
    assert asked == {f"{address}/dashboard", f"{address}/dashboard/events"}


def test_dark_and_light_as_the_system_is_and_as_the_reader_likes(address: str, new_page: Callable[[], Page]) -> None:
    page, seen = new_page(), []
    for theme in ("light", "dark"):
        page.show(900, 700, theme)
        page.open(f"{address}/")
        page.wait("document.getElementById('theme')?.textContent.endsWith('theme')")
        seen.append(background(page))
        page.value("document.getElementById('theme').click()")
        seen.append(background(page))
    light, dark = "rgb(244, 245, 247)", "rgb(18, 21, 25)"
    assert seen == [light, dark, dark, light]


def test_text_stands_out_from_what_is_behind_it(page: Page) -> None:
    """Contrast of 4.5:1 at least, by the formula of WCAG, in both themes."""
    script = """
    (() => {
      const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
      const light = (color) => {
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((value) => {
          const part = value / 255;
          return part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
        });
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
      };
      const behind = (node) => {
        const color = getComputedStyle(node).backgroundColor;
        return color === "rgba(0, 0, 0, 0)" && node.parentElement ? behind(node.parentElement) : color;
      };
      const worst = [];
      for (const theme of ["light", "dark"]) {
        document.documentElement.dataset.theme = theme;
        for (const node of document.querySelectorAll("body *")) {
          if (![...node.childNodes].some((one) => one.nodeType === 3 && one.data.trim())) continue;
          const pair = [light(getComputedStyle(node).color), light(behind(node))].sort((a, b) => b - a);
          const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
          if (ratio < 4.5) worst.push(theme + " " + node.tagName + " " + node.id + " " + ratio);
        }
      }
      return worst;
    })()
    """
    assert page.value(script) == []


def test_keys_alone_reach_and_work_everything(address: str, new_page: Callable[[], Page]) -> None:
    page = new_page()
    page.open(f"{address}/")
    page.wait("document.getElementById('state').textContent === 'Live'")
    focused = "document.activeElement.id || document.activeElement.className"
    reached = []
    for _ in range(3):
        page.press("Tab")
        reached.append(page.value(focused))
    assert reached == ["skip", "pause", "theme"]
    page.value("document.getElementById('pause').focus()")
    page.press("Enter")
    assert text(page, "state") == "Paused"
    assert page.value("document.getElementById('pause').ariaPressed") == "true"
    page.press("Enter")
    page.value("document.querySelector('.skip').focus()")
    page.press("Enter")
    assert page.value(focused) == "figures"


def test_what_a_screen_reader_finds(page: Page) -> None:
    nodes: list[dict[str, Any]] = page.call("Accessibility.getFullAXTree")["nodes"]
    found = [(one["role"]["value"], one.get("name", {}).get("value", "")) for one in nodes if not one["ignored"]]
    roles = [role for role, _ in found]
    assert {"banner", "main", "status"} <= {*roles} and roles.count("heading") == 8
    regions = ["Tokens a second", "In flight", "Acceptance by position", "Acceptance by source", "Latency", "Cache"]
    assert [name for role, name in found if role == "region"] == [*regions, "Memory"]
    assert sum(role == "table" and bool(name) for role, name in found) == roles.count("table") == 4
    assert all(name for role, name in found if role in ("button", "image", "link", "rowheader", "columnheader"))
    assert any(role == "image" and name.startswith("Tokens a second in the last 60 seconds") for role, name in found)
    live = page.value("[...document.querySelectorAll('[aria-live], [role=status], [role=alert]')].map((one) => one.id)")
    assert live == ["state"], "figures change every second: none of them may be announced"


@pytest.mark.parametrize("width", [320, 700, 1100])
def test_the_page_is_as_wide_as_its_window(page: Page, width: int) -> None:
    page.show(width, 800)
    assert page.value("document.documentElement.scrollWidth") <= width
    cut = "[...document.querySelectorAll('th, td, dd, dt')].filter((one) => one.scrollWidth > one.clientWidth + 1)"
    assert page.value(f"{cut}.map((one) => one.textContent)") == []


def test_a_key_is_asked_for_where_there_is_one(tiny: Served, new_page: Callable[[], Page]) -> None:
    with listening(create_app(tiny.state, Access(keys=("secret",)))) as address:
        page = new_page()
        page.open(f"{address}/")
        page.wait("document.activeElement?.id === 'given'")
        assert text(page, "state") == "A key is asked for"
        for letter in "secret":
            page.press(letter)
        page.press("Enter")
        page.wait("document.getElementById('state').textContent === 'Live'")
        assert page.value("document.getElementById('key').hidden")
        page.open("about:blank")
