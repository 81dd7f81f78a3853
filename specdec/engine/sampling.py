"""From a row of logits to a token: transformers' processors, or a native call in place of the last of them, and noise.

The noise of a token is a hash of (seed, position, token id), so it does not depend on which tokens survive, on the
order of evaluation or on how many rows a pass has. It is evaluated only for tokens that can still win.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specdec import kernels
from specdec.engine.verify import Choice

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
# SplitMix64's finaliser (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014).
_MULTIPLIERS = (0xBF58476D1CE4E5B9, 0x94D049BB133111EB)
_SHIFTS = (30, 27, 31)

# Uniforms are (n + 1/2) / 2^53, so Gumbel noise -log(-log u) lies within [-log(54 log 2), 54 log 2]: a token this far
# below the best score cannot win, and its noise need not be computed.
_REACH = 54 * math.log(2) + math.log(54 * math.log(2))

_WARPERS_HOME = "transformers.generation.logits_process"
_WARPERS = {
    "TemperatureLogitsWarper": "temperature",
    "TopKLogitsWarper": "top_k",
    "TopPLogitsWarper": "top_p",
    "MinPLogitsWarper": "min_p",
}

_TAIL = 12.0  # nats below the best: what a drafter leaves out where it has to sort

Processors = Callable[[Tensor, Tensor], Tensor]
"""`(input_ids [1, n], scores [1, vocab]) -> scores [1, vocab]`: transformers' LogitsProcessorList."""


@dataclass(frozen=True)
class Temperature:
    """Divide scores by a temperature, like transformers' `TemperatureLogitsWarper`."""

    temperature: float

    def __call__(self, tokens: Tensor, scores: Tensor) -> Tensor:
        """Return `scores` [1, vocab] divided by the temperature."""
        return scores / self.temperature


