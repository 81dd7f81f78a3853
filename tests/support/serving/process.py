"""The server as a process of its own."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import run
from tests.support.processes.forked import python
from tests.support.serving.served import until
from tests.support.tiny_folder import hears_ctrl_c

ROOT = Path(run.__file__).parent


@contextmanager
def serving(folder: Path, log: Path, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """The process `run.py serve`, and where it listens, once the model is loaded."""
    words = ["run.py", "serve", "--model", str(folder), "--port", "0", "--threads", "1", "--device", "cpu", *options]
    with log.open("wb") as file:
        process = subprocess.Popen([*python(), *words], cwd=ROOT, stderr=file, preexec_fn=hears_ctrl_c)
    try:
        until(lambda: "Ctrl-C ends" in log.read_text() or process.poll() is not None, 120)
        found = re.search(r"served at http://([\d.:]+)/v1", log.read_text())
        assert found is not None, log.read_text()
        yield process, found[1]
    finally:
        process.kill()
        process.wait()
