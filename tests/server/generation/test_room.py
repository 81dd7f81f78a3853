"""Memory under a budget: answers get room as they grow, and the newest waits where there is none left."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from specdec.cache import Conversations, conversation
from specdec.engine.engine import Engine
from specdec.engine.event import Event
from specdec.engine.sequence import Sequence
from specdec.hf import decoder_of
from specdec.server.generation.engine_thread import EngineThread
from tests.support.decoding import alone, request
from tests.support.serving.served import USER, Served, until
from tests.support.tiny import prompt, tiny_model


@pytest.fixture
def thread(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int], EngineThread]]:
    monkeypatch.setattr(conversation, "AHEAD", 80)
    made: list[EngineThread] = []

    def make(room: int) -> EngineThread:
        decoder = decoder_of(tiny_model("llama"))
        engine = Engine(decoder, caches=Conversations(decoder.new_cache, room, lambda n: n), max_batch=4)
        made.append(EngineThread(engine, 8, room, lambda n: n))
        return made[0]

    yield make
    made[0].close()


def test_texts_share_the_room_and_none_is_lost(
    thread: Callable[[int], EngineThread], monkeypatch: pytest.MonkeyPatch
) -> None:
    decoder = decoder_of(tiny_model("llama"))
    asked = [request(prompt(20, seed=i)[0], 120, seed=i) for i in range(4)]
    expected = [alone(decoder, one) for one in asked]
    pauses, most = Counter[Sequence](), list[int]()
    pause = Engine.pause

    def counting(engine: Engine, sequence: Sequence) -> None:
        pauses[sequence] += 1
        pause(engine, sequence)

    monkeypatch.setattr(Engine, "pause", counting)
    one, texts, heard = thread(420), dict[int, list[int]](), Counter[int]()

    def listener(number: int) -> Callable[[Any], None]:
        def hear(what: Any) -> None:
            assert isinstance(what, Event), what
            texts.setdefault(number, []).extend(what.tokens)
            held = [each.sequence.length for each in one._running.values() if each.sequence is not None]
            most.append(sum(held) if len(held) > 1 else 0)
            heard[number] += what.sequence.finish == "length"

        return hear

    one.submit([(each, listener(i)) for i, each in enumerate(asked)])
    assert one.running == 4, "each needs 100 now, though 140 in the end"
    until(lambda: sum(heard.values()) == 4, 60)
    assert [texts[i] for i in range(4)] == [row[20:] for row in expected]
    assert sum(pauses.values()) >= 1 and max(most) <= 420
    assert asked[0] not in {sequence.request for sequence in pauses}, "the oldest is never stopped"


def test_a_text_that_was_stopped_for_room_can_be_cancelled(thread: Callable[[int], EngineThread]) -> None:
    one = thread(240)
    asked = [request(prompt(20, seed=i)[0], 200) for i in range(2)]
    tickets = one.submit([(each, lambda what: None) for each in asked])
    until(lambda: one.waiting == 1)
    stopped = tickets[1]
    assert stopped.sequence is not None and stopped.sequence.waiting
    one.cancel(stopped)
    until(lambda: one.running == one.waiting == one.engine.in_flight == 0)


def test_answers_without_a_limit_run_side_by_side_in_the_room_of_one(tiny: Served) -> None:
    service = tiny.service
    room = service.thread.cache_room
    service.thread.cache_room = service.thread._bytes_for(service.context)
    try:
        with tiny.client() as client:
            found: list[Any] = []
            body = {"messages": [USER], "temperature": 0}
            stop = client.post("/v1/chat/completions", json={**body, "max_tokens": 40}).json()
            text = stop["choices"][0]["message"]["content"]
            together = list[int]()

            def ask() -> None:
                found.append(client.post("/v1/chat/completions", json={**body, "stop": text[30:36]}).json())

            threads = [threading.Thread(target=ask) for _ in range(2)]
            for each in threads:
                each.start()
            while any(each.is_alive() for each in threads):
                together.append(service.thread.running)
            assert max(together) == 2
            assert {one["choices"][0]["finish_reason"] for one in found} == {"stop"}
    finally:
        service.thread.cache_room = room
