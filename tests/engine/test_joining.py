"""Sequences that join, leave, fail and are cancelled while others run: each text is the one that it is alone."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from specdec.cache import Conversations, KVCache
from specdec.drafting.composite import CompositeDrafter
from specdec.drafting.costs import Costs
from specdec.drafting.draft_length import AdaptiveLength, FixedLength
from specdec.drafting.protocol import Draft, NoDraft
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
from tests.support.decoding import decode, never, request
from tests.support.tiny import VOCAB, WINDOW, prompt, tiny_model

NEW = 3 * WINDOW


def alone(decoder: Decoder, one: Request) -> list[int]:
    """The text of a request that nobody is beside, plainly decoded."""
    ((_, row, _),) = decode(decoder, NoDraft(), FixedLength(0), [one])
    return row.tolist()


def to_end(engine: Engine) -> None:
    while engine.in_flight:
        engine.step()


def counted(decoder: Decoder, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The rows of every pass, as passes come."""
    rows: list[int] = []
    forward = decoder.forward_many

    def counting(ids: list[Tensor], *arguments: object) -> States:
        rows.append(sum(map(len, ids)))
        return forward(ids, *arguments)

    monkeypatch.setattr(decoder, "forward_many", counting)
    return rows


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


@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4", "gemma4-e2b"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_texts_join_and_leave_at_random(family: str, sampled: bool) -> None:
    decoder, draws = decoder_of(tiny_model(family)), random.Random(3)
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


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_what_was_computed_of_a_cancelled_text_serves_the_next(family: str) -> None:
    decoder = decoder_of(tiny_model(family))
    engine = Engine(decoder, caches=Conversations(decoder.new_cache, 1 << 28), max_batch=2)
    ids = prompt(150)[0]
    first = engine.add(request(ids, NEW))
    for _ in range(6):  # three chunks, and tokens
        engine.step()
    engine.cancel(first)
    assert engine.in_flight == 0 and len(first.row) > 150
    again = engine.add(request(ids, NEW))
    to_end(engine)
    assert again.reused == len(ids) - 1
    assert again.row.tolist() == alone(decoder, request(ids, NEW))


def test_a_cancelled_sequence_costs_no_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = decoder_of(tiny_model("llama"))
    rows = counted(decoder, monkeypatch)
    engine = Engine(decoder, max_batch=3)
    waiting_for_room = [engine.add(request(prompt(9, seed=i)[0], 20)) for i in range(4)]
    engine.step()
    assert rows == [27]
    for sequence in waiting_for_room[1:]:
        engine.cancel(sequence)
        engine.cancel(sequence)  # a second time does nothing
    engine.step()
    assert rows == [27, 1]
    assert [sequence.finish for sequence in waiting_for_room] == [None, *["cancelled"] * 3]
    assert waiting_for_room[3].length == 9, "it had no cache yet"


def test_others_may_add_and_cancel_while_a_pass_runs() -> None:
    decoder = decoder_of(tiny_model("llama"))
    inside, go_on = threading.Event(), threading.Event()

    def stop(tokens: Tensor, choice: Choice) -> bool:
        inside.set()
        assert go_on.wait(60)
        return False

    engine = Engine(decoder, max_batch=4)
    slow = engine.add(Request(prompt(5)[0], 30, Sampler(), stop))
    other = engine.add(request(prompt(6)[0], 20))
    thread = threading.Thread(target=engine.step)
    thread.start()
    assert inside.wait(60)
    late = engine.add(request(prompt(7)[0], 20))  # from this thread, while the pass is under way
    engine.cancel(other)
    assert other.finish == "cancelled" and late.finish is None and engine.in_flight == 2
    go_on.set()
    thread.join(60)
    seen = other.length
    to_end(engine)
    assert other.length == seen <= 7
    assert late.row.tolist() == alone(decoder, request(prompt(7)[0], 20))
    assert slow.row.tolist() == alone(decoder, request(prompt(5)[0], 25))


def test_a_callback_may_add_and_cancel() -> None:
    decoder = decoder_of(tiny_model("llama"))
    engine = Engine(decoder, max_batch=2)
    added: list[Sequence] = []

    def stop(tokens: Tensor, choice: Choice) -> bool:
        if len(tokens) == 10:
            added.append(engine.add(request(prompt(8)[0], 12)))
        if len(tokens) == 12:
            engine.cancel(sequence)
        return False

    sequence = engine.add(Request(prompt(5)[0], 90, Sampler(), stop))
    to_end(engine)
    assert sequence.finish == "cancelled" and sequence.length == 12
    assert added[0].row.tolist() == alone(decoder, request(prompt(8)[0], 12))


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


@pytest.mark.parametrize("where", ["sampler", "stop"])
def test_an_error_ends_its_own_text_alone(where: str) -> None:
    decoder = decoder_of(tiny_model("gemma4"))

    def broken(tokens: Tensor, given: Choice | Tensor) -> bool | Tensor:
        if tokens.shape[-1] > 15:
            raise RuntimeError("mine")
        return given if isinstance(given, Tensor) else False

    ids = prompt(9)[0]
    sampler = Sampler(broken if where == "sampler" else None)
    engine = Engine(decoder, SuffixDrafter(), FixedLength(2), Conversations(decoder.new_cache, 1 << 28), max_batch=2)
    bad = engine.add(Request(ids, 60, sampler, broken if where == "stop" else never))
    good = engine.add(request(prompt(12)[0], 40))
    finishes: list[str | None] = []
    while engine.in_flight:
        finishes += [event.sequence.finish for event in engine.step() if not event.tokens]
    assert finishes == ["error"] and bad.finish == "error"
    assert isinstance(bad.error, RuntimeError) and bad.length == (16 if where == "sampler" else 15)
    assert good.row.tolist() == alone(decoder, good.request)
    again = engine.add(request(ids, 40))  # what was computed of it is usable
    to_end(engine)
    assert again.reused == len(ids) - 1 and again.row.tolist() == alone(decoder, again.request)
    with pytest.raises(RuntimeError, match="mine"):
        list(engine.run([Request(ids, 60, sampler, broken if where == "stop" else never)]))
    assert engine.in_flight == 0


def test_ctrl_c_leaves_a_usable_engine() -> None:
    decoder = decoder_of(tiny_model("gemma3"))
    engine = Engine(decoder, caches=Conversations(decoder.new_cache, 1 << 28), max_batch=2)

    def stop(tokens: Tensor, choice: Choice) -> bool:
        if len(tokens) == 20 and not pressed:
            pressed.append(True)
            raise KeyboardInterrupt
        return False

    pressed: list[bool] = []
    first = engine.add(Request(prompt(9)[0], 50, Sampler(), stop))
    second = engine.add(request(prompt(11)[0], 50))
    with pytest.raises(KeyboardInterrupt):
        to_end(engine)
    to_end(engine)  # and on
    assert first.row.tolist() == alone(decoder, request(prompt(9)[0], 41))
    assert second.row.tolist() == alone(decoder, second.request)


class Pair:
    """Chooses greedily for both rows; ends them at `length`."""

    def __init__(self, length: int) -> None:
        self.length, self.rows = length, list[int]()

    def choose(self, rows: list[Tensor], logits: Tensor) -> list[Choice]:
        self.rows.append(len(rows))
        assert len({len(row) for row in rows}) == 1
        return [Choice(int(row.argmax()), row) for row in logits]

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
