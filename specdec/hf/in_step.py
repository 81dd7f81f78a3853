"""Batches whose logits processors or stopping criteria look at all rows at once.

transformers calls a processor once a step with all rows, `input_ids` [B, n] and `scores` [B, vocab]. Most of its own
processors treat a row without a look at the others. Such a row may be decoded by itself, and at its own pace, with the
same result. For all other processors and criteria (a user's, a grammar's, a watermark's, whatever knows the row's
number or counts its calls) `RowsInStep` repeats transformers' `GenerationMixin._sample` (5.17 to 5.23): all rows
advance by one token a step, rows that have ended are padded, and every processor and criterion is called once.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process, stopping_criteria
from transformers.generation.stopping_criteria import StoppingCriteriaList

from specdec.engine.sampling import Sampler
from specdec.engine.verify import Choice

# Exact classes: a derived class may look at anything. A class that a version of transformers lacks is left out. The
# classes that are missing here know the row's number (PrefixConstrained), hold the prompts of all rows (Encoder...),
# keep a state per row (SynthID), or call the model themselves (guidance).
_PROCESSORS = (
    "EpsilonLogitsWarper",
    "EtaLogitsWarper",
    "ExponentialDecayLengthPenalty",
    "ForcedBOSTokenLogitsProcessor",
    "ForcedEOSTokenLogitsProcessor",
    "InfNanRemoveLogitsProcessor",
    "LogitNormalization",
    "MinLengthLogitsProcessor",
    "MinNewTokensLengthLogitsProcessor",
    "MinPLogitsWarper",
    "NoBadWordsLogitsProcessor",
    "NoRepeatNGramLogitsProcessor",
    "RepetitionPenaltyLogitsProcessor",
    "SequenceBiasLogitsProcessor",
    "SuppressTokensAtBeginLogitsProcessor",
    "SuppressTokensLogitsProcessor",
    "TemperatureLogitsWarper",
    "TopHLogitsWarper",
    "TopKLogitsWarper",
    "TopPLogitsWarper",
    "TypicalLogitsWarper",
)
_CRITERIA = ("EosTokenCriteria", "MaxLengthCriteria", "StopStringCriteria")  # MaxTime is a clock of all rows


def _classes(module: Any, names: Iterable[str]) -> frozenset[type]:
    return frozenset(getattr(module, name) for name in names if hasattr(module, name))


ROW_BY_ROW = _classes(logits_process, _PROCESSORS) | _classes(stopping_criteria, _CRITERIA)


def needs_all_rows(processors: Iterable[Any], criteria: StoppingCriteriaList) -> bool:
    """Return whether rows decoded one by one could differ from rows that transformers decodes together."""
    if any(type(one) not in ROW_BY_ROW for one in (*processors, *criteria)):
        return True
    # Without an end token transformers does not pad a row that a stop string has ended: it goes on with the others.
    return not _pads(criteria) and any(type(one) is stopping_criteria.StopStringCriteria for one in criteria)


def _pads(criteria: StoppingCriteriaList) -> bool:
    return any(hasattr(one, "eos_token_id") for one in criteria)


class RowsInStep:
    """Choose the tokens of a whole batch, step by step, with transformers' processors and criteria."""

    def __init__(
        self,
        input_ids: Tensor,
        processors: Any,
        criteria: StoppingCriteriaList,
        samplers: Sequence[Sampler],
        pad: int,
        keep_scores: bool = False,
    ) -> None:
        """Keep the prompts, processors and criteria of the batch. `input_ids` [B, n] int64: the prompts as they were
        given. `samplers`: one of each row; `processors` replaces their own. `pad`: the token that follows an ended row.
        `keep_scores`: criteria see the `scores` so far."""
        self.input_ids, self.processors, self.criteria = input_ids, processors, criteria
        self.samplers, self.pad = samplers, pad
        self.scores: list[Tensor] = []  # [B, vocab] per step, after the processors; empty without `keep_scores`
        self._keep_scores, self._pads = keep_scores, _pads(criteria)
        self._going_on = [True] * len(samplers)

    def choose(self, rows: Sequence[Tensor], logits: Tensor) -> list[Choice]:
        """Return one choice for each of `rows` [n], from logits [B, vocab] float32."""
        scores = self.processors(self._shown(rows), logits.clone()) if self.processors else logits  # [B, vocab]
        if self._keep_scores:
            self.scores.append(scores)
        return [
            sampler.pick(logits[i], scores[i], len(rows[i]))
            if self._going_on[i] or not self._pads
            else Choice(self.pad, partial(scores.__getitem__, i))
            for i, sampler in enumerate(self.samplers)
        ]

    def ended(self, rows: Sequence[Tensor], choices: Sequence[Choice]) -> bool:
        """Return whether the criteria have ended all rows, which end with `choices` now."""
        done = self.criteria(self._shown(rows), tuple(self.scores) if self._keep_scores else None)  # [B] bool
        self._going_on = [going and not over for going, over in zip(self._going_on, done.tolist(), strict=True)]
        return not any(self._going_on)

    def _shown(self, rows: Sequence[Tensor]) -> Tensor:
        """Return the rows as processors see them: prompts as given, masked tokens where they stood, then emitted
        tokens."""
        given = self.input_ids
        return torch.cat((given, torch.stack([row[given.shape[1] :] for row in rows])), dim=1)  # [B, n]
