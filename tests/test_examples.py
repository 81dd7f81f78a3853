"""Every file in examples/ is run, on a tiny model, and prints the text that plain decoding gives.

An example takes a prompt (or several), `--model` and `--max-new-tokens`: one that is new is tested by being there.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import specdec

FOLDER = Path(__file__).parent.parent / "examples"
EXAMPLES = sorted(FOLDER.glob("*.py"))
PROMPTS = ["Name three rivers.", "Name two of the lakes."]
TOKENS = 8


@pytest.fixture(scope="module")
def model(folder: Path) -> specdec.SpecdecForCausalLM:
    return specdec.load(folder, drafter=None, device="cpu")


def asked(folder: Path, prompt: str) -> Any:
    chat = [{"role": "user", "content": prompt}]
    tokenizer = specdec.load_tokenizer(folder)
    return tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)


def plain(model: specdec.SpecdecForCausalLM, folder: Path, prompt: str) -> str:
    inputs = asked(folder, prompt)
    output = model.generate(**inputs, max_new_tokens=TOKENS, speculation=False)
    answer = output[0, inputs["input_ids"].shape[1] :]
    text: str = specdec.load_tokenizer(folder).decode(answer, skip_special_tokens=True)
    assert len(text) > 1, "a text that would be found in any other"
    return text


def run_example(path: Path, folder: Path, prompts: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run it as `python PATH ...` does; return its names."""
    options = ["--model", str(folder), "--max-new-tokens", str(TOKENS)]
    monkeypatch.setattr(sys, "argv", [str(path), *prompts, *options])
    return runpy.run_path(str(path), run_name="__main__")


def test_there_are_examples() -> None:
    assert "generate.py" in [path.name for path in EXAMPLES]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_it_prints_the_plain_text(
    path: Path,
    model: specdec.SpecdecForCausalLM,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_example(path, folder, PROMPTS[:1], monkeypatch)
    assert plain(model, folder, PROMPTS[0]) in capsys.readouterr().out


@pytest.mark.parametrize("name", ["batch.py", "own_drafter.py"])
def test_several_prompts_have_the_text_that_each_has_alone(
    name: str,
    model: specdec.SpecdecForCausalLM,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_example(FOLDER / name, folder, PROMPTS, monkeypatch)
    shown = capsys.readouterr().out
    assert [f"> {prompt}\n{plain(model, folder, prompt)}\n" in shown for prompt in PROMPTS] == [True, True]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_it_says_what_it_shows_and_how_to_run_it(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert source.startswith('"""')
    assert f"\npython examples/{path.name}" in source.split('"""')[1]
    assert len(source.splitlines()) < 60


def test_the_drafter_drafts_from_what_it_learned(model: specdec.SpecdecForCausalLM, folder: Path) -> None:
    drafter = runpy.run_path(str(FOLDER / "own_drafter.py"))["FormerAnswers"]()
    inputs = asked(folder, PROMPTS[0])
    first = model.generate(**inputs, max_new_tokens=32)
    drafter.learn(first[0].tolist())
    again = model.generate(**inputs, max_new_tokens=32, drafter=drafter, draft_length=4)
    assert again.equal(first)
    assert model.last_stats.accepted > 8
    assert [*model.last_stats.draft_sources] == ["former-answers"]
