"""Sampled choices without the processors: the token that transformers' warpers and the noise give, or no answer."""

from __future__ import annotations

import itertools
import math
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from specdec import kernels
from specdec.engine.sampling import Noise, Sampler, Warping, noise_key, split_warpers
from specdec.server.generation.sampling import Sampling
from tests.support.native.kernel_paths import path  # noqa: F401
from tests.support.native.needs_native import needs_library

POSITION = 7
TEXT = torch.zeros(30, dtype=torch.int64)
TOKENS = TEXT[:POSITION]
SETTINGS = [
    Warping(*setting)
    for setting in itertools.product((1.0, 0.7, 1.6), (0, 1, 5, 64, 5000), (1.0, 0.95, 0.5, 0.0), (0.0, 0.05, 1.0))
]


def warpers(warping: Warping) -> LogitsProcessorList:
    """The processors that the server makes of these settings, as `generate` does."""
    w = warping
    sampling = Sampling(temperature=w.temperature, top_k=w.top_k, top_p=w.top_p, min_p=w.min_p)
    return LogitsProcessorList(cast(LogitsProcessorList | None, sampling.sampler(0, 0).processors) or [])


def chosen(logits: Tensor, warping: Warping, seed: int) -> int | None:
    key = noise_key(seed, POSITION)
    return kernels.sampled_token(logits, key, warping.temperature, warping.top_k, warping.top_p, warping.min_p)


def asked(logits: Tensor, warping: Warping, seed: int) -> int:
    """What the processors and the noise give."""
    scores = warpers(warping)(TOKENS[None], logits[None].clone())[0]
    return Sampler(seed=seed).pick(logits, scores, POSITION).token


def rows(vocabulary: int, kind: str, generator: torch.Generator) -> Tensor:
    """Logits [vocabulary] as a model may have them: `flat`, `steep`, `tied` in whole numbers, most `forbidden`."""
    x = torch.randn(vocabulary, generator=generator, dtype=torch.float32) * {"flat": 0.3}.get(kind, 2.5)
    if kind == "tied":
        return x.round()
    if kind == "forbidden":
        x[torch.rand(vocabulary, generator=generator, dtype=torch.float32) < 0.99] = -math.inf
        x[0] = 0.5
    if kind == "steep":
        x[torch.randint(0, vocabulary, (9,), generator=generator)] += 9
    return x


@pytest.mark.parametrize("kind", ["flat", "steep", "tied", "forbidden"])
def test_a_choice_is_that_of_the_processors(path: str, kind: str) -> None:  # noqa: F811
    generator = torch.Generator().manual_seed(3)
    answers = 0
    for number, (vocabulary, warping) in enumerate(itertools.product((3, 64, 777, 5003), SETTINGS)):
        logits = rows(vocabulary, kind, generator)
        token = chosen(logits, warping, number)
        assert token in (None, asked(logits, warping, number)), (vocabulary, warping)
        answers += token is not None
    share = answers / (4 * len(SETTINGS))
    assert path == "reference" or share > {"flat": 0.95, "steep": 0.98, "tied": 0.7, "forbidden": 0.95}[kind], (
        "else nothing is saved"
    )


@needs_library
@pytest.mark.parametrize("top_p", [0.25, 0.5, 0.75])
def test_rounding_decides_nothing(top_p: float) -> None:
    """Four equal logits: whether the second, third or fourth is within top_p is decided by the last bit of a sum, and
    by the order of a sort."""
    logits = torch.full((100,), -60.0, dtype=torch.float32)
    logits[torch.tensor([3, 40, 70, 90])] = 2.0
    warping = Warping(top_p=top_p)
    for seed in range(100):
        assert chosen(logits, warping, seed) in (None, asked(logits, warping, seed))
    # the same with shares of 1/2, 1/4, 1/8, ..., and top_p at some of their sums
    logits = -math.log(2) * torch.arange(40, dtype=torch.float32)
    for seed in range(100):
        token = chosen(logits, warping, seed)
        assert token in (None, asked(logits, warping, seed))


