"""What agents do to a cache: they part from a text at places known beforehand, and ask for other things in between."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from specdec.cache.reuse import RECENT, Conversations
from specdec.drafting.protocol import FixedLength, NoDraft
from specdec.engine.sampling import Sampler
from specdec.engine.sequence import Request
from specdec.engine.stats import GenerationStats
from specdec.model.decoder import Decoder
from tests.support.decoding import alone, decode, never
from tests.support.tiny import prompt
from tests.support.tiny_decoder import of

PLENTY = 1 << 30


def ask(decoder: Decoder, kept: Conversations, ids: Tensor, new: int = 3, pins: tuple[int, ...] = ()) -> int:
    """Decode after ids [n]; return how many of them came from the cache, the text being that without one."""
    stats = GenerationStats()
    request = Request(ids, len(ids) + new, Sampler(), never, stats=stats, pins=frozenset(pins))
    ((_, row, _),) = decode(decoder, NoDraft(), FixedLength(0), [request], caches=kept)
    assert row.tolist() == alone(decoder, request)
    return stats.reused


def test_a_text_goes_back_to_a_pin_past_the_window() -> None:
    decoder, kept = of("gemma3", None), Conversations(of("gemma3", None).new_cache, PLENTY)
    system, question, loop = (prompt(n, seed=n)[0] for n in (200, 150, 600))
    first = torch.cat((system, question, loop))
    assert ask(decoder, kept, first, pins=(200, 350)) == 0
    # A thinking model's template drops the thoughts of the loop: the next prompt parts at the last question.
    assert ask(decoder, kept, torch.cat((system, question, prompt(300, seed=8)[0])), pins=(200, 350)) == 350
    # Another session of the same agent parts after the system turn.
    assert ask(decoder, kept, torch.cat((system, prompt(50, seed=9)[0])), pins=(200,)) == 200


def test_without_pins_the_same_prompt_begins_anew() -> None:
    decoder, kept = of("gemma3", None), Conversations(of("gemma3", None).new_cache, PLENTY)
    system, loop = prompt(200, seed=1)[0], prompt(700, seed=2)[0]
    ask(decoder, kept, torch.cat((system, loop)))
    assert ask(decoder, kept, torch.cat((system, prompt(50, seed=3)[0]))) == 0


@pytest.mark.parametrize("shared", [0, 40])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_side_text_does_not_end_a_conversation(family: str, shared: int) -> None:
    decoder = of(family, None)
    kept = Conversations(decoder.new_cache, PLENTY)
    chat = prompt(600, seed=1)[0]
    ask(decoder, kept, chat)
    chat = torch.cat((chat, prompt(30, seed=2)[0]))
    assert ask(decoder, kept, chat) > 500
    kept.limit = kept.nbytes + 1000  # no room for anything more
    for number in range(RECENT - 2):
        side = torch.cat((chat[:shared], prompt(300, seed=50 + number)[0]))
        ask(decoder, kept, side)
    assert ask(decoder, kept, torch.cat((chat, prompt(30, seed=3)[0]))) >= len(chat)


def test_a_conversation_that_rests_makes_room_in_the_end() -> None:
    decoder = of("llama", None)
    kept = Conversations(decoder.new_cache, PLENTY)
    chat = prompt(600, seed=1)[0]
    ask(decoder, kept, chat)
    ask(decoder, kept, torch.cat((chat, prompt(30, seed=2)[0])))
    kept.limit = kept.nbytes + 1000
    other = prompt(500, seed=7)[0]
    for number in range(RECENT + 2):
        ask(decoder, kept, prompt(300, seed=50 + number)[0])
    ask(decoder, kept, other)
    assert ask(decoder, kept, torch.cat((other, prompt(5, seed=3)[0]))) >= len(other)
