"""Constraints in the engine: obeyed, the same with and without drafts, beside other texts, and after an interrupt."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
import torch
from torch import Tensor

from specdec.drafting.draft_length import AdaptiveLength
from specdec.drafting.protocol import Drafter, FixedLength, NoDraft
from specdec.drafting.suffix import SuffixDrafter
from specdec.engine.constraints import FORCED
from specdec.engine.engine import Engine
from specdec.engine.sampling import Sampler
from specdec.engine.sequence import Request
from specdec.engine.stats import GenerationStats
from specdec.engine.verify import Choice
from specdec.model.decoder import Decoder
from tests.support.decoding import decode, never, request, to_end
from tests.support.scripted import ScriptedDrafter
from tests.support.tiny import VOCAB, prompt
from tests.support.tiny_decoder import quantised

NEW = 30


class Cycle:
    """A constraint: the n-th token is of residue n mod 5, but every third one is a given token; `length` tokens."""

    def __init__(self, length: int = 1000) -> None:
        self.length = length

    def start(self) -> CycleMatcher:
        return CycleMatcher(self.length)


class CycleMatcher:
    def __init__(self, length: int) -> None:
        self.taken: list[int] = []
        self.length = length

    @property
    def ended(self) -> bool:
        return len(self.taken) >= self.length

    def only(self, at: int) -> int | None:
        return 7 + at if at % 3 else None

    def fits(self, at: int, token: int) -> bool:
        return token == self.only(at) if self.only(at) is not None else token % 5 == at % 5

    def allowed(self) -> Tensor:
        return torch.tensor([self.fits(len(self.taken), token) for token in range(VOCAB)], dtype=torch.bool)

    def advance(self, token: int) -> None:
        assert self.fits(len(self.taken), token)
        self.taken.append(token)

    def rewind(self, tokens: int) -> None:
        del self.taken[tokens:]

    def forced(self) -> list[int]:
        found: list[int] = []
        while (token := self.only(len(self.taken) + len(found))) is not None:
            found.append(token)
        return found

    def valid(self, tokens: Sequence[int]) -> int:
        fit = [self.fits(len(self.taken) + i, token) for i, token in enumerate(tokens)]
        return [*fit, False].index(False)


def constrained(seed: int | None = None, length: int = 1000, prompt_seed: int = 0) -> Request:
    sampler = Sampler() if seed is None else Sampler.at_temperature(1.5, seed)
    ids = prompt(12, prompt_seed)[0]
    return Request(ids, len(ids) + NEW, sampler, never, constraint=Cycle(length))


def text(
    decoder: Decoder, one: Request, drafter: Drafter, length: int, stats: GenerationStats | None = None
) -> list[int]:
    ((_, row, _),) = decode(decoder, drafter, FixedLength(length), [one], stats)
    return row.tolist()


@pytest.fixture(scope="module")
def decoder() -> Decoder:
    return quantised("gemma3", "int8")


@pytest.fixture(params=[None, 5], ids=["greedy", "sampled"])
def seed(request: pytest.FixtureRequest) -> int | None:
    found: int | None = request.param
    return found


def test_a_text_obeys_and_is_the_best_that_does(decoder: Decoder) -> None:
    tokens = text(decoder, constrained(), NoDraft(), 0)[12:]
    matcher = Cycle().start()
    for token in tokens:
        matcher.advance(token)
    assert len({*tokens}) > 3
    free = text(decoder, request(prompt(12)[0], NEW), NoDraft(), 0)[12:]
    assert free != tokens


@pytest.mark.parametrize("length", [1, 4])
def test_drafts_change_nothing_and_forced_tokens_are_drafts(decoder: Decoder, seed: int | None, length: int) -> None:
    plain = text(decoder, constrained(seed), NoDraft(), 0)
    for drafter in (NoDraft(), SuffixDrafter(1), ScriptedDrafter(plain, lambda turn: turn % 3, VOCAB)):
        stats = GenerationStats()
        assert text(decoder, constrained(seed), drafter, length, stats) == plain
        drafted, accepted = stats.draft_sources[FORCED]
        assert drafted == accepted > 5


def test_adaptive_lengths_use_forced_tokens_without_a_drafter(decoder: Decoder, seed: int | None) -> None:
    plain = text(decoder, constrained(seed), NoDraft(), 0)
    lengths, stats = AdaptiveLength(), GenerationStats()
    for _ in range(3):
        ((_, row, _),) = decode(decoder, NoDraft(), lengths, [constrained(seed)], stats)
        assert row.tolist() == plain
    assert stats.draft_sources[FORCED][1] > 0


def test_beside_other_texts(decoder: Decoder, seed: int | None) -> None:
    alone = [text(decoder, constrained(seed, prompt_seed=i), NoDraft(), 0) for i in range(3)]
    free = text(decoder, request(prompt(20, 7)[0], NEW), NoDraft(), 0)
    requests = [constrained(seed, prompt_seed=i) for i in range(3)]
    requests.insert(1, request(prompt(20, 7)[0], NEW))
    rows = {
        number: row.tolist()
        for number, row, _ in decode(decoder, SuffixDrafter(1), FixedLength(3), requests, max_batch=4)
    }
    assert [rows[0], rows[2], rows[3]] == alone
    assert rows[1] == free


@pytest.mark.parametrize("length", [0, 2], ids=["plain", "drafted"])
def test_a_text_ends_where_nothing_may_follow(decoder: Decoder, length: int) -> None:
    engine = Engine(decoder, NoDraft(), FixedLength(length))
    sequence = engine.add(constrained(length=9))
    to_end(engine)
    assert sequence.finish == "stop"
    assert sequence.row.tolist() == text(decoder, constrained(), NoDraft(), 0)[: 12 + 9]


def test_what_could_not_follow_is_not_checked(decoder: Decoder) -> None:
    plain = text(decoder, constrained(), NoDraft(), 0)
    stats = GenerationStats()
    text(decoder, constrained(), ScriptedDrafter(plain, lambda _: 0, VOCAB), 4, stats)
    assert "scripted" not in stats.draft_sources, "a token of the wrong residue, drafted where none is forced"


def test_an_interrupted_pass_leaves_the_constraint_where_it_was(decoder: Decoder, seed: int | None) -> None:
    plain = text(decoder, constrained(seed), NoDraft(), 0)
    calls = 0

    def interrupted(tokens: Tensor, choice: Choice) -> bool:
        nonlocal calls
        calls += 1
        if calls in (2, 5, 6, 20):
            raise KeyboardInterrupt
        return False

    ids = prompt(12)[0]
    sampler = constrained(seed).sampler
    engine = Engine(decoder, NoDraft(), FixedLength(2))
    sequence = engine.add(Request(ids, len(ids) + NEW, sampler, interrupted, constraint=Cycle()))
    interrupts = 0
    while engine.in_flight:
        try:
            engine.step()
        except KeyboardInterrupt:
            interrupts += 1
    assert interrupts == 4
    assert sequence.row.tolist() == plain


class Broken(CycleMatcher):
    def allowed(self) -> Tensor:
        if len(self.taken) == 4:
            raise ValueError("the grammar cannot be followed further")
        return super().allowed()


def test_an_error_of_a_constraint_ends_its_text_alone(decoder: Decoder) -> None:
    class BrokenCycle(Cycle):
        def start(self) -> Broken:
            return Broken(self.length)

    engine = Engine(decoder, NoDraft(), FixedLength(2), max_batch=2)
    ids = prompt(12)[0]
    broken = engine.add(Request(ids, len(ids) + NEW, Sampler(), never, constraint=BrokenCycle()))
    fine = engine.add(constrained(prompt_seed=1))
    to_end(engine)
    assert (broken.finish, str(broken.error)) == ("error", "the grammar cannot be followed further")
    assert fine.finish == "length"
    assert fine.row.tolist() == text(decoder, constrained(prompt_seed=1), NoDraft(), 0)


def test_processors_see_what_is_allowed_alone(decoder: Decoder) -> None:
    def only_the_best(tokens: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(scores < scores.max(), -torch.inf)

    ids = prompt(12)[0]
    one = Request(ids, len(ids) + NEW, Sampler(only_the_best, seed=3), never, constraint=Cycle())
    assert text(decoder, one, NoDraft(), 0) == text(decoder, constrained(), NoDraft(), 0)


def test_one_constraint_serves_several_texts(decoder: Decoder) -> None:
    shared = Cycle()

    def requests() -> Iterator[Request]:
        for i in range(3):
            ids = prompt(12, i)[0]
            yield Request(ids, len(ids) + NEW, Sampler(), never, constraint=shared)

    rows = {n: row.tolist() for n, row, _ in decode(decoder, NoDraft(), FixedLength(2), requests(), max_batch=3)}
    assert rows == {i: text(decoder, constrained(prompt_seed=i), NoDraft(), 0) for i in range(3)}
