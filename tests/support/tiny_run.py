"""Whole training runs on the tiny models of `tiny.py`: a few prompts and steps of each, a second or two long."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from drafter.data.build_dataset import Collector
from drafter.files.formats import Start, form_for
from drafter.settings import Answering, Recipe, Shape, TimeBudget, TrainerSettings
from drafter.train.run import TrainingRun
from specdec.model.decoder import Decoder
from tests.support.tiny import prompt, tiny_model
from tests.support.tiny_decoder import quantised

PER_SHARD, HELD_OUT = 12, 8  # fewer than usual: several shards and evaluations in a second or two
ANSWERING = Answering(max_new_tokens=32, temperatures=(0.0, 0.7), max_batch=16)
SETTINGS = TrainerSettings(Recipe(steps=3, deeper=0.5, soft=True), learning_rate=3e-3, batch_tokens=200, warmup=3)
BUDGET = TimeBudget(steps=12, tokens=700)


def backbone(family: str) -> Decoder:
    """The tiny model in blocks of 8 bits, whose passes are a native call each and not one for every operation."""
    return quantised(family, "int8")


def make_shards_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("drafter.data.build_dataset.PER_SHARD", PER_SHARD)
    monkeypatch.setattr("drafter.data.build_dataset.HELD_OUT", HELD_OUT)


def prompts(count: int = 1000) -> Iterator[Tensor]:
    return (prompt(3 + i % 6, seed=i)[0] for i in range(count))


def collector(
    folder: Path,
    family: str = "llama",
    count: int = 1000,
    answering: Answering = ANSWERING,
    layers: Sequence[int] | None = None,
    aux_layers: Sequence[int] = (),
) -> Collector:
    layers = tuple(backbone(family).spec.shared_kv_layers.values()) if layers is None else layers
    place = folder / "training" / "set"
    return Collector(place, backbone(family), layers, prompts(count), frozenset(), answering, {}, aux_layers)


def training_run(
    folder: Path,
    family: str = "llama",
    budget: TimeBudget = BUDGET,
    settings: TrainerSettings = SETTINGS,
    start: Start | None = None,
    **more: Any,
) -> TrainingRun:
    decoder: Decoder = backbone(family)
    text = tiny_model(family).config.get_text_config()
    shape = Shape(draft_vocab=64, bigram=0 if family.startswith("gemma4") else 4)
    form = form_for(shape, decoder.spec, text) if start is None else start.form
    spec = form.spec(decoder.spec)
    answers = collector(folder, family, layers=spec.reads, aux_layers=spec.aux_layers)
    return TrainingRun(folder, decoder, answers, form, settings, budget, {"backbone_name": "tiny"}, start, **more)
