"""Training learns, and a run that was killed and taken up again ends with the same weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from drafter.config import MTPHeadConfig, head_spec, head_tensors
from drafter.data.answering import generate_answers
from drafter.data.dataset import Dataset, DatasetWriter, frequent
from drafter.files.head import as_stored
from drafter.settings import Recipe, TrainerSettings
from drafter.train.initial import initial_tensors
from drafter.train.loss import Candidates
from drafter.train.model import Network
from drafter.train.trainer import Trainer
from specdec.model.decoder import Decoder
from tests.support.tiny import FAMILIES, VOCAB, prompt
from tests.support.tiny_assistant import backbone

SETTINGS = TrainerSettings(
    recipe=Recipe(steps=2, deeper=1.0, feature_weight=2.0, soft=False), learning_rate=3e-3, batch_tokens=100, warmup=3
)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    folder = tmp_path_factory.mktemp("set")
    writer = DatasetWriter(folder, {"backbone": "llama"})
    asked = [prompt(4 + i % 5, seed=i)[0] for i in range(24)]
    layers = MTPHeadConfig.like(backbone("llama").spec).reads
    found = generate_answers(backbone("llama"), asked, layers=layers, max_new_tokens=25, eos_ids=frozenset())
    texts = [text for _, text in found]
    for at in range(0, 24, 8):
        writer.add(texts[at : at + 8])
    return Dataset(folder)


Stored = Callable[[str, torch.Tensor], torch.Tensor]


def trainer(dataset: Dataset, settings: TrainerSettings = SETTINGS, stored: Stored | None = None) -> Trainer:
    decoder: Decoder = backbone("llama")
    spec = head_spec(MTPHeadConfig.like(decoder.spec, depth=1, draft_vocab=48), decoder.spec)
    ids, coverage = frequent(dataset, VOCAB, 48)
    assert 0.4 < coverage <= 1
    network = Network(spec, initial_tensors(spec, decoder, ids))
    return Trainer(network, dataset, lambda t: decoder.embed(t).clone(), Candidates.of(ids, VOCAB), settings, stored)


def weights(run: Trainer) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in run.network.tensors().values()]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_head_begins_as_its_backbones_last_layers(family: str) -> None:
    decoder = backbone(family)
    if decoder.spec.per_layer_input:
        pytest.skip("its assistant is Google's, of another shape")
    ids = torch.arange(0, VOCAB, 3)
    spec = head_spec(replace(MTPHeadConfig.like(decoder.spec, depth=2, draft_vocab=len(ids)), bigram=4), decoder.spec)
    made = initial_tensors(spec, decoder, ids)
    assert {name: tuple(t.shape) for name, t in made.items()} == head_tensors(spec)
    assert torch.equal(made["embed_tokens.weight"], decoder.head.rows(ids, torch.float32))
    last = [layer for layer in decoder.layers if layer.spec.kind == spec.text.layers[-1].kind][-1]
    assert torch.equal(made["layers.1.mlp.down_proj.weight"], last.down.weight.dequantize())
    assert torch.equal(made["layers.1.input_layernorm.weight"], last.input_norm)


def test_it_learns(dataset: Dataset) -> None:
    run = trainer(dataset)
    first = run.step(0.0)
    for i in range(40):
        report = run.step(i / 40)
    assert report.cross_entropy < 0.7 * first.cross_entropy and report.feature < first.feature
    assert report.acceptance_length > first.acceptance_length
    assert 0 < report.learning_rate < first.learning_rate * 3
    assert report.step == 41 and run.tokens >= 4100


def test_a_run_that_was_put_down_ends_with_the_same_weights(dataset: Dataset, tmp_path: Path) -> None:
    whole = trainer(dataset)
    for i in range(12):
        whole.step(i / 12)
    cut = trainer(dataset)
    for i in range(5):
        cut.step(i / 12)
    cut.save(tmp_path / "state.pt", {"best": 1.5})
    again = trainer(dataset)
    assert again.restore(tmp_path / "state.pt") == {"best": 1.5}
    assert again.step_number == 5 and again.tokens == cut.tokens
    for i in range(5, 12):
        again.step(i / 12)
    assert all(torch.equal(a, b) for a, b in zip(weights(again), weights(whole), strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["state.pt"]


def coarse(name: str, tensor: torch.Tensor) -> torch.Tensor:
    return as_stored(name, tensor, 4)


def test_the_end_of_a_run_computes_with_the_weights_as_they_are_saved(dataset: Dataset) -> None:
    settings = replace(SETTINGS, quantised=0.25, bfloat16=False)
    aware, plain, rounded = (trainer(dataset, settings, stored) for stored in (coarse, None, None))
    own = weights(aware)
    with torch.no_grad():
        for name, parameter in rounded.network.by_name():
            parameter.copy_(coarse(name, parameter.detach()))
    losses = [run.step(0.75).loss for run in (aware, plain, rounded)]
    assert losses[0] == losses[2] != losses[1]
    # The own weights are moved, not the rounded ones: by as much as a step of the rate moves them.
    moved = [torch.dist(a, b) / b.numel() ** 0.5 for a, b in zip(weights(aware), own, strict=True)]
    off = [torch.dist(a, b) / b.numel() ** 0.5 for a, b in zip(weights(rounded), own, strict=True)]
    matrices = [i for i, tensor in enumerate(own) if tensor.dim() == 2]
    assert matrices and all(0 < moved[i] < off[i] for i in matrices)


def test_weights_are_not_rounded_before_the_end_of_a_run(dataset: Dataset) -> None:
    settings = replace(SETTINGS, quantised=0.25)
    assert trainer(dataset, settings, coarse).step(0.74).loss == trainer(dataset, settings).step(0.74).loss


def test_a_step_that_is_stopped_leaves_the_own_weights(dataset: Dataset) -> None:
    run = trainer(dataset, replace(SETTINGS, quantised=1.0), coarse)
    own = weights(run)

    def stop(_: torch.Tensor) -> torch.Tensor:
        raise KeyboardInterrupt

    run.embed = stop
    with pytest.raises(KeyboardInterrupt):
        run.step(0.5)
    assert all(torch.equal(a, b) for a, b in zip(weights(run), own, strict=True))


def test_what_cannot_be_taken_up(dataset: Dataset, tmp_path: Path) -> None:
    run = trainer(dataset)
    path = tmp_path / "state.pt"
    run.save(path)
    with pytest.raises(ValueError, match="another learning_rate"):
        trainer(dataset, replace(SETTINGS, learning_rate=1.0)).restore(path)
    other = trainer(dataset)
    other.candidates = Candidates.of(other.candidates.ids + 1, VOCAB)
    with pytest.raises(ValueError, match="training set has changed"):
        other.restore(path)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(ValueError, match="damaged checkpoint"):
        run.restore(path)
