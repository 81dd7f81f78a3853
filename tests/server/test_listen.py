"""run.py serve as a process: it answers while it loads, and ends in good order."""

from __future__ import annotations

import http.client
import json
import signal
import sys
import time
from pathlib import Path

import pytest

import run
from eval.serve.command import check_folder
from tests.support.serving.process import serving
from tests.support.serving.served import events, until
from tests.support.tiny_folder import threads_restored

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")


def post(address: str, **body: object) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(address, timeout=60)
    text = json.dumps({"messages": [{"role": "user", "content": "hello"}], "temperature": 0, **body})
    connection.request("POST", "/v1/chat/completions", text, {"Content-Type": "application/json"})
    return connection


def test_ctrl_c_lets_answers_end_and_keeps_conversations(folder: Path, tmp_path: Path) -> None:
    kept, log = tmp_path / "kept", tmp_path / "log"
    with serving(folder, log, "--cache-dir", str(kept), "--alias", "mine") as (process, address):
        assert "mine, drafter" in log.read_text()
        running = post(address, max_tokens=3000, ignore_eos=True, stream=True).getresponse()
        first = running.readline()
        process.send_signal(signal.SIGINT)
        until(lambda: "Ctrl-C again ends answers at once" in log.read_text())
        said = log.read_text().splitlines()[-1]
        assert "1 under way may go on for 30 s" in said and f"written to {kept}" in said
        asked = http.client.HTTPConnection(address, timeout=60)
        asked.request("GET", "/health")
        reply = asked.getresponse()
        assert (reply.status, json.loads(reply.read())) == (503, {"status": "shutting down"})
        assert post(address, max_tokens=3).getresponse().status == 503
        found = events((first + running.read()).decode())
        assert found[-1] == "[DONE]" and found[-2]["timings"]["predicted_n"] == 3000
        assert process.wait(60) == 0
    assert "Traceback" not in log.read_text()
    assert len(list(kept.iterdir())) == 1 and kept.stat().st_mode & 0o077 == 0


def test_the_second_signal_ends_streams_with_an_error(folder: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    with serving(folder, log) as (process, address):
        running = post(address, max_tokens=8000, ignore_eos=True, stream=True).getresponse()
        running.readline()
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None, "the answer may go on for a while"
        process.send_signal(signal.SIGTERM)
        found = events(running.read().decode())
        assert found[-1]["error"]["code"] == "shutting_down"
        assert process.wait(60) == 0
    assert "Traceback" not in log.read_text()


def test_what_cannot_be_served_is_told_in_a_line(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPECDEC_API_KEY", raising=False)
    assert run.main(["serve", "--model", str(folder), "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "--api-key" in capsys.readouterr().err.splitlines()[-1]
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="--cache-dir"):
        check_folder(tmp_path / "file")
    with threads_restored():
        assert run.main(["serve", "--model", str(empty), "--port", "0"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
