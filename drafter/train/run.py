"""A training run, from prompts to a head that is in use: collect, begin, train, judge by real decoding, keep the best.

What: `TrainingRun`, whose `run` yields every event as it happens. All files of a run are in one folder:

    config.json, mtp.gguf        the best head so far, there from the beginning of training on
    training/set/                the training set, a shard at a time
    training/state.pt            all that the next step depends on
    training/progress.json       time spent on training, and the scores so far

A run that was stopped goes on when it is started again; with `steps` it ends with the weights of an unstopped run.

Under `torchrun` the first process collects, judges and saves; all of them train.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, distributed

from drafter.data.build_dataset import Collector
from drafter.data.dataset import Dataset, Size, frequent, size
from drafter.data.features import Features
from drafter.data.patience import PATIENT, USUAL, Intervals, Now
from drafter.files.formats import Form, Start, Trained
from drafter.settings import TimeBudget, TrainerSettings
from drafter.train.initial import initial_tensors, with_candidates
from drafter.train.judge import Judge, Progress, Scored
from drafter.train.loss import Candidates
from drafter.train.model import Network
from drafter.train.optimizer import is_parallel, rank_and_count
from drafter.train.schedule import Clock, Pace, Schedule, Step, rows_per_second, side_by_side
from drafter.train.trainer import StepReport, Trainer
from specdec.model.decoder import Decoder

COLLECTING, TRAINING = "collecting texts", "training"


@dataclass(frozen=True)
class Began:
    """Tell that training begins, or goes on: shape of the head, and the share of choices that its candidates cover."""

    parameters: int
    candidates: int
    coverage: float
    step: int


Event = Size | Began | StepReport | Scored


class Status(NamedTuple):
    """Tell where a run is, at any moment.

    `done` 0..1 of the phase; `left`: seconds to the end of the run, where that is known. `tokens`: while collecting,
    those of the training set, texts under way included; from training on, those that were trained on. `real`: the best
    score so far.
    """

    phase: str
    done: float
    left: float | None
    tokens: int
    step: int
    real: float | None


class TrainingRun:
    """Train a head of `form` for `backbone` in `folder`; the module's docstring lists the files."""

    def __init__(
        self,
        folder: Path,
        backbone: Decoder,
        collector: Collector,
        form: Form,
        settings: TrainerSettings,
        budget: TimeBudget,
        about: dict[str, Any],
        start: Start | None = None,
        intervals: Intervals = USUAL,
        began: float | None = None,
        now: Now = time.monotonic,
    ) -> None:
        """Read the progress and the training set of earlier sittings from `folder`.

        `about`: what the caller adds to the head's provenance. `start`: a head of this form to go on from, instead of
        the backbone's last layers. `began`: when, on the clock `now`, the budget's minutes began (None: now). Raises
        ValueError: an impossible shape.
        """
        self.folder, self.backbone, self.collector = folder, backbone, collector
        self.form, self.settings, self.about, self.intervals = form, settings, about, intervals
        self.spec, self.start = form.spec(backbone.spec), start
        self.progress = Progress.read(self._progress_file)
        self.collected = collector.size()
        used = self.collected.seconds + self.progress.training
        self.schedule = Schedule(budget, used, now() if began is None else began, now)
        self.done = 0.0  # of the phase, 0..1
        self.phase = "beginning"
        self.first = rank_and_count()[0] == 0
        self.trainer: Trainer | None = None
        self._saved = -1  # the step that the state on disk is of, as far as this sitting knows

    @property
    def state(self) -> Path:
        """Return the file of the trainer's state, which a run that goes on begins with."""
        return self.folder / "training" / "state.pt"

    @property
    def before(self) -> dict[str, Any] | None:
        """Return the score of the head that training began with; None until it is known."""
        return self.progress.scores[0] if self.progress.scores else None

    @property
    def status(self) -> Status:
        """Return where the run is now; another thread may ask while `run` is under way."""
        left = max(0.0, self.schedule.left) if self.schedule.limited else None
        best = max((float(score["real"]) for score in self.progress.scores), default=None)
        if (trainer := self.trainer) is not None:
            return Status(self.phase, self.done, left, trainer.tokens, trainer.step_number, best)
        if self.phase != COLLECTING:
            return Status(self.phase, self.done, left, self.collected.tokens, 0, best)
        before, (began, until), most = self._before, self._collecting, self.schedule.budget.tokens
        tokens = before + max(self.collected.tokens - before, self.collector.fresh)
        done = max((self.schedule.now() - began) / max(1e-9, until - began), tokens / most if most else 0.0)
        return Status(self.phase, min(1.0, done), left, tokens, 0, best)

    def run(self) -> Iterator[Event]:
        """Run all phases, or those that are left, and yield their events.

        Raises ValueError when the files in the folder do not fit, or the minutes are too few to begin.
        """
        if self.first:
            yield from self._collect()
        if is_parallel():
            distributed.barrier()
        self.phase, self.done = "beginning", 0.0
        trainer, began = self._begin()
        self.trainer = trainer
        yield began
        yield from self._train(trainer)

    # Collecting

    def _collect(self) -> Iterator[Size]:
        found, schedule = self.collected, self.schedule
        yield found
        if self.state.is_file():
            return  # the set of a run that has begun to train stays as it is
        how, speed = self.collector.answering, rows_per_second(self.backbone, schedule.now)
        if not found.shards:
            schedule.check(speed)
        patience = schedule.collecting(found.seconds)
        self._before, self._collecting = found.tokens, (schedule.now(), patience.until)
        self.phase = COLLECTING
        max_batch = side_by_side(speed, how.max_new_tokens, how.max_batch)
        growing = self.collector.grow(patience, self.intervals, max_batch)
        while not self._enough(found):
            grown = next(growing, None)
            if grown is None:
                break  # the prompts are used up, or the time
            self.collected = found = grown
            yield found
        if not found.tokens:
            raise ValueError("there are no prompts short enough to learn from; give others with --data, or texts")

    def _enough(self, found: Size) -> bool:
        """Tell whether the set has its tokens; with steps, whole blocks of them, which do not depend on the time."""
        if self.schedule.budget.tokens is None or found.tokens < self.schedule.budget.tokens:
            return False
        return self.schedule.limited or self.collector.whole_blocks(found)

    # Training

    def _begin(self) -> tuple[Trainer, Began]:
        dataset, backbone = Dataset(self.collector.writer.folder), self.backbone
        self.collected = size(dataset.shards)
        vocab = backbone.spec.vocab_size
        wanted = None if self.start is None or self.start.renewed else self.start.draft_ids
        ids, coverage = frequent(dataset, vocab, self.form.draft_vocab or vocab, wanted)
        teacher = backbone.head.rows(ids, torch.float32) if self.settings.recipe.soft else None
        candidates = Candidates.of(ids, vocab, teacher)
        going_on = self.state.is_file()
        if self.start is not None:
            tensors = self.start.tensors
            if self.start.renewed:
                tensors = with_candidates(tensors, self.start.draft_ids, ids, backbone)
        else:
            tensors = initial_tensors(self.spec, backbone, ids, self._to_fit(dataset, going_on), self.settings.seed)
        network = Network(self.spec, tensors)
        trainer = Trainer(network, dataset, self._embed, candidates, self.settings, self.form.stored)
        if going_on:
            trainer.restore(self.state)
        parameters = sum(p.numel() for p in network.parameters())
        return trainer, Began(parameters, len(ids), coverage, trainer.step_number)

    def _to_fit(self, dataset: Dataset, going_on: bool) -> Iterator[Features]:
        """Yield the texts that a new head is fitted to, as many as there is time for; none where training goes on."""
        if going_on:
            return
        patience = PATIENT if is_parallel() else self.schedule.fitting()  # every process has to make the same of it
        for _, text in dataset.texts(self.settings.seed, epochs=1):
            yield text
            if patience.over():
                return

    def _train(self, trainer: Trainer) -> Iterator[StepReport | Scored]:
        schedule = self.schedule
        clock = Clock(self.progress.training, schedule.now)
        pace = Pace(schedule, clock)
        saved = scored = clock.seconds
        whole = True  # Between steps: a step that was cut short leaves a state that no whole run has.
        judge = (
            Judge(self.backbone, self.collector, self.settings.recipe.steps, self._prompts_judged())
            if self.first
            else None
        )
        try:
            if judge and not (self.folder / "config.json").is_file():
                self._write(self.folder, trainer, None)  # from now on there is a head, even after a kill
                self._save(trainer, clock)
            if judge and not self.progress.scores:
                yield self._score(trainer, judge, clock)
                pace.judging, scored = judge.seconds, clock.seconds
            while (step := self._next(trainer, pace)).done < 1:
                self.phase, self.done = TRAINING, step.done
                whole, before = False, clock.seconds
                report = trainer.step(step.done, step.tokens)
                whole = True
                pace.stepped(clock.seconds - before)
                yield report
                if not judge:
                    continue
                due = clock.seconds - scored >= max(schedule.budget.evaluate_minutes * 60, 4 * pace.judging)
                if due or clock.seconds - saved + pace.step >= self.intervals.state:
                    self._save(trainer, clock)
                    saved = clock.seconds
                if due and (not schedule.limited or schedule.left > 2 * pace.judging):
                    yield self._score(trainer, judge, clock)
                    pace.judging, scored = judge.seconds, clock.seconds
            if judge and (not self.progress.scores or self.progress.scores[-1]["step"] != trainer.step_number):
                self._save(trainer, clock)
                yield self._score(trainer, judge, clock)
        finally:
            if self.first and whole:
                self._save(trainer, clock)

    def _next(self, trainer: Trainer, pace: Pace) -> Step:
        """Return the step to come, the same on every process."""
        if self.schedule.budget.steps is not None:
            return Step(trainer.step_number / self.schedule.budget.steps, trainer.settings.batch_tokens)
        step = pace.next(trainer.step_number, trainer.settings.batch_tokens)
        if not is_parallel():
            return step
        agreed = torch.tensor(step, dtype=torch.float64)
        distributed.broadcast(agreed, 0)
        done, tokens = agreed.tolist()
        return Step(done, int(tokens))

    def _prompts_judged(self) -> int:
        """Return how many prompts the first score was taken on; all later scores are taken on the same prompts."""
        most = len(self.collector.held_out)
        return min([most, *(int(score.get("prompts", most)) for score in self.progress.scores[:1])])

    def _score(self, trainer: Trainer, judge: Judge, clock: Clock) -> Scored:
        self.phase, self.done = "judging", 0.0
        trial = self.folder / "training" / "trial"
        self._write(trial, trainer, None)
        scores = self.progress.scores
        figures = judge.judge(trial, trainer, self._embed, self.schedule.judging, fixed=bool(scores))
        best = all(figures.real > score["real"] for score in scores)
        found = Scored(trainer.step_number, trainer.tokens, clock.seconds, *figures[:3], best, figures.prompts)
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
        if self.start is not None:
            about["before"] = self.before
        tensors, ids = trainer.network.tensors(), trainer.candidates.ids
        self.form.save(folder, Trained(tensors, ids, self.backbone, about, self.settings.recipe.steps))

    def _save(self, trainer: Trainer, clock: Clock) -> None:
        if self._saved != trainer.step_number:
            trainer.save(self.state)
            self._saved = trainer.step_number
        self._note(training=clock.seconds)

    def _embed(self, ids: Tensor) -> Tensor:
        return self.backbone.embed(ids).float().clone()  # not an inference tensor, which gradients refuse

    @property
    def _progress_file(self) -> Path:
        return self.folder / "training" / "progress.json"

    def _note(self, **changes: Any) -> None:
        self.progress = replace(self.progress, **changes)
        self.progress.write(self._progress_file)