@dataclass(frozen=True)
class Warping:
    """Hold the settings of transformers' warpers, which are applied in this order. A drafter applies them to its own
    logits, a native choice to the backbone's."""

    temperature: float = 1.0
    top_k: int = 0  # 0: all
    top_p: float = 1.0
    min_p: float = 0.0

    @property
    def truncates(self) -> bool:
        """Return whether some scores may not be sampled."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @classmethod
    def of(cls, warpers: Processors | None) -> Warping:
        """Return the present settings of `warpers`, the second result of `split_warpers`."""
        if isinstance(warpers, Temperature):
            return cls(warpers.temperature)
        several: list[Any] = warpers if isinstance(warpers, list) else []
        settings: dict[str, Any] = {}
        for one in several:
            name = _WARPERS[type(one).__name__]
            settings[name] = getattr(one, name)
        return cls(**settings)

    def kept(self, scores: Tensor) -> Tensor:
        """Return the indices, ascending, of the scores [candidates] (float32, `temperature` applied) that may be
        sampled."""
        order = torch.nonzero(scores > scores.max() - _TAIL).squeeze(1)
        order = order[scores[order].argsort(descending=True, stable=True)][: self.top_k or None]
        shares = (scores[order].double() - scores[order[:1]].double()).exp()
        allowed = (shares.cumsum(0) - shares < self.top_p * shares.sum()) & (shares >= self.min_p)
        allowed[:1] = True
        return order[allowed].sort().values


@dataclass(frozen=True)
class Noise:
    """Hold the noise of a text's choices, known before there are logits. Token t wins at a position where
    `logits[t] / temperature + gumbel(key, t)` is largest.

    A drafter whose logits come close to the backbone's and which adds the same noise proposes the winner far more often
    than a drafter that proposes its own likeliest token (Gumbel coupling: Daliri, Musco, Suresh, arXiv 2408.07978).
    """

    seed: int
    warping: Warping = Warping()

    def keys(self, position: int, count: int) -> list[int]:
        """Return the noise keys of `count` positions, from `position` of the text (padding does not count)."""
        return [noise_key(self.seed, position + i) for i in range(count)]

    def chance(self, share: float, key: int, token: int) -> float:
        """Return how likely `token`, the winner with the noise of `key`, is right where a drafter gives it `share` of
        its probability, without temperature and noise.

        Noise g of the winner at temperature T makes e^(T g) p of its share p, and of the others' together about 1 + T
        times what they were: a fit, with which one power makes probabilities of the chances of greedy text and of
        temperatures up to 1 (docs/design.md, "Chances").
        """
        temperature = self.warping.temperature
        uniform = ((mix(key + (token - 1) * _GOLDEN) >> 11) + 0.5) * 2.0**-53
        noise = -math.log(-math.log(uniform))
        lead = share * math.exp(min(temperature * noise, 80.0))
        return lead / (lead + (1 - share) * (1 + temperature))

    def winner(self, scores: Tensor, key: int, ids: Tensor | None = None) -> int:
        """Return the index of the score that a drafter should propose: the largest sum with the noise of `key` among
        those that may be sampled; of scores that are no numbers the first of these.

        `scores` [candidates]: float32, the temperature applied; `ids` [candidates] int64: as in `gumbel_argmax`.
        """
        top, first = kernels.best(scores)
        if not math.isfinite(top):
            return first
        if not self.warping.truncates:
            return gumbel_argmax(scores, top, key, ids)
        kept = self.warping.kept(scores)
        return int(kept[gumbel_argmax(scores[kept], top, key, kept if ids is None else ids[kept])])


@dataclass(frozen=True)
class Sampler:
    """Choose tokens. `seed` is None for greedy decoding.

    `offset`: how many tokens of the row are padding, so that a prompt's noise does not depend on its padding.
    `warping`: the part of the processors that a drafter should know. Only drafters look at it: a wrong one costs time
    and changes no token.
    """

    processors: Processors | None = None
    seed: int | None = None
    offset: int = 0
    warping: Warping = Warping()

    @classmethod
    def at_temperature(cls, temperature: float, seed: int) -> Sampler:
        """Make a sampler with a temperature alone, like transformers' `TemperatureLogitsWarper`; greedy at 0."""
        if temperature == 0:
            return cls()
        return cls(Temperature(temperature), seed, warping=Warping(temperature))

    @property
    def noise(self) -> Noise | None:
        """Return the noise of the sampler's text; None for greedy decoding."""
        return None if self.seed is None else Noise(self.seed, self.warping)

    def choose(self, logits: Tensor, tokens: Tensor) -> Choice:
        """Return the choice for the position after `tokens` [n], from its `logits` [vocab] (float32).

        transformers' last warpers are called only where the native call cannot tell. Raises ValueError when the logits
        are not numbers, or when the processors leave no token.
        """
        if self.seed is None:
            return self.pick(logits, _processed(self.processors, tokens, logits), len(tokens))
        others, warpers = split_warpers(self.processors)
        scores = _processed(others, tokens, logits)
        if split_warpers(warpers)[0] is None:  # asked once more: the others may have changed what follows them
            key, warping = self._key(len(tokens)), Warping.of(warpers)
            token = kernels.sampled_token(scores, key, warping.temperature, warping.top_k, warping.top_p, warping.min_p)
            if token is not None:
                return Choice(token, partial(_processed, warpers, tokens, scores))
        return self.pick(logits, _processed(warpers, tokens, scores), len(tokens))

    def pick(self, logits: Tensor, scores: Tensor, position: int) -> Choice:
        """Return the choice at `position` of the row, from `scores` [vocab]: the position's `logits` [vocab] after the
        processors. Raises ValueError as `choose` does."""
        top, token = kernels.best(scores)
        if not math.isfinite(top):
            raise ValueError(_not_finite(logits, top, position))
        if self.seed is not None:
            token = gumbel_argmax(scores, top, self._key(position))
        return Choice(token, lambda: scores)

    def _key(self, position: int) -> int:
        assert self.seed is not None
        return noise_key(self.seed, position - self.offset)


