"""A headless Chromium: one page drawn and told in one call, or opened and followed while it lives.

`opened` speaks Chromium's DevTools protocol over two pipes, which needs no port and no further package. It is for pages
that change; what a page is like when it has been loaded, `browse` tells in one call.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from specdec.util.atomic import replacing

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_SECONDS = 120


def find_browser() -> str:
    """Return the path of a browser. Raises ValueError when there is none."""
    for name in BROWSERS:
        if path := shutil.which(name):
            return path
    raise ValueError(f"no browser to draw with ({', '.join(BROWSERS)}): apt install chromium")


def _command(browser: str, profile: str, *options: str) -> list[str]:
    # Chromium's sandbox refuses to run as root, as in a container; the pages are ours, and ask nobody else.
    as_root = ["--no-sandbox"] if hasattr(os, "geteuid") and os.geteuid() == 0 else []
    fixed = ["--headless", "--disable-gpu", "--hide-scrollbars", "--no-first-run", f"--user-data-dir={profile}"]
    return [browser, *fixed, *as_root, *options]


def browse(browser: str, address: str, *options: str) -> subprocess.CompletedProcess[str]:
    """Open `address` headless with a profile of its own; raise ValueError when the browser fails."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = _command(browser, profile, *options, address)
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
        except subprocess.TimeoutExpired:
            raise ValueError(
                f"{browser} did not finish in {_SECONDS} s; try again on a machine with less to do"
            ) from None
    if done.returncode != 0:
        raise ValueError(f"{browser} ended with code {done.returncode}: {done.stderr.strip()[-300:]}")
    return done


class Page:
    """Drive an open page. `events`: what the browser has told of it, in DevTools' words."""

    def __init__(self, pipes: _Pipes, session: str) -> None:
        self._pipes, self._session = pipes, session
        for domain in ("Page", "Runtime", "Network", "Log", "Accessibility"):
            self.call(f"{domain}.enable")

    @property
    def events(self) -> list[dict[str, Any]]:
        """Return what the browser has told so far."""
        self.call("Runtime.evaluate", expression="0")  # what was told before the answer is read with it
        return [one for one in self._pipes.events if one.get("sessionId") == self._session]

    def call(self, method: str, **params: Any) -> Any:
        """Return the result of a method of the protocol. Raises ValueError where the browser refuses it."""
        return self._pipes.call(method, params, self._session)

    def open(self, address: str) -> None:
        """Go to `address`, and wait until the page is there. Raises ValueError where there is none."""
        if problem := self.call("Page.navigate", url=address).get("errorText"):
            raise ValueError(f"{address}: {problem}")
        self.wait("document.readyState === 'complete'")

    def show(self, width: int, height: int, theme: str = "light") -> None:
        """Make the window so large, in px, and prefer a "light" or a "dark" page."""
        self.call("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])

    def value(self, script: str) -> Any:
        """Return the value of an expression in the page, as JSON has it. Raises ValueError where it fails."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise ValueError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = 60) -> None:
        """Wait until an expression holds. Raises ValueError when it does not in time."""
        end = time.monotonic() + seconds
        while not self.value(script):
            if time.monotonic() > end:
                raise ValueError(f"{script}: did not hold within {seconds:.0f} s")
            time.sleep(0.05)

    def press(self, key: str) -> None:
        """Press a key: Tab, Enter, or a letter."""
        text = {"text": "\r" if key == "Enter" else key} if key == "Enter" or len(key) == 1 else {}
        code = {"Tab": 9, "Enter": 13}.get(key, ord(key[0]))
        for kind in ("keyDown", "keyUp"):
            more = text if kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=code, **more)

    def picture(self, file: Path) -> None:
        """Write what the window shows, as a PNG."""
        shown = base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])
        with replacing(file.absolute()) as temporary:
            temporary.write_bytes(shown)

    @property
    def complaints(self) -> list[str]:
        """Return what went wrong so far: exceptions, and all that the console shows as an error or a warning."""
        found = []
        for one in self.events:
            params = one["params"]
            if one["method"] == "Runtime.exceptionThrown":
                found.append(str(params["exceptionDetails"]))
            elif one["method"] == "Log.entryAdded" and params["entry"]["level"] in ("error", "warning"):
                found.append(f"{params['entry']['text']} {params['entry'].get('url', '')}")
            elif one["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(str(params["args"]))
        return found

    @property
    def requests(self) -> list[str]:
        """Return the addresses that the page has asked for."""
        return [one["params"]["request"]["url"] for one in self.events if one["method"] == "Network.requestWillBeSent"]


@contextmanager
def opened(browser: str) -> Iterator[Callable[[], Page]]:
    """Start a browser; give the function that opens an empty page in it. Raises ValueError where there are no pipes."""
    if sys.platform == "win32":
        raise ValueError("a page that changes is followed through pipes, which Windows has not")
    to_us, from_it = os.pipe()
    to_it, from_us = os.pipe()

    def wire() -> None:  # the protocol has its numbers: 3 is read, 4 is written
        spare = [os.dup(to_it), os.dup(from_it)]
        while min(spare) <= 4:
            spare = [os.dup(one) for one in spare]
        for number, pipe in zip((3, 4), spare, strict=True):
            os.dup2(pipe, number, inheritable=True)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = _command(browser, profile, "--remote-debugging-pipe", "about:blank")
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL, close_fds=False, preexec_fn=wire)
        os.close(to_it)
        os.close(from_it)
        pipes = _Pipes(from_us, to_us)

        def page() -> Page:
            target = pipes.call("Target.createTarget", {"url": "about:blank"})["targetId"]
            session = pipes.call("Target.attachToTarget", {"targetId": target, "flatten": True})["sessionId"]
            return Page(pipes, session)

        try:
            yield page
        finally:
            with suppress(ValueError):
                pipes.call("Browser.close", {})
            os.close(from_us)
            os.close(to_us)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


class _Pipes:
    """Exchange JSON texts, each with a zero byte behind it, through the two pipes."""

    def __init__(self, write: int, read: int) -> None:
        self.events: list[dict[str, Any]] = []
        self._write, self._read = write, read
        self._calls, self._rest = 0, b""

    def call(self, method: str, params: dict[str, Any], session: str | None = None) -> Any:
        """Return the answer to a call; keep the events that come before it."""
        self._calls += 1
        said = {"id": self._calls, "method": method, "params": params} | ({"sessionId": session} if session else {})
        text = json.dumps(said).encode() + b"\0"
        try:
            while text:
                text = text[os.write(self._write, text) :]
        except BrokenPipeError:
            raise ValueError("the browser has ended") from None
        while True:
            heard = self._hear(method)
            if heard.get("id") == self._calls:
                if "error" in heard:
                    raise ValueError(f"{method}: {heard['error']['message']}")
                return heard["result"]
            self.events.append(heard)

    def _hear(self, method: str) -> dict[str, Any]:
        while b"\0" not in self._rest:
            if not select.select([self._read], [], [], _SECONDS)[0]:
                raise ValueError(f"the browser did not answer {method} in {_SECONDS} s")
            if not (more := os.read(self._read, 1 << 16)):
                raise ValueError("the browser has ended")
            self._rest += more
        text, _, self._rest = self._rest.partition(b"\0")
        heard: dict[str, Any] = json.loads(text)
        return heard
