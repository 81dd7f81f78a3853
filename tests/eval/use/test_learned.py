"""`--learn`, `run.py learned` and `train --from-use` as a user meets them, on a tiny model."""

from __future__ import annotations

import io
import json
import stat
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import run
from drafter.use.log import UsedModel, UseLog, use_folder, use_logs
from eval.use.options import LIMIT, amount
from tests.support.tiny_folder import make_folder, threads_restored

HELLO = "hello there, hello there"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with threads_restored():
        yield make_folder(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def model(folder: Path) -> list[str]:
    return ["--model", str(folder), "--device", "cpu", "--threads", "1"]


def chat(folder: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str], *more: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    assert run.main(["chat", *model(folder), "--max-new-tokens", "8", *more]) == 0


def record(tmp_path: Path, *words: str) -> dict[str, Any]:
    out = tmp_path / "out.json"
    assert run.main([*words, "--json", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_a_chat_is_kept_shown_and_erased(
    folder: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    chat(folder, monkeypatch, [HELLO])
    assert not use_folder().exists(), "it is off unless asked for"
    chat(folder, monkeypatch, [HELLO, "and again", "/reset", "another"], "--learn")
    assert "are kept in" in capsys.readouterr().out
    (found,) = record(tmp_path, "learned")["models"]
    assert (found["model"], found["conversations"], found["unreadable"]) == (str(folder), 2, 0)
    assert found["answered"] == 16 and found["tokens"] > 60 and Path(found["path"]).parent == cache / "use"
    capsys.readouterr()
    assert run.main(["learned", str(folder), "--texts", "5"]) == 0
    shown = capsys.readouterr().out
    assert HELLO in shown and "and again" in shown and shown.index("and again") < shown.index("another")
    assert run.main(["learned", "nobody"]) == 2 and "nothing is kept" in capsys.readouterr().err
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n"))
    assert run.main(["learned", "--erase"]) == 2 and "say --yes" in capsys.readouterr().err
    assert run.main(["learned", "--erase", "--yes"]) == 0 and not use_logs(use_folder())
    assert record(tmp_path, "learned")["models"] == []


def test_a_limit_is_an_amount(capsys: pytest.CaptureFixture[str]) -> None:
    assert (amount("64MB"), amount("5000")) == (LIMIT, 5000)
    for wrong in ("0", "many"):
        with pytest.raises(SystemExit):
            run.main(["chat", "--learn-limit", wrong])
        assert " amount" in capsys.readouterr().err


def train(folder: Path, out: Path, *more: str) -> list[str]:
    sizes = ["--max-new-tokens", "9", "--draft-length", "2", "--tokens", "200", "--steps", "3"]
    return ["train", *model(folder), "--out", str(out), *sizes, *more]


def test_a_head_is_adapted_to_what_was_kept(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    first, out = tmp_path / "first", tmp_path / "adapted"
    lines = tmp_path / "prompts.jsonl"
    lines.write_text("\n".join(json.dumps({"prompt": f"Say the number {i} in words."}) for i in range(90)))
    data = ["--data", str(lines)]
    assert run.main(train(folder, first, *data, "--draft-vocab", "64", "--bits", "5")) == 0
    capsys.readouterr()
    use = train(folder, out, *data, "--from-use")
    assert run.main(use) == 2 and "no head of this model to adapt" in capsys.readouterr().err
    use += ["--start", str(first)]
    assert run.main([*use, "--answers-from", "http://localhost:1"]) == 2
    assert "leave out --answers-from" in capsys.readouterr().err
    chat(folder, monkeypatch, [HELLO], "--learn")
    assert run.main(use) == 2 and "1 conversations of" in capsys.readouterr().err
    (log,) = use_logs(use_folder())
    log.limit = LIMIT
    for i in range(30):  # more than a tiny model writes in a test
        assert log.add([2, 5 + i, *range(20, 120)], 2)

    found = record(tmp_path, *use)
    about = found["from_use"]
    assert (about["conversations"], about["held_out"]) == (27, 4)
    assert about["before"] == found["scores"][0] and about["before"]["step"] == 0
    assert about["after"]["real"] == max(score["real"] for score in found["scores"])
    assert about["before"]["prompts"] == 4 and found["training"]["learning_rate"] == 3e-4
    assert found["set"]["texts"] == 27 + 9, "a third as many general prompts"
    assert "before" in capsys.readouterr().out
    provenance = json.loads((out / "config.json").read_text())["provenance"]
    assert provenance["from_use"]["held_out"] == 4 and provenance["start"]["name"] == str(first)
    assert provenance["before"] == about["before"] and provenance["set"]["from_use"]
    assert (out / "mtp.gguf").stat().st_size == (first / "mtp.gguf").stat().st_size, "in as many bits"
    assert stat.S_IMODE((out / "training").stat().st_mode) == 0o700

    log.erase()
    assert record(tmp_path, *use)["scores"] == found["scores"], "a run goes on from the texts that it began with"
    (out / "training" / "use.json").unlink()
    assert run.main(use) == 2 and "use.json: is missing" in capsys.readouterr().err


def test_texts_of_another_adapter_are_of_another_model(tmp_path: Path) -> None:
    one, two = UsedModel("tiny", "a"), UsedModel("tiny", "a", "mine", "b")
    assert one.key != two.key and one.key == one._replace(name="tiny, elsewhere").key
    UseLog(tmp_path, two, LIMIT).add([1, 2, 3], 1)
    assert UseLog(tmp_path, one).texts() == ([], [])
