"""Sequences that join and leave while others run: each text is the one that it is alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor

from specdec.cache import Conversations, KVCache
from specdec.drafting.composite import CompositeDrafter
from specdec.drafting.costs import Costs
from specdec.drafting.draft_length import AdaptiveLength
from specdec.drafting.protocol import Draft, FixedLength
from specdec.drafting.suffix import SuffixDrafter
from specdec.engine.engine import Engine
from specdec.engine.sampling import Noise, Sampler
from specdec.engine.schedule import DRAFT_ROWS, PROMPT_ROWS, ROWS_BESIDE
from specdec.engine.sequence import Request, Sequence
from specdec.engine.stats import GenerationStats
from specdec.engine.verify import Choice
from specdec.hf import decoder_of
from specdec.model.decoder import Decoder
from specdec.model.states import States
from tests.support.decoding import alone, counted, never, request, to_end
from tests.support.tiny import VOCAB, WINDOW, prompt, tiny_model
from tests.support.tiny_decoder import quantised

NEW = 3 * WINDOW


class Knowing:
    """Drafts what comes next in the one of `texts` that a sequence is; one draft in three is half wrong."""

    name, max_draft, aux_layers = "knowing", 8, ()

    def __init__(self, texts: list[list[int]]) -> None:
        self.texts, self.drafts = texts, 0

    def bind(self, backbone: Decoder) -> None:
        pass

    def start(self, cache: KVCache, noise: Noise | None = None) -> Knowing:
        return self

    def propose(self, tokens: list[int], states: States, k: int) -> Draft:
        self.drafts += 1
        text = next(text for text in self.texts if text[: len(tokens)] == tokens)
        draft = text[len(tokens) : len(tokens) + k]
        if self.drafts % 3 == 0:
            draft[k // 2 :] = [(token + 1) % VOCAB for token in draft[k // 2 :]]
        return Draft.by(self.name, draft)


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4", "gemma4-e2b", "gemma4-moe"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_texts_join_and_leave_at_random(family: str, sampled: bool) -> None:
    # In blocks a pass is one native call, otherwise it goes op by op.
    decoder, draws = quantised(family, "int8") if sampled else decoder_of(tiny_model(family)), random.Random(3)
    caches = Conversations(decoder.new_cache, 1 << 28)
    prompts = [prompt(draws.choice((1, 5, 64, 65, 150)), seed=i % 9)[0] for i in range(24)]
    requests = [request(ids, draws.randrange(1, NEW), i if sampled else None) for i, ids in enumerate(prompts)]
    expected = {one: alone(decoder, one) for one in requests}
    drafter = CompositeDrafter(Knowing(list(expected.values())))
    engine = Engine(decoder, drafter, FixedLength(3), caches, max_batch=4)
    waiting, running = list(requests), list[Sequence]()
    cancelled: list[Sequence] = []
    emitted: dict[Sequence, list[int]] = {}
    while waiting or engine.in_flight:
        while waiting and draws.random() < 0.4:
            running.append(engine.add(waiting.pop()))
        going = [one for one in running if not one.ended]
        if going and draws.random() < 0.1:
            cancelled.append(draws.choice(going))
            engine.cancel(cancelled[-1])
        for event in engine.step():
            emitted.setdefault(event.sequence, []).extend(event.tokens)
    assert len(cancelled) > 3
    for sequence in running:
        text = expected[sequence.request]
        assert sequence.row.tolist() == [*sequence.request.row.tolist(), *emitted.get(sequence, [])]
        if sequence in cancelled:
            assert sequence.finish == "cancelled"
            assert sequence.row.tolist() == text[: sequence.length]
        else:
            assert sequence.finish == "length"
            assert sequence.row.tolist() == text
    assert engine.stats.accepted > 0, "drafts are made beside others"
    assert engine.stats.reused > 0


def test_a_long_prompt_does_not_stop_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of(tiny_model("gemma3"))
    rows = counted(decoder, monkeypatch)
    engine = Engine(decoder, SuffixDrafter(), FixedLength(2), max_batch=3)
    talking = engine.add(request(prompt(5)[0], 40))
    engine.step()
    long = engine.add(request(prompt(10 * PROMPT_ROWS)[0], 4))
    short = engine.add(request(prompt(7)[0], 4))
    for _ in range(10 * PROMPT_ROWS // ROWS_BESIDE):
        before = talking.length
        events = engine.step()
        assert talking.length > before, "a token in every pass"
        assert short not in [event.sequence for event in events], "nobody overtakes"
    assert long.length == 10 * PROMPT_ROWS + 1
    assert max(rows) <= ROWS_BESIDE + DRAFT_ROWS
    to_end(engine)
    assert long.row.tolist() == alone(decoder, long.request)
    assert short.row.tolist() == alone(decoder, short.request)


def test_a_prompt_is_read_in_smaller_chunks_only_while_others_decode(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of(tiny_model("gemma3"))
    rows = counted(decoder, monkeypatch)
    engine = Engine(decoder, max_batch=2)
    other = engine.add(request(prompt(5)[0], 3))
    engine.step()
    long = engine.add(request(prompt(5 * PROMPT_ROWS)[0], 4))
    to_end(engine)
    assert rows == [5, *[1 + ROWS_BESIDE] * 2, *[PROMPT_ROWS] * 4, 1, 1, 1]
    assert long.row.tolist() == alone(decoder, long.request)
    assert other.row.tolist() == alone(decoder, other.request)


class Pair:
    """Chooses greedily for both rows; ends them at `length`."""

    def __init__(self, length: int) -> None:
        self.length, self.rows = length, list[int]()

    def choose(self, rows: list[Tensor], logits: Tensor) -> list[Choice]:
        self.rows.append(len(rows))
        assert len({len(row) for row in rows}) == 1
        return [Choice(int(row.argmax()), partial(logits.__getitem__, i)) for i, row in enumerate(logits)]

    def ended(self, rows: list[Tensor], choices: list[Choice]) -> bool:
        return len(rows[0]) >= self.length


def test_rows_in_step_have_their_passes_together_beside_others() -> None:
    decoder = decoder_of(tiny_model("llama"))
    pad = 130  # the first row's prompt has three chunks, the second's one
    rows = [prompt(150, seed=1)[0], torch.cat((torch.zeros(pad, dtype=torch.int64), prompt(20, seed=2)[0]))]
    requests = [Request(rows[0], 180, Sampler(), never), Request(rows[1], 180, Sampler(), never, padding=pad)]
    engine, chooser = Engine(decoder, SuffixDrafter(), FixedLength(3), max_batch=1), Pair(170)
    other = engine.add(request(prompt(5)[0], 30))
    both = engine.add_lockstep(requests, chooser)
    to_end(engine)
    assert set(chooser.rows) == {2} and len(chooser.rows) == 20
    assert both[0].row.tolist() == alone(decoder, request(rows[0], 20))
    assert both[1].row[pad:].tolist() == alone(decoder, request(rows[1][pad:], 20))
    assert other.row.tolist() == alone(decoder, other.request)
    both = engine.add_lockstep(requests, Pair(170))
    for _ in range(5):
        engine.step()
    engine.cancel(both[1])
    assert [one.finish for one in both] == ["cancelled"] * 2 and engine.in_flight == 0


def test_statistics_are_a_requests_own_and_all_together() -> None:
    decoder = decoder_of(tiny_model("llama"))
    engine = Engine(decoder, SuffixDrafter(), AdaptiveLength(Costs({1: 1.0, 9: 1.1}, text=0.0)), max_batch=3)
    own = [GenerationStats() for _ in range(5)]
    requests = [Request(prompt(9, seed=i)[0], 60, Sampler(), never, stats=stats) for i, stats in enumerate(own)]
    for _ in engine.run(requests):
        pass
    for name in ("prompts", "prompt_tokens", "emitted", "rounds", "drafted", "accepted"):
        assert sum(getattr(stats, name) for stats in own) == getattr(engine.stats, name)
    for stats in own:
        assert stats.emitted == 51 == 1 + stats.rounds + stats.accepted
    assert engine.stats.drafted > 0


@pytest.mark.parametrize(
    ("costs", "drafts"),
    [
        (Costs({1: 1.0, 9: 1.1}), False),  # what a further text costs was not measured
        (Costs({1: 1.0, 9: 1.1}, text=0.1), True),
        (Costs({1: 1.0, 2: 2.0}, text=0.1), False),  # a row costs as much as a pass
    ],
)
def test_texts_beside_others_are_drafted_for_where_the_costs_say_so(costs: Costs, drafts: bool) -> None:
    engine = Engine(decoder_of(tiny_model("llama")), SuffixDrafter(), AdaptiveLength(costs), max_batch=2)
    engine.lengths.observe = lambda *_: None  # type: ignore[method-assign]  # the costs stay as they are
    for _ in engine.run([request(prompt(9, seed=i)[0], 60) for i in range(2)]):
        pass
    assert (engine.stats.drafted > 0) == drafts


def test_waiting_for_work() -> None:
    decoder = decoder_of(tiny_model("llama"))
    engine = Engine(decoder, max_batch=2)
    assert not engine.wait(0.01)
    texts: list[list[int]] = []

    def serve(until: Callable[[], bool]) -> None:
        while not until():
            if engine.wait(5):
                texts.extend(event.sequence.row.tolist() for event in engine.step() if event.sequence.ended)

    thread = threading.Thread(target=serve, args=(lambda: len(texts) == 2,))
    thread.start()
    requests = [request(prompt(9, seed=i)[0], 20) for i in range(2)]
    for one in requests:
        engine.add(one)
    thread.join(60)
    assert sorted(texts) == sorted(alone(decoder, one) for one in requests)
