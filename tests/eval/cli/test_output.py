"""Where results go, and how commands end: files of the user's stay, machines get JSON alone, errors are one line."""

from __future__ import annotations

import argparse
import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import run
from eval.cli import options as cli
from eval.cli.output import (
    STDOUT,
    check_head_folder,
    check_writable,
    file_name,
    is_metrics,
    is_record,
    put_record,
    run_guarded,
    sentence,
)
from specdec.engine.stats import GenerationStats
from specdec.engine.telemetry import prometheus

ROOT = Path(run.__file__).parent


class Screen(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def start(*arguments: str, **more: object) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, *arguments]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=120, **more)  # type: ignore[call-overload]


def test_what_json_wrote_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    check_writable(path)
    put_record(path, {"command": "bench", "n": 1})
    check_writable(path)
    put_record(path, {"command": "bench", "n": 2})
    assert json.loads(path.read_text()) == {"command": "bench", "n": 2}
    for foreign in ("notes", '{"a": 1}', "[]", '{"command": 3}', "[" * 100_000, "\udcff"):
        path.write_text(foreign, errors="surrogateescape")
        with pytest.raises(ValueError, match="holds something that --json did not write; name another file"):
            check_writable(path)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(ValueError, match="holds something"):
        check_writable(tmp_path / "link")
    path.write_text("")
    check_writable(tmp_path / "link")
    check_writable(STDOUT)
    check_writable(Path("/dev/null"))


def test_metrics_are_replaced_by_metrics(tmp_path: Path) -> None:
    path = tmp_path / "specdec.prom"
    path.write_text(prometheus(GenerationStats(), "m"))
    check_writable(path, "--prometheus", is_metrics)
    path.write_text("# HELP node_cpu_seconds_total\n")
    with pytest.raises(ValueError, match="holds something that --prometheus did not write"):
        check_writable(path, "--prometheus", is_metrics)
    assert not is_record(path)


def test_a_head_goes_into_a_folder_of_its_own(tmp_path: Path) -> None:
    check_head_folder(tmp_path / "new")
    check_head_folder(tmp_path)
    (tmp_path / "config.json").write_text("{}")  # of somebody's model
    with pytest.raises(ValueError, match="holds something that train did not write; name another folder"):
        check_head_folder(tmp_path)
    (tmp_path / "training" / "set").mkdir(parents=True)
    check_head_folder(tmp_path)
    with pytest.raises(ValueError, match="is a file; name a folder"):
        check_head_folder(tmp_path / "config.json")


def test_nobody_gets_json_unasked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    record = {"command": "x", "text": "é\ud83d"}
    for stream, path, wanted in (
        (Screen(), None, 0),
        (Screen(), tmp_path / "a.json", 0),
        (Screen(), STDOUT, 1),
        (io.StringIO(), None, 0),
        (io.StringIO(), tmp_path / "b.json", 0),
        (io.StringIO(), STDOUT, 1),
    ):
        monkeypatch.setattr(sys, "stdout", stream)
        put_record(path, record)
        assert len(stream.getvalue().splitlines()) == wanted
        if wanted:
            assert json.loads(stream.getvalue()) == record
        if path not in (None, STDOUT):
            assert json.loads(path.read_text()) == record


def test_two_results_on_stdout_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_guarded(lambda: 0, STDOUT, STDOUT, None) == 2
    assert capsys.readouterr().err == "error: two results go to stdout (-); name a file for one of them\n"


def test_with_json_on_stdout_people_read_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    def command() -> int:
        print("a table")
        put_record(STDOUT, {"command": "x"})
        return 0

    assert run_guarded(command, STDOUT, None) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == {"command": "x"}
    assert captured.err == "a table\n"


def out_of_memory() -> int:
    torch.empty(1 << 60, dtype=torch.int8)
    return 0


