"""`run.py train` and `eval.acceptance` as a user meets them, on a tiny model."""

from __future__ import annotations

import io
import itertools
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

import run
from drafter.data.dataset import Dataset, Size
from drafter.train.judge import Scored
from drafter.train.run import Began, Status
from drafter.train.trainer import StepReport
from eval import ablations, acceptance
from eval.train.view import LiveTraining, PlainLines
from tests.support.processes.forked import python
from tests.support.tiny_folder import hears_ctrl_c, make_folder, threads_restored

ROOT = Path(run.__file__).parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with threads_restored():
        yield make_folder(tmp_path_factory.mktemp("tiny"), "llama")  # its texts have no window to fit into


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    lines = [{"prompt": f"Say the number {i} in words, please."} for i in range(200)]
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def words(folder: Path, prompts: Path, out: Path) -> list[str]:
    fixed = ["--model", str(folder), "--device", "cpu", "--threads", "1", "--data", str(prompts), "--out", str(out)]
    return ["train", *fixed, "--tokens", "400", "--max-new-tokens", "9", "--draft-length", "2", "--draft-vocab", "64"]


def test_what_it_leaves_is_a_drafter(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "head"
    assert run.main([*words(folder, prompts, out), "--steps", "3", "--json", str(tmp_path / "out.json")]) == 0
    shown = capsys.readouterr().out
    record = json.loads((tmp_path / "out.json").read_text())
    assert record["best"]["real"] == max(score["real"] for score in record["scores"]) and len(record["scores"]) == 2
    assert record["set"]["tokens"] >= 400 and record["versions"]["torch"]
    for part in ("tokens collected", "candidates", "per round decoded", "--drafter"):
        assert part in shown
    provenance = json.loads((out / "config.json").read_text())["provenance"]
    assert provenance["set"]["data"] == [[str(prompts), 1.0]] and provenance["trained"]["recipe"]["steps"] == 2
    assert provenance["score"]["real"] == record["best"]["real"]

    fixed = ["--model", str(folder), "--device", "cpu", "--threads", "1", "--drafter", str(out), "--draft-length", "2"]
    measure = [*fixed, "--prompts", str(prompts), "--limit", "4", "--max-new-tokens", "9"]
    assert acceptance.main([*measure, "--json", str(tmp_path / "acceptance.json")]) == 0
    figures = json.loads((tmp_path / "acceptance.json").read_text())
    assert 1 <= figures["all"]["mean_acceptance_length"] <= 3 and figures["prompts"] == 4
    assert figures["d_over_v1"] == pytest.approx(figures["draft_step_seconds"] / figures["plain_pass_seconds"])
    assert "d / V(1)" in capsys.readouterr().out

    again = [*words(folder, prompts, out), "--steps", "3", "--json", "-"]
    assert run.main(again) == 0, "a finished run finishes again"
    assert json.loads(capsys.readouterr().out)["scores"] == record["scores"]


def test_ctrl_c_leaves_what_the_same_command_goes_on_from(folder: Path, prompts: Path, tmp_path: Path) -> None:
    out = tmp_path / "head"
    command = [*python(), "run.py", *words(folder, prompts, out), "--minutes", "10", "--collecting", "0.1"]
    running = subprocess.Popen(
        [*command, "--evaluate-minutes", "0.01"],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hears_ctrl_c,
    )
    deadline = time.monotonic() + 120
    while not (out / "config.json").is_file() and time.monotonic() < deadline:
        time.sleep(0.2)
    running.send_signal(signal.SIGINT)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 130 and "the same command goes on" in errors and "Traceback" not in errors
    assert (out / "training" / "state.pt").is_file() and (out / "mtp.gguf").is_file()


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--data", "nowhere"], "nowhere: no such file or folder"),
        (["--start", "nowhere"], "no such file or folder"),
        (["--average-with", "nowhere"], "name the first with --start"),
        (["--json", "nowhere/x.json"], "does not exist"),
    ],
)
def test_what_is_refused(
    more: list[str], complaint: str, folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([*words(folder, prompts, tmp_path / "head"), "--steps", "2", *more]) == 2
    assert complaint in capsys.readouterr().err


def test_another_order_of_the_same_set_makes_another_head(folder: Path, prompts: Path, tmp_path: Path) -> None:
    begin, texts, networks = tmp_path / "begin", {}, {}
    assert run.main([*words(folder, prompts, begin), "--seed", "3", "--steps", "1"]) == 0
    for name, order in {"plain": (), "same": ("--order", "3"), "other": ("--order", "4")}.items():
        out = tmp_path / name
        command = [*words(folder, prompts, out), "--start", str(begin), "--seed", "3", "--steps", "2", *order]
        command += ["--batch-tokens", "64"]
        assert run.main(command) == 0
        texts[name] = [text.tokens.tolist() for _, text in Dataset(out / "training" / "set").texts(0, epochs=1)]
        networks[name] = torch.load(out / "training" / "state.pt")["network"]
        trained = json.loads((out / "config.json").read_text())["provenance"]["trained"]
        assert trained["seed"] == (4 if name == "other" else 3)
    assert texts["plain"] == texts["same"] == texts["other"]
    assert all(torch.equal(tensor, networks["same"][name]) for name, tensor in networks["plain"].items())
    assert not all(torch.equal(tensor, networks["other"][name]) for name, tensor in networks["plain"].items())


def test_how_long_has_to_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    for given in ([], ["--minutes", "1", "--steps", "2"], ["--minutes", "1", "--data", "x=-1"]):
        with pytest.raises(SystemExit):
            run.main(["train", "--out", "x", *given])
    assert run.main(["train", "--out", "x", "--steps", "2"]) == 2
    assert "size of the training set" in capsys.readouterr().err


def test_both_views_show_every_kind_of_event() -> None:
    events = [
        (Size(), Status("collecting texts", 0.0, 170.0, 0, 0, None)),
        (Size(2, 1000, 600, 3.0), Status("collecting texts", 0.5, 120.0, 1000, 0, None)),
        (Began(9_000_000, 8192, 0.93, 0), Status("beginning", 0.0, 80.0, 1000, 0, None)),
        (StepReport(1, 100, 3.0, 2.0, 0.5, (0.5, 0.25), 1e-3), Status("training", 0.1, 70.0, 100, 1, None)),
        (Scored(1, 100, 66.0, 1.75, 1.76, (0.5, 0.25), True, 24), Status("judging", 0.0, 66.0, 100, 1, 1.75)),
        (StepReport(2, 100, 3.0, 2.0, 0.5, (0.5, 0.25), 1e-3), Status("training", 0.3, 60.0, 200, 2, 1.75)),
    ]
    for view_class in (PlainLines, LiveTraining):
        stream, now = io.StringIO(), [events[0][1]]
        console = Console(file=stream, width=80, force_terminal=view_class is LiveTraining)
        with view_class(console, "a head", lambda now=now: now[0]) as view:
            for event, now[0] in events:
                view.on_event(event)
                if isinstance(view, LiveTraining):
                    console.print(view.draw())
        shown = stream.getvalue()
        for part in ("a head", "1,000 tokens", "8,192 candidates", "93%", "1.75", "1.76", "2.0 min left", "66 s left"):
            assert part in shown, (view_class, part)
        assert max(map(len, re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown).splitlines())) <= 130


