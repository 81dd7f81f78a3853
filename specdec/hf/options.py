"""The arguments of `generate` besides transformers' own."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from specdec.drafting.draft_length import AdaptiveLength
from specdec.drafting.protocol import DraftLength, FixedLength
from specdec.engine.constraints import Constraint
from specdec.engine.sampling import mix
from specdec.engine.stats import Round


@dataclass(frozen=True)
class Options:
    """Describe the arguments of `generate` besides transformers' own.

    `speculation`: False decodes plainly. `draft_length`: "adaptive", or a number of tokens. `seed`: of the noise that
    sampling uses; None draws a seed from torch's global generator, so that `torch.manual_seed` rules. `reuse`: False
    computes the whole prompt, even where an earlier text began with it, and keeps nothing of this text. `on_round` is
    called with a `Round` after every round. `constraint` says what the text of each row must look like. `adapter`: the
    name of one of the model's adapters; None: its default, "none": no adapter.
    """

    speculation: bool = True
    draft_length: str | int = "adaptive"
    seed: int | None = None
    reuse: bool = True
    on_round: Callable[[Round], None] | None = None
    constraint: Constraint | None = None
    adapter: str | None = None

    def lengths(self, adaptive: AdaptiveLength) -> DraftLength:
        """Return what chooses draft lengths: `adaptive` itself, or a fixed length, 0 without speculation.

        Raises ValueError: `draft_length` is neither "adaptive" nor a whole number from 0.
        """
        if not self.speculation:
            return FixedLength(0)
        if isinstance(self.draft_length, str) and self.draft_length == "adaptive":
            return adaptive
        length = _whole(self.draft_length)
        if length is None:
            raise ValueError(f"draft_length must be 'adaptive' or a number of tokens, got {self.draft_length!r}")
        return FixedLength(length)

    def seeds(self, rows: int, sample: bool) -> list[int | None]:
        """Return one seed per row; the first row's is the request's own, so that a batch of one equals one prompt."""
        if not sample:
            return [None] * rows
        seed = _whole(self.seed) if self.seed is not None else int(torch.randint(0, 2**62, (1,), device="cpu"))
        if seed is None or seed < 0:
            raise ValueError(f"seed must be a whole number from 0, got {self.seed!r}")
        return [seed if row == 0 else mix(mix(seed) + row) for row in range(rows)]


def _whole(value: Any) -> int | None:
    """Return `value` as an int, numpy's and torch's whole numbers too; None for anything else."""
    try:
        return None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        return None
