"""The command that measures the server: its figures add up, and what differs or is invalid is told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from eval.cli.output import DIFFERS
from eval.server import tasks
from eval.server.command import main
from eval.server.replay import Turn, replay_record
from specdec.server.formats.answer import AnswerParser
from specdec.server.formats.base import Delta


@pytest.fixture
def options(folder: Path) -> list[str]:
    few = ["--prompts", "2", "--repeat", "1", "--predicted", "40", "--answers", "3", "--drafter", "suffix"]
    return ["--model", str(folder), "--device", "cpu", "--threads", "1", *few]


def test_all_figures(options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*options, "--max-new-tokens", "60", "--json", str(tmp_path / "out")]) == 0
    record, told = json.loads((tmp_path / "out").read_text()), " ".join(capsys.readouterr().out.split())
    assert record["command"] == "server" and not record["interrupted"]
    http = record["http"]
    assert http["identical"] == len(http["prompts"]) == 2 and all(0 < one["tokens"] <= 60 for one in http["prompts"])
    assert http["ratio"] == http["tokens_per_second"]["http"] / http["tokens_per_second"]["in_process"]
    assert 0 < http["first_byte_ms"]["median"] <= http["first_byte_ms"]["most"] < 2000
    rows = {(row["prompt"], row["prediction"]): row for row in record["prediction"]}
    assert len(rows) == 8 and all(row["identical"] and row["tokens"] == 40 for row in rows.values())
    for prompt in ("file in the prompt", "described"):
        assert rows[prompt, "none"]["ratio"] == 1 and rows[prompt, "none"]["accepted"] == 0
        assert rows[prompt, "right"]["accepted"] > rows[prompt, "wrong"]["accepted"]
    for kind in ("schema", "tool"):
        assert record["constraint"][kind]["with"] > 0 and record["constraint"][kind]["without"] > 0
        found = record["answers"][kind]
        assert found["total"] == 3 == found["valid"] + found["cut"] and found["wrong"] == []
    for part in ("over HTTP", "prediction, described", "tokens/s of answers", "by tool", "2 of 2 texts the same"):
        assert part in told


def test_what_differs_or_is_invalid_is_told(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    feed = AnswerParser.feed

    def shouting(parser: AnswerParser, tokens: Any) -> list[Delta]:
        return [Delta(content=delta.content + "!") if delta.content else delta for delta in feed(parser, tokens)]

    monkeypatch.setattr(AnswerParser, "feed", shouting)
    assert main([*options, "--max-new-tokens", "8", "--parts", "http"]) == DIFFERS
    assert "texts over HTTP DIFFER" in capsys.readouterr().out
    assert main([*options, "--max-new-tokens", "200", "--parts", "answers", "--answers", "1"]) == DIFFERS
    assert "INVALID: " in capsys.readouterr().out


def test_tasks_are_many_and_valid_answers_are_known() -> None:
    by_schema, by_tool = tasks.schema_tasks(200), tasks.tool_tasks(200)
    assert (
        len({json.dumps(one.messages) for one in by_schema})
        == len({json.dumps(one.messages) for one in by_tool})
        == 200
    )
    right = {"place": {"x": 1, "y": 2.5}}
    point = next(one for one in by_schema if one.name.startswith("point"))
    assert tasks._wrong(point, {"content": json.dumps(right)}) == ""
    assert "ValidationError" in tasks._wrong(point, {"content": '{"place": {"x": 1}}'})
    assert "JSONDecodeError" in tasks._wrong(point, {"content": "{"})
    call = next(one for one in by_tool if one.name.startswith("point"))
    function = {"name": "make_point", "arguments": json.dumps(right)}
    assert tasks._wrong(call, {"tool_calls": [{"function": function}]}) == ""
    assert tasks._wrong(call, {"tool_calls": [{"function": {**function, "name": "make_up"}}]}) != ""
    assert tasks._wrong(call, {"content": "no"}) != ""


def test_the_agent_needs_a_file_that_both_servers_read(
    options: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("eval.bench.engines.util.find_spec", lambda name: None)
    assert main([*options, "--parts", "replay"]) == 2
    assert "needs the package xllamacpp" in capsys.readouterr().err
    monkeypatch.setattr("eval.bench.engines.util.find_spec", lambda name: True)
    assert main([*options, "--parts", "replay"]) == 2
    assert "compares servers of one .gguf file" in capsys.readouterr().err


def test_conversations_are_added_up_and_their_median_taken() -> None:
    turns = [
        Turn(server, conversation, turn, seconds * (conversation + 1), 10, computed, 4)
        for server, seconds, computed in (("specdec", 0.5, 3), ("llama.cpp", 1.5, 6))
        for conversation in range(3)
        for turn in range(2)
    ]
    record = replay_record(turns)
    assert record["specdec"] == {"seconds": 2.0, "prompt_tokens": 20, "computed": 6, "emitted": 8}
    assert record["llama.cpp"]["seconds"] == 6.0 and record["llama.cpp"]["computed"] == 12
    assert record["ratio"] == 3.0 and len(record["turns"]) == 12


@pytest.mark.model
def test_an_agent_beside_llama_cpp(tmp_path: Path) -> None:
    pytest.importorskip("xllamacpp")
    words = ["--parts", "replay", "--repeat", "1", "--max-new-tokens", "4", "--json", str(tmp_path / "out")]
    assert main(words) == 0
    record = json.loads((tmp_path / "out").read_text())["replay"]
    for server in ("specdec", "llama.cpp"):
        found = [one for one in record["turns"] if one["server"] == server]
        assert len(found) == 10 and all(one["emitted"] == 4 for one in found)
        assert record[server]["computed"] < record[server]["prompt_tokens"] / 2
