"""What a head learns from is what the backbone computes, whoever wrote the text; the disk gives it back as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from itertools import count, islice
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from drafter.data.answering import generate_answers
from drafter.data.dataset import ABOUT, Dataset, DatasetWriter, Position, read_shard
from drafter.data.features import Features, read
from specdec.hf import decoder_of
from specdec.model.decoder import Decoder
from tests.support.tiny import WINDOW, prompt, tiny_model

NOBODY = frozenset[int]()


def prompts() -> list[Tensor]:
    return [prompt(length, seed=length)[0] for length in (3, 9, 1, 14, 6)]


def layers(decoder: Decoder) -> list[int]:
    return [0, *decoder.spec.shared_kv_layers.values()]


def answers(decoder: Decoder, max_batch: int = 3, **changes: object) -> dict[int, Features]:
    settings = {"layers": layers(decoder), "max_new_tokens": 30, "eos_ids": NOBODY, "dtype": torch.float32, **changes}
    return dict(generate_answers(decoder, prompts(), max_batch=max_batch, **settings))


def same(first: Features, second: Features) -> bool:
    pairs = [(first.tokens, second.tokens), (first.hidden, second.hidden), (first.best, second.best)]
    pairs += [(a, b) for at in first.keys for a, b in zip(first.keys[at], second.keys[at], strict=True)]
    return first.answer == second.answer and all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4"])
def test_answers_and_their_states_are_what_reading_them_gives(family: str) -> None:
    decoder = decoder_of(tiny_model(family))
    found = answers(decoder)
    for number, text in found.items():
        asked = prompts()[number]
        assert torch.equal(text.tokens[: len(asked)], asked) and text.answer == len(asked)
        assert torch.equal(text.best[len(asked) - 1 : -1], text.tokens[len(asked) :])  # its own words, greedily
        (again,) = read(decoder, [text.tokens], layers(decoder), torch.float32)
        assert same(Features(again.tokens, again.hidden, again.best, again.keys, text.answer), text)
        assert len(text) == min(len(asked) + 30 - 1, WINDOW - 1 if family != "llama" else 999)


def test_answers_do_not_depend_on_their_neighbours() -> None:
    decoder = decoder_of(tiny_model("gemma3"))
    for settings in ({}, {"temperatures": (0.8,), "seed": 5}):
        found, alone = answers(decoder, 4, **settings), answers(decoder, 1, **settings)
        assert all(same(found[i], alone[i]) for i in alone)
    sampled, greedy = answers(decoder, temperatures=(0.8,), seed=5), answers(decoder)
    assert any(not torch.equal(sampled[i].tokens, greedy[i].tokens) for i in greedy)
    both = answers(decoder, temperatures=(0.0, 0.8), seed=5)
    assert all(same(both[i], (greedy, sampled)[i % 2][i]) for i in both)
    settings = {"layers": layers(decoder), "max_new_tokens": 30, "eos_ids": NOBODY, "dtype": torch.float32}
    later = dict(generate_answers(decoder, prompts()[2:], first=2, temperatures=(0.0, 0.8), seed=5, **settings))
    assert sorted(later) == [2, 3, 4] and all(same(later[i], both[i]) for i in later)
    end = int(greedy[0].tokens[12])
    short = answers(decoder, eos_ids=frozenset([end]))[0]
    assert len(short) <= 12 and torch.equal(short.tokens, greedy[0].tokens[: len(short)])


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_change_no_text(workers: int) -> None:
    decoder, before = decoder_of(tiny_model("gemma3")), torch.get_num_threads()
    alone = answers(decoder, 1, temperatures=(0.0, 0.8), seed=5)
    for _ in range(3):
        found = answers(decoder, 4, workers=workers, temperatures=(0.0, 0.8), seed=5)
        assert sorted(found) == sorted(alone) and all(same(found[i], alone[i]) for i in alone)
    assert torch.get_num_threads() == before


def test_workers_stop_with_whoever_asks_and_say_what_went_wrong() -> None:
    decoder = decoder_of(tiny_model("llama"))
    settings = {"layers": layers(decoder), "max_new_tokens": 5, "eos_ids": NOBODY, "workers": 2}

    def endless(fails_at: int | None = None) -> Iterator[Tensor]:
        for i in count():
            if i == fails_at:
                raise ValueError("no such prompt")
            yield prompt(3 + i % 5, seed=i)[0]

    threads = threading.active_count()
    few = generate_answers(decoder, endless(), **settings)
    assert len(list(islice(few, 7))) == 7
    few.close()
    assert threading.active_count() == threads
    with pytest.raises(ValueError, match="no such prompt"):
        list(generate_answers(decoder, endless(20), **settings))
    assert threading.active_count() == threads


def test_texts_that_nobody_waits_for_end_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, late = decoder_of(tiny_model("llama")), [0]
    closing, forward_many = threading.Event(), Decoder.forward_many

    def counted(*arguments: Any) -> Tensor:
        late[0] += closing.is_set()
        return forward_many(*arguments)

    monkeypatch.setattr(Decoder, "forward_many", counted)
    asked = (prompt(3 + i % 5, seed=i)[0] for i in count())
    texts = generate_answers(
        decoder, asked, layers=layers(decoder), max_new_tokens=400, eos_ids=NOBODY, workers=2, max_batch=4
    )
    next(texts)
    closing.set()
    texts.close()
    assert late[0] <= 8, "a pass or two of each worker"


def written(folder: Path) -> tuple[list[Features], DatasetWriter]:
    texts = [text for _, text in sorted(answers(decoder_of(tiny_model("gemma4")), dtype=torch.bfloat16).items())]
    writer = DatasetWriter(folder, {"backbone": "tiny"})
    writer.add(texts[:2])
    writer.add(texts[2:])
    return texts, writer


def test_a_set_comes_back_in_a_shuffled_order_from_any_position(tmp_path: Path) -> None:
    texts, writer = written(tmp_path / "set")
    assert len(writer.shards) == 2
    dataset = Dataset(tmp_path / "set")
    assert all(same(a, b) for a, b in zip(read_shard(dataset.shards[0]), texts[:2], strict=True))
    whole = list(islice(dataset.texts(seed=3), 15))
    for epoch in range(3):
        numbers = [i for _, found in whole[5 * epoch : 5 * epoch + 5] for i, t in enumerate(texts) if same(found, t)]
        assert sorted(numbers) == [0, 1, 2, 3, 4]
    for i, (after, _) in enumerate(whole[:14]):
        (_, following) = next(dataset.texts(seed=3, start=after))
        assert same(following, whole[i + 1][1])
    assert len(list(dataset.texts(seed=3, start=Position(1, 1, 0), epochs=2))) in (2, 3)
    orders = {tuple(t.answer for _, t in islice(dataset.texts(seed=s), 10)) for s in range(8)}
    assert len(orders) > 1


def test_what_a_set_refuses(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no training set here"):
        Dataset(tmp_path)
    DatasetWriter(tmp_path / "set", {"backbone": "tiny"})
    with pytest.raises(ValueError, match="no shards yet"):
        Dataset(tmp_path / "set")
    with pytest.raises(ValueError, match=r"other settings \(backbone\)"):
        DatasetWriter(tmp_path / "set", {"backbone": "another"})
    (tmp_path / "set" / ABOUT).write_text("{")
    with pytest.raises(ValueError, match="no training set here"):
        Dataset(tmp_path / "set")
    written(tmp_path / "other")
    shard = tmp_path / "other" / "00001.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"00001\.safetensors: a damaged shard"):
        list(Dataset(tmp_path / "other").texts(seed=0, epochs=1))


def test_a_shard_that_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, writer = written(tmp_path / "set")
    before = sorted(path.name for path in (tmp_path / "set").iterdir())

    def full(tensors: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("drafter.data.dataset.save_file", full)
    with pytest.raises(OSError, match="No space"):
        writer.add(texts)
    assert sorted(path.name for path in (tmp_path / "set").iterdir()) == before