def gumbel_argmax(scores: Tensor, top: float, key: int, ids: Tensor | None = None) -> int:
    """Return the index of the largest sum of score and noise.

    `scores` [candidates]: float32, the largest of them `top`, finite. `ids` [candidates] int64: the candidates' token
    ids, None where those are their indices.
    """
    found = kernels.gumbel_candidates(scores, top, top - _REACH, key, ids)
    if len(found) == 1:
        return int(found)
    tokens = found if ids is None else ids[found]
    # On the CPU wherever the logits are: the same noise on every device, and float64 where the device has none.
    noisy = scores[found].cpu().double() + gumbel(key, tokens.cpu())
    return int(found[noisy.argmax()])


def split_warpers(processors: Processors | None) -> tuple[Processors | None, Processors | None]:
    """Return the processors that have to be called, and the warpers at the end of the list that one native call can
    replace; None for an empty part.

    transformers appends its warpers to a user's own processors (`GenerationMixin._get_logits_processor`).
    """
    if type(processors) is Temperature:
        return None, processors
    if type(processors).__name__ != "LogitsProcessorList" or type(processors).__module__ != _WARPERS_HOME:
        return processors, None
    assert isinstance(processors, list)
    order = list(_WARPERS.values())
    first = len(processors)
    while first and (name := _warper(processors[first - 1])) in order:
        first -= 1
        order = order[: order.index(name)]  # what may stand before it
    others, warpers = (type(processors)(part) if part else None for part in (processors[:first], processors[first:]))
    return others, warpers


def _warper(one: object) -> str | None:
    """Return the name of the setting of `Warping` that says all that `one` does; None where there is none."""
    kind = type(one)  # exactly: a derived class may do anything
    name = _WARPERS.get(kind.__name__) if kind.__module__ == _WARPERS_HOME else None
    if name is None or not isinstance(getattr(one, name), int if name == "top_k" else int | float):
        return None
    plain = getattr(one, "min_tokens_to_keep", 1) == 1 and getattr(one, "filter_value", -math.inf) == -math.inf
    return name if plain else None


def _processed(processors: Processors | None, tokens: Tensor, scores: Tensor) -> Tensor:
    """Return `scores` [vocab] after the processors, which get a copy."""
    return scores if processors is None else processors(tokens[None], scores[None].clone())[0]  # [1, vocab] -> [vocab]


def _not_finite(logits: Tensor, top: float, position: int) -> str:
    if top == -math.inf and not torch.isnan(logits).any():
        return f"the logits processors forbid every token at position {position}; relax bad_words or the constraint"
    return (
        f"the logits at position {position} contain {'NaN' if math.isnan(top) else 'infinity'}: the weights are "
        "damaged or overflow this dtype; check the checkpoint, or load it with dtype=torch.float32"
    )


def noise_key(seed: int, position: int) -> int:
    """Return the 64-bit key of the noise at an absolute position."""
    return mix(mix(seed) ^ position)


def gumbel(key: int, ids: Tensor) -> Tensor:
    """Return standard Gumbel noise, float64, for token `ids` [n] under `noise_key`: a function of both alone."""
    bits = _hash(ids, key)  # [n] int64
    uniform = ((_shift_right(bits, 11)).double() + 0.5) * 2.0**-53
    return -torch.log(-torch.log(uniform))


def mix(value: int) -> int:
    """Return SplitMix64 of a 64-bit integer; it also derives the seeds of a batch's rows."""
    value = (value + _GOLDEN) & _MASK
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        value = ((value ^ (value >> shift)) * multiplier) & _MASK
    return value ^ (value >> _SHIFTS[-1])


def _hash(ids: Tensor, key: int) -> Tensor:
    """Return `mix` of key + id * golden ratio, elementwise; int64 arithmetic wraps like uint64's."""
    value = ids.long() * _signed(_GOLDEN) + _signed(key)
    for shift, multiplier in zip(_SHIFTS, _MULTIPLIERS, strict=False):
        value = (value ^ _shift_right(value, shift)) * _signed(multiplier)
    return value ^ _shift_right(value, _SHIFTS[-1])


def _shift_right(value: Tensor, bits: int) -> Tensor:
    """Shift logically: torch's own shift is arithmetic on int64."""
    return (value >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
