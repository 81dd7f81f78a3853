"""Prompts to answer and texts to read in one set: each has its number, wherever the making was cut."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from drafter.data.build_dataset import Collector
from drafter.data.dataset import read_shard
from drafter.data.features import Features
from drafter.data.given import GivenText
from drafter.data.mixture import Item, Mixture, as_given
from drafter.data.patience import PATIENT, Patience
from drafter.settings import Answering
from tests.support.tiny import prompt
from tests.support.tiny_run import HELD_OUT, PER_SHARD, backbone, make_shards_small

HOW = Answering(max_new_tokens=8, temperatures=(0.0, 0.8), max_batch=4)
OVER = Patience(until=0.0, now=lambda: 1.0)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards_small(monkeypatch)


def is_text(number: int) -> bool:
    return number % 3 == 1


def items(count: int = HELD_OUT + 2 * PER_SHARD) -> Iterator[Item]:
    for i in range(count):
        ids = prompt(3 + i % 6, seed=i)[0]
        text = i >= HELD_OUT and is_text(i - HELD_OUT)
        yield GivenText(torch.cat((ids, ids.flip(0))), len(ids)) if text else ids


def grown(folder: Path, pieces: int = 1) -> list[Features]:
    """The texts of a whole set, which `pieces` collectors grow by a shard or more each."""
    for piece in range(pieces):
        one = Collector(folder, backbone("llama"), (3,), items(), frozenset(), HOW, {})
        growing = one.grow()
        if piece < pieces - 1:
            next(growing)
        else:
            list(growing)
    return [text for shard in one.writer.shards for text in read_shard(shard)]


def test_a_set_of_both_is_the_same_however_it_was_cut(tmp_path: Path) -> None:
    texts, known = grown(tmp_path / "whole"), list(items())[HELD_OUT:]
    assert len(texts) == 2 * PER_SHARD
    asked = 0
    for number, (text, item) in enumerate(zip(texts, known, strict=True)):
        if isinstance(item, GivenText):
            assert torch.equal(text.tokens, item.tokens[:-1]) and text.answer == item.answer
        else:
            assert torch.equal(text.tokens[: len(item)], item) and len(text) == len(item) + HOW.max_new_tokens - 1
            greedy = torch.equal(text.best[len(item) - 1 : -1], text.tokens[len(item) :])
            assert greedy == (asked % 2 == 0), f"text {number}: temperatures are taken in turn by the prompts"
            asked += 1
    for a, b in zip(texts, grown(tmp_path / "cut", pieces=2), strict=True):
        assert torch.equal(a.tokens, b.tokens) and torch.equal(a.hidden, b.hidden) and a.answer == b.answer


def test_texts_before_a_prompt_are_read_even_when_the_time_is_up() -> None:
    text, ids = GivenText(torch.tensor([1, 2, 3]), 1), torch.tensor([4, 5])
    mixture = Mixture(iter([ids, text, ids, text, text, ids]), 1, PATIENT)
    prompts = mixture.prompts()
    next(prompts)
    assert mixture.asked_before == 1 and mixture.number(1) == 2
    assert [number for number, _ in mixture.texts()] == [1]
    mixture._patience = OVER
    assert list(prompts) == [] and list(mixture.texts()) == [], "number 3 precedes no prompt that was drawn"
    late = Mixture(iter([text, ids, text, ids]), 0, OVER)
    assert len(list(late.prompts())) == 0
    late = Mixture(iter([text, ids, text, ids]), 0, PATIENT)
    drawn = late.prompts()
    next(drawn)
    late._patience = OVER
    assert [number for number, _ in late.texts()] == [0], "without it the answer to prompt 1 would be lost"


def test_texts_alone_are_numbered_and_end_with_the_time() -> None:
    given = as_given(lambda: iter([GivenText(torch.tensor([i]), 1) for i in range(4)]))
    assert [(number, int(text.tokens)) for number, text in given(2, PATIENT)] == [(2, 2), (3, 3)]
    assert list(given(0, OVER)) == []
