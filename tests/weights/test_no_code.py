"""A model's folder never runs code, and nobody is asked whether it may."""

from __future__ import annotations

import json
import os
import pty
import subprocess
from pathlib import Path

import pytest

import specdec
from tests.support.processes.forked import python
from tests.support.tiny_folder import make_folder

# What a module beside the model would do first.
MODULE = "from pathlib import Path\nPath({marker!r}).write_text('ran')\nfrom transformers import {base}\n\n{body}\n"
PARTS = {
    "AutoConfig": ("PretrainedConfig", "class Own(PretrainedConfig):\n    model_type = 'own'"),
    "AutoTokenizer": ("PreTrainedTokenizerFast", "class Own(PreTrainedTokenizerFast):\n    pass"),
}
PROGRAM = """
import sys, specdec
for call in (lambda: specdec.load(sys.argv[1], drafter=None), lambda: specdec.load_tokenizer(sys.argv[1]),
             lambda: specdec.load(sys.argv[2], drafter=sys.argv[1])):
    try:
        call()
        print("loaded")
    except ValueError as error:
        print("ValueError:", error)
"""


def with_code(folder: Path, **changes: object) -> Path:
    """A folder whose config and tokenizer name modules beside them; returns the file that those would write."""
    make_folder(folder)
    marker = folder / "ran"
    for file, auto in (("config.json", "AutoConfig"), ("tokenizer_config.json", "AutoTokenizer")):
        base, body = PARTS[auto]
        (folder / f"{auto.lower()}.py").write_text(MODULE.format(marker=str(marker), base=base, body=body))
        own = {"auto_map": {auto: f"{auto.lower()}.Own" if auto == "AutoConfig" else [None, "autotokenizer.Own"]}}
        own |= changes if file == "config.json" else {"tokenizer_class": "Own"}
        path = folder / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **own}))
    return marker


def answers(folder: Path, other: Path, stdin: int) -> list[str]:
    """What each call of PROGRAM ended with, in a process whose stdin is `stdin`; a question waits for ever."""
    command = [*python(), "-c", PROGRAM, str(folder), str(other)]
    done = subprocess.run(command, stdin=stdin, capture_output=True, text=True, timeout=120, check=True)
    assert "[y/N]" not in done.stdout + done.stderr
    return done.stdout.splitlines()


@pytest.mark.parametrize("terminal", [True, False])
def test_code_of_a_folder_is_refused_without_a_question(tmp_path: Path, terminal: bool) -> None:
    marker = with_code(tmp_path / "own", model_type="own")
    make_folder(tmp_path / "plain")
    if terminal:
        there, stdin = pty.openpty()
        os.write(there, b"y\n" * 8)  # whoever asks is told to go on
        try:
            said = answers(marker.parent, tmp_path / "plain", stdin)
        finally:
            os.close(there)
            os.close(stdin)
    else:
        said = answers(marker.parent, tmp_path / "plain", subprocess.DEVNULL)
    assert len(said) == 3
    assert all(line.startswith(f"ValueError: {marker.parent}") for line in said), said
    assert "needs code of its own (auto_map), which is never run" in said[0]
    assert not marker.exists()


def test_a_known_architecture_loads_without_the_code_beside_it(tmp_path: Path) -> None:
    marker = with_code(tmp_path)
    assert specdec.load(tmp_path, drafter=None).config.model_type == "gemma3_text"
    assert not marker.exists()


def test_a_config_picks_no_kernel_of_the_hub(tmp_path: Path) -> None:
    make_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for name in ("attn_implementation", "_attn_implementation", "_attn_implementation_internal"):
        config[name] = "somebody/flash-kernel"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert specdec.load(tmp_path, drafter=None).config._attn_implementation in (None, "eager", "sdpa")
