"""The bench: order, identity, interrupts, what it shows and what it writes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import run
from eval.bench.command import PREFILL_TOKENS, WARM_UP_TOKENS, Bench, BenchOptions, _prompts
from eval.bench.comparison import Turn
from eval.bench.modes import Ours
from eval.bench.view import PlainView
from eval.cli.metrics import TimedRun
from eval.cli.options import GenerationSettings
from eval.cli.session import Session, open_session
from eval.prompts.sets import Prompt
from specdec.engine.stats import GenerationStats


def bench(folder: Path, *arguments: str) -> int:
    fixed = ["--model", str(folder), "--device", "cpu", "--threads", "1", "--max-new-tokens", "12", "--limit", "2"]
    json_file = [] if "--json" in arguments else ["--json", "-"]
    return run.main(["bench", *fixed, *json_file, *arguments])


def test_the_file_holds_the_record(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert bench(folder, "--json", str(tmp_path / "out.json"), "--draft-length", "3") == 0
    output = capsys.readouterr().out
    record = json.loads((tmp_path / "out.json").read_text())
    assert "{" not in output, "JSON is for those who ask"
    assert [p.name for p in tmp_path.iterdir()] == ["out.json"]
    assert record["identical"] is True
    plain, drafted = record["modes"]
    assert (plain["mode"], drafted["mode"], record["headline"]) == ("plain", "k3", "k3")
    assert plain["tokens"] == drafted["tokens"] == 24
    assert plain["drafted"] == 0 and drafted["speculative_decoding"]["num_spec_tokens"] <= 3
    assert record["costs"] is None, "no mode chose its lengths"
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


def test_counters_for_prometheus_are_of_all_runs(
    folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert bench(folder, "--draft-length", "3", "--prometheus", str(tmp_path / "specdec.prom")) == 0
    text = (tmp_path / "specdec.prom").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["specdec.prom"]
    counts = dict(line.rsplit(" ", 1) for line in text.splitlines() if not line.startswith("#"))
    label = f'{{model_name="{folder}"}}'
    assert counts[f"specdec:generation_tokens_total{label}"] == str(2 * 16 + 4 * 12), "the warm-up too"
    assert int(counts[f"specdec:spec_decode_num_drafts_total{label}"]) > 0
    capsys.readouterr()
    assert bench(folder, "--prometheus", str(tmp_path / "no" / "such.prom")) == 2
    assert "--prometheus" in capsys.readouterr().err


def test_sampled_texts_are_identical_too(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(folder, "--temperature", "1", "--seed", "3", "--top-k", "0") == 0
    record, output = capsys.readouterr()
    assert "temperature 1, seed 3" in output
    assert json.loads(record)["identical"] is True


def test_different_outputs_are_an_error(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Session.run

    def broken(self: Session, ids: Any, speculation: bool = True, **options: Any) -> TimedRun:
        made = honest(self, ids, speculation=speculation, **options)
        return TimedRun((*made.tokens[:5], 7, *made.tokens[6:]), made.seconds, made.stats) if speculation else made

    monkeypatch.setattr(Session, "run", broken)
    assert bench(folder) == 1
    written, output = capsys.readouterr()
    record = json.loads(written)
    assert record["identical"] is False
    assert record["differing"] == ["tea", "average"]
    assert "DIFFERENT" in output
    assert "tea: adaptive differs from plain from new token 6 on" in output


def test_unreliable_timings_are_called_so(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = Session.run

    def disturbed(self: Session, ids: Any, speculation: bool = True, **options: Any) -> TimedRun:
        made = honest(self, ids, speculation=speculation, **options)
        return made if speculation else TimedRun(made.tokens, 100.0, made.stats)

    monkeypatch.setattr(Session, "run", disturbed)
    assert bench(folder) == 0
    record, output = capsys.readouterr()
    assert "These timings are not reliable: tea, average sped up" in output
    assert json.loads(record)["implausible"] == ["tea", "average"]


def test_ctrl_c_shows_what_was_finished(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    honest, calls = Session.run, []

    def impatient(self: Session, *arguments: Any, **options: Any) -> TimedRun:
        calls.append(1)
        if len(calls) == 6:  # two to warm up, two of the first prompt, one of the second
            raise KeyboardInterrupt
        return honest(self, *arguments, **options)

    monkeypatch.setattr(Session, "run", impatient)
    assert bench(folder, "--json", str(tmp_path / "out.json")) == 130
    captured = capsys.readouterr()
    record = json.loads((tmp_path / "out.json").read_text())
    assert (record["interrupted"], record["prompts"], record["identical"]) == (True, 1, True)
    assert "interrupted" in captured.err
    assert "Traceback" not in captured.err + captured.out


def measured(session: Session, prompts: list[Prompt], modes: list[Any], repeat: int = 1) -> list[Turn]:
    view = PlainView(Console(file=io.StringIO()), "", len(prompts), repeat)
    return list(Bench(session, prompts, modes, repeat).turns(view))


def test_runs_alternate_and_turns_see_the_answers_before_them(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = open_session(GenerationSettings(model=str(folder), device="cpu", threads=1, max_new_tokens=6))
    modes: list[bool] = []
    seen: list[str] = []
    honest = Session.run

    def noting(self: Session, ids: Any, speculation: bool = True, **options: Any) -> TimedRun:
        modes.append(speculation)
        seen.append(self.tokenizer.decode(ids[0]))
        return honest(self, ids, speculation=speculation, **options)

    monkeypatch.setattr(Session, "run", noting)
    prompts = [Prompt("a", "", ("first", "second"), (("system", "short"),)), Prompt("b", "", ("third",))]
    turns = measured(session, prompts, [Ours(session, "plain", 0), Ours(session, "k2", 2)], repeat=2)
    # After the two of the warm-up; who begins changes from turn to turn.
    assert modes[2:] == [False, True, True, False, False, True, True, False, False, True, True, False]
    assert [(turn.repetition, turn.name) for turn in turns] == [
        (repetition, name) for repetition in (1, 2) for name in ("a, turn 1", "a, turn 2", "b")
    ]
    assert seen[2] == "<bos>short<eos><bos>first<eos><bos>"
    answer = session.text(turns[0].plain.tokens)
    assert seen[4] == f"<bos>short<eos><bos>first<eos><bos>{answer}<eos><bos>second<eos><bos>"


class FakeMode:
    """Another engine that takes no time; `log` notes who ran, and for how many tokens."""

    ours, details = False, "details"

    def __init__(self, name: str, process: int, log: list[tuple[str, int]]) -> None:
        self.name, self.process, self.log, self.cpu = name, process, log, 0.0
        self.before: Callable[[], None] = lambda: None

    def run(self, ids: Any, answer: Any, streamer: Any = None, on_round: Any = None) -> TimedRun:
        self.before()
        self.log.append((self.name, len(answer)))
        stats = GenerationStats(1, ids.shape[1], emitted=len(answer), timeline=[(0.5, 1), (1.0, len(answer))])
        return TimedRun((), 1.0, stats)

    def cpu_seconds(self) -> float:
        return self.cpu


@pytest.fixture
def tiny(folder: Path) -> Session:
    return open_session(GenerationSettings(model=str(folder), device="cpu", threads=1, max_new_tokens=6))


PROMPTS = [Prompt("a", "", ("x",)), Prompt("a", "", ("w",)), Prompt("prefill", "", ("v",))]


def test_other_engines_follow_the_plain_run_and_decode_as_many_tokens(tiny: Session) -> None:
    log: list[tuple[str, int]] = []
    turns = measured(tiny, PROMPTS, [Ours(tiny, "plain", 0), FakeMode("b", 1, log), FakeMode("c", 2, log)], repeat=2)
    assert [turn.name for turn in turns] == ["a", "a, prompt 2", "prefill, prompt 3", "prefill"] * 2
    assert [next(iter(turn.runs)) for turn in turns[:3]] == ["plain"] * 3, "its answer is what they decode"
    assert {next(iter(turn.runs)) for turn in turns} == {"plain", "b", "c"}
    assert [tokens for name, tokens in log if name == "b"] == [16, *[6, 6, 6, 1] * 2]
    assert all(len(turn.runs) == 3 for turn in turns)


def test_every_prefill_reads_another_stretch_of_the_text(tiny: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    def stretches() -> set[tuple[int, ...]]:
        return {tuple(Bench(tiny, [], []).prefill(repetition)[0].tolist()) for repetition in range(6)}

    assert len(stretches()) == 6 and {len(ids) for ids in stretches()} == {PREFILL_TOKENS}
    monkeypatch.setattr(Session, "context", 100)
    assert {len(ids) for ids in stretches()} == {100 - WARM_UP_TOKENS}


def test_cpu_time_of_waiting_processes_is_counted_and_told(tiny: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[tuple[str, int]] = []
    busy, other = FakeMode("busy", 1, log), FakeMode("other", 2, log)

    def spin() -> None:
        busy.cpu += 1.0

    other.before = spin  # busy burns a second whenever the other is timed
    busy.before = lambda: setattr(busy, "cpu", busy.cpu + 5.0)  # its own work is not a disturbance
    plain = Ours(tiny, "plain", 0)
    monkeypatch.setattr(plain, "cpu_seconds", lambda: 0.0)
    found = Bench(tiny, PROMPTS[:1], [plain, busy, other])
    assert len(list(found.turns(PlainView(Console(file=io.StringIO()), "", 1, 1)))) == 2
    assert found.disturbed == pytest.approx(2.0) and found.waited > 0


def with_fakes(folder: Path, monkeypatch: pytest.MonkeyPatch, fakes: list[FakeMode], *arguments: str) -> int:
    """The whole command on the tiny model, with `fakes` as the other engines."""

    @contextmanager
    def opened(names: Any, session: Session, *_: Any) -> Iterator[list[Any]]:
        yield [Ours(session, "plain", 0), *fakes]

    monkeypatch.setattr("eval.bench.command.open_modes", opened)
    monkeypatch.setattr("eval.bench.command.check_possible", lambda *_: None)
    return bench(folder, "--modes", "llama.cpp", *arguments)


def test_other_engines_have_their_rows_and_details(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fakes = [FakeMode("llama.cpp", 1, []), FakeMode("other", 2, [])]
    assert with_fakes(folder, monkeypatch, fakes, "--repeat", "3") == 0
    written, output = capsys.readouterr()
    record = json.loads(written)
    assert (record["repetitions"], record["prompts"], record["identical"], record["error"]) == (3, 2, True, None)
    assert [mode["identical"] for mode in record["modes"]] == [True, None, None]
    assert record["modes"][1]["tokens_per_second"] == 12
    for words in ("llama.cpp: details", "prefill of 512 tokens (3 of 3)", "medians of 3 repetitions; 2 prompts"):
        assert words in output


def test_an_engine_that_fails_is_an_error_after_the_figures(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log: list[tuple[str, int]] = []
    fake = FakeMode("llama.cpp", 1, log)

    def fail() -> None:
        if len(log) == 2:
            raise ValueError("llama.cpp: refused")

    fake.before = fail
    assert with_fakes(folder, monkeypatch, [fake]) == 2
    captured = capsys.readouterr()
    record = json.loads(captured.out)
    assert (record["prompts"], record["error"]) == (1, "prompt average: llama.cpp: refused")
    assert "error: prompt average: llama.cpp: refused" in captured.err


def test_a_short_suite_has_prompts_of_every_task(folder: Path) -> None:
    every, some = _prompts(BenchOptions(suite=True)), _prompts(BenchOptions(suite=True, limit=16))
    assert len(every) == 128 and len({p.name for p in every}) == 128
    assert sorted(p.task for p in some) == sorted(2 * list(dict.fromkeys(p.task for p in every)))
    assert bench(folder, "--suite", "--prompts", "x.jsonl") == 2


def test_a_prompt_that_is_too_long_is_named(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text(json.dumps({"id": "huge", "prompt": "x" * 9000}))
    assert bench(folder, "--prompts", str(tmp_path / "p.jsonl")) == 2
    assert "error: prompt huge: the prompt has 9003 tokens" in capsys.readouterr().err


def test_the_answer_ends_where_the_context_does(folder: Path) -> None:
    session = open_session(GenerationSettings(model=str(folder), device="cpu", threads=1, max_new_tokens=50))
    ids = session.encode([{"role": "user", "content": "x" * 8180}])
    assert len(session.run(ids).tokens) == 8192 - 8183


def test_synthetic_acceptance_is_what_was_asked_for_and_says_so(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench(folder, "--draft-length", "2", "--max-new-tokens", "40", "--synthetic-acceptance", "1") == 0
    written, output = capsys.readouterr()
    record = json.loads(written)
    assert record["identical"] is True
    assert record["synthetic_acceptance"] == [1.0]
    assert record["modes"][1]["acceptance_rate"] == 1.0
    assert "SYNTHETIC" in output
    assert bench(folder, "--draft-length", "2", "--max-new-tokens", "400", "--synthetic-acceptance", "0.8", "0.3") == 0
    positions = json.loads(capsys.readouterr().out)["modes"][1]["acceptance_by_position"]
    first, second = (position["accepted"] for position in positions)
    assert 0.7 < first < 0.9
    assert 0.15 < second < 0.33  # of all rounds: 0.8 * 0.3
    assert bench(folder, "--synthetic-acceptance", "0.5", "--modes", "transformers") == 2
