"""The page of a report: all of a full record, what is left out, hostile values, several runs, well-formedness."""

from __future__ import annotations

import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from eval.cli.words import repetitions
from eval.report.command import SECTIONS, page
from eval.report.record import Node, label_runs
from tests.support.bench_record import MANY, MODES, record


def made(*records: dict[str, Any]) -> str:
    return page(label_runs([(Path(f"run{i}.json"), Node(one)) for i, one in enumerate(records, start=1)]))


def without(*path: str) -> str:
    """A page of a record that lacks what is at `path`, in every mode where it begins with "modes"."""
    shown = record()
    for owner in shown["modes"] if path[0] == "modes" else [shown]:
        *way, last = path[1:] if path[0] == "modes" else path
        for key in way:
            owner = owner[key]
        del owner[last]
    return made(shown)


class Reader(HTMLParser):
    """Balanced tags, ids, headings, outside addresses and charts of a page."""

    VOID = ("meta", "br", "hr", "img", "input", "link")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.headings: list[int] = []
        self.charts: list[dict[str, str | None]] = []
        self.addresses: list[str] = []
        self.seen: Counter[str] = Counter()
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen[tag] += 1
        given = dict(attrs)
        assert not any(name.startswith("on") for name in given)
        self.addresses += [str(value) for name, value in attrs if name in ("src", "href", "action", "data")]
        if "id" in given:
            self.ids[str(given["id"])] += 1
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))
        if tag == "svg":
            self.charts.append(given)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("records", [[record()], [record(), record(MANY, 12), record()], [{"modes": []}]])
def test_a_page_is_well_formed_and_of_one_piece(records: list[dict[str, Any]]) -> None:
    text = made(*records)
    seen = Reader(text)
    assert max(seen.ids.values()) == 1
    assert seen.headings[0] == 1 and seen.headings.count(1) == 1
    assert all(later <= sooner + 1 for sooner, later in zip(seen.headings, seen.headings[1:], strict=False))
    assert all(address.startswith("#") and address[1:] in seen.ids for address in seen.addresses)
    assert set(re.findall(r"https?://[^\"' <]*", text)) <= {"http://www.w3.org/2000/svg"}
    assert not re.search(r"@import|url\(", text)
    assert seen.seen["script"] == 1 and "default-src 'none'" in text
    assert [seen.seen[tag] for tag in ("header", "nav", "main", "footer")] == [1] * 4


def test_every_chart_is_named_described_and_a_table_too() -> None:
    text = made(record(), record(MANY))
    seen = Reader(text)
    assert len(seen.charts) > 20
    for chart in seen.charts:
        assert chart["role"] == "img"
        for name in str(chart["aria-labelledby"]).split():
            assert re.search(rf'<(title|desc) id="{name}">[^<]+</', text)
    for card in text.split('class="card')[1:]:
        assert "<svg" not in card or "<table" in card


def test_a_full_record_shows_everything() -> None:
    text = made(record())
    for _, title, _, _ in SECTIONS:
        assert f">{title}</h2>" in text
    for words in (
        "1.52x",
        "YES",
        "output identical, 24 of 24 texts",
        "1.47x",
        "1.19x, translation-04",
        "24, of 6 tasks",
    ):
        assert words in text
    for title in ("Speed-up by mode", "Speed-up by task", "Acceptance by position", "Rounds by tokens drafted"):
        assert f"<h3>{title}" in text
    for title in ("Drafted tokens by source", "TTFT", "ITL", "TPOT", "Seconds by part of a round", "Cost of a pass"):
        assert f"<h3>{title}" in text
    for title in ("Memory", "Every prompt", "Settings", "Machine and model", "Versions"):
        assert f"<h3>{title}" in text
    for words in (
        "33%, 56% of 682",
        "d of mtp = 1.13 ms a drafted token, 0.075 of V(1)",
        "budget 2.00 GB",
        "AMD EPYC 9R14",
    ):
        assert words in text
    assert "SYNTHETIC" not in text and "Interrupted" not in text and "unreliable" not in text
    assert "57.5 to 59.1" in text  # by repetition


@pytest.mark.parametrize(
    ("path", "title"),
    [
        (("costs",), "Cost of a pass"),
        (("memory",), None),
        (("modes", "by_task"), "Speed-up by task"),
        (("modes", "acceptance_by_position"), "Acceptance by position"),
        (("modes", "draft_lengths"), "Rounds by tokens drafted"),
        (("modes", "draft_sources"), "Drafted tokens by source"),
        (("modes", "itl"), "ITL"),
        (("modes", "phase_seconds"), "Seconds by part of a round"),
        (("modes", "speedup"), None),
        (("per_prompt",), "Every prompt"),
        (("versions",), "Versions"),
        (("arguments",), None),
        (("headline",), None),
        (("model",), None),
        (("tasks",), None),
    ],
)
def test_what_is_missing_is_left_out(path: tuple[str, ...], title: str | None) -> None:
    text = without(*path)
    Reader(text)
    assert title is None or f"<h3>{title}" not in text
    assert "1.52x" in text


