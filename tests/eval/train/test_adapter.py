"""`--adapter` of the commands: a head for an adapted model, its text, its memory."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import run
from eval.chat.commands import Chat
from eval.cli.options import GenerationSettings, adapter, check_names
from eval.cli.session import adapters_of, open_session
from tests.support.adapters.tiny_adapter import make_peft
from tests.support.tiny_folder import make_folder, threads_restored


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with threads_restored():
        yield make_folder(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    made = tmp_path_factory.mktemp("adapters")
    return {name: make_peft(made / name, "llama", seed) for seed, name in enumerate(("one", "two"), 1)}


def record(out: Path, *words: Any) -> dict[str, Any]:
    assert run.main([*map(str, words), "--json", str(out)]) == 0
    found: dict[str, Any] = json.loads(out.read_text())
    return found


def test_a_head_is_trained_for_the_adapted_model(
    folder: Path, adapters: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"Say the number {i} in words."}) for i in range(200)))
    model = ["--model", folder, "--device", "cpu", "--threads", "1"]
    sizes = ["--tokens", "400", "--max-new-tokens", "9", "--draft-length", "2", "--draft-vocab", "64", "--steps", "3"]
    words = ["train", *model, "--data", prompts, "--out", tmp_path / "head", *sizes]
    assert record(tmp_path / "a.json", *words, "--adapter", f"mine={adapters['one']}")["set"]["tokens"] >= 400
    about = json.loads((tmp_path / "head" / "config.json").read_text())["provenance"]
    assert about["adapter"] == "mine"
    said = {}
    for name, more in {
        "drafted": ["--adapter", adapters["one"], "--drafter", tmp_path / "head", "--draft-length", "2"],
        "plain": ["--adapter", f"x={adapters['one']}", "--no-speculation"],
        "base": ["--no-speculation"],
        "two": ["--adapter", adapters["two"], "--adapter", f"other={adapters['one']}", "--no-speculation"],
    }.items():
        asked = ["generate", "Say seven.", *model, "--max-new-tokens", "30", *more]
        said[name] = record(tmp_path / "b.json", *asked)["tokens"]
    assert said["drafted"] == said["plain"]
    assert len({str(tokens) for tokens in said.values()}) == 3
    # with another adapter it is another run: the set would mix two models' answers
    capsys.readouterr()
    assert run.main([*map(str, words), "--adapter", str(adapters["two"])]) == 2
    assert "other settings (adapter)" in capsys.readouterr().err


def test_a_chat_switches_adapters(folder: Path, adapters: dict[str, Path]) -> None:
    pairs = tuple((name, str(path)) for name, path in adapters.items())
    with threads_restored():
        settings = GenerationSettings(model=str(folder), device="cpu", threads=1, max_new_tokens=8, adapter=pairs)
        session = open_session(settings)
    shown = io.StringIO()
    chat = Chat(session, Console(file=shown, width=120))
    said = []
    for name in ("one", "two", "none"):
        chat.line(f"/adapter {name}")
        chat.line("hello")
        said.append(chat.turns.runs[-1].tokens)
        chat.line("/reset")
    chat.line("/adapter three")
    chat.line("/adapter")
    assert len({*said}) == 3
    assert "there is no adapter 'three'" in shown.getvalue()
    assert "adapter: none (there are: one, two, none)" in shown.getvalue()


def test_plan_counts_adapters(folder: Path, adapters: dict[str, Path], tmp_path: Path) -> None:
    words = ["plan", "--model", folder, "--context", "512"]
    plain = record(tmp_path / "a.json", *words)
    found = record(tmp_path / "b.json", *words, "--adapter", adapters["one"], "--adapter", f"x={adapters['two']}")
    assert plain["adapters"] == 0 < 50_000 < found["adapters"] < 300_000
    assert abs(found["total"] - plain["total"] - found["adapters"]) < abs(found["program"] - plain["program"]) + 1


def test_names_and_paths_of_adapters(tmp_path: Path) -> None:
    assert adapter("a=b/c") == ("a", "b/c") and adapter("b/c") == ("", "b/c") and adapter("./x=y") == ("", "./x=y")
    assert adapters_of([("", "b/c"), ("x", "b/c")]) == {"c": "b/c", "x": "b/c"}
    with pytest.raises(ValueError, match="two adapters are called 'c'"):
        adapters_of([("", "b/c"), ("c", "d")])
    settings = GenerationSettings(adapter=(("", str(tmp_path / "nowhere")),))
    with pytest.raises(ValueError, match=r"--adapter .*nowhere: there is no such file or folder"):
        check_names(settings)
    check_names(GenerationSettings(adapter=(("", "owner/name"), ("", "owner/name/lora.gguf"))))  # of the hub
