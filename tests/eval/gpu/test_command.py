"""`python -m eval.gpu` where no GPU is: what it says, how its stages end, and what its table judges."""

from __future__ import annotations

import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

pytest.importorskip("triton", reason="Triton is not installed")

from eval.gpu import command
from eval.gpu.checks import Checks, Finding, _error
from eval.gpu.report import BARS, bars_table, checks_table, differs, finite, judge
from specdec import kernels


def test_without_a_gpu_it_says_so_and_ends_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with monkeypatch.context() as compiled:
        compiled.setattr(command, "_why_not_compiled", lambda: "")
        assert command.main([]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err == (
        "No GPU of NVIDIA's is here, which this measures; --interpret runs the checks on the CPU, in small\n"
    )
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    assert command.main([]) == 2
    assert "install gcc" in capsys.readouterr().err
    monkeypatch.setenv("CC", "cc")
    monkeypatch.setattr(sysconfig, "get_path", lambda *names: str(tmp_path))
    assert command.main([]) == 2
    assert "install python3-dev" in capsys.readouterr().err
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert command.main(["--interpret"]) == 2
    assert "Triton is not installed" in capsys.readouterr().err


def test_the_interpreter_compares_no_texts(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        command.main(["--interpret", "--model", "smollm2-135m-instruct"])
    assert error.value.code == 2 and "--model needs a GPU" in capsys.readouterr().err


def test_with_the_interpreter_no_gpu_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "_why_not_compiled", lambda: "")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert command.why_not(False).startswith("TRITON_INTERPRET is set") and command.why_not(True) == ""
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert command.why_not(False) == ""


GOOD = Finding("rope", "4 heads of 32", 0.0, 0.0, True)


def test_what_was_checked_before_ctrl_c_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def checks(count: int) -> Iterator[Finding]:
        for _ in range(count):
            yield GOOD
        raise KeyboardInterrupt

    monkeypatch.setattr(kernels, "choose", lambda choice: None)
    file = tmp_path / "gpu.json"
    monkeypatch.setattr("eval.gpu.checks.Checks", lambda device, small: checks(2))
    assert command.measure(True, 100.0, (), file) == 130
    assert "2 of 2 checks hold, others are missing" in capsys.readouterr().out
    kept = json.loads(file.read_text())
    assert len(kept["checks"]) == 2 and "checks_ok" not in kept and differs(kept)
    monkeypatch.setattr("eval.gpu.checks.Checks", lambda device, small: checks(0))
    assert command.measure(True, 100.0, (), file) == 130
    said = " ".join(capsys.readouterr().out.split())
    assert "interrupted before anything was found" in said and "is not written" in said
    assert json.loads(file.read_text()) == kept


def test_an_op_without_a_number_is_a_readable_record(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    bad = torch.tensor([float("nan")], dtype=torch.float32)
    nothing = Finding("rope", "4 heads of 32", _error(bad, torch.ones_like(bad)), 0.0, True)
    monkeypatch.setattr(kernels, "choose", lambda choice: None)
    monkeypatch.setattr("eval.gpu.checks.Checks", lambda device, small: [nothing, GOOD])
    file = tmp_path / "gpu.json"
    assert command.measure(True, 100.0, (), file) == 1
    kept = json.loads(file.read_text())
    assert [one["error"] for one in kept["checks"]] == [None, 0.0] and kept["checks_ok"] == 1
    assert finite({"a": [float("inf"), 1.0], "b": (2, "c")}) == {"a": [None, 1.0], "b": [2, "c"]}


def test_an_op_that_fails_costs_no_finding_of_another(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of resource: shared memory\nand more")

    monkeypatch.setattr(kernels, "attention", fail)
    found = list(Checks(torch.device("cpu"), small=True))
    (bad,) = (one for one in found if not one.ok)
    assert (bad.kernel, bad.what) == ("attention", "RuntimeError: out of resource: shared memory")
    assert found[-1].kernel == "choice of a drafted token"


def test_checks_end_where_the_others_need_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("eval.gpu.checks.Checks", lambda device, small: [GOOD] * 5)
    times = iter([0.0, 10.0, 10.0, 20.0, 40.0, 60.0, *[99.0] * 9])
    stages = command.Stages(100.0, lambda name: None, lambda: next(times))
    device = torch.device("cpu")
    assert not stages.run("checks", 5, lambda: command._check(stages, device, False, 50.0))
    assert len(stages.figures["checks"]) == 3 and "checks_ok" not in stages.figures
    assert stages.stages[0]["error"].startswith("TimeoutError: the others are left out")
    assert command._check(stages, device, True, 50.0) == {"checks_ok": 5}, "under the interpreter there are no others"


def test_checks_are_a_table_with_the_worst_case_of_each_op() -> None:
    bad = Finding("rope", "1 head of 8", 1e-3, 0.0, False)
    out = io.StringIO()
    Console(file=out, width=140).print(checks_table([one.to_dict() for one in (GOOD, bad, GOOD)]))
    (row,) = (line.split() for line in out.getvalue().splitlines() if line.startswith("rope"))
    assert row == ["rope", "3", "1.0e-03", "0.0e+00", "no"]


@pytest.mark.parametrize(("missing", "code"), [(None, 0), ("torch computes what kernels would: rope (no memory)", 1)])
def test_it_ends_with_1_where_torch_stands_in_for_a_kernel(
    missing: str | None, code: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(kernels, "choose", lambda choice: None)
    monkeypatch.setattr(kernels, "missing", lambda device: missing)
    monkeypatch.setattr("eval.gpu.checks.Checks", lambda device, small: [GOOD])
    assert command.measure(True, 100.0, (), tmp_path / "gpu.json") == code
    assert json.loads((tmp_path / "gpu.json").read_text())["kernels_missing"] == missing


def test_a_module_that_is_given_no_words_begins() -> None:
    words = [sys.executable, "-m", "eval.gpu"]
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(words, capture_output=True, text=True, env=hidden, check=False)
    assert done.returncode == 2 and done.stderr.startswith("No GPU of NVIDIA's is here"), done.stderr


def test_stages_that_fail_or_have_no_time_let_the_others_go_on() -> None:
    times: Iterator[float] = iter([0.0, 0.0, 1.0, 3.0, 50.0, 50.0, 51.0, 95.0, 95.0])

    def fail() -> dict[str, Any]:
        raise RuntimeError("no kernel image\nand more")

    said: list[str] = []
    stages = command.Stages(100.0, said.append, lambda: next(times))
    assert stages.run("first", 10, lambda: {"a": 1})
    assert not stages.run("second", 10, fail)
    assert not stages.run("third", 10, lambda: {"b": 2})
    assert stages.figures == {"a": 1} and said == ["first", "second"]
    assert [one["error"] for one in stages.stages] == [
        None, "RuntimeError: no kernel image", "left out: 10 seconds needed, 5 are left"
    ]  # fmt: skip
    assert [one["seconds"] for one in stages.stages] == [2.0, 1.0, 0.0]


def test_ctrl_c_ends_all_stages() -> None:
    def interrupt() -> dict[str, Any]:
        raise KeyboardInterrupt

    stages = command.Stages(100.0, lambda name: None)
    assert not stages.run("first", 1, interrupt)
    assert not stages.run("second", 1, lambda: {"a": 1})
    assert stages.interrupted and stages.figures == {} and len(stages.stages) == 1


def test_the_bars_are_those_that_were_wanted() -> None:
    figures = {
        "product_share": 0.61, "token_share": 0.49, "token_gain": 3.0, "v4": 1.11, "v8": 1.2, "draft_cost": 0.05,
        "drafted_gain": 1.9, "prefill_gain": 0.69, "memory_gb": 9.6,
    }  # fmt: skip
    found = {one["figure"]: one["ok"] for one in judge(figures)}
    assert found == {
        "product_share": True, "token_share": False, "token_gain": True, "v4": False, "v8": True, "draft_cost": True,
        "drafted_gain": True, "prefill_gain": False, "memory_gb": False, "identical_share": None,
    }  # fmt: skip
    out = io.StringIO()
    Console(file=out, width=140).print(bars_table(figures))
    text = out.getvalue()
    assert len(text.splitlines()) == 1 + len(BARS)
    assert "at least 60%" in text and "61%" in text and "at most 1.10" in text and "not measured" in text


def test_the_checks_hold_for_the_kernels_of_the_cpu() -> None:
    found = list(Checks(torch.device("cpu"), small=True))
    assert [one for one in found if not one.ok] == []
    assert {one.kernel for one in found} == {
        "block_linear", "block_rows", "dense_linear", "low_rank", "rms_norm", "gated", "rope", "attention",
        "LayerStore.write (torch)", "choice of a drafted token",
    }  # fmt: skip
    assert any(one.error > 0 for one in found if one.kernel == "dense_linear"), "bfloat16 rounds"


@pytest.mark.parametrize(
    ("changed", "wrong"),
    [
        ({}, False),
        ({"interpreted": False}, True),  # no text was decoded: the stage failed, or there was no time for it
        ({"interpreted": False, "texts": {"a": {}}, "texts_wanted": ["a"], "identical_share": 1.0}, False),
        ({"interpreted": False, "texts": {"a": {}}, "texts_wanted": ["a", "b"], "identical_share": 1.0}, True),
        ({"interpreted": False, "texts": {}, "texts_wanted": []}, False),
        ({"identical_share": 1.0, "drafted_text_is_plain_text": True}, False),
        ({"checks_ok": 1}, True),
        ({"checks_ok": None, "checks": []}, True),  # the checks themselves failed
        ({"identical_share": 0.9}, True),
        ({"drafted_text_is_plain_text": False}, True),
        ({"kernels_missing": "torch computes what the kernel of rope would"}, True),
    ],
)
def test_what_differs_or_torch_computes_instead_is_an_exit_code(changed: dict[str, Any], wrong: bool) -> None:
    assert (
        differs({"interpreted": True, "kernels_missing": None, "checks": [{}, {}], "checks_ok": 2, **changed}) is wrong
    )


def test_a_kernel_is_wrong_by_its_error_or_by_its_neighbours() -> None:
    assert Finding("rope", "4 x 32", 0.0, 0.0, True).ok
    assert not Finding("rope", "4 x 32", 1e-9, 0.0, True).ok
    assert not Finding("gated", "silu", 1e-6, 2e-5, False).ok
    assert not Finding("gated", "silu", float("inf"), 2e-5, True).ok
    assert Finding("gated", "silu", 1e-6, 2e-5, True).to_dict()["ok"] is True
