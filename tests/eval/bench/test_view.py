"""What bench shows: tables of 80 columns, a live view that does not jump, lines for pipes."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from eval.bench.comparison import PREFILL, Turn, Way, compare
from eval.bench.tables import mode_table, notes, prompt_table, show, summary_table, task_table
from eval.bench.view import LiveView, PlainView
from eval.cli.metrics import TimedRun
from eval.cli.names import PLAIN
from eval.cli.options import GenerationSettings
from eval.cli.session import Session, open_session
from specdec.engine.stats import GenerationStats, Round

NAME = "a-name-that-is-longer-than-its-column [/red] ✓"
WAYS = [Way(PLAIN), Way("adaptive"), Way("k4"), Way("llama.cpp-ngram-map-k4v", "built for AVX2", ours=False)]


def run(seconds: float, tokens: int = 120) -> TimedRun:
    stats = GenerationStats(prompts=1, prompt_tokens=900, emitted=tokens)
    for turn in range(40):
        stats.count_round(Round(("suffix",) * 8, turn % 9, turn % 9 + 1, 0.0, 0.0, 0.0))
    stats.timeline = [(0.2, 1), (2.0, tokens)]
    stats.seconds |= {"prefill": 0.2, "verify": 1.8}
    return TimedRun(tuple(range(tokens)), seconds, stats)


def turn(name: str, seconds: float, other: TimedRun | None = None) -> Turn:
    runs = {PLAIN: run(5.0), "adaptive": run(seconds), "k4": run(2.5)}
    return Turn(name, f"task of {name[-1:]}", 1, {**runs, "llama.cpp-ngram-map-k4v": other or run(3.0)})


def sample(count: int = 3) -> dict[str, Any]:
    turns = [turn(f"{NAME} {i}", 2.0 + i / 9) for i in range(count)]
    differs = Turn("differs", "", 1, {**turns[0].runs, "adaptive": run(1.0, 1)})
    return {
        **compare([*turns, differs], WAYS),
        "synthetic_acceptance": [0.5],
        "memory": {"process": 12_345_678_901, "device": 98_765_432, "budget": 16_000_000_000},
        "host": {"kernels": "torch reference: no C++ compiler was found when this was installed", "threads": 2},
        "costs": {"pass_seconds": {str(n): 0.01 * n for n in range(1, 10)}, "draft_seconds": {"mtp": 0.001}},
        "others_cpu": 0.5,
    }


@pytest.mark.parametrize("terminal", [False, True])
@pytest.mark.parametrize("count", [3, 40])
def test_everything_that_is_shown_fits_80_columns(terminal: bool, count: int) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None)
    show(console, "title", sample(count))
    output = console.file.getvalue()
    assert all(len(line) <= 80 for line in output.splitlines())
    for words in ("12.35 GB", "99 MB", "of a budget of 16.00 GB", "NO", f"{count} of {count + 1} texts", "by position"):
        assert words in output
    for words in ("SYNTHETIC", "waiting engines used 0.50 cores", "differs: adaptive differs from plain"):
        assert words in " ".join(output.split())
    assert ("adaptive, by task" in output) == (count == 40), "by task where that says more than prompt by prompt"
    assert ("speeds up least" in output) == (count == 40)


def test_tables_say_what_the_record_says() -> None:
    record = sample()
    for table, words in (
        (prompt_table(record["per_prompt"], "k4"), "48.0"),
        (mode_table(record), "llama.cpp-ngra"),
        (summary_table(record), "a mtp token 0.10"),
        (task_table(record), "k4"),
    ):
        console = Console(file=io.StringIO(), width=80)
        console.print(table)
        assert words in console.file.getvalue()
    assert any(text.startswith("llama.cpp-ngram-map-k4v: built for AVX2") for text, _ in notes(record))
    empty = Console(file=io.StringIO(), width=80)
    show(empty, "title", record | compare([], WAYS))
    assert "nothing was finished" in empty.file.getvalue()


@pytest.mark.parametrize("width", [80, 60, 40, 30])
def test_no_table_cuts_a_figure(width: int) -> None:
    record = sample(40)
    for mode in record["modes"]:  # as long as figures are
        for figures in (mode, *mode["by_task"].values()):
            figures |= {"speedup": 12.345, "tokens_per_second": 12345.6, "speedup_lowest": 11.119}
    record["headline"] = "adaptive"
    tables = (prompt_table(record["per_prompt"], "adaptive"), task_table(record), mode_table(record))
    for table in (*tables, summary_table(record)) if width >= 60 else tables:
        console = Console(file=io.StringIO(), width=width)
        console.print(table)
        lines = console.file.getvalue().splitlines()
        assert all(len(line) <= width for line in lines)
        assert not any(re.search(r"\d…", line) for line in lines), lines
        assert any(re.search(r"\b\d+\.\d\dx", line) for line in lines), lines
    console = Console(file=io.StringIO(), width=width)
    console.print(task_table(record))
    output = console.file.getvalue()
    assert output.count("12.35x") >= 11 and "task of 9" in output
    if width >= 80:
        assert "no room" not in output and "11.12x" in output and "12345.6" in output
    else:
        assert "no room for: prompts" in output


@pytest.fixture(scope="module")
def session(folder: Path) -> Session:
    return open_session(GenerationSettings(model=str(folder), device="cpu", threads=1, max_new_tokens=6))


@pytest.mark.parametrize("height", [24, 60])
def test_the_live_view_draws_at_80_columns_and_keeps_its_height(session: Session, height: int) -> None:
    console = Console(file=io.StringIO(), width=80, height=height, force_terminal=True, color_system=None)
    view = LiveView(console, "title", 3, 2, session)
    heights = set()
    for tokens in (0, 1, 500):
        watch = view.begin(1, "tea", "adaptive")
        watch.put(torch.zeros(1, 5))  # the prompt is not counted
        for token in range(tokens):
            watch.put(torch.tensor([token % 200 + 3]))
            watch.on_round(Round(("mtp",) * 3, token % 4, token % 4 + 1, 0.001, 0.01, 0.0001))
        assert len(watch.tokens) == tokens
        lines = console.render_lines(view.draw())
        heights.add(len(lines))
        assert all(sum(len(segment.text) for segment in line) <= 80 for line in lines)
    assert len(heights) == 1
    for i in range(60):
        view.finished(turn(f"{NAME} {i}", 2.0))
    assert len(console.render_lines(view.draw())) <= max(height, *heights)
    assert view.dashboards["adaptive"].plain == pytest.approx(119 / 1.8)


def test_lines_for_pipes_name_every_mode() -> None:
    console = Console(file=io.StringIO(), width=200)
    view = PlainView(console, "title", 4, 2)
    view.begin(2, "tea", PLAIN)
    view.finished(turn("tea", 2.0))
    view.finished(Turn("tea", "", 2, {PLAIN: run(4.0), "k4": run(2.0)}))
    view.finished(Turn("tea", "", 2, {PLAIN: run(4.0), "k4": run(2.0, 5)}))
    view.finished(Turn(PREFILL, "", 2, {PLAIN: run(4.0, 1)}))
    first, second, third, last = console.file.getvalue().splitlines()
    assert first.startswith("2/4 tea (1 of 2): 120 tokens, plain 24.0/s, adaptive 60.0/s, k4 48.0/s, llama.cpp-ngram")
    assert second.endswith("k4 60.0/s, 2.00x, identical")
    assert third.endswith("DIFFERENT: k4")
    assert last == "prefill of 900 tokens (2 of 2): plain 4500/s"