def test_a_pipe_is_told_where_training_is_even_when_nothing_happens() -> None:
    now, stream = [Status("collecting texts", 0.25, 100.0, 1234, 0, None)], io.StringIO()
    with PlainLines(Console(file=stream, width=80), "a head", lambda: now[0], every=0.02) as view:
        _until(lambda: stream.getvalue().count("1,234 tokens") > 1)
        now[0] = Status("training", 0.5, None, 99, 7, 1.5)
        view.on_event(StepReport(7, 99, 3.0, 2.0, 0.5, (0.5, 0.25), 1e-3))
        _until(lambda: "step 7" in stream.getvalue())
    lines = stream.getvalue().splitlines()
    assert lines[0] == "a head" and lines[1] == "collecting texts, 25%: 1,234 tokens, 1.7 min left"
    assert lines[-1].startswith("training, 50%: 99 tokens, step 7: loss 2.00, drafts right 0.50 0.25, ")
    assert lines[-1].endswith("best 1.50 tokens per round") and "\x1b" not in stream.getvalue()


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_ablations_train_what_they_name(
    folder: Path, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main([*words(folder, prompts, tmp_path / "head"), "--steps", "1", "--aux-layers", "0", "2"]) == 0
    asked = ["--set", str(tmp_path / "head" / "training" / "set"), "--steps", "2", "--model", str(folder)]
    asked += ["--limit", "1", "--max-new-tokens", "12", "--threads", "1", "--device", "cpu", "--json"]
    chosen = ["one layer", "mistake", "K = 1", "AdamW", "fused"]
    assert ablations.main([*asked, str(tmp_path / "out.json"), "--only", *chosen]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    assert [row["name"] for row in record["variants"]] == [
        "mistake: state of the wrong position",
        "mistake: sees its own key",
        "K = 1",
        "one layer",
        "AdamW alone",
        "a high layer's state fused",
        "low, middle and high layers' states fused",
    ]
    one, three = (row["bytes"] for row in record["variants"][-2:])
    assert three > one, "a matrix for each state"
    assert all(row["mean_acceptance_length"] >= 1 and len(row["per_position"]) == 4 for row in record["variants"])
    capsys.readouterr()
    assert ablations.main([*asked, str(tmp_path / "no.json"), "--only", "two layers"]) == 2
    assert "these heads read [2, 3]" in capsys.readouterr().err


def test_ablations_go_on_from_a_head_and_judge_on_a_held_out_set(folder: Path, prompts: Path, tmp_path: Path) -> None:
    head, other = tmp_path / "head", tmp_path / "other"
    assert run.main([*words(folder, prompts, head), "--steps", "1", "--draft-length", "4"]) == 0
    assert run.main([*words(folder, prompts, other), "--steps", "1", "--draft-length", "4", "--seed", "7"]) == 0
    asked = ["--set", str(head / "training" / "set"), "--steps", "2", "--model", str(folder), "--start", str(head)]
    asked += ["--held-out", str(other / "training" / "set"), "--prompts", str(prompts), "--limit", "3"]
    asked += ["--max-new-tokens", "12", "--threads", "1", "--device", "cpu", "--json", str(tmp_path / "out.json")]
    assert ablations.main([*asked, "--only", "base", "later", "overlap", "rows", "targets", "layer"]) == 0
    record = json.loads((tmp_path / "out.json").read_text())
    rows = {row["name"]: row for row in record["variants"]}
    assert len(rows) == 9 and "one layer" not in rows, "the head has its layers"
    assert record["prompts"] == 3 and record["start"] == str(head)
    for row in rows.values():
        assert row["teacher_forced_length"] == pytest.approx(1 + sum(row["teacher_forced"]))
        assert all(a >= b for a, b in itertools.pairwise(row["teacher_forced"]))
    assert ablations.main([*asked, "--only", "two layers"]) == 2
