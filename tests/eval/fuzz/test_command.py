"""Damaged files of every kind load, or are refused in a sentence that names them; the fuzzer sees what is not so."""

from __future__ import annotations

import faulthandler
import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from random import Random
from types import SimpleNamespace

import pytest

from eval.fuzz.cases import KINDS, World
from eval.fuzz.command import NAMES, fuzz, main
from eval.fuzz.damage import damage
from eval.fuzz.runner import Case, Runner, make_case
from tests.support.tiny_folder import threads_restored

CASES, SEED, JOBS = 1000, 20, 2

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits of memory and time are those of Linux")


@pytest.fixture(scope="module")
def runner(seeds: Path) -> Iterator[Runner]:
    with threads_restored():
        yield Runner(seeds)


def test_damaged_files_load_or_are_refused_by_name(tmp_path: Path) -> None:
    outcomes = list(fuzz(CASES, SEED, jobs=JOBS, keep=tmp_path))
    assert len(outcomes) == CASES
    failed = [f"{outcome.case}: {outcome.why}" for outcome in outcomes if outcome.result == "failed"]
    assert not failed, "\n".join(failed[:20])
    results = Counter((outcome.case.kind, outcome.result) for outcome in outcomes)
    assert all(results[kind, result] for kind in NAMES for result in ("loaded", "refused")), results


@pytest.mark.filterwarnings("ignore:.*takes 8.5 bits")
def test_whole_files_load(seeds: Path) -> None:
    assert set(KINDS) == set(NAMES)
    world = World(seeds)
    for kind in KINDS.values():
        for name in kind.seeds:
            kind.read(seeds / name, world)


def test_a_case_is_the_same_each_time(seeds: Path, tmp_path: Path) -> None:
    for kind in NAMES:
        for place in ("one", "two"):
            make_case(Case(kind, 1, 4), seeds, tmp_path / kind / place)
        one, two = (
            {file.name: file.read_bytes() for file in (tmp_path / kind / place).iterdir()} for place in ("one", "two")
        )
        assert one == two
        wholes = [{file.name: file.read_bytes() for file in (seeds / name).iterdir()} for name in KINDS[kind].seeds]
        assert one not in wholes


def test_damage_leaves_the_file_that_a_link_leads_to(seeds: Path, tmp_path: Path) -> None:
    whole = seeds / "hf-llama" / "config.json"
    before = whole.read_bytes()
    os.link(whole, tmp_path / "config.json")
    damage(tmp_path / "config.json", Random(0))
    assert whole.read_bytes() == before != (tmp_path / "config.json").read_bytes()


def hang() -> None:
    while True:
        pass


def spend() -> None:
    end = time.process_time() + 1.2
    while time.process_time() < end:
        pass


def crash() -> None:
    faulthandler.disable()  # or pytest's shows where
    os.abort()


def fill() -> None:
    bytes(1 << 31)


def grow() -> None:
    kept = [b"x" * (1 << 20) for _ in range(1100)]
    raise ValueError(f"{len(kept)}")


def wrong_kind() -> None:
    raise KeyError("model_type")


def nameless() -> None:
    raise ValueError("no such key")


def coloured() -> None:
    os.write(1, b"a \x1b[31mname")


@pytest.mark.parametrize(
    ("act", "why"),
    [
        (hang, "SIGXCPU"),
        (spend, "s of processor time"),
        (crash, "SIGABRT"),
        (fill, "MemoryError"),
        (grow, "took"),
        (wrong_kind, "KeyError: 'model_type'"),
        (nameless, "ValueError: no such key"),
        (coloured, "control character"),
    ],
)
def test_what_must_not_happen_is_seen(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, act: Callable[[], None], why: str
) -> None:
    monkeypatch.setattr("eval.fuzz.runner.SECONDS", 1.0)
    whole = KINDS["prompts"]
    bad = replace(whole, read=lambda folder, world: act() if folder.name.endswith("-1") else whole.read(folder, world))
    monkeypatch.setitem(KINDS, "prompts", bad)
    outcomes = runner.run([Case("prompts", 0, number) for number in range(3)], tmp_path / "kept")
    assert [outcome.result == "failed" for outcome in outcomes] == [False, True, False]
    assert why in outcomes[1].why
    assert [kept.name for kept in (tmp_path / "kept").iterdir()] == ["prompts-0-1"]


def test_a_case_that_neither_computes_nor_ends_is_stopped(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("eval.fuzz.runner._CLOCK", 0.3)
    monkeypatch.setitem(KINDS, "prompts", replace(KINDS["prompts"], read=lambda folder, world: time.sleep(60)))
    (outcome,) = runner.run([Case("prompts", 0, 0)], tmp_path)
    assert outcome.result == "failed" and "SIGKILL" in outcome.why


def test_time_in_which_no_process_runs_is_not_the_case_s(
    runner: Runner, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A clock that goes on by ten minutes at each look: so it is after a stop of all processes, or a lid that shut."""
    looks = iter(range(1 << 30))
    monkeypatch.setattr("eval.fuzz.runner.time", SimpleNamespace(
        monotonic=lambda: 600.0 * next(looks), sleep=time.sleep, process_time=time.process_time,
    ))  # fmt: skip
    monkeypatch.setitem(KINDS, "prompts", replace(KINDS["prompts"], read=lambda folder, world: time.sleep(0.1)))
    (outcome,) = runner.run([Case("prompts", 0, 0)], tmp_path)
    assert outcome.result == "loaded"


def test_the_command(
    seeds: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def pool(jobs: int, _: object, begin: Callable[..., None], about: tuple[Path]) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(jobs, initializer=begin, initargs=about)

    monkeypatch.setattr("eval.fuzz.command._seeds", lambda: nullcontext(seeds))
    monkeypatch.setattr("eval.fuzz.command.ProcessPoolExecutor", pool)  # the 2,000 cases have real ones
    record, kept = tmp_path / "fuzz.json", tmp_path / "kept"
    arguments = ["--cases", "24", "--seed", "3", "--kind", "prompts", "shards", "--jobs", "1"]
    assert main([*arguments, "--json", str(record), "--keep", str(kept)]) == 0
    found = json.loads(record.read_text())
    assert found["cases"] == 24 and found["failed"] == 0 and set(found["kinds"]) == {"prompts", "shards"}
    assert "24 damaged files read, 0 failed" in capsys.readouterr().out
    (tmp_path / "prompts-0-1").mkdir()
    (tmp_path / "prompts-0-1" / "prompts.jsonl").write_text("{")
    assert main(["--replay", str(tmp_path / "prompts-0-1")]) == 0
    assert "refused: " in capsys.readouterr().out
    assert main(["--replay", str(tmp_path)]) == 2


def test_help_needs_no_tensor_library() -> None:
    program = "import sys, eval.fuzz; sys.exit(any(name in sys.modules for name in ('torch', 'transformers')))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
