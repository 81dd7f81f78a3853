"""The bench: order, identity, interrupts, what it shows and what it writes."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import run
from eval.bench import Bench
from eval.cli import Settings
from eval.dashboard import LiveView, PlainView, position_table, prompt_table, summary_table
from eval.metrics import Pair, Run, compare
from eval.prompts import Prompt
from eval.session import Session, open_session
from specdec.stats import GenerationStats, Round


def bench(folder: Path, *arguments: str) -> int:
    fixed = ["--model", str(folder), "--device", "cpu", "--threads", "1", "--max-new-tokens", "12", "--limit", "2"]
    return run.main(["bench", *fixed, *arguments])


def test_the_last_line_is_the_record_and_the_file_holds_the_same(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert bench(folder, "--json", str(tmp_path / "out.json"), "--draft-length", "3") == 0
    output = capsys.readouterr().out
    record = json.loads(output.splitlines()[-1])
    assert json.loads((tmp_path / "out.json").read_text()) == record
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]
    assert record["identical"] is True
    assert record["plain"]["tokens"] == record["drafted"]["tokens"] == 24
    assert record["plain"]["drafted"] == 0
    assert record["arguments"]["draft_length"] == 3
    assert record["host"]["threads"] == 1
    assert record["versions"]["torch"]
    assert record["memory"]["process"] > 50e6
    for words in (
        "tokens/s",
        "speed-up",
        "mean acceptance length",
        "acceptance rate",
        "peak memory",
        "identical",
        "1/2 tea",
    ):
        assert words in output
    assert all(
        len(line) <= 80 for line in output.splitlines() if line[:1] not in "{12" and "drafter suffix" not in line
    )


def test_sampled_texts_are_identical_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(folder, "--temperature", "1", "--seed", "3", "--top-k", "0") == 0
    output = capsys.readouterr().out
    assert "temperature 1, seed 3" in output
    assert json.loads(output.splitlines()[-1])["identical"] is True


def test_different_outputs_are_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Session.run

    def broken(self: Session, ids: Any, speculation: bool = True, **options: Any) -> Run:
        made = honest(self, ids, speculation=speculation, **options)
        return Run((*made.tokens[:5], 7, *made.tokens[6:]), made.seconds, made.stats) if speculation else made

    monkeypatch.setattr(Session, "run", broken)
    assert bench(folder) == 1
    output = capsys.readouterr().out
    record = json.loads(output.splitlines()[-1])
    assert record["identical"] is False
    assert record["differing"] == ["tea", "average"]
    assert "DIFFERENT" in output
    assert "tea: differs from new token 6 on" in output


def test_unreliable_timings_are_called_so(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Session.run

    def disturbed(self: Session, ids: Any, speculation: bool = True, **options: Any) -> Run:
        made = honest(self, ids, speculation=speculation, **options)
        return made if speculation else Run(made.tokens, 100.0, made.stats)

    monkeypatch.setattr(Session, "run", disturbed)
    assert bench(folder) == 0
    output = capsys.readouterr().out
    assert "These timings are not reliable: tea, average" in output
    assert json.loads(output.splitlines()[-1])["implausible"] == ["tea", "average"]


def test_ctrl_c_shows_what_was_finished(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    honest, calls = Session.run, []

    def impatient(self: Session, *arguments: Any, **options: Any) -> Run:
        calls.append(1)
        if len(calls) == 6:  # two to warm up, two of the first prompt, one of the second
            raise KeyboardInterrupt
        return honest(self, *arguments, **options)

    monkeypatch.setattr(Session, "run", impatient)
    assert bench(folder, "--json", str(tmp_path / "out.json")) == 130
    captured = capsys.readouterr()
    record = json.loads(captured.out.splitlines()[-1])
    assert (record["interrupted"], record["prompts"], record["identical"]) == (True, 1, True)
    assert "interrupted" in captured.err
    assert "Traceback" not in captured.err + captured.out


def test_runs_alternate_and_turns_see_the_answers_before_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(Settings(model=str(folder), device="cpu", threads=1, max_new_tokens=6))
    modes: list[bool] = []
    seen: list[str] = []
    honest = Session.run

    def noting(self: Session, ids: Any, speculation: bool = True, **options: Any) -> Run:
        modes.append(speculation)
        seen.append(self.tokenizer.decode(ids[0]))
        return honest(self, ids, speculation=speculation, **options)

    monkeypatch.setattr(Session, "run", noting)
    prompts = [Prompt("a", "", ("first", "second"), (("system", "short"),)), Prompt("b", "", ("third",))]
    view = PlainView(Console(file=io.StringIO()), "", 2, session.text)
    pairs = list(Bench(session, prompts).pairs(view))
    assert modes[2:] == [False, True, False, True, True, False]  # after the two of the warm-up
    assert [pair.name for pair in pairs] == ["a, turn 1", "a, turn 2", "b"]
    assert seen[2] == "<bos>short<eos><bos>first<eos><bos>"
    answer = session.text(pairs[0].plain.tokens)
    assert seen[4] == f"<bos>short<eos><bos>first<eos><bos>{answer}<eos><bos>second<eos><bos>"


def test_a_prompt_that_is_too_long_is_named(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "huge", "prompt": "x" * 9000}))
    assert bench(folder, "--prompts", str(tmp_path / "p.jsonl")) == 2
    assert "error: prompt huge: the prompt has 9003 tokens" in capsys.readouterr().err


def test_the_answer_ends_where_the_context_does(folder: Path) -> None:
    session = open_session(Settings(model=str(folder), device="cpu", threads=1, max_new_tokens=50))
    ids = session.encode([{"role": "user", "content": "x" * 8180}])
    assert len(session.run(ids).tokens) == 8192 - 8183


def sample_pairs() -> list[Pair]:
    stats = GenerationStats(prompts=1, prompt_tokens=900, emitted=120)
    for turn in range(40):
        stats.count_round(Round(("suffix",) * 8, turn % 9, turn % 9 + 1, 0.0, 0.0, 0.0))
    stats.timeline = [(0.2, 1), (2.0, 120)]
    stats.seconds |= {"prefill": 0.2, "verify": 1.8}
    name = "a-name-that-is-longer-than-its-column [/red] ✓"
    fast, slow = Run(tuple(range(120)), 2.0, stats), Run(tuple(range(120)), 12_345.6, stats)
    return [Pair(name, "", slow, fast), Pair("same", "", fast, fast), Pair("differs", "", fast, Run((1,), 1.0, stats))]


def test_every_table_fits_80_columns() -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=True, color_system=None)
    figures = compare(sample_pairs())
    memory = {"process": 12_345_678_901, "device": 98_765_432}
    console.print(prompt_table(sample_pairs()))
    console.print(summary_table(figures, memory, "torch reference: no C++ compiler was found when this was installed"))
    console.print(position_table(figures["drafted"]["acceptance_by_position"]))
    output = console.file.getvalue()
    assert all(len(line) <= 80 for line in output.splitlines())
    for words in ("12.35 GB", "99 MB", "NO", "2 of 3 texts", "acceptance by position"):
        assert words in output


def test_the_live_view_draws_at_80_columns_and_keeps_its_height() -> None:
    console = Console(file=io.StringIO(), width=80, height=24, force_terminal=True, color_system=None)
    view = LiveView(console, "title", 3, lambda tokens: " ".join(f"word{t}" for t in tokens))
    heights = set()
    for tokens in (0, 1, 500):
        watch = view.begin(1, "tea", "drafted")
        import torch

        watch.put(torch.zeros(1, 5))  # the prompt is not counted
        for token in range(tokens):
            watch.put(torch.tensor([token]))
        assert len(watch.tokens) == tokens
        lines = console.render_lines(view.draw())
        heights.add(len(lines))
        assert all(sum(len(segment.text) for segment in line) <= 80 for line in lines)
    assert len(heights) == 1
    for pair in sample_pairs() * 20:
        view.finished(pair)
    assert len(console.render_lines(view.draw())) <= 24


def test_synthetic_acceptance_is_what_was_asked_for_and_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(folder, "--draft-length", "2", "--max-new-tokens", "40", "--synthetic-acceptance", "1") == 0
    output = capsys.readouterr().out
    record = json.loads(output.splitlines()[-1])
    assert record["identical"] is True
    assert record["synthetic_acceptance"] == [1.0]
    assert record["drafted"]["acceptance_rate"] == 1.0
    assert "SYNTHETIC" in output
    assert bench(folder, "--draft-length", "2", "--max-new-tokens", "400", "--synthetic-acceptance", "0.8", "0.3") == 0
    positions = json.loads(capsys.readouterr().out.splitlines()[-1])["drafted"]["acceptance_by_position"]
    first, second = (position["accepted"] for position in positions)
    assert 0.7 < first < 0.9
    assert 0.15 < second < 0.33  # of all rounds: 0.8 * 0.3
    assert bench(folder, "--synthetic-acceptance", "0.5", "--against", "transformers") == 2
