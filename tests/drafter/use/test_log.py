"""Texts of use on disk: one for a conversation, within a limit, for their owner alone, whoever else writes or dies."""

from __future__ import annotations

import json
import multiprocessing
import stat
from array import array
from pathlib import Path

import pytest

from drafter.use.log import UsedModel, UseLog, UseText, drop_oldest, files_of, goes_on, longest, use_logs

MODEL = UsedModel("tiny", "f" * 64)
LIMIT = 10_000_000


def text(prompt: list[int], answer: list[int], name: str = "0") -> UseText:
    return UseText(array("i", prompt + answer), len(prompt), name, 0.0)


def kept(log: UseLog) -> list[list[int]]:
    return [one.tokens.tolist() for one in log.texts()[0]]


def test_a_conversation_is_one_text_its_longest(tmp_path: Path) -> None:
    log = UseLog(tmp_path, MODEL, LIMIT)
    assert log.add([1, 2, 3, 4], 2)
    first = log.texts()[0][0]
    assert log.add([1, 2, 3, 4, 5, 6], 5), "the answer again, and the next turn"
    assert log.add([1, 2, 3, 4, 5, 9, 6, 7, 8], 7), "the second answer in other words: templates do that"
    (only,) = log.texts()[0]
    assert only.tokens.tolist() == [1, 2, 3, 4, 5, 9, 6, 7, 8] and only.answer == 7
    assert only.id == first.id and only.when > first.when, "what is held out stays so as it grows"
    assert not log.add([1, 2, 3, 4], 2), "a turn of a conversation that went on"
    assert log.add([1, 2, 7, 7], 3) and log.add([1, 2, 7, 8], 3), "two answers to one question"
    assert len(files_of(log.place)) == 3
    again = UseLog(tmp_path, MODEL, LIMIT)
    assert again.add([1, 2, 7, 8, 5, 5], 5) and len(again.texts()[0]) == 2, "another process goes on from both"


@pytest.mark.parametrize("tokens", [[1, 2, 3], [], [5]])
def test_a_text_without_an_answer_is_not_kept(tokens: list[int], tmp_path: Path) -> None:
    log = UseLog(tmp_path, MODEL, LIMIT)
    assert not log.add(tokens, len(tokens)) and log.stored().texts == 0


def test_only_the_owner_can_read(tmp_path: Path) -> None:
    log = UseLog(tmp_path / "use", MODEL, LIMIT)
    log.add([1, 2, 3], 1)
    for path in (tmp_path / "use").rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert stat.S_IMODE((tmp_path / "use").stat().st_mode) == 0o700


def test_the_oldest_go_first_of_all_models(tmp_path: Path) -> None:
    other = UseLog(tmp_path, UsedModel("other", "e" * 64), LIMIT)
    other.add([1] * 400, 200)
    log = UseLog(tmp_path, MODEL, 4000)
    for i in range(10):
        log.add([100 + i] * 200, 100)
    total = sum(path.stat().st_size for one in (log, other) for path in files_of(one.place))
    assert 2000 < total <= 4000 and other.stored().texts == 0
    assert [tokens[0] for tokens in kept(log)] == [*range(110 - log.stored().texts, 110)]
    assert drop_oldest(tmp_path, 0) > 0 and [tokens[0] for tokens in kept(log)] == [109], "the newest stays"


def test_logs_are_found_told_and_erased(tmp_path: Path) -> None:
    assert use_logs(tmp_path / "nowhere") == []
    log, adapted = UseLog(tmp_path, MODEL, LIMIT), UseLog(tmp_path, UsedModel("tiny", "f" * 64, "a", "b"), LIMIT)
    log.add([1, 2, 3], 1)
    adapted.add([1, 2, 3], 1)
    assert sorted(one.model.adapter for one in use_logs(tmp_path)) == ["", "a"]
    assert log.erase() == 1 and [one.model for one in use_logs(tmp_path)] == [adapted.model]
    assert log.add([1, 2, 3], 1), "after it was erased nothing of it is there, in memory either"
    UseLog(tmp_path, MODEL._replace(name="renamed"), LIMIT).add([9, 2, 3], 1)
    assert {one.model.name for one in use_logs(tmp_path)} == {"tiny", "renamed"}, "the newest name counts"


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        ("", "cannot be read as JSON"),
        ("[]", "a JSON object is due"),
        ('{"answer": 1}', "tokens"),
        ('{"answer": 1, "tokens": [1, -2]}', "tokens"),
        ('{"answer": 5, "tokens": [1, 2]}', "answer"),
        ('{"answer": 1, "tokens": [1]}', "a text of 1 token"),
        ('{"answer": 1, "tokens": [1, 4294967296]}', "tokens"),
    ],
)
def test_a_damaged_file_is_named_and_passed_over(content: str, wrong: str, tmp_path: Path) -> None:
    log = UseLog(tmp_path, MODEL, LIMIT)
    log.add([1, 2, 3], 1)
    bad = log.place / f"{1:020d}-0123456789ab.json"
    bad.write_text(content)
    found, (said,) = log.texts()
    assert len(found) == 1 and bad.name in said and wrong in said
    assert UseLog(tmp_path, MODEL, LIMIT).add([4, 5, 6], 1)


def test_a_log_whose_model_cannot_be_told_is_still_listed(tmp_path: Path) -> None:
    log = UseLog(tmp_path, MODEL, LIMIT)
    log.add([1, 2, 3], 1)
    (log.place / "about.json").write_text(json.dumps({"name": 3}))
    (found,) = use_logs(tmp_path)
    assert found.model.name == MODEL.key and found.erase() == 1


def write(folder: Path, first: int) -> None:
    log = UseLog(folder, MODEL, LIMIT)
    for i in range(20):
        log.add([first, i, 1, 2], 2)


def test_two_processes_write_at_once(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    others = [context.Process(target=write, args=(tmp_path, first)) for first in (1, 2)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert sorted(kept(UseLog(tmp_path, MODEL))) == [[first, i, 1, 2] for first in (1, 2) for i in range(20)]


def test_what_goes_on_from_what() -> None:
    assert goes_on(text([1, 2], [3, 4]), text([1, 2], [3])) and not goes_on(text([1, 2], [3]), text([1, 2], [4]))
    assert goes_on(text([1, 2, 3], [4]), text([1, 2], [9])) and not goes_on(text([1, 2], [9]), text([1, 2, 3], [4]))
    one, two = text([1], [2, 3, 4]), text([1, 2], [3])
    assert goes_on(one, two) and goes_on(two, one), "of two that go on from each other one has to stay"
    assert len(longest([one, two])) == len(longest([two, one])) == 1


def test_the_longest_of_many_are_those_of_a_search_through_all() -> None:
    some = [text([1 + i % 3] + [5] * (i % 4), [6] * (1 + i % 2) + [i % 5], str(i)) for i in range(60)]
    found = longest(some)
    assert found == [one for one in some if one in found], "in their order"
    for one in some:
        assert one in found or any(goes_on(other, one) for other in found)
    assert not any(goes_on(a, b) for a in found for b in found if a is not b)
