"""A clock that only a model's work moves: what a slow one takes, without the wait."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
from torch import Tensor

from drafter.train.trainer import StepReport, Trainer
from specdec.cache import KVCache
from specdec.model.decoder import Decoder


class ScriptedClock:
    """`clock()` is the time in seconds; a row of a pass takes `row` of them, a step `step` and a row's for each token.

    Not for several threads.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, row: float, step: float = 0.0) -> None:
        self.seconds, self.row = 0.0, row
        forward_many, one_step = Decoder.forward_many, Trainer.step

        def slow_pass(decoder: Decoder, ids: Sequence[Tensor], caches: Sequence[KVCache], *more: Any) -> Tensor:
            self.seconds += self.row * sum(map(len, ids))
            return forward_many(decoder, ids, caches, *more)

        def slow_step(trainer: Trainer, *how: Any) -> StepReport:
            report = one_step(trainer, *how)
            self.seconds += step + self.row * report.tokens
            return report

        monkeypatch.setattr(Decoder, "forward_many", slow_pass)
        monkeypatch.setattr(Trainer, "step", slow_step)

    def __call__(self) -> float:
        return self.seconds
