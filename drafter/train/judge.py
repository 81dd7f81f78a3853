"""A head's score while it is trained: drafts for held-out prompts in the real decoding loop, and the same offline.

What: `Judge`; `Scored`, one evaluation; `Progress`, which a run's folder keeps. Scores are compared with one another,
so all scores of a run are taken on the same prompts: as many as the first evaluation had time for.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from drafter.data.build_dataset import Collector
from drafter.data.features import Features, longest_text
from drafter.data.patience import Patience
from drafter.files.checkpoint import load_drafter
from drafter.train.evaluate import measure_drafts, simulate_acceptance
from drafter.train.trainer import Trainer
from specdec.model.decoder import Decoder
from specdec.util.atomic import replacing


@dataclass(frozen=True)
class Scored:
    """Describe an evaluation: mean acceptance length of drafts of the recipe's length, decoded, and simulated on
    texts."""

    step: int
    tokens: int
    seconds: float
    real: float
    offline: float
    per_position: tuple[float, ...]
    best: bool
    prompts: int  # that it was taken on


@dataclass(frozen=True)
class Progress:
    """Keep what is known of a run besides the weights: seconds of training, and the scores so far as JSON objects."""

    training: float = 0.0
    scores: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def read(cls, path: Path) -> Progress:
        """Return the progress that `write` left at `path`, or an empty one.

        Raises:
            ValueError: the file holds something else.
        """
        try:
            return cls(**json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else cls()
        except (ValueError, TypeError) as error:
            raise ValueError(f"{path}: not readable ({error}); delete it, its times and scores are then lost") from None

    def write(self, path: Path) -> None:
        """Write the progress to `path` as JSON, whole or not at all."""
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")


class Figures(NamedTuple):
    """Keep the figures of an evaluation: mean acceptance length, decoded and offline; acceptance by position; how many
    prompts."""

    real: float
    offline: float
    per_position: tuple[float, ...]
    prompts: int


class Judge:
    """Judge the heads of a run by drafts of `draft_length` tokens, on the first `prompts` of the held-out prompts."""

    def __init__(self, backbone: Decoder, collector: Collector, draft_length: int, prompts: int) -> None:
        self.backbone, self.collector, self.draft_length, self.prompts = backbone, collector, draft_length, prompts
        self.seconds = 0.0  # that the last evaluation took, and the next one may; making texts is not in it
        self._texts: list[Features] | None = None  # the backbone's answers, made when first needed

    def judge(
        self,
        head: Path,
        trainer: Trainer,
        embed: Callable[[Tensor], Tensor],
        patience: Callable[[], Patience],
        fixed: bool,
    ) -> Figures:
        """Score the head of `trainer`, as it is saved in `head`; each half of the evaluation lasts as long as
        `patience`.

        Unless `fixed`, prompts for which there was no time are left out from now on.
        """
        how, longest = self.collector.answering, longest_text(self.backbone, self.collector.layers)
        limit = patience()
        now = limit.now
        began = now()
        stats = measure_drafts(
            self.backbone,
            load_drafter(head),
            self.collector.held_out[: self.prompts],
            draft_length=self.draft_length,
            max_new_tokens=how.max_new_tokens,
            eos_ids=self.collector.eos_ids,
            temperature=how.temperatures[0],
            seed=how.seed,
            longest=longest,
            patience=limit,
        )
        self.seconds = now() - began
        if not fixed:
            self.prompts = stats.prompts
        if self._texts is None:
            self._texts = self.collector.held_out_texts(self.prompts, patience())
        began = now()
        offline = simulate_acceptance(trainer.network, embed, self._texts, trainer.candidates, self.draft_length)
        self.seconds += now() - began
        return Figures(stats.mean_acceptance_length, offline, tuple(stats.acceptance_per_position), stats.prompts)
