"""A hub on this machine: as much of the Hugging Face hub's protocol as `huggingface_hub` needs to read a model."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Serve `repositories`: contents of files by name, by repository."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, dict[str, bytes]]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.asked: list[str] = []  # "METHOD path range"
        self.breaks: dict[str, int] = {}  # after so many bytes the connection ends, once
        self.sent: dict[str, int] = {}  # bytes of each file, all requests together
        self.instead: dict[str, bytes] = {}  # what arrives in place of a file

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving(repositories: dict[str, dict[str, bytes]]) -> Iterator[Hub]:
    hub = Hub(repositories)
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append(f"{self.command} {path} {self.headers.get('Range', '')}".strip())
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            self._info(found[1])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/[^/]+", path):
            self._tree(found[1])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._file(found[1], found[2], body)
        else:
            self._missing("EntryNotFound")

    def _info(self, repository: str) -> None:
        files = self.server.repositories.get(repository)
        if files is None:
            return self._missing("RepoNotFound")
        siblings = [{"rfilename": name, **_about(content)} for name, content in files.items()]
        self._json({"id": repository, "modelId": repository, "sha": COMMIT, "siblings": siblings})

    def _tree(self, repository: str) -> None:
        files = self.server.repositories[repository]
        self._json(
            [{"type": "file", "path": name, "oid": "0" * 40, **_about(content)} for name, content in files.items()]
        )

    def _file(self, repository: str, name: str, body: bool) -> None:
        content = self.server.repositories.get(repository, {}).get(name)
        if content is None:
            return self._missing("EntryNotFound")
        whole, content = content, self.server.instead.get(name, content)
        start = 0
        if found := re.fullmatch(r"bytes=(\d+)-.*", self.headers.get("Range", "")):
            start = int(found[1])
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{sha256(whole)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("X-Linked-Size", str(len(whole)))
        self.send_header("X-Linked-Etag", f'"{sha256(whole)}"')
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not body:
            return
        end = self.server.breaks.pop(name, len(content))
        self.wfile.write(content[start:end])
        self.server.sent[name] = self.server.sent.get(name, 0) + max(0, end - start)
        if end < len(content):
            self.close_connection = True

    def _json(self, value: Any) -> None:
        data = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _missing(self, code: str) -> None:
        self.send_response(404)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _about(content: bytes) -> dict[str, Any]:
    lfs = {"sha256": sha256(content), "oid": sha256(content), "size": len(content), "pointerSize": 130}
    return {"size": len(content), "blobId": "0" * 40, "lfs": lfs}
