"""When a proposer that has to read the text itself reads it: never at the price of more than the credit covers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from types import SimpleNamespace

import pytest
import torch

from specdec.cache import MAX_ROWS
from specdec.drafting.calibrate import calibrate, measure_costs
from specdec.drafting.costs import FLOOR, Costs, LiveCosts
from specdec.drafting.draft_length import AdaptiveLength
from specdec.drafting.propose import NEAR, OpenEnd, propose_together
from specdec.drafting.protocol import Draft, Drafted, DraftLength, FixedLength
from specdec.hf import decoder_of
from specdec.model.states import States
from tests.support.drafts.replay import Process, each, first
from tests.support.drafts.tiny_draft_model import draft_model
from tests.support.tiny import tiny_model

STATES = States(torch.empty(0, dtype=torch.float32))
PASSES = {1: 1.0, 2: 1.05, 3: 1.1, 4: 1.16, 5: 1.24, 9: 1.65}


def costs(step: float = 0.07, reading: float = 0.007) -> Costs:
    """In plain passes; a draft model of a fourteenth of the backbone's size."""
    return Costs(dict(PASSES), {"model": step}, {"model": 0.01}, readings={"model": reading})


class Reader:
    """A model that drafts, without the model: `process` says how many tokens of a draft are right."""

    name, max_draft = "model", 8

    def __init__(self, true: Costs, process: Process) -> None:
        self.true, self.process, self.draws = true, process, random.Random(1)
        self.clock = self.reading = 0.0  # of all, and of what was read beforehand
        self.read = self.right = 0

    def behind(self, tokens: Sequence[int]) -> int:
        return len(tokens) - self.read

    def catch_up(self, tokens: Sequence[int]) -> int:
        rows = min(self.behind(tokens) - 1, MAX_ROWS)
        self.read, taken = self.read + rows, self.true.of_reading(self.name, rows)
        self.clock, self.reading = self.clock + taken, self.reading + taken
        return rows

    def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
        while self.behind(tokens) > NEAR:
            self.catch_up(tokens)
        self.clock += self.true.of_draft(self.name, k)
        self.right = min(k, self.process(self.draws))
        self.read = len(tokens) + min(self.right, k - 1)
        return Draft.by(self.name, [0] * k)


class Text:
    """A text of so many tokens after a prompt, decoded round by round with a `Reader`."""

    def __init__(self, lengths: DraftLength, reader: Reader, prompt: int, new: int) -> None:
        self.readings, self.history, tokens = list[float](), list[tuple[int, float]](), [0] * (prompt + 1)
        began, reader.read = reader.clock, 0
        while len(tokens) < prompt + new:
            read, before = reader.reading, reader.clock
            (draft,), caught_up = propose_together([OpenEnd(reader, tokens, STATES, 8)], lengths)
            self.readings.append(reader.reading - read)
            assert caught_up == (self.readings[-1] > 0)
            taken, verify = reader.clock - before, reader.true.of_pass(1 + len(draft.tokens))
            reader.clock += verify
            right = reader.right if draft.tokens else 0
            lengths.observe([Drafted(draft.sources, right)], 0, 0.0 if caught_up else taken, verify)
            tokens += [0] * (right + 1)
            self.history.append((len(tokens) - prompt - 1, reader.clock - began))

    @property
    def rate(self) -> float:
        tokens, seconds = self.history[-1]
        return tokens / seconds


@pytest.fixture
def clocked(monkeypatch: pytest.MonkeyPatch) -> list[Reader]:
    """The readers by whose clock time is told: the last one's."""
    readers: list[Reader] = []
    told = SimpleNamespace(perf_counter=lambda: readers[-1].clock)
    monkeypatch.setattr("specdec.drafting.propose.time", told)
    return readers


@pytest.mark.parametrize("prompt", [3, 40, 500, 4000])
@pytest.mark.parametrize("step", [0.02, 0.07, 0.3, 1.0])
@pytest.mark.parametrize("process", [first(0), each(0.5, 0.3), each(0.9), first(8)], ids=["none", "few", "most", "all"])
def test_no_text_is_ever_slower_than_the_floor(
    process: Process, step: float, prompt: int, clocked: list[Reader]
) -> None:
    reader, lengths = Reader(costs(step, step / 10), process), AdaptiveLength(costs(step, step / 10))
    clocked.append(reader)
    text = Text(lengths, reader, prompt, 600)
    assert all(tokens + 1e-6 >= FLOOR * seconds for tokens, seconds in text.history)
    if step == 1.0:
        assert reader.reading == 0, "what cannot pay is not read for"
    prefill = prompt / MAX_ROWS * 5  # of the backbone; a part of it is for whoever reads the prompt too
    reader, lengths = Reader(costs(step, step / 10), process), AdaptiveLength(costs(step, step / 10))
    clocked.append(reader)
    lengths.observe_prompt(prefill)
    again = Text(lengths, reader, prompt, 600)
    assert all(tokens + prefill + 1e-6 >= FLOOR * (prefill + seconds) for tokens, seconds in again.history)
    if step <= 0.07 and prompt <= 500 and min(process(random.Random(i)) for i in range(9)) == 8:
        assert text.rate > 1.7


