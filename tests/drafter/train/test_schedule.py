"""A run ends when it was said to, on any machine, and whatever kills it, little is lost."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from drafter.data.dataset import Dataset, Size
from drafter.data.patience import Intervals, Patience
from drafter.files.checkpoint import load_drafter
from drafter.settings import TimeBudget
from drafter.train.judge import Scored
from drafter.train.run import Began, Event
from drafter.train.schedule import LEAST_STEPS, SMALLEST_BATCH, Clock, Pace, Schedule, rows_per_second, side_by_side
from drafter.train.trainer import StepReport
from tests.support.processes.forked import python
from tests.support.slow_model import ScriptedClock
from tests.support.tiny_assistant import backbone
from tests.support.tiny_folder import threads_restored
from tests.support.tiny_run import PER_SHARD, collector, make_shards_small, training_run

LOADING = 6.0


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    make_shards_small(monkeypatch)
    monkeypatch.setattr("drafter.train.schedule.LEAST_ROWS", 4000)  # half of the usual, and of the wait
    with threads_restored():
        torch.set_num_threads(1)
        yield


@pytest.mark.parametrize(("rows", "step", "minutes"), [(100, 0.1, 1.0), (50, 5.0, 2.0), (30, 2.0, 3.0), (8, 0.0, 10.0)])
def test_the_minutes_rule_everything(
    rows: float, step: float, minutes: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = ScriptedClock(monkeypatch, 1 / rows, step)
    run = training_run(tmp_path, budget=TimeBudget(minutes=minutes), began=-LOADING, now=clock)
    events: list[tuple[float, Event]] = [(clock() + LOADING, event) for event in run.run()]
    whole = 60 * minutes
    assert 0.8 * whole < events[-1][0] < max(1.1 * whole, whole + 10)
    collected = [at for at, event in events if isinstance(event, Size)]
    assert collected[-1] < 0.75 * whole, "the time that is left is for training"
    assert sum(isinstance(event, StepReport) for _, event in events) >= LEAST_STEPS
    scores = [event for _, event in events if isinstance(event, Scored)]
    assert len(scores) >= 2 and scores[0].step == 0 and scores[-1].step >= LEAST_STEPS
    assert len({score.prompts for score in scores}) == 1
    load_drafter(tmp_path)
    record = json.loads((tmp_path / "config.json").read_text())["provenance"]
    assert record["score"]["real"] == max(score.real for score in scores) and record["set"]["tokens"] > 100
    assert run.status.left == max(0.0, whole - events[-1][0])


def test_too_little_time_is_told_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ScriptedClock(monkeypatch, 1 / 8)
    run = training_run(tmp_path, budget=TimeBudget(minutes=3), began=-LOADING, now=clock)
    with pytest.raises(ValueError, match=r"3 minutes are too few.* 8 tokens a second.*give at least 1\d(\.5)? minutes"):
        list(run.run())
    assert clock() < 5


def test_a_step_that_takes_all_of_the_time_is_the_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ScriptedClock(monkeypatch, 1 / 50, step=40.0)
    run = training_run(tmp_path, budget=TimeBudget(minutes=2), began=-LOADING, now=clock)
    steps = sum(isinstance(event, StepReport) for event in run.run())
    assert 1 <= steps <= LEAST_STEPS and clock() + LOADING < 1.2 * 120 + 5
    assert json.loads((tmp_path / "config.json").read_text())["provenance"]["score"]


def test_there_is_a_head_from_the_beginning_of_training_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = training_run(tmp_path)
    for event in run.run():
        if isinstance(event, Began):
            assert not (tmp_path / "config.json").exists()
        if isinstance(event, Scored):
            break
    assert json.loads((tmp_path / "config.json").read_text())["provenance"]["score"]["step"] == 0

    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("drafter.train.run.Judge.judge", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(training_run(tmp_path / "judging").run())
    load_drafter(tmp_path / "judging")
    assert (tmp_path / "judging" / "training" / "state.pt").is_file()


def test_a_step_that_was_cut_short_is_not_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    list(training_run(tmp_path / "whole").run())
    run = training_run(tmp_path / "cut")
    with monkeypatch.context() as patched:
        patched.setattr("drafter.train.optimizer.Muon.step", _fifth_time_interrupted())
        with pytest.raises(KeyboardInterrupt):
            list(run.run())
    list(training_run(tmp_path / "cut").run())
    states = [torch.load(tmp_path / name / "training" / "state.pt", weights_only=True) for name in ("whole", "cut")]
    assert all(torch.equal(a, b) for a, b in zip(*(s["network"].values() for s in states), strict=True))


def _fifth_time_interrupted() -> object:
    from drafter.train.optimizer import Muon

    step, times = Muon.step, [0]

    def one(self: Muon, closure: None = None) -> object:
        times[0] += 1
        if times[0] == 5:
            raise KeyboardInterrupt
        return step(self, closure)

    return one


def test_shards_are_closed_by_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieces = collector(tmp_path / "whole", count=40), collector(tmp_path / "pieces", count=40)
    list(whole.grow())
    clock = ScriptedClock(monkeypatch, row=0.1)
    written = [(clock(), found) for found in pieces.grow(Patience(now=clock), Intervals(20.0, 30.0), max_batch=4)]
    assert written[0][0] < 40 and written[0][1].texts < PER_SHARD
    assert all(later - earlier < 50 for (earlier, _), (later, _) in pairwise(written))
    assert len(pieces.writer.shards) > len(whole.writer.shards)
    assert pieces.size()[1:3] == whole.size()[1:3] and pieces.size().texts == whole.size().texts == 32
    orders = [list(Dataset(made.writer.folder).texts(seed=3, epochs=2)) for made in (whole, pieces)]
    for (at, text), (there, other) in zip(*orders, strict=True):
        assert at == there and torch.equal(text.tokens, other.tokens) and torch.equal(text.hidden, other.hidden)


def test_a_block_goes_on_after_its_last_piece(tmp_path: Path) -> None:
    cut = collector(tmp_path / "cut").grow(intervals=Intervals(0.0, 0.0))
    for _ in range(3):
        found = next(cut)
    assert found.texts % PER_SHARD
    cut.close()
    again = collector(tmp_path / "cut", count=32)
    assert list(again.grow())[-1].texts == 24
    whole = collector(tmp_path / "whole", count=32)
    list(whole.grow())
    for (_, a), (_, b) in zip(*(Dataset(c.writer.folder).texts(0, epochs=1) for c in (whole, again)), strict=True):
        assert torch.equal(a.tokens, b.tokens)


def test_texts_end_when_the_time_is_up_and_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ScriptedClock(monkeypatch, row=0.1)
    made = collector(tmp_path)
    found = list(made.grow(Patience(until=12.0, now=clock), max_batch=8))[-1]
    assert 12 <= clock() < 14 and found.texts >= 8
    clock.seconds = 0.0
    long = collector(tmp_path / "long")
    texts = list(long.grow(Patience(until=30.0, each=2.0, now=clock), max_batch=4))[-1]
    assert texts.answered < 16 * texts.texts, "none is under way for more than two seconds"


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_hear_of_the_time(workers: int, tmp_path: Path) -> None:
    torch.set_num_threads(workers)
    assert list(collector(tmp_path).grow(Patience(until=0.0)))[-1:] == []
    found = list(collector(tmp_path).grow(Patience(until=_soon(3.0))))[-1]
    assert found.texts > 0


def _soon(seconds: float) -> float:
    import time

    return time.monotonic() + seconds


def test_a_slow_model_writes_fewer_answers_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = ScriptedClock(monkeypatch, row=0.1)
    assert rows_per_second(backbone("llama"), clock) == pytest.approx(10)
    assert side_by_side(10.0, 200, 48) == 1 and side_by_side(100.0, 200, 48) == 12 and side_by_side(1e4, 200, 48) == 48


def test_batches_grow_as_far_as_the_time_allows() -> None:
    now = [0.0]
    schedule = Schedule(TimeBudget(minutes=10), 0.0, 0.0, lambda: now[0])
    pace = Pace(schedule, Clock(0.0, schedule.now))
    sizes = []
    while (step := pace.next(len(sizes), 2048)).done < 1:
        sizes.append(step.tokens)
        now[0] += step.tokens / 20
        pace.stepped(step.tokens / 20)
    assert sizes[0] == SMALLEST_BATCH and max(sizes) == 1024 and 10 <= len(sizes) < 40
    assert now[0] + pace.judging < 1.05 * 600


def test_kill_9_loses_next_to_nothing(tmp_path: Path) -> None:
    list(training_run(tmp_path / "whole").run())
    seen: list[list[list[str]]] = []
    for stop in (["Size", "5"], ["Scored", "0"], ["StepReport", "7"], []):
        seen.append(_killed(tmp_path / "cut", *stop))
    first, second, third, last = seen
    assert second[0] == first[-1] == ["Size", "5"], "the set goes on where it was"
    sizes = [event for event in second if event[0] == "Size"]
    assert third[:2] == [sizes[-1], ["Began", "0"]] and ["Scored", "0"] not in third, "that was judged already"
    assert ["Began", "7"] in last or ["Began", "6"] in last
    states = [torch.load(tmp_path / name / "training" / "state.pt", weights_only=True) for name in ("whole", "cut")]
    assert all(torch.equal(a, b) for a, b in zip(*(s["network"].values() for s in states), strict=True))


def _killed(folder: Path, *stop: str) -> list[list[str]]:
    """Run a run in `folder` up to the event `stop` (name, number), and kill it there; returns its events."""
    running = subprocess.Popen(
        [*python(), "-m", "tests.support.processes.killed_run", str(folder), *stop],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert running.stdout is not None
    events = []
    for line in running.stdout:
        events.append(line.split())
        if events[-1] == list(stop):
            running.kill()
    assert running.wait(timeout=60) == (-9 if stop else 0)
    return events
