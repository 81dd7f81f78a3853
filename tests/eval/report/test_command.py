"""The report command: records that are read or refused, pages that are written and replaced."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from eval.report.command import page, report
from eval.report.record import Node, label_runs, read
from tests.support.bench_record import record

ROOT = Path(__file__).parents[3]


def test_labels_of_one_name_are_numbered() -> None:
    files = [(Path(folder, "a.json"), Node(record())) for folder in ("x", "y", "z")]
    labels = [run.label for run in label_runs(files)]
    assert labels == [f"a.json · smollm2-135m-instruct{end}" for end in ("", " (2)", " (3)")]


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("hello", "not a record of run.py bench --json (Expecting value"),
        ("[]", "not a record of run.py bench --json"),
        ('{"command": "generate", "modes": []}', "not a record of run.py bench --json"),
        ('{"command": "bench", "plain": {}}', "no modes); measure again"),
        ('{"command": "bench", "modes": [], "repeat": NaN}', "NaN is not a figure"),
        ('{"command": "bench", "modes": [], "repeat": 1e999}', "1e999 is not a figure"),
        ('{"command": "bench", "modes": [], "repeat": ' + "9" * 5000 + "}", "is not a figure"),
        ("[" * 100_000, "nested too deeply"),
        ("\udcff", "not a record"),
    ],
)
def test_what_is_no_record_is_refused(tmp_path: Path, text: str, complaint: str) -> None:
    file = tmp_path / "x.json"
    file.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ValueError, match=re.escape(complaint)) as refused:
        read(file)
    assert str(refused.value).startswith(f"{file}: ")


def test_a_report_is_written_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file, out = Path("a.json"), Path("report.html")
    file.write_text(json.dumps(record()), encoding="utf-8")
    for _ in range(2):  # the second time over the first
        assert report([file], None) == 0
        line = "adaptive 1.52x, median 1.47x, lowest 1.19x, output identical"
        assert capsys.readouterr().out.splitlines() == ["report.html", f"a.json · smollm2-135m-instruct: {line}"]
        assert out.read_text(encoding="utf-8") == page(label_runs([(file, Node(record()))]))
    out.write_text("mine", encoding="utf-8")
    for named in (None, out):
        with pytest.raises(ValueError, match=r"holds something that report did not write; name another file"):
            report([file], named)
    assert out.read_text(encoding="utf-8") == "mine"
    assert report([file], Path("-")) == 0
    assert capsys.readouterr().out.startswith("<!doctype html>")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "report.html"]


def test_a_record_is_never_replaced(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(record()), encoding="utf-8")
    with pytest.raises(ValueError, match="is one of the records"):
        report([file], tmp_path / "." / "a.json")
    with pytest.raises(ValueError, match="is a folder"):
        report([file], tmp_path)
    with pytest.raises(ValueError, match=r"x\.html: Not a directory"):
        report([file], file / "x.html")
    with pytest.raises(ValueError, match=r"nowhere\.json: cannot be read"):
        report([tmp_path / "nowhere.json"], tmp_path / "x.html")


def test_help_of_the_command() -> None:
    done = subprocess.run([sys.executable, "run.py", "report", "--help"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and "--out" in done.stdout and "bench --json" in done.stdout