def test_a_long_prompt_is_read_in_several_rounds_and_sooner_once_drafts_have_paid(clocked: list[Reader]) -> None:
    reader, lengths = Reader(costs(), each(0.9)), AdaptiveLength(costs())
    clocked.append(reader)
    texts = [Text(lengths, reader, 1000, 600) for _ in range(2)]
    chunk = reader.true.of_reading("model", MAX_ROWS)
    for text in texts:
        assert max(text.readings) < 1 + chunk, "no round reads for much longer than a plain pass takes"
        assert sum(taken > 0 for taken in text.readings) > 5
    drafted = [next(i for i, (tokens, _) in enumerate(text.history) if tokens > i + 1) for text in texts]
    assert drafted[1] < 20 < drafted[0]
    assert texts[1].rate > texts[0].rate > 1


def test_a_prompt_pays_for_being_read_twice_where_the_second_reader_is_small(clocked: list[Reader]) -> None:
    begun = []
    for prefill in (0.0, 1000 / MAX_ROWS * 8):
        reader, lengths = Reader(costs(0.03, 0.003), each(0.9)), AdaptiveLength(costs(0.03, 0.003))
        clocked.append(reader)
        lengths.observe_prompt(prefill)
        text = Text(lengths, reader, 1000, 300)
        begun.append(next(i for i, (tokens, _) in enumerate(text.history) if tokens > i + 1))
    assert begun[1] < 10 < 100 < begun[0]


def test_what_would_win_little_is_not_read_for(clocked: list[Reader]) -> None:
    """As a model that drafts for itself: a draft that is wholly right is a little faster than plain passes."""
    rows = (1.0, 1.24, 1.38, 1.58, 1.68, 1.93, 1.99, 2.54, 2.82)  # as measured of a model of 135M
    dear = Costs(dict(enumerate(rows, 1)), {"model": 0.78}, readings={"model": 0.15})
    reader, lengths = Reader(dear, first(8)), AdaptiveLength(dear)
    lengths._credit.balance = 12.0
    clocked.append(reader)
    Text(lengths, reader, 60, 300)
    assert reader.reading == 0


def test_a_source_that_is_left_behind_is_tried_again(clocked: list[Reader]) -> None:
    reader, lengths = Reader(costs(), first(0)), AdaptiveLength(costs())
    clocked.append(reader)
    Text(lengths, reader, 10, 400)
    assert reader.behind([0] * 500) > NEAR
    reader.process = first(8)
    assert Text(lengths, reader, 10, 400).rate > 1.5


def test_what_another_source_does_better_is_not_read_for(clocked: list[Reader]) -> None:
    lengths = AdaptiveLength(costs())
    lengths._credit.balance = 12.0
    limits = {"suffix": 8, "model": 8}
    for _ in range(30):
        lengths.observe([Drafted(("suffix",) * 8, 8)], 0, 0.0, PASSES[9])
        lengths.observe([Drafted(("model",) * 2, 1)], 0, 0.14, PASSES[3])
    assert not lengths.may_catch_up(limits, "model", 100)
    assert lengths.may_catch_up({"model": 8}, "model", 100)


def test_a_fixed_length_reads_all_of_it_at_once(clocked: list[Reader]) -> None:
    reader = Reader(costs(), first(8))
    clocked.append(reader)
    text = Text(FixedLength(4), reader, 300, 50)
    assert text.readings[0] == pytest.approx(
        4 * reader.true.of_reading("model", 64) + reader.true.of_reading("model", 44)
    )
    assert sum(text.readings[1:]) == 0


def test_the_cost_of_reading_follows_the_machine() -> None:
    live = LiveCosts()
    live.calibrate(costs(), 9)
    for _ in range(60):
        live.correct_reading("model", 64, 1.0)
    assert live.of_reading("model", 64) == pytest.approx(1.0, rel=0.02)
    assert live.now().readings["model"] == pytest.approx((1.0 - 0.07) / 63, rel=0.02)
    live.correct_reading("another", 10, 0.9)
    assert live.of_reading("another", 10) == pytest.approx(0.9)


def test_reading_is_measured_with_the_drafts() -> None:
    decoder, drafter = decoder_of(tiny_model("gemma3")), draft_model("llama")
    drafter.bind(decoder)
    found = measure_costs(decoder, drafter, 9, seconds=600.0)
    assert found is not None and found.steps["model"] > 0 and found.readings["model"] >= 0
    assert found.of_reading("model", 16) > found.steps["model"]
    lengths = calibrate(AdaptiveLength(), decoder, drafter)
    assert lengths.costs.readings.keys() == {"model"}
