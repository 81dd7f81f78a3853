"""Sequences that are cancelled, fail or are interrupted while others run, which go on as they would alone."""

from __future__ import annotations

import threading

import pytest
from torch import Tensor

from specdec.cache import Conversations
from specdec.drafting.protocol import FixedLength
from specdec.drafting.suffix import SuffixDrafter
from specdec.engine.engine import Engine
from specdec.engine.sampling import Sampler
from specdec.engine.sequence import Request, Sequence
from specdec.engine.verify import Choice
from specdec.hf import decoder_of
from tests.support.decoding import alone, counted, never, request, to_end
from tests.support.tiny import WINDOW, prompt, tiny_model

NEW = 3 * WINDOW


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
