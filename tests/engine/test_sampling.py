"""Keyed noise and choices: the model's own distribution, whatever the drafter."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch
from scipy.stats import chisquare, kstest
from transformers import LogitsProcessorList, TemperatureLogitsWarper, TopPLogitsWarper

from specdec import kernels
from specdec.drafting.protocol import FixedLength
from specdec.engine.sampling import Noise, Processors, Sampler, Warping, gumbel, gumbel_argmax, mix, noise_key
from specdec.engine.sequence import Request
from specdec.engine.stats import GenerationStats
from specdec.engine.verify import verify
from specdec.hf import decoder_of
from tests.support.decoding import decode, never
from tests.support.scripted import ScriptedDrafter
from tests.support.tiny import VOCAB, prompt, tiny_model
from tests.support.tiny_decoder import quantised

DRAWS = 10_000


def test_noise_is_a_pure_function_of_its_key() -> None:
    ids = torch.arange(1000)
    everything = gumbel(noise_key(5, 17), ids)
    assert torch.equal(gumbel(noise_key(5, 17), ids[ids % 3 == 0]), everything[ids % 3 == 0])
    assert not torch.equal(gumbel(noise_key(5, 18), ids), everything)
    assert not torch.equal(gumbel(noise_key(6, 17), ids), everything)
    assert everything.isfinite().all()


def test_noise_is_gumbel_and_independent_across_positions() -> None:
    noise = gumbel(noise_key(0, 3), torch.arange(200_000))
    assert kstest(noise.numpy(), "gumbel_r").pvalue > 0.001
    next_position = gumbel(noise_key(0, 4), torch.arange(200_000))
    assert abs(float(torch.corrcoef(torch.stack((noise, next_position)))[0, 1])) < 0.01
    by_seed = torch.cat([gumbel(noise_key(seed, 0), torch.tensor([9])) for seed in range(20_000)])
    assert kstest(by_seed.numpy(), "gumbel_r").pvalue > 0.001


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.0])
def test_a_chance_is_a_share_that_the_winners_noise_lifts(temperature: float) -> None:
    noise = Noise(3, Warping(temperature, top_k=1))
    for token, key in ((0, noise_key(3, 5)), (17, noise_key(3, 6)), (49151, noise_key(4, 0))):
        lift = math.exp(temperature * float(gumbel(key, torch.tensor([token], dtype=torch.int64))))
        odds = 0.2 / 0.8 * lift / (1 + temperature)
        assert noise.chance(0.2, key, token) == pytest.approx(odds / (1 + odds), rel=1e-12)
        assert noise.chance(0.0, key, token) == 0.0 and noise.chance(1.0, key, token) == 1.0
    assert 0 < Noise(3, Warping(1e6)).chance(1e-6, key, 5) <= 1, "no number overflows"


def test_integer_and_tensor_hashes_agree() -> None:
    # mix() is SplitMix64; its first output for state 0 is published with the algorithm.
    assert mix(0) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("spread", [0.0, 0.5, 3.0, 12.0])
def test_no_token_that_wins_is_left_out(spread: float) -> None:
    """Every set of kernels finds the winner, among a few tokens; also where all are alike, or most are forbidden."""
    generator = torch.Generator().manual_seed(int(10 * spread))
    kept = 0
    for draw in range(300):
        scores = torch.randn(5003, generator=generator) * spread
        if draw % 3 == 0:
            scores[torch.rand(5003, generator=generator) < 0.9] = -math.inf
        top, key = float(scores.max()), noise_key(draw, 7)
        ids = torch.nonzero(scores > top - 41.4).squeeze(1)
        noisy = scores[ids].double() + gumbel(key, ids)
        winner = int(ids[noisy.argmax()])
        found = kernels.gumbel_candidates(scores, top, top - 41.4, key)
        assert winner in found and bool((found.diff() > 0).all()) and set(found.tolist()) <= set(ids.tolist())
        assert Sampler(seed=draw).choose(scores, torch.zeros(7)).token == winner
        some = torch.arange(draw % 7, 5003, 3)  # a part of the vocabulary, each with its own token's noise
        winner = some[(scores[some].double() + gumbel(key, some)).argmax()]
        top = float(scores[some].max())
        assert some[gumbel_argmax(scores[some].contiguous(), top, key, some)] == winner
        kept += len(found)
    if kernels.active().startswith("native") and spread > 1:
        assert kept / 300 < 60


@pytest.mark.parametrize("drafter", ["good", "bad", "adversarial"])
def test_drafts_never_change_the_distribution(drafter: str) -> None:
    """10,000 draws per position against the model's exact probabilities: chi-square.

    The good drafter proposes the likeliest token, so that a position inside a draft is drawn too; the bad one
    the unlikeliest. The adversary knows the noise: it proposes the choice itself when its id is odd, and another
    token when it is even, which would tilt any rule that treats accepted and rejected drafts differently.
    """
    decoder, ids = decoder_of(tiny_model("gemma3")), prompt(30)[0]
    warm = LogitsProcessorList([TemperatureLogitsWarper(0.4), TopPLogitsWarper(0.98)])
    path = torch.cat((ids, distribution(decoder, ids, warm).argmax()[None]))
    likeliest = path[-1:].tolist()
    logits = decoder.logits(decoder.forward(path, decoder.new_cache()).last)[-2:]  # [2, vocab]
    exact = torch.stack([torch.softmax(warm(ids[None], row[None].clone())[0].double(), dim=0) for row in logits])
    choose_from = logits_after(warm)
    positions = 2 if drafter == "good" else 1
    counts = torch.zeros(2, VOCAB, dtype=torch.int64)
    tokens, scores, seed = torch.arange(VOCAB), exact[0].log(), 0
    while counts[positions - 1].sum() < DRAWS:
        sampler, seed = Sampler(choose_from, seed), seed + 1
        if drafter == "good":
            draft = likeliest
        elif drafter == "bad":
            draft = [int(exact[0].argmin())]
        else:
            noise = gumbel(noise_key(seed - 1, len(ids)), tokens)
            choice = int((scores + noise).argmax())
            draft = [choice if choice % 2 else choice + 1]
        verdict = verify(draft, logits[: len(draft) + 1], torch.cat((ids, ids.new_tensor([*draft, 0]))), sampler.choose)
        for position, token in enumerate(verdict.tokens[:positions]):
            counts[position, token] += 1
    for position in range(positions):
        draws, possible = int(counts[position].sum()), exact[position] > 0
        assert draws >= DRAWS
        assert int(counts[position][~possible].sum()) == 0
        observed, expected = pooled(counts[position][possible].double(), exact[position][possible] * draws)
        assert len(observed) > 3
        pvalue = chisquare(observed, expected).pvalue
        print(f"{drafter} drafts, position {position}: {draws} draws over {len(observed)} tokens, p = {pvalue:.3f}")
        assert pvalue > 0.001


def logits_after(processors: LogitsProcessorList) -> Processors:
    """`processors`, computed once: 10,000 draws from the same row need it only once."""
    known: dict[bytes, torch.Tensor] = {}

    def process(tokens: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        key = scores.numpy().tobytes()
        if key not in known:
            known[key] = processors(tokens, scores)
        return known[key]

    return process


def pooled(observed: torch.Tensor, expected: torch.Tensor) -> tuple[list[float], list[float]]:
    """Cells with an expectation below 5 in one: what the chi-square approximation needs."""
    rare = expected < 5
    cells = [observed[~rare].tolist(), expected[~rare].tolist()]
    if rare.any():
        cells[0].append(float(observed[rare].sum()))
        cells[1].append(float(expected[rare].sum()))
    return cells[0], [e * sum(cells[0]) / sum(cells[1]) for e in cells[1]]


@pytest.mark.parametrize("right", [0, 1])
def test_whole_decoding_draws_from_the_model(right: int) -> None:
    """Two tokens decoded by the whole loop, 2,000 seeds: joint frequencies, with a draft of the likeliest second token
    or of another one. A third token makes room for the draft; in blocks, a pass is one native call."""
    runs = 2000
    decoder, ids = quantised("llama", "int8"), prompt(8)[0]
    cold = LogitsProcessorList([TemperatureLogitsWarper(0.35)])
    first = distribution(decoder, ids, cold)
    likeliest = distribution(decoder, torch.cat((ids, first.argmax()[None])), cold).argmax()
    pairs: Counter[tuple[int, ...]] = Counter()
    drafter = LooseDrafter([*ids.tolist(), 0, int(likeliest)], lambda _: right, VOCAB)
    requests = [Request(ids, 11, Sampler(cold, seed), never) for seed in range(runs)]
    stats = GenerationStats()
    for _, tokens, _ in decode(decoder, drafter, FixedLength(1), requests, stats, max_batch=16):
        pairs[tuple(tokens[8:10].tolist())] += 1
    assert stats.drafted == runs and (stats.accepted > 100) == bool(right)
    counts, expected = [], []
    for token in first.topk(6).indices.tolist():
        second = distribution(decoder, torch.cat((ids, torch.tensor([token]))), cold)
        for follow in second.topk(4).indices.tolist():
            counts.append(float(pairs[token, follow]))
            expected.append(float(first[token] * second[follow] * runs))
    counts.append(runs - sum(counts))
    expected.append(runs - sum(expected))
    assert chisquare(*pooled(torch.tensor(counts), torch.tensor(expected))).pvalue > 0.001


class LooseDrafter(ScriptedDrafter):
    """Drafts from its script without checking that the text follows it."""

    def propose(self, tokens, states, k):
        self.answer[: len(tokens)] = list(tokens)
        return super().propose(tokens, states, k)


def distribution(decoder: object, ids: torch.Tensor, processors: LogitsProcessorList) -> torch.Tensor:
    cache = decoder.new_cache()
    logits = decoder.logits(decoder.forward(ids, cache).last[-1:])
    return torch.softmax(processors(ids[None], logits)[0].double(), dim=0)


@pytest.mark.parametrize(("value", "message"), [(math.nan, "NaN"), (math.inf, "infinity")])
def test_logits_that_are_not_numbers_are_an_error(value: float, message: str) -> None:
    logits = torch.zeros(8)
    logits[3] = value
    for sampler in (Sampler(), Sampler(seed=1)):
        with pytest.raises(ValueError, match=message):
            sampler.choose(logits, torch.tensor([1]))


def test_processors_that_forbid_everything_are_an_error() -> None:
    sampler = Sampler(lambda tokens, scores: scores.fill_(-math.inf))
    with pytest.raises(ValueError, match="forbid every token"):
        sampler.choose(torch.zeros(8), torch.tensor([1]))
