"""Texts that give their cache back and go on later, and room that is reserved as a text grows."""

from __future__ import annotations

import random

import pytest

from specdec.cache import Conversations, conversation
from specdec.cache.conversation import needed_positions
from specdec.drafting.protocol import Drafter, DraftLength, FixedLength, NoDraft
from specdec.drafting.suffix import SuffixDrafter
from specdec.engine.engine import Engine
from specdec.hf import decoder_of
from tests.support.decoding import alone, request
from tests.support.tiny import prompt, tiny_model


@pytest.mark.parametrize("limit", [0, 10**9], ids=["nothing kept", "kept"])
@pytest.mark.parametrize(
    ("family", "drafter", "lengths", "seed"),
    [("gemma4_unified", SuffixDrafter(), FixedLength(4), 3), ("llama", NoDraft(), FixedLength(0), None)],
)
def test_a_paused_text_goes_on_as_if_nothing_had_been(
    family: str, drafter: Drafter, lengths: DraftLength, seed: int | None, limit: int
) -> None:
    decoder, dice = decoder_of(tiny_model(family)), random.Random(1)
    asked = [request(prompt(90, seed=i)[0], 70, seed) for i in range(3)]
    expected = [alone(decoder, one) for one in asked]
    engine = Engine(decoder, drafter, lengths, Conversations(decoder.new_cache, limit), 3)
    texts = [engine.add(one) for one in asked]
    paused, pauses = list[int](), 0
    while engine.in_flight or paused:
        if paused and (dice.random() < 0.3 or not engine.in_flight):
            engine.resume(texts[paused.pop()])
        which = dice.randrange(3)
        if which not in paused and not texts[which].ended and dice.random() < 0.2:
            engine.pause(texts[which])
            assert texts[which].waiting
            paused.append(which)
            pauses += 1
        engine.step()
    assert pauses > 10 and [one.row.tolist() for one in texts] == expected
    assert [one.finish for one in texts] == ["length"] * 3
    assert (engine.stats.prompts, engine.stats.prompt_tokens) == (3, 270), "what is read again is no prompt"


def test_a_paused_text_can_be_cancelled() -> None:
    decoder = decoder_of(tiny_model("llama"))
    engine = Engine(decoder)
    text = engine.add(request(prompt(9)[0], 9))
    engine.step()
    engine.pause(text)
    assert engine.in_flight == 0 and not text.ended
    engine.cancel(text)
    assert text.finish == "cancelled" and engine.step() == []


def test_room_is_reserved_as_a_text_grows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversation, "AHEAD", 20)
    decoder = decoder_of(tiny_model("llama"))
    conversations = Conversations(decoder.new_cache, 10**6, lambda positions: 10**4 + positions)
    engine = Engine(decoder, caches=conversations)
    text, reserved = engine.add(request(prompt(9)[0], 80)), list[int]()
    while engine.in_flight:
        engine.step()
        if not text.ended:
            assert text.conversation.cache.length <= text.conversation.positions
            reserved.append(text.conversation.reserved - 10**4)
    assert [*dict.fromkeys(reserved)] == [29, 50, 71, 89], "and never more than its limit"
    assert needed_positions(700, 650) == 700
