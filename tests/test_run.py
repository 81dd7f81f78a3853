"""run.py as a user meets it: help, errors, exit codes, pipes, Ctrl-C, and the real model."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import run
from tests.support.processes.forked import python
from tests.support.tiny_folder import hears_ctrl_c

ROOT = Path(run.__file__).parent


def start(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*python(), "run.py", *arguments], cwd=ROOT, input=stdin, capture_output=True, text=True, timeout=600
    )


def tiny(folder: Path, *arguments: str) -> list[str]:
    return [*arguments, "--model", str(folder), "--device", "cpu", "--threads", "1"]


def test_the_package_is_the_command_too(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "specdec", "--help"]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and done.stdout.startswith("usage: python -m specdec")
    script = subprocess.run([Path(sys.executable).parent / "specdec", "plan", "--help"], capture_output=True, text=True)
    assert script.returncode == 0 and script.stdout.startswith("usage: specdec plan")


@pytest.mark.parametrize("arguments", [["--help"], ["bench", "--help"], ["generate", "--help"], ["chat", "--help"]])
def test_help_teaches(arguments: list[str]) -> None:
    done = start(*arguments)
    assert done.returncode == 0
    assert done.stderr == ""
    for words in {1: ("examples:", "bench", "generate", "chat", "report"), 2: ("--model", "--drafter", "adaptive")}[
        len(arguments)
    ]:
        assert words in done.stdout


@pytest.mark.parametrize("arguments", [[], *([name] for name in run.COMMANDS)], ids=lambda words: " ".join(words))
def test_help_fits_a_terminal(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    shown = start(*arguments, "--help").stdout
    assert shown.startswith("usage: ") and max(map(len, shown.splitlines())) <= 80


def test_help_of_training_teaches() -> None:
    shown = start("train", "--help").stdout
    for words in ("--minutes", "--steps", "--data", "--out", "--start", "torchrun", "Ctrl-C", "--drafter"):
        assert words in shown


def test_arguments_are_understood_before_anything_heavy_is_imported() -> None:
    heavy = "any(m in sys.modules for m in ('torch', 'transformers', 'rich'))"
    code = f"import sys, run; run.parser(*run.COMMANDS); sys.exit({heavy})"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["generate", "x", "--temperature", "-1"], "must be 0 (greedy) or more, got -1"),
        (["generate", "x", "--temperature", "nan"], "must be finite"),
        (["generate", "x", "--top-p", "0"], "must be above 0 and at most 1"),
        (["bench", "--draft-length", "many"], "must be adaptive or a whole number, got 'many'"),
        (["--max-new-tokens", "0"], "must be at least 1, got 0"),
        (["--limit", "1.5"], "'1.5' is not a whole number"),
        (["dance"], "invalid choice: 'dance'"),
        (["benc"], "Did you mean bench?"),
        (["generate", "x", "--kv-dtype", "bflot16"], "Did you mean bfloat16?"),
        (["--threads", "40000"], "ask for at most"),
        (["report", "a", "--\x1b[31mred"], "unrecognized arguments: --[31mred"),
        (["bench", "--json", "x" * 5000], "5,000 characters"),
    ],
)
def test_bad_arguments(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        run.main(arguments)
    assert stopped.value.code == 2
    assert complaint in capsys.readouterr().err


def test_an_unusable_model_is_one_line_and_no_traceback() -> None:
    done = start("generate", "hello", "--model", "no-such-model")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: no-such-model: there is no such file or folder. Named models:")
    assert len(done.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--model", "smolm2-135m-instruct"], "Did you mean smollm2-135m-instruct?"),
        (["generate", "x", "--drafter", "sufix"], "Did you mean suffix?"),
        (["bench", "--modes", "fixed", "adaptve"], "Did you mean adaptive?"),
        (["plan", "--model", "gemma-4-12"], "Did you mean gemma-4-12b?"),
        (["generate", "x", "--model", "x" * 5000], "a name of 5,000 characters"),
        (["generate", "x", "--model", "a\0b"], "NUL"),
        (["train", "--steps", "1", "--tokens", "9", "--out", "eval"], "holds something that train did not write"),
    ],
)
def test_a_mistyped_name_is_told_before_torch_is_imported(
    arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    code = "import sys, run; code = run.main(eval(sys.argv[1])); assert 'torch' not in sys.modules; sys.exit(code)"
    done = subprocess.run([sys.executable, "-c", code, repr(arguments)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert complaint in done.stderr
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1


def test_what_cannot_work_is_said_before_the_model_loads(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    surrogate = tmp_path / "p.jsonl"
    surrogate.write_text('{"prompt": "fine"}\n{"prompt": "ab\\ud83d"}\n')
    cases = [
        (["generate", " "], "the prompt is empty"),
        (["generate", "x", "--json", str(tmp_path / "gone" / "out.json")], "does not exist; create it first"),
        (["generate", "x", "--json", str(tmp_path)], "is a folder; name a file"),
        (["bench", "--prompts", str(tmp_path / "gone.jsonl")], "gone.jsonl: No such file"),
        (["generate", "x\udcff"], "the prompt is not text: character 2 is '\\udcff'"),
        (["bench", "--prompts", str(surrogate)], "p.jsonl, line 2: prompt is not text: character 3 is '\\ud83d'"),
        (["generate", "x", "--json", str(surrogate)], "holds something that --json did not write"),
        (["generate", "x", "--prometheus", str(surrogate)], "holds something that --prometheus did not write"),
        (["generate", "x", "--device", "abacus"], "device 'abacus' is no name of one; write cpu, cuda,"),
    ]
    for arguments, complaint in cases:
        assert run.main([*arguments, "--model", str(folder)]) == 2
        error = capsys.readouterr().err
        assert complaint in error
        assert error.startswith("error: ") and len(error.strip().splitlines()) == 1


def generated(folder: Path, out: Path, *arguments: str) -> dict[str, Any]:
    assert (
        run.main(tiny(folder, "generate", "abc abc abc", "--max-new-tokens", "20", "--json", str(out), *arguments)) == 0
    )
    return json.loads(out.read_text())


def test_generate_prints_the_text_alone(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = generated(folder, tmp_path / "out.json", "--stats")
    captured = capsys.readouterr()
    assert captured.out.strip() == record["text"].strip()
    assert len(record["tokens"]) == record["figures"]["tokens"] == 20
    assert "20 tokens in" in captured.err


def test_generate_gives_a_machine_its_json_alone(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(tiny(folder, "generate", "abc", "--max-new-tokens", "5", "--json", "-")) == 0
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    text, note = captured.err.strip().rsplit("\n", 1)
    assert text.strip() == record["text"].strip() and record["finish_reason"] == "length"
    assert note == "[cut after 5 tokens, the limit; a larger --max-new-tokens gives longer answers]"


def test_generated_control_characters_do_not_reach_a_terminal(folder: Path) -> None:
    from rich.console import Console

    from eval.chat.answer import Spoken
    from eval.chat.view import Raw
    from eval.cli.options import GenerationSettings
    from eval.cli.session import open_session

    session, evil = open_session(GenerationSettings(model=str(folder), drafter="none", device="cpu")), "a\x1b[31mb\x07"
    for terminal, wanted in ((True, "a␛[31mb␇"), (False, evil)):
        shown = io.StringIO()
        with Raw(Console(file=shown, force_terminal=terminal)) as view:
            spoken = Spoken(session, view.feed)
            spoken.on_finalized_text(evil, stream_end=True)
        assert shown.getvalue().strip() == wanted
        assert spoken.text == evil


def test_generate_depends_on_the_seed_and_not_on_drafting(folder: Path, tmp_path: Path) -> None:
    out, sample = tmp_path / "out.json", ("--temperature", "1.5", "--top-k", "0", "--seed")
    first = generated(folder, out, *sample, "1")["tokens"]
    plain = generated(folder, out, *sample, "1", "--no-speculation")
    assert plain["tokens"] == first
    assert plain["figures"]["drafted"] == 0
    assert generated(folder, out, *sample, "1", "--draft-length", "5", "--drafter", "none")["tokens"] == first
    assert generated(folder, out, *sample, "2")["tokens"] != first


def test_generate_raw_skips_the_chat_template(folder: Path, tmp_path: Path) -> None:
    with_template = generated(folder, tmp_path / "out.json")
    raw = generated(folder, tmp_path / "out.json", "--raw")
    assert with_template["figures"]["prompt_tokens"] == len("abc abc abc") + 3
    assert raw["figures"]["prompt_tokens"] == len("abc abc abc")


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")
def test_ctrl_c_ends_a_bench_with_what_was_finished(folder: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "p.jsonl"
    # The first takes a moment; the second would take minutes.
    prompts.write_text("".join(json.dumps({"prompt": "x" * 10}) + "\n" for _ in range(100)))
    arguments = tiny(folder, "bench", "--prompts", str(prompts), "--max-new-tokens", "500", "--draft-length", "0")
    arguments += ["--json", str(tmp_path / "out.json")]
    process = subprocess.Popen(
        [*python(), "run.py", *arguments],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        preexec_fn=hears_ctrl_c,
    )
    try:
        assert process.stdout is not None
        while not (line := process.stdout.readline()).startswith("1/100"):
            assert line, process.communicate()[1]
        time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "Traceback" not in errors
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["interrupted"] is True
    assert 1 <= record["prompts"] < 100


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other pipes")
def test_a_reader_that_leaves_is_no_error_to_speak_of(folder: Path) -> None:
    words = [*python(), "run.py", *tiny(folder, "generate", "hello", "--max-new-tokens", "4000")]
    process = subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        errors = process.stderr.read()
        process.wait(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 1
    assert errors.strip() == ""


@pytest.mark.model
def test_bench_on_the_real_model(tmp_path: Path) -> None:
    done = start(
        "bench", "--limit", "1", "--max-new-tokens", "16", "--threads", "1", "--json", str(tmp_path / "out.json")
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["identical"] is True
    assert [mode["tokens"] for mode in record["modes"]] == [16, 16]
    assert record["model"]["name"] == "smollm2-135m-instruct"


@pytest.mark.model
def test_generate_on_the_real_model() -> None:
    done = start(
        "generate",
        "-",
        "--max-new-tokens",
        "24",
        "--threads",
        "1",
        "--stats",
        stdin="What is the capital of France? Answer in one sentence.",
    )
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert "tokens in" in done.stderr


@pytest.mark.model
def test_chat_on_the_real_model() -> None:
    question = "What is the capital of France? Answer in one sentence."
    lines = [question, "/draft off", "Now say it again.", "/stats", "/quit", "never read"]
    done = start("chat", "--max-new-tokens", "16", "--threads", "1", stdin="\n".join(lines))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Paris") == 2
    assert "drafting: off" in done.stdout
    assert "all 2:" in done.stdout
