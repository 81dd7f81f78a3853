"""A training run, from prompts to a head that is in use: collect, begin, train, judge by real decoding, keep the best.

What: `Course`, whose `run` yields what happened as it happens. All of it lives in one folder:

    config.json, mtp.gguf        the best head so far, there from the first evaluation on
    training/set/                the training set, a shard at a time
    training/state.pt            all that the next step depends on
    training/progress.json       time spent on training, and the scores so far

A run that was stopped goes on when it is started again; with `steps` it ends with the weights of one that was not.

Under `torchrun` the first process collects, judges and saves; all of them train.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, distributed

from drafter.checkpoint import load_drafter
from drafter.collect import Collector, held_out_texts
from drafter.dataset import Dataset, Size, frequent, size
from drafter.evaluate import drafted, walked
from drafter.features import Features, longest_text
from drafter.form import Form, Start, Trained
from drafter.initial import initial_tensors
from drafter.loss import Candidates
from drafter.network import Network
from drafter.training import Settings, StepReport, Trainer
from specdec.atomic import replacing
from specdec.model.decoder import Decoder

SAVE_SECONDS = 120.0  # between states; a kill loses less than that


@dataclass(frozen=True)
class Budget:
    """How long: `minutes` in all, of which `collecting` is the share that goes into data, or `steps` of training.

    `tokens`: of the training set, at most; with `steps` also at least.
    """

    minutes: float | None = None
    steps: int | None = None
    tokens: int | None = None
    collecting: float = 0.55
    evaluate_minutes: float = 4.0

    def __post_init__(self) -> None:
        if (self.minutes is None) == (self.steps is None):
            raise ValueError("say how long to train: either minutes or steps")
        if self.steps is not None and self.tokens is None:
            raise ValueError("a number of steps needs a size of the training set too, in tokens")


@dataclass(frozen=True)
class Began:
    """Training begins, or goes on: shape of the head, and how much of the set's choices its candidates cover."""

    parameters: int
    candidates: int
    coverage: float
    step: int


@dataclass(frozen=True)
class Scored:
    """An evaluation: mean acceptance length of drafts of `draft_length` tokens, decoded for real, and `walked`."""

    step: int
    tokens: int
    seconds: float
    real: float
    offline: float
    per_position: tuple[float, ...]
    best: bool


@dataclass(frozen=True)
class Progress:
    """What is known besides the weights."""

    training: float = 0.0
    scores: list[dict[str, Any]] = field(default_factory=list)


Event = Size | Began | StepReport | Scored


