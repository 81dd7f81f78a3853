"""Pictures of what a terminal shows; those of a browser are in `report/test_browser.py`."""

from __future__ import annotations

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest

import run
from eval.cli.output import run_guarded
from eval.screenshots import draw_bench, main, terminal


def words_of(picture: Path) -> str:
    return " ".join("".join(ElementTree.parse(picture).getroot().itertext()).replace("\xa0", " ").split())


def test_a_record_is_drawn_as_the_bench_shows_it(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fixed = ["--model", str(folder), "--device", "cpu", "--threads", "1", "--max-new-tokens", "6", "--limit", "2"]
    assert run.main(["bench", *fixed, "--modes", "adaptive", "k2", "--json", str(tmp_path / "out.json")]) == 0
    draw_bench(tmp_path / "out.json", tmp_path / "bench.svg")
    words = words_of(tmp_path / "bench.svg")
    for expected in ("tea", "adaptive", "k2", "identical", "2 of 2 texts", "python run.py bench"):
        assert expected in words
    capsys.readouterr()
    assert run_guarded(lambda: main(["--bench", str(tmp_path / "out.json"), "--out", str(tmp_path / "made")])) == 0
    assert (tmp_path / "made" / "bench.svg").read_text() == (tmp_path / "bench.svg").read_text()


def test_pictures_name_no_server(tmp_path: Path) -> None:
    terminal(lambda console: console.print("1.52x & more"), "title", tmp_path / "some.svg")
    text = (tmp_path / "some.svg").read_text()
    assert "@font-face" not in text and "url(http" not in text
    assert "1.52x & more" in words_of(tmp_path / "some.svg")


def test_what_cannot_be_drawn_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "other.json").write_text(json.dumps({"command": "plan"}))
    for words, complaint in (
        ([], "nothing to draw"),
        (["--bench", str(tmp_path / "other.json")], "not a record of run.py bench"),
        (["--bench", str(tmp_path / "none.json")], "not a record of run.py bench"),
        (["--report", str(tmp_path / "none.html")], "there is no such file"),
    ):
        assert run_guarded(lambda words=words: main([*words, "--out", str(tmp_path)])) == 2
        assert complaint in capsys.readouterr().err
    assert not list(tmp_path.glob("*.svg"))