@needs_library
def test_min_p_at_its_limit() -> None:
    logits = torch.tensor([0.0, math.log(0.2), math.log(0.1), math.log(0.05)] + [-30.0] * 60, dtype=torch.float32)
    for min_p in (0.2, 0.1, 0.05):
        tokens = [chosen(logits, Warping(min_p=min_p), seed) for seed in range(200)]
        right = [asked(logits, Warping(min_p=min_p), seed) for seed in range(200)]
        assert all(token in (None, wanted) for token, wanted in zip(tokens, right, strict=True))
        assert None in tokens and 0 in tokens
    assert chosen(logits, Warping(min_p=1e-9), 0) is None, "its product with a share may be no normal number"


@needs_library
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_left_to_the_processors(value: float) -> None:
    logits = torch.zeros(100, dtype=torch.float32)
    logits[70] = value
    assert chosen(logits, Warping(0.7, 5, 0.9, 0.1), 0) is None
    assert chosen(torch.full((100,), -math.inf, dtype=torch.float32), Warping(), 0) is None
    assert chosen(torch.full((100,), 1e38, dtype=torch.float32), Warping(1e-3), 0) is None, "divided, they are infinite"
    assert chosen(torch.zeros(100, dtype=torch.bfloat16), Warping(), 0) is None


class Derived(TopKLogitsWarper):
    """A warper of a user's own."""


def anything(tokens: Tensor, scores: Tensor) -> Tensor:
    """A processor of a user's own, which turns the scores round."""
    return scores.flip(1)


ALL = Warping(0.7, 5, 0.9, 0.1)
KNOWN = [
    (None, 0, Warping()),
    (LogitsProcessorList(), 0, Warping()),
    (warpers(ALL), 0, ALL),
    (warpers(Warping(top_p=0.5)), 0, Warping(top_p=0.5)),
    (LogitsProcessorList([anything, *warpers(ALL)]), 1, ALL),
    (LogitsProcessorList([*warpers(ALL), anything]), 5, Warping()),
    (LogitsProcessorList([TopKLogitsWarper(5), anything, TopPLogitsWarper(0.5)]), 2, Warping(top_p=0.5)),
    (LogitsProcessorList([TopPLogitsWarper(0.9), TopKLogitsWarper(5)]), 1, Warping(top_k=5)),
    (LogitsProcessorList([TopKLogitsWarper(9), TopKLogitsWarper(5)]), 1, Warping(top_k=5)),
    (LogitsProcessorList([MinPLogitsWarper(0.1), *warpers(ALL)]), 1, ALL),
    (LogitsProcessorList([Derived(5)]), 1, Warping()),
    (LogitsProcessorList([TopKLogitsWarper(5, min_tokens_to_keep=2)]), 1, Warping()),
    (LogitsProcessorList([TopPLogitsWarper(0.5, filter_value=-1e4)]), 1, Warping()),
]


@pytest.mark.parametrize(("processors", "others", "expected"), KNOWN)
def test_warpers_are_known_where_nothing_follows_them(
    processors: LogitsProcessorList | None, others: int, expected: Warping
) -> None:
    before: Any
    after: Any
    before, after = split_warpers(processors)
    assert Warping.of(after) == expected
    assert before is None or isinstance(before, LogitsProcessorList)
    assert len(before or []) == others
    assert [*(before or []), *(after or [])] == list(processors or [])
    logits = rows(777, "steep", torch.Generator().manual_seed(1))
    for seed in range(20):
        scores = logits if not processors else processors(TOKENS[None], logits[None].clone())[0]
        choice = Sampler(processors, seed).choose(logits, TOKENS)
        assert choice.token == Sampler(seed=seed).pick(logits, scores, POSITION).token
        assert torch.equal(choice.scores, scores)


