"""The settings of a request that decide which tokens are chosen: read, checked, and made into a sampler.

The processors are transformers' own, in the order in which its `generate` has them, so that a request and a call of
`generate` with the same settings and seed give the same text.
"""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec.engine.sampling import Sampler, Warping, mix
from specdec.server.body.objects import Fields
from specdec.server.errors import bad_request


@dataclass(frozen=True)
class Defaults:
    """Describe what holds where a request says nothing: the model's own generation settings."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    suppress_tokens: Sequence[int] = ()

    @classmethod
    def of(cls, generation_config: Any) -> Defaults:
        """Return the defaults of a model's generation config; what it leaves open does not narrow the choice."""
        return cls(**cls.told(generation_config))

    @classmethod
    def told(cls, generation_config: Any) -> dict[str, Any]:
        """Return what a model's generation config says itself."""
        found = {name: getattr(generation_config, name, None) for name in cls.__dataclass_fields__}
        return {name: value for name, value in found.items() if value is not None}


@dataclass(frozen=True)
class Sampling:
    """Describe the settings of one request. `logprobs`: how many alternatives to report (None: no logprobs at all).
    `never`: token ids that are no answer's, as the model's generation config says. `model`: the name that was asked
    for. `store`: whether the text may be kept to learn from."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    max_tokens: int | None = None
    ignore_eos: bool = False
    choices: int = 1
    logprobs: int | None = None
    never: Sequence[int] = ()
    model: str = ""
    store: bool = True

    def seeds(self, texts: int) -> list[int | None]:
        """Return a seed for each of `texts`, the request's own for the first: those of a batch of `generate`."""
        if self.temperature == 0:
            return [None] * texts
        seed = secrets.randbits(62) if self.seed is None else self.seed
        return [seed if i == 0 else mix(mix(seed) + i) for i in range(texts)]

    def sampler(self, prompt_tokens: int, seed: int | None) -> Sampler:
        """Return the sampler of a text whose prompt has so many tokens."""
        processors = LogitsProcessorList()
        if self.repetition_penalty != 1:
            processors.append(RepetitionPenaltyLogitsProcessor(self.repetition_penalty))
        if self.presence_penalty or self.frequency_penalty:
            processors.append(_Penalties(prompt_tokens, self.presence_penalty, self.frequency_penalty))
        if self.logit_bias:
            processors.append(_Bias(self.logit_bias))
        if self.never:
            processors.append(_Bias(dict.fromkeys(self.never, -math.inf)))
        if seed is not None:
            if self.temperature != 1:
                processors.append(TemperatureLogitsWarper(self.temperature))
            if self.top_k:
                processors.append(TopKLogitsWarper(self.top_k))
            if self.top_p < 1:
                processors.append(TopPLogitsWarper(self.top_p))
            if self.min_p > 0:
                processors.append(MinPLogitsWarper(self.min_p))
        warping = Warping(self.temperature or 1.0, self.top_k, self.top_p, self.min_p)
        return Sampler(processors or None, seed, warping=warping)


def read_sampling(body: Fields, defaults: Defaults, vocabulary: int) -> Sampling:
    """Return the sampling settings in a request's body; raises ApiError for those that do not go together."""
    seed = body.get("seed")
    temperature = body.get("temperature", defaults.temperature)
    penalty = body.get("repetition_penalty", body.get("repeat_penalty", defaults.repetition_penalty))
    return Sampling(
        temperature=0.0 if temperature < 1e-5 else temperature,  # smaller ones overflow, and are greedy anyway
        top_p=body.get("top_p", defaults.top_p) or 1e-9,
        top_k=max(0, body.get("top_k", defaults.top_k)),
        min_p=body.get("min_p", defaults.min_p),
        repetition_penalty=penalty,
        presence_penalty=body.get("presence_penalty", 0.0),
        frequency_penalty=body.get("frequency_penalty", 0.0),
        logit_bias=_biases(body, vocabulary),
        seed=None if seed is None else seed % 2**63,
        stop=_stops(body),
        max_tokens=_max_tokens(body),
        ignore_eos=body.get("ignore_eos", False),
        choices=body.get("n", 1),
        never=defaults.suppress_tokens,
        model=body.get("model") or "",
        store=body.get("store", True),
    )


def read_logprobs(body: Fields) -> int | None:
    """Return how many alternatives are reported beside log probabilities; None where none are asked for. Raises
    ApiError."""
    told, alternatives = body.get("logprobs", False), body.get("top_logprobs", 0)
    if told is False and alternatives:
        raise bad_request("top_logprobs needs logprobs: true", "top_logprobs")
    if isinstance(told, bool):
        return alternatives if told else None
    return int(told)


def _max_tokens(body: Fields) -> int | None:
    names = ("max_completion_tokens", "max_tokens", "max_output_tokens")
    limit: int | None = next((body.get(name) for name in names if body.has(name)), None)
    return None if limit == -1 else limit


def _stops(body: Fields) -> tuple[str, ...]:
    stops = body.get("stop_sequences", body.get("stop", ()))
    return tuple(stop for stop in ([stops] if isinstance(stops, str) else stops) if stop)


def _biases(body: Fields, vocabulary: int) -> dict[int, float]:
    found: dict[int, float] = body.get("logit_bias", {})
    if (token := max(found, default=0)) >= vocabulary:
        raise bad_request(f"logit_bias: {token} is no token id below {vocabulary}", "logit_bias")
    return {token: max(-100.0, min(100.0, bias)) for token, bias in found.items()}


class _Penalties:
    """Lower the scores of tokens that the answer has already: once for being there, and once for each time."""

    def __init__(self, prompt_tokens: int, presence: float, frequency: float) -> None:
        self.prompt_tokens, self.presence, self.frequency = prompt_tokens, presence, frequency

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        tokens, counts = torch.unique(input_ids[0, self.prompt_tokens :], return_counts=True)  # [distinct], [distinct]
        scores[0, tokens] -= self.presence + self.frequency * counts.to(scores.dtype)
        return scores


class _Bias:
    """Add to the scores of given tokens."""

    def __init__(self, biases: Mapping[int, float]) -> None:
        self._ids = torch.tensor(list(biases), dtype=torch.int64)  # [biased]
        self._values = torch.tensor(list(biases.values()), dtype=torch.float32)  # [biased]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[0, self._ids.to(scores.device)] += self._values.to(scores.device)
        return scores
