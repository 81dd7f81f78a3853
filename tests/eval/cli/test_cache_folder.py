"""The user's cache folder is left alone by the suite: by its own process, and by the commands that it starts."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import run
from specdec.weights.hub.paths import cache_folder
from tests.support.processes.forked import python

ROOT = Path(run.__file__).parent


def test_a_command_keeps_what_it_learned_in_the_suites_folder(folder: Path, tmp_path: Path) -> None:
    def kept() -> set[Path]:
        return set(cache_folder().rglob("learned/*.json"))

    words = ["generate", "hello", "--model", str(folder), "--device", "cpu", "--threads", "1", "--max-new-tokens", "4"]
    home = {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    before = kept()
    done = subprocess.run(
        [*python(), "run.py", *words], cwd=ROOT, env={**os.environ, **home}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert len(kept() - before) == 1
    assert not [path for path in tmp_path.rglob("*") if "specdec" in path.name], "in the user's home"
