"""A whole training run: it leaves a drafter, can be stopped anywhere, and counts what decoding does."""

from __future__ import annotations

import os
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice, repeat
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from drafter.data.build_dataset import encode_prompts
from drafter.data.dataset import Size, read_shard
from drafter.data.features import longest_text
from drafter.files.checkpoint import load_drafter
from drafter.files.formats import OwnForm, read_start
from drafter.settings import TimeBudget
from drafter.train.evaluate import measure_drafts
from drafter.train.initial import with_candidates
from drafter.train.judge import Scored
from drafter.train.run import Began, Event
from drafter.train.trainer import StepReport
from specdec.hf import decoder_of
from tests.support.processes.forked import python
from tests.support.tiny import tiny_model
from tests.support.tiny_folder import threads_restored
from tests.support.tiny_run import (
    ANSWERING,
    HELD_OUT,
    PER_SHARD,
    SETTINGS,
    collector,
    make_shards_small,
    training_run,
)


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards_small(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run in one process, which others are compared with."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch, threads_restored():
        torch.set_num_threads(1)
        make_shards_small(patch)
        list(training_run(folder).run())
    return folder


def saved(folder: Path) -> list[Tensor]:
    state = torch.load(folder / "training" / "state.pt", weights_only=True)
    entries = [entry for optimizer in state["optimizers"] for entry in optimizer["state"].values()]
    return [*state["network"].values(), *[tensor for entry in entries for tensor in entry.values()]]


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4_unified"])
def test_a_course_leaves_a_drafter_that_does_what_it_says(family: str, tmp_path: Path) -> None:
    run = training_run(tmp_path, family)
    events = list(run.run())
    kinds = [type(event) for event in events]
    assert kinds[0] is Size and kinds.count(Began) == 1 and kinds.count(StepReport) == 12
    scores = [event for event in events if isinstance(event, Scored)]
    assert [score.step for score in scores] == [0, 12]
    best = max(scores, key=lambda score: score.real)
    # Texts of some 30 tokens: their ends, which the two count differently, are a large part of them.
    assert abs(best.offline - best.real) < 0.15 * best.real
    stats = measure_drafts(
        run.backbone,
        load_drafter(tmp_path),
        run.collector.held_out,
        draft_length=3,
        max_new_tokens=ANSWERING.max_new_tokens,
        eos_ids=frozenset(),
        longest=longest_text(run.backbone, run.collector.layers),
    )
    assert stats.mean_acceptance_length == best.real > 1
    assert len(run.collector.held_out) == HELD_OUT


def test_offline_figures_are_those_of_decoding(tmp_path: Path) -> None:
    run = training_run(tmp_path, budget=TimeBudget(steps=6, tokens=700))
    run.collector.answering = replace(ANSWERING, max_new_tokens=250)
    scores = [event for event in run.run() if isinstance(event, Scored)]
    for score in scores:
        assert abs(score.offline - score.real) < 0.03 * score.real


class KilledError(Exception):
    """What comes between two events, as Ctrl-C would."""


@pytest.mark.parametrize("after", [1, 2, 4, 9])
def test_a_course_that_was_killed_ends_with_the_same_weights(after: int, whole: Path, tmp_path: Path) -> None:
    events: Iterator[Event] = training_run(tmp_path / "cut").run()
    list(islice(events, after))
    if after > 4:
        with pytest.raises(KilledError):
            events.throw(KilledError())
    del events
    list(training_run(tmp_path / "cut").run())
    pairs = zip(saved(whole), saved(tmp_path / "cut"), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_two_processes_do_what_one_does(whole: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        told = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": "2"}
    command = [*python(), "-m", "tests.support.processes.parallel_run", str(tmp_path / "two")]
    both = [
        subprocess.Popen(command, env={**os.environ, **told, "RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    try:
        for process in both:
            _, errors = process.communicate(timeout=300)
            assert process.returncode == 0, errors[-2000:]
    finally:
        for process in both:
            process.kill()
    for one, two in zip(saved(whole), saved(tmp_path / "two"), strict=True):
        # Sums in another order; AdamW's roots and Muon's bfloat16 make much of the smallest gradients.
        assert float((two - one).norm()) <= 0.1 * float(one.norm())


def test_a_set_grows_to_the_same_texts_however_it_was_made(tmp_path: Path) -> None:
    whole, cut = collector(tmp_path / "whole"), collector(tmp_path / "cut")
    sizes = list(islice(whole.grow(), 3))
    assert [size.shards for size in sizes] == [1, 2, 3] and sizes[2].answered < sizes[2].tokens
    next(cut.grow())
    again = collector(tmp_path / "cut", answering=replace(ANSWERING, max_batch=5))
    assert list(islice(again.grow(), 2))[1][:3] == sizes[2][:3] == again.size()[:3]
    for one, other in zip(whole.writer.shards, again.writer.shards, strict=True):
        for a, b in zip(read_shard(one), read_shard(other), strict=True):
            assert torch.equal(a.tokens, b.tokens) and torch.equal(a.hidden, b.hidden) and a.answer == b.answer


@pytest.mark.parametrize("family", ["llama", "gemma4_unified"])
def test_a_trained_head_is_a_start(family: str, tmp_path: Path) -> None:
    first = training_run(tmp_path / "first", family)
    list(first.run())
    start = read_start(tmp_path / "first", first.backbone)
    assert start.form == first.form or family.startswith("gemma4")
    second = training_run(tmp_path / "second", family, budget=TimeBudget(steps=1, tokens=300), start=start)
    events = list(second.run())
    assert torch.equal(second.trainer.candidates.ids, first.trainer.candidates.ids)
    scores = [event.real for event in events if isinstance(event, Scored)]
    assert scores[0] == max(score["real"] for score in first.progress.scores)  # 8 bits hold 8 bits
    assert start.trained_for is None
    assert read_start(tmp_path / "first", decoder_of(tiny_model(family, seed=1))).trained_for == "tiny"
    with pytest.raises(ValueError, match=r"first: .*(made for another backbone|stores none there)"):
        read_start(tmp_path / "first", decoder_of(tiny_model("gemma3" if family == "llama" else "gemma4-e2b")))


def test_a_start_may_have_more_states_and_other_bits(tmp_path: Path) -> None:
    first = training_run(tmp_path / "first")
    list(first.run())
    start = read_start(tmp_path / "first", first.backbone, bits=8, aux_layers=(0, 2))
    second = training_run(tmp_path / "second", budget=TimeBudget(steps=3, tokens=300), start=start)
    scores = [event.real for event in second.run() if isinstance(event, Scored)]
    assert scores[0] == max(score["real"] for score in first.progress.scores), "new states say nothing at first"
    assert second.trainer.network["fuse.weight"].abs().sum() > 0
    again = read_start(tmp_path / "second", first.backbone, bits=4)
    assert again.provenance["score"]["real"] == max(score["real"] for score in second.progress.scores)
    assert isinstance(again.form, OwnForm) and (again.form.config.aux_layers, again.form.bits) == ((0, 2), 4)
    with pytest.raises(ValueError, match=r"fuses the states of layers \[0, 2\].*--aux-layers can add others"):
        read_start(tmp_path / "second", first.backbone, aux_layers=(1,))
    wider = read_start(tmp_path / "second", first.backbone, bits=8, aux_layers=(0, 1, 2))
    hidden = first.backbone.spec.hidden_size
    low, new, high = wider.tensors["fuse.weight"].view(hidden, 3, hidden).unbind(1)  # [hidden, 3 * hidden]
    had = read_start(tmp_path / "second", first.backbone).tensors["fuse.weight"].view(hidden, 2, hidden)
    assert torch.equal(torch.stack((low, high), dim=1), had) and not new.any()
    gemma = training_run(tmp_path / "gemma", "gemma4_unified", TimeBudget(steps=1, tokens=300))
    list(gemma.run())
    assert read_start(tmp_path / "gemma", gemma.backbone).provenance["trained"]["steps"] <= 1
    with pytest.raises(ValueError, match="without --aux-layers"):
        read_start(tmp_path / "gemma", gemma.backbone, aux_layers=(1,))


def test_a_mean_records_once_what_its_heads_went_on_from(tmp_path: Path) -> None:
    first = training_run(tmp_path / "first")
    list(first.run())
    head = read_start(tmp_path / "first", first.backbone)
    zero = {"cpu": "0", "start": None}
    one = {"cpu": "1", "start": {"name": "zero", "provenance": zero, "trained_for": None}}
    branch, other = ({"cpu": "2", "start": {"name": "one", "provenance": parent}} for parent in (one, {"cpu": "3"}))
    late = {"cpu": "4", "start": {"name": "zero", "provenance": zero}}
    further = {"cpu": "5", "start": {"name": "branch", "provenance": branch, "trained_for": "it"}}
    made = {"further": further, "branch": branch, "late": late, "other": other, "text": "any JSON", "none": None}
    start = head._replace(provenance=one)
    record = start.record("one", {name: head._replace(provenance=about) for name, about in made.items()})
    assert record["name"] == "one" and record["provenance"] == one and record["trained_for"] is None
    begun = {"name": "branch", "provenance": {"cpu": "2", "start": {"name": "one"}}, "trained_for": "it"}
    short = {"further": {"cpu": "5", "start": begun}, "late": {"cpu": "4", "start": {"name": "zero"}}}
    entries = {each["name"]: each.get("provenance", "told") for each in record["averaged_with"]}
    assert entries == made | short | {"branch": "told"}
    assert "averaged_with" not in start.record("one", {})


def test_a_start_may_be_the_mean_of_heads(tmp_path: Path) -> None:
    first = training_run(tmp_path / "first")
    list(first.run())
    start = read_start(tmp_path / "first", first.backbone)
    doubled = start._replace(tensors={name: 2 * tensor for name, tensor in start.tensors.items()})
    sixfold = start._replace(tensors={name: 6 * tensor for name, tensor in start.tensors.items()})
    mean = start.averaged({"doubled": doubled, "sixfold": sixfold})
    assert mean.form == start.form and mean.provenance == start.provenance
    for name, tensor in start.tensors.items():
        torch.testing.assert_close(mean.tensors[name], 3 * tensor, rtol=1e-6, atol=0)
    assert all(torch.equal(one, start.tensors[name]) for name, one in start.averaged({}).tensors.items())
    assert start.draft_ids is not None
    others = (start._replace(draft_ids=start.draft_ids.flip(0)), start._replace(draft_ids=None))
    wider = read_start(tmp_path / "first", first.backbone, bits=8, aux_layers=(0,))
    for other in (*others, wider):
        with pytest.raises(ValueError, match=r"^third: has another shape .* or proposes other tokens"):
            start.averaged({"second": doubled, "third": other})


def test_a_start_may_propose_other_tokens(tmp_path: Path) -> None:
    first = training_run(tmp_path / "first")
    list(first.run())
    start = read_start(tmp_path / "first", first.backbone).with_draft_vocab(96)
    second = training_run(tmp_path / "second", budget=TimeBudget(steps=1, tokens=300), start=start)
    list(second.run())
    ids, had = second.trainer.candidates.ids, first.trainer.candidates.ids
    assert (len(had), len(ids)) == (64, 96) and set(ids.tolist()) - set(had.tolist())
    made = with_candidates(start.tensors, had, ids, first.backbone)
    rows = {"embed_tokens.weight": first.backbone.head.rows(ids, torch.float32)}
    for name in ("embed_tokens.weight", "bigram.left.weight", "bigram.right.weight"):
        assert len(made[name]) == len(start.tensors[name]) + 32
        for slot, token in enumerate(ids.tolist()):
            new = rows[name][slot] if name in rows else torch.zeros(4, dtype=torch.float32)
            old = start.tensors[name][had.tolist().index(token)] if token in had.tolist() else new
            assert torch.equal(made[name][slot], old), (name, token)
    assert torch.equal(made["bigram.left.weight"][-1], start.tensors["bigram.left.weight"][-1]), "of all other tokens"
    assert all(made[name] is tensor for name, tensor in start.tensors.items() if made[name].shape == tensor.shape)
    assert read_start(tmp_path / "second", first.backbone).draft_ids.tolist() == ids.tolist()
    gemma = training_run(tmp_path / "gemma", "gemma4_unified", TimeBudget(steps=1, tokens=300))
    list(gemma.run())
    with pytest.raises(ValueError, match="without --draft-vocab"):
        read_start(tmp_path / "gemma", gemma.backbone).with_draft_vocab(32)


def test_prompts_that_are_all_too_long_are_not_asked_for_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drafter.data.build_dataset.TOO_LONG", 50)
    asked: list[Any] = [3] * 49 + [1] + [3] * 49 + [2]
    found = encode_prompts(chain(asked, repeat(3)), lambda length: torch.zeros(length, dtype=torch.int64), 2)
    assert [len(one.ids) for one in found] == [1, 2]


def test_prompts_may_run_out(tmp_path: Path) -> None:
    few = collector(tmp_path, count=HELD_OUT + PER_SHARD + 3)
    assert [size.shards for size in few.grow()] == [1, 2]
    assert len(read_shard(few.writer.shards[1])) == 3
    assert list(collector(tmp_path, count=HELD_OUT + PER_SHARD + 3).grow()) == []
    none = training_run(tmp_path / "none")
    none.collector = collector(tmp_path / "none", count=HELD_OUT, layers=none.spec.reads)
    with pytest.raises(ValueError, match="no prompts short enough"):
        list(none.run())


def test_minutes_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drafter.train.schedule.LEAST_ROWS", 100)  # on a busy machine 7 seconds are too few for more
    run = training_run(tmp_path, budget=TimeBudget(minutes=0.12, evaluate_minutes=0.01, tokens=300))
    events = list(run.run())
    assert sum(isinstance(event, Scored) for event in events) >= 2
    assert 1 < run.progress.training < 60


def test_budgets_that_make_no_sense() -> None:
    with pytest.raises(ValueError, match="either minutes or steps"):
        TimeBudget()
    with pytest.raises(ValueError, match="either minutes or steps"):
        TimeBudget(minutes=1, steps=1)
    with pytest.raises(ValueError, match="size of the training set"):
        TimeBudget(steps=1)


def test_a_folder_of_another_run_is_refused(tmp_path: Path) -> None:
    list(training_run(tmp_path, budget=TimeBudget(steps=2, tokens=100)).run())
    with pytest.raises(ValueError, match="another learning_rate"):
        list(training_run(tmp_path, settings=replace(SETTINGS, learning_rate=1.0)).run())
    with pytest.raises(ValueError, match=r"other settings \(answering\)"):
        collector(tmp_path, answering=replace(ANSWERING, max_new_tokens=99))
    (tmp_path / "training" / "progress.json").write_text("{")
    with pytest.raises(ValueError, match=r"progress\.json: not readable"):
        training_run(tmp_path)
