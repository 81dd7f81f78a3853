"""Options that a command does not have: its own usage, the nearest option, exit code 2."""

from __future__ import annotations

import re

import pytest

import run
from eval.cli.options import KV_DTYPES, PICTURES, module_parser
from eval.exactness import command as exactness
from eval.prompts.media import FULL
from specdec.memory import plan


def complaint(words: list[str], capsys: pytest.CaptureFixture[str], command: object = run.main) -> tuple[str, str]:
    """Return the first and the last line that the command prints before it ends with exit code 2."""
    assert callable(command)
    with pytest.raises(SystemExit) as stopped:
        command(words)
    printed = capsys.readouterr()
    assert stopped.value.code == 2 and printed.out == ""
    first, *_, last = printed.err.splitlines()
    return first, last


@pytest.mark.parametrize(
    ("words", "usage", "said"),
    [
        (["bench", "--limitt", "3"], "run.py bench", "--limitt. Did you mean --limit?"),
        (["--limitt=3"], "run.py bench", "--limitt. Did you mean --limit?"),
        (["generate", "--statz", "x"], "run.py generate", "--statz. Did you mean --stats?"),
        (["train", "--minuts", "40"], "run.py train", "--minuts. Did you mean --minutes?"),
        (["plan", "--zzzzzz"], "run.py plan", "--zzzzzz"),
        (["plan", "-z"], "run.py plan", "-z"),
        (["chat", "hello"], "run.py chat", "hello"),
    ],
)
def test_a_command_refuses_what_is_not_its_own(
    words: list[str], usage: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.argv", ["run.py"])
    first, last = complaint(words, capsys)
    assert first.startswith(f"usage: {usage} [")
    assert last == f"{usage}: error: unrecognized arguments: {said}"


def test_a_check_refuses_what_is_not_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    first, last = complaint(["--promts", "4"], capsys, exactness.main)
    assert first.startswith("usage: python -m eval.exactness [")
    assert last.endswith("error: unrecognized arguments: --promts. Did you mean --prompts?")


def test_what_only_looks_like_an_unknown_option_is_taken() -> None:
    parser = run.parser("bench", "generate")
    assert parser.parse_args(["generate", "--", "--statz"]).prompt == "--statz"
    assert parser.parse_args(["generate", "--is this an option?"]).prompt == "--is this an option?"
    assert parser.parse_args(["generate", "-5"]).prompt == "-5"
    assert parser.parse_args(["bench", "--lim", "3", "--max-new=5"]).limit == 3  # argparse's abbreviations


def test_options_of_others_are_no_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    made = module_parser("exactness", None)
    made.add_argument("--tokens")
    _, last = complaint(["--jsonn", "x"], capsys, made.parse_args)
    assert re.search(r"unrecognized arguments: --jsonn$", last)


def test_the_types_of_a_cache_are_those_that_memory_is_planned_for() -> None:
    assert tuple(plan.KV_DTYPES) == KV_DTYPES


def test_the_budgets_of_a_picture_are_those_that_prompts_have() -> None:
    assert tuple(FULL) == PICTURES and PICTURES[-1] == plan.LARGEST_PICTURE
    assert all(columns * rows == budget for budget, (columns, rows) in FULL.items())