def fails_with(error: Exception) -> Callable[[], int]:
    def command() -> int:
        raise error

    return command


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (out_of_memory, "there is not enough memory for this; take a smaller model"),
        (fails_with(MemoryError()), "there is not enough memory for this"),
        (fails_with(RuntimeError("can't start new thread")), "ask for fewer with --threads"),
        (fails_with(PermissionError(13, "Permission denied", "/x/y")), "/x/y: Permission denied"),
        (fails_with(OSError(28, "No space left on device")), "No space left on device"),
        (fails_with(OSError("the hub has gone")), "the hub has gone"),
        (fails_with(ValueError("a\x1b[2Jb\nsecond\r\n  third\x9b\x00")), "a[2Jb second third"),
        (fails_with(UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte")), "can't decode byte 0xff"),
    ],
)
def test_what_the_machine_refuses_is_one_line(
    command: Callable[[], int], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_guarded(command) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.startswith("error: ") and error.count("\n") == 1 and error[:-1].isprintable()


def test_what_nobody_can_mend_keeps_its_traceback() -> None:
    assert sentence(RuntimeError("shapes do not match")) is None
    for error in (RuntimeError("shapes do not match"), NotImplementedError(), RecursionError(), KeyError("x")):
        with pytest.raises(type(error)):
            run_guarded(fails_with(error))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_a_full_disk_below_stdout_is_one_line() -> None:
    code = "import sys; from eval.cli.output import run_guarded; sys.exit(run_guarded(lambda: print('x' * 100) or 0))"
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-c", code]
        done = subprocess.run(words, cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (2, "error: No space left on device\n")


def test_a_terminal_that_knows_only_ascii() -> None:
    code = (
        "import sys; from eval.cli.output import run_guarded, put_record, STDOUT\n"
        "from specdec.util.terminal import Terminal; from rich.progress import track\n"
        "def command():\n"
        "    print('é语', sys.stdin.read()); Terminal().print('▁█ –'); print('ä', file=sys.stderr)\n"
        "    put_record(STDOUT, {'command': 'é'}); return 0\n"
        "sys.exit(run_guarded(command))"
    )
    env = {**os.environ, "LC_ALL": "C", "PYTHONIOENCODING": "ascii"}
    done = start("-c", code, env=env, input="ü")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == {"command": "é"}
    assert done.stdout.isascii() and "\\xe9" in done.stdout and "\\xfc" in done.stdout


def test_paths_of_users(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert file_name("~/out.json") == tmp_path / "out.json"
    assert cli.source("~/mine.jsonl=3") == (str(tmp_path / "mine.jsonl"), 3.0)
    assert cli.source("builtin") == ("builtin", 1.0)
    with pytest.raises(argparse.ArgumentTypeError, match="5,000 characters"):
        file_name("x" * 5000)
    arguments = run.parser("bench").parse_args(["bench", "--json", "~/a", "--prometheus", "~/b", "--prompts", "~/c"])
    assert {arguments.json, arguments.prometheus, arguments.prompts} == {tmp_path / name for name in "abc"}


def test_threads_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert cli.threads("32") == 32
    with pytest.raises(
        argparse.ArgumentTypeError, match="this machine has 8 processors; ask for at most 32, not 40000"
    ):
        cli.threads("40000")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert cli.threads("16") == 16


@pytest.mark.parametrize(
    "words", [["--model", "smolm2-135m-instruct"], ["--tokens", "8", "--model=smolm2-135m-instruct"]]
)
def test_a_mistyped_model_of_a_check_is_told_before_torch_is_imported(words: list[str]) -> None:
    done = start("-X", "importtime", "-m", "eval.exactness", *words)
    assert done.returncode == 2
    told = [line for line in done.stderr.splitlines() if not line.startswith("import time:")]
    assert len(told) == 1 and "Did you mean smollm2-135m-instruct?" in told[0]
    assert not {line.split("|")[-1].strip() for line in done.stderr.splitlines()} & {"torch", "transformers"}