class Course:
    """Trains a head of `form` for `backbone` in `folder`; see the module."""

    def __init__(
        self,
        folder: Path,
        backbone: Decoder,
        collector: Collector,
        form: Form,
        settings: Settings,
        budget: Budget,
        about: dict[str, Any],
        start: Start | None = None,
    ) -> None:
        """`about`: what the head's provenance says besides what is known here. `start`: a head of this form to go on
        from, instead of the backbone's last layers. Raises ValueError: an impossible shape."""
        self.folder, self.backbone, self.collector = folder, backbone, collector
        self.form, self.settings, self.budget, self.about = form, settings, budget, about
        self.spec, self.start = form.spec(backbone.spec), start
        self.progress = self._progress()
        self.done = 0.0  # of training, 0..1
        self.first = not _parallel() or distributed.get_rank() == 0

    @property
    def state(self) -> Path:
        return self.folder / "training" / "state.pt"

    def run(self) -> Iterator[Event]:
        """All of it, or what is left of it. Raises ValueError when what is in the folder does not fit."""
        if self.first:
            yield from self._collect()
        if _parallel():
            distributed.barrier()
        self.trainer, began = self._begin()
        yield began
        yield from self._train(self.trainer)

    # Collecting

    def _collect(self) -> Iterator[Size]:
        found = self.collector.size()
        yield found
        if self.state.is_file():
            return  # the set of a run that has begun to train stays as it is
        growing = self.collector.grow()
        while not self._enough(found):
            grown = next(growing, None)
            if grown is None:
                break  # the prompts are used up
            found = grown
            yield found
        if not found.tokens:
            raise ValueError("there are no prompts short enough to learn from; give others with --data")

    def _enough(self, found: Size) -> bool:
        budget = self.budget
        if budget.tokens is not None and found.tokens >= budget.tokens:
            return True
        seconds = None if budget.minutes is None else budget.minutes * 60 * budget.collecting
        return found.shards > 0 and seconds is not None and found.seconds >= seconds

    # Training

    def _begin(self) -> tuple[Trainer, Began]:
        dataset, backbone = Dataset(self.collector.writer.folder), self.backbone
        self.collected = size(dataset.shards)
        vocab = backbone.spec.vocab_size
        wanted = None if self.start is None else self.start.draft_ids
        ids, coverage = frequent(dataset, vocab, self.form.draft_vocab or vocab, wanted)
        teacher = backbone.head.rows(ids, torch.float32) if self.settings.recipe.soft else None
        candidates = Candidates.of(ids, vocab, teacher)
        going_on = self.state.is_file()
        if self.start is not None:
            tensors = self.start.tensors
        else:
            texts = () if going_on else (text for _, text in dataset.texts(self.settings.seed, epochs=1))
            tensors = initial_tensors(self.spec, backbone, ids, texts, self.settings.seed)
        network = Network(self.spec, tensors)
        trainer = Trainer(network, dataset, self._embed, candidates, self.settings)
        if going_on:
            trainer.restore(self.state)
        parameters = sum(p.numel() for p in network.parameters())
        return trainer, Began(parameters, len(ids), coverage, trainer.step_number)

    def _train(self, trainer: Trainer) -> Iterator[StepReport | Scored]:
        texts = held_out_texts(self.collector) if self.first else []
        clock = _Clock(self.progress.training)
        saved = scored = clock.seconds
        try:
            if self.first and not self.progress.scores:
                yield self._score(trainer, texts, clock)
            while (done := self._share(trainer, clock)) < 1:
                self.done = done
                yield trainer.step(done)
                if not self.first:
                    continue
                if clock.seconds - saved >= SAVE_SECONDS:
                    self._save(trainer, clock)
                    saved = clock.seconds
                if clock.seconds - scored >= self.budget.evaluate_minutes * 60:
                    yield self._score(trainer, texts, clock)
                    scored = clock.seconds
            if self.first and (not self.progress.scores or self.progress.scores[-1]["step"] != trainer.step_number):
                yield self._score(trainer, texts, clock)
        finally:
            if self.first:
                self._save(trainer, clock)

    def _share(self, trainer: Trainer, clock: _Clock) -> float:
        """The share of training that is done, the same on every process."""
        if self.budget.steps is not None:
            return trainer.step_number / self.budget.steps
        assert self.budget.minutes is not None
        share = clock.seconds / max(1e-9, self.budget.minutes * 60 - self.collected.seconds)
        if _parallel():
            agreed = torch.tensor(share, dtype=torch.float32)
            distributed.broadcast(agreed, 0)
            share = float(agreed)
        return share

    def _score(self, trainer: Trainer, texts: list[Features], clock: _Clock) -> Scored:
        k, collector = self.settings.recipe.steps, self.collector
        scores = self.progress.scores
        trial = self.folder / "training" / "trial"
        self._write(trial, trainer, None)
        how = collector.answering
        stats = drafted(
            self.backbone,
            load_drafter(trial),
            collector.held_out,
            draft_length=k,
            max_new_tokens=how.max_new_tokens,
            ends=collector.ends,
            temperature=how.temperatures[0],
            seed=how.seed,
            longest=longest_text(self.backbone, collector.layers),
        )
        positions = tuple(stats.acceptance_per_position)
        real = stats.mean_acceptance_length
        best = all(real > score["real"] for score in scores)
        offline = walked(trainer.network, self._embed, texts, trainer.candidates, k)
        found = Scored(trainer.step_number, trainer.tokens, clock.seconds, real, offline, positions, best)
        self._note(scores=[*scores, asdict(found)], training=clock.seconds)
        if best:
            self._write(self.folder, trainer, found)
        return found

    def _write(self, folder: Path, trainer: Trainer, score: Scored | None) -> None:
        about = {
            **self.about,
            "set": {**trainer.dataset.about, **self.collected._asdict()},
            "trained": {"steps": trainer.step_number, "tokens": trainer.tokens, **asdict(self.settings)},
            "score": None if score is None else asdict(score),
        }
        tensors, ids = trainer.network.tensors(), trainer.candidates.ids
        self.form.save(folder, Trained(tensors, ids, self.backbone, about, self.settings.recipe.steps))

    def _save(self, trainer: Trainer, clock: _Clock) -> None:
        trainer.save(self.state)
        self._note(training=clock.seconds)

    def _embed(self, ids: Tensor) -> Tensor:
        return self.backbone.embed(ids).float().clone()  # not an inference tensor, which gradients refuse

    # What is known besides

    def _progress(self) -> Progress:
        path = self.folder / "training" / "progress.json"
        try:
            return Progress(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else Progress()
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not readable ({error}); delete it, its times and scores are then lost") from None

    def _note(self, **changes: Any) -> None:
        self.progress = Progress(**{**asdict(self.progress), **changes})
        path = self.folder / "training" / "progress.json"
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(asdict(self.progress)) + "\n", encoding="utf-8")


class _Clock:
    """Seconds of training, those of earlier runs included."""

    def __init__(self, before: float, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._began = now, now() - before

    @property
    def seconds(self) -> float:
        return self._now() - self._began


def _parallel() -> bool:
    return distributed.is_available() and distributed.is_initialized()