def test_what_is_no_list_of_transformers_may_do_anything() -> None:
    warm: Any = [TopKLogitsWarper(5)]
    assert split_warpers(anything) == (anything, None)
    assert split_warpers(warm) == (warm, None)
    assert Warping.of(split_warpers(Sampler.at_temperature(0.4, 1).processors)[1]) == Warping(0.4)


@needs_library
def test_a_warper_is_asked_what_it_does_now() -> None:
    """A processor may change the settings of a warper that follows it, and a list may grow."""
    warm = TemperatureLogitsWarper(0.7)
    logits = rows(777, "flat", torch.Generator().manual_seed(4))

    def changes(tokens: Tensor, scores: Tensor) -> Tensor:
        warm.temperature = 0.05 if tokens.shape[1] % 2 else 5.0
        return scores

    processors = LogitsProcessorList([changes, warm])
    sampler = Sampler(processors, 5)
    for n in range(1, 20):
        expected = Sampler(seed=5).pick(logits, logits / (0.05 if n % 2 else 5.0), n).token
        assert sampler.choose(logits, TEXT[:n]).token == expected
    processors.append(TopKLogitsWarper(1))
    assert all(sampler.choose(logits, TEXT[:n]).token == int(logits.argmax()) for n in range(1, 20))


@needs_library
@pytest.mark.parametrize("flushed", [False, True])
def test_numbers_near_zero(flushed: bool) -> None:
    """The k-th largest score is zero, and the next one almost: also where denormal numbers count as zero."""
    logits = torch.full((100,), -5.0, dtype=torch.float32)
    logits[10], logits[20], logits[30], logits[40] = 0.5, 0.0, -1e-40, -1e-31
    try:
        torch.set_flush_denormal(flushed)  # without effect where the processor cannot
        for warping in (Warping(top_k=2), Warping(1.0, 2, 0.99, 0.1)):
            for seed in range(200):
                assert chosen(logits, warping, seed) in (None, asked(logits, warping, seed)), (warping, seed)
    finally:
        torch.set_flush_denormal(False)


@needs_library
def test_the_sampler_asks_only_where_it_must(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    real = TopPLogitsWarper.__call__

    def counted(self: TopPLogitsWarper, tokens: Tensor, scores: Tensor) -> Tensor:
        calls.append("top_p")
        return real(self, tokens, scores)

    def own(tokens: Tensor, scores: Tensor) -> Tensor:
        calls.append("own")
        return 2 * scores

    monkeypatch.setattr(TopPLogitsWarper, "__call__", counted)
    warping = Warping(0.8, 0, 0.9)
    logits = rows(777, "steep", torch.Generator().manual_seed(1))
    before = logits.clone()
    processors = LogitsProcessorList([own, *warpers(warping)])
    choice = Sampler(processors, 5, warping=warping).choose(logits, TOKENS)
    assert calls == ["own"] and choice.token == asked(2 * logits, warping, 5)
    calls.clear()
    assert torch.equal(choice.scores, warpers(warping)(TOKENS[None], 2 * logits[None])[0])
    assert choice.scores is choice.scores and calls == ["top_p", "top_p"] and torch.equal(logits, before)
    calls.clear()
    Sampler(LogitsProcessorList([*warpers(warping), own]), 5, warping=warping).choose(logits, TOKENS)
    assert calls == ["top_p", "own"], "what comes after the warpers is called for every token, and so are they"


@needs_library
def test_padding_does_not_move_the_noise() -> None:
    logits = rows(777, "flat", torch.Generator().manual_seed(2))
    plain, padded = Sampler(None, 5), Sampler(None, 5, offset=3)
    assert [plain.choose(logits, TEXT[:n]).token for n in range(4, 9)] == [
        padded.choose(logits, TEXT[: n + 3]).token for n in range(4, 9)
    ]
    assert Noise(5).keys(4, 1) == [noise_key(5, 4)]
