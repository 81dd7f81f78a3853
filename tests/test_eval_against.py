"""`bench --against`: turns, figures, failures and Ctrl-C, with engines that compute nothing."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import run
from eval import against as module
from eval.against import PREFILL, Against, cases_of, prefill_text
from eval.against_report import Case, Turn, figures, line, notes, speed, table, view_for
from eval.engines import DRAFTED, PLAIN, Timing
from eval.metrics import Pair, Run
from eval.prompts import Prompt
from eval.session import Session
from specdec.stats import GenerationStats
from tests.fake_engine import FakeEngine
from tests.test_eval_engines import session

__all__ = ["session"]

TEXT = list(range(1000))
CASES = [Case("tea", (1, 2, 3), 11), Case("train", (4, 5), 21)]


def test_engines_take_turns_and_each_begins_as_often() -> None:
    log: list[str] = []
    engines = [FakeEngine(name, process=n, log=log) for n, name in enumerate("abc")]
    turns = list(Against(engines, CASES, TEXT, repeat=2).turns())
    assert "".join(log) == "abc" + "abc" + "bca" + "cab" + "abc" + "bca" + "cab"  # the warm-up first
    assert [(turn.repetition, turn.case.name) for turn in turns] == [
        (repetition, name) for repetition in (1, 2) for name in ("tea", "train", "prefill")
    ]
    assert engines[0].runs == engines[1].runs == engines[2].runs
    assert [tokens for _, tokens in engines[0].runs] == [8, 11, 21, 1, 11, 21, 1]


def test_every_prefill_reads_another_stretch_of_the_text() -> None:
    for length in (PREFILL + 300, PREFILL, 100):
        measured = Against([], CASES, TEXT[:length], repeat=5)
        stretches = [measured.prefill(repetition).ids for repetition in range(6)]
        assert {len(ids) for ids in stretches} == {min(PREFILL, length)}
        assert all(list(ids) == TEXT[ids[0] : ids[0] + len(ids)] for ids in stretches)
        assert len({ids[0] for ids in stretches}) == (6 if length > PREFILL else 1)


def test_cpu_time_of_waiting_processes_is_counted_and_told() -> None:
    ours, theirs, neighbour = FakeEngine("a", process=1), FakeEngine("b", process=2), FakeEngine("c", process=1)

    def spin() -> None:
        theirs.cpu += 1.0

    ours.before = neighbour.before = spin  # b burns a second whenever the process of a and c is timed
    theirs.before = lambda: setattr(theirs, "cpu", theirs.cpu + 5.0)  # its own work is not a disturbance
    measured = Against([ours, theirs, neighbour], CASES, TEXT, repeat=1)
    assert len(list(measured.turns())) == 3
    assert measured.disturbed == pytest.approx(3 * 2 * 1.0)
    assert measured.waited > 0
    record = figures([], []) | {"others_cpu": 0.5}
    assert "waiting engines used 0.50 cores" in notes(record)[-1]
    assert notes(record | {"others_cpu": 0.01}) == []


def turns_of(seconds: dict[str, list[float]], case: Case) -> list[Turn]:
    """One turn per repetition, with the seconds that count for `case`."""
    rows = zip(*seconds.values(), strict=True)
    return [
        Turn(r, case, {name: Timing(case.tokens, s, s) for name, s in zip(seconds, row, strict=True)})
        for r, row in enumerate(rows, start=1)
    ]


def test_speed_is_of_the_medians_and_its_range_of_whole_repetitions() -> None:
    first, second = (turns_of({"a": values}, case) for values, case in (([1, 9, 2], CASES[0]), ([4, 5, 1], CASES[1])))
    found = speed([*first, *second], "a")
    assert found["median"] == pytest.approx((10 + 20) / (2 + 4))
    assert found["lowest"] == pytest.approx(30 / 14)
    assert found["highest"] == pytest.approx(30 / 3)
    interrupted = [*first, *second[:2]]  # the third repetition has only the short case
    assert speed(interrupted, "a")["highest"] == pytest.approx(30 / 5)
    assert speed([], "a") == {"median": 0.0, "lowest": 0.0, "highest": 0.0}


def sample_turns() -> list[Turn]:
    decode = {PLAIN: [2.0], DRAFTED: [1.0], "transformers float32": [8.0], "transformers bfloat16": [4.0]}
    prefill = {PLAIN: [0.5], DRAFTED: [0.5], "transformers float32": [1.0], "transformers bfloat16": [2.0]}
    return [
        *turns_of(decode | {"llama.cpp": [2.5]}, CASES[0]),
        *turns_of(prefill | {"llama.cpp": [1.5]}, Case("prefill", tuple(TEXT[:500]), 1)),
    ]


def sample_record() -> dict[str, Any]:
    turns = sample_turns()
    record = figures(turns, [(name, f"details of {name}") for name in turns[0].timings])
    return record | {"threads": 2, "others_cpu": 0.0}


def test_figures_count_tokens_after_the_first_and_say_what_to_quote() -> None:
    record = sample_record()
    rows = {row["engine"]: row for row in record["engines"]}
    assert rows[PLAIN]["decode_tokens_per_second"]["median"] == pytest.approx(10 / 2)
    assert rows[PLAIN]["prefill_tokens_per_second"]["median"] == pytest.approx(500 / 0.5)
    half = rows["transformers bfloat16"]
    assert (half["plain_is"], half["drafted_is"], half["prefill_is"]) == pytest.approx((2, 4, 4))
    assert rows["llama.cpp"]["seconds"] == {"tea": [2.5], "prefill": [1.5]}
    # Not the same dtype is the faster one for both.
    assert record["quote"]["decode"]["transformers"] == "transformers bfloat16"
    assert record["quote"]["prefill"]["transformers"] == "transformers float32"
    assert record["quote"]["decode"][DRAFTED] == DRAFTED
    assert (record["prompts"], record["repetitions"], record["prefill_tokens"]) == (1, 1, 500)
    assert json.loads(json.dumps(record)) == record


def test_repetitions_that_differ_are_called_unreliable() -> None:
    turns = turns_of({PLAIN: [1.0, 1.2, 1.1], "llama.cpp": [1.0, 1.3, 1.0]}, CASES[0])
    told = notes(figures(turns, [(PLAIN, ""), ("llama.cpp", "")]) | {"others_cpu": 0.0})[-1]
    assert "another llama.cpp differed by more than 1.25x" in told
    assert not any("reliable" in note for note in notes(sample_record()))


def test_without_a_drafter_its_column_is_empty() -> None:
    turns = turns_of({PLAIN: [2.0], "llama.cpp": [1.0]}, CASES[0])
    rows = figures(turns, [(PLAIN, ""), ("llama.cpp", "")])["engines"]
    assert [(row["plain_is"], row["drafted_is"], row["prefill_is"]) for row in rows] == [
        (1, None, None),
        (0.5,) + (None,) * 2,
    ]


def test_the_table_fits_80_columns_and_lines_name_every_engine() -> None:
    console = Console(file=io.StringIO(), width=80)
    record = sample_record()
    for row in record["engines"]:  # as wide as figures get
        row["decode_tokens_per_second"] = {"median": 1234.5, "lowest": 1233.4, "highest": 1235.6}
        row["drafted_is"] = 12.34
    console.print(table(record))
    output = console.file.getvalue()
    assert "…" not in output
    assert all(len(shown) <= 80 for shown in output.splitlines())
    for words in ("transformers bfloat16", "1233.4", "12.34x", "1 repetition, 1 prompt, 2 threads", "500 tokens"):
        assert words in output
    assert line(sample_turns()[0]).startswith(
        "repetition 1, tea: llama.cpp 4.0/s, specdec 5.0/s, specdec drafted 10.0/s"
    )


@pytest.mark.parametrize("terminal", [True, False])
def test_the_view_tells_of_every_turn(terminal: bool) -> None:
    console = Console(file=io.StringIO(), width=80, force_terminal=terminal, color_system=None)
    with view_for(console, 2) as advance:
        for turn in sample_turns():
            advance(turn)
    output = console.file.getvalue()
    assert "prefill" in output
    assert ("2/2" in output) == terminal
    assert ("llama.cpp 333.3/s" in output) == (not terminal)


def test_cases_are_first_turns_as_long_as_their_plain_runs(session: Session) -> None:
    prompts = [
        Prompt("a", "", ("x", "y")),
        Prompt("b", "", ("z",)),
        Prompt("a", "", ("w",)),
        Prompt("prefill", "", ("v",)),
    ]
    lengths = iter([5, 9, 1, 3, 2])
    runs = [Run((7,) * n, 1.0, GenerationStats()) for n in lengths]
    pairs = [Pair("any", "", made, made) for made in runs]
    cases = cases_of(session, prompts, pairs)
    assert [(case.name, case.tokens) for case in cases] == [("a", 5), ("a, prompt 3", 3), ("prefill, prompt 4", 2)]
    assert session.tokenizer.decode(cases[0].ids) == "<bos>x<eos><bos>"


def test_the_prefill_text_leaves_room_in_a_small_context(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(prefill_text(session)) > 2 * PREFILL
    monkeypatch.setattr(Session, "context", 100)
    assert len(prefill_text(session)) == 92


def bench(folder: Path, monkeypatch: pytest.MonkeyPatch, engines: list[FakeEngine], *arguments: str) -> int:
    """The whole command on the tiny model, with `engines` in place of all real ones."""

    @contextmanager
    def opened(*_: object) -> Iterator[list[FakeEngine]]:
        yield engines

    monkeypatch.setattr(module, "open_engines", opened)
    monkeypatch.setattr("eval.bench.check_possible", lambda *_: None)
    words = ["--model", str(folder), "--device", "cpu", "--threads", "1", "--max-new-tokens", "4", "--limit", "2"]
    return run.main(["bench", *words, "--against", "llama.cpp", *arguments])


def test_bench_writes_the_comparison_into_its_record(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    engines = [FakeEngine(PLAIN, each=0.1), FakeEngine("llama.cpp", each=0.2)]
    assert bench(folder, monkeypatch, engines, "--json", str(tmp_path / "out.json"), "--repeat", "3") == 0
    output = capsys.readouterr().out
    record = json.loads(output.splitlines()[-1])
    assert json.loads((tmp_path / "out.json").read_text()) == record
    found = record["against"]
    assert (found["repeat"], found["repetitions"], found["turns"], found["prompts"]) == (3, 3, 9, 2)
    assert [row["plain_is"] for row in found["engines"]] == pytest.approx([1, 2])
    assert (found["error"], found["interrupted"], record["interrupted"]) == (None, False, False)
    assert [tokens for _, tokens in engines[0].runs] == [8, *[4, 4, 1] * 3]
    for words in ("repetition 3, average: llama.cpp 5.0/s", "details of llama.cpp", "against other engines"):
        assert words in output


def test_five_repetitions_unless_asked_otherwise(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(folder, monkeypatch, [FakeEngine(PLAIN)]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["against"]["repetitions"] == 5


def raise_after(runs: int, engine: FakeEngine, error: BaseException) -> None:
    def fail() -> None:
        if len(engine.runs) == runs:
            raise error

    engine.before = fail


def test_ctrl_c_keeps_the_turns_that_every_engine_finished(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engines = [FakeEngine(PLAIN), FakeEngine("llama.cpp")]
    raise_after(5, engines[1], KeyboardInterrupt())  # warm-up, first repetition, first prompt: then in the second
    assert bench(folder, monkeypatch, engines) == 130
    captured = capsys.readouterr()
    record = json.loads(captured.out.splitlines()[-1])
    assert record["interrupted"] is record["against"]["interrupted"] is True
    assert record["against"]["turns"] == 4
    assert record["against"]["engines"][1]["seconds"]["prefill"] == [0.5]
    assert "interrupted: these are the turns" in captured.err
    assert "Traceback" not in captured.out + captured.err


def test_an_engine_that_fails_is_an_error_after_the_figures(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    engines = [FakeEngine(PLAIN), FakeEngine("llama.cpp")]
    raise_after(0, engines[1], ValueError("llama.cpp: refused"))
    assert bench(folder, monkeypatch, engines) == 2
    captured = capsys.readouterr()
    record = json.loads(captured.out.splitlines()[-1])
    assert (record["identical"], record["against"]["error"], record["against"]["turns"]) == (
        True,
        "llama.cpp: refused",
        0,
    )
    assert "no engine was compared" in captured.out
    assert captured.err.strip() == "error: llama.cpp: refused"


def test_repeat_without_engines_is_an_error(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run.main(["bench", "--model", str(folder), "--repeat", "5"]) == 2
    assert "--against transformers llama.cpp" in capsys.readouterr().err