@pytest.mark.parametrize("value", [None, 3, "text", [], {}, [None], [[1]], {"a": {"b": 1}}, True, -1])
def test_values_of_any_type_make_a_page(value: object) -> None:
    for key in record():
        text = made(record(MODES[:2], 2) | {key: value})
        Reader(text)
        assert text.count("<h1") == 1, "a whole page, whatever was wrong"
    for key in record()["modes"][1]:
        shown = record(MODES[:2], 2)
        shown["modes"][1][key] = value
        text = made(shown)
        Reader(text)
        assert text.count("<h1") == 1


def test_hostile_text_is_text() -> None:
    evil = "</script><script>alert(1)</script><img src=x onerror=alert(1)>\"'&\u202e\ud800\x00"
    shown = record()
    shown["model"]["name"] = shown["headline"] = shown["modes"][1]["mode"] = evil
    shown["modes"][1]["details"] = shown["per_prompt"][0]["name"] = shown["per_prompt"][0]["task"] = evil
    shown["modes"][1]["by_task"] = {evil: shown["modes"][1]["by_task"]["chat"]}
    shown["modes"][1]["draft_sources"] = {evil: [3, 2]}
    shown["arguments"] = {evil: evil}
    shown["implausible"] = shown["differing"] = [evil]
    text = made(shown)
    seen = Reader(text)
    assert seen.seen["script"] == 1 and seen.seen["img"] == 0
    assert "&lt;img" in text and "\u202e" not in text and "\x00" not in text
    text.encode()


def test_several_runs_stand_side_by_side() -> None:
    other = record(MANY)
    other["speedup"], other["arguments"]["drafter"] = 1.21, "suffix"
    text = made(record(), other)
    assert text.count("<article") == 2
    assert "Runs compared, by task" in text and "B adaptive" in text and "run2.json · smollm2" in text
    assert text.count(">differs<") == 1
    assert "Runs compared" not in made(record())


def test_what_must_be_known_is_said_first() -> None:
    shown = record() | {"synthetic_acceptance": [0.8, 0.6], "interrupted": True, "implausible": ["chat-01"]}
    text = made(shown | {"identical": False, "differing": ["code-02"], "error": "it broke", "others_cpu": 0.4})
    assert text.count("SYNTHETIC") > 5
    for words in (
        "0.8, 0.6",
        "Interrupted:",
        "unreliable: chat-01",
        "Texts that differ: code-02",
        "<strong>NO</strong>",
    ):
        assert words in text
    assert text.index("SYNTHETIC</b>: drafts") < text.index(">Speed-up</h2>")
    assert "<strong>–</strong>output identical" in made(record() | {"identical": None})


def test_prompts_tasks_and_repetitions_are_counted_in_words() -> None:
    found = record(prompts=2)
    found["tasks"], found["repetitions"] = ["chat"], 3
    text = page(label_runs([(Path("a.json"), Node(found))]))
    assert "2, of 1 task<" in text and "3 repetitions<" in text
    found |= {"tasks": [""], "interrupted": True, "repetitions": 2, "repetitions_finished": 1}
    text = page(label_runs([(Path("a.json"), Node(found))]))
    assert "of 1 task" not in text and "1 repetition and a part of the next, of 3<" in text


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"repeat": 3, "repetitions": 3}, "3 repetitions"),
        ({"repeat": 1}, "1 repetition"),
        ({"repeat": 1, "repetitions": 1, "interrupted": True}, "a part of the first repetition"),
        ({"repeat": 3, "repetitions": 1, "interrupted": True}, "a part of the first repetition, of 3"),
        ({"repeat": 3, "repetitions": 3, "error": "gone"}, "2 repetitions and a part of the next, of 3"),
        ({"repeat": 3, "repetitions": 2, "repetitions_finished": 2, "interrupted": True}, "2 repetitions, of 3"),
        ({"repeat": 1, "repetitions": 1, "repetitions_finished": 1, "interrupted": True}, "1 repetition"),
        ({"repeat": "x", "repetitions": None}, ""),
        (
            {"repeat": 2, "repetitions": 2, "repetitions_finished": [], "interrupted": True},
            "a part of the first repetition, of 2",
        ),
    ],
)
def test_repetitions_in_words(told: dict[str, object], words: str) -> None:
    assert repetitions(told) == words
