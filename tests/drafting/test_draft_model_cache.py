"""What a draft model keeps beside the backbone's cache: read once, taken along, given back, counted."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from specdec.cache import Conversations
from specdec.cache.reuse import EARLY, TAIL
from specdec.drafting.draft_model.draft_cache import MARKS, DraftCache
from specdec.drafting.draft_model.draft_model import DraftModel
from specdec.drafting.protocol import FixedLength
from specdec.engine.engine import Engine
from specdec.engine.stats import GenerationStats
from specdec.memory.plan import Planner, conversations_of, text_bytes
from specdec.model.decoder import Decoder
from tests.support.decoding import alone, counted, decode, request, to_end
from tests.support.drafts.tiny_draft_model import draft_model
from tests.support.tiny import WINDOW, prompt
from tests.support.tiny_decoder import of

PLENTY = 1 << 30
NEW = 20


class Turn:
    """A text that was decoded: its tokens, the rows of the draft model's passes, and what was drafted."""

    def __init__(
        self, decoder: Decoder, drafter: DraftModel, rows: list[int], ids: Tensor, kept: Conversations, new: int = NEW
    ) -> None:
        rows.clear()
        self.stats = GenerationStats()
        ((_, row, self.cache),) = decode(decoder, drafter, FixedLength(4), [request(ids, new)], self.stats, caches=kept)
        self.tokens, self.rows = row, list(rows)
        assert row.tolist() == alone(decoder, request(ids, new))
        assert self.stats.accepted == self.stats.drafted > 0, "a model that drafts for itself is always right"


@pytest.fixture
def pair(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> tuple[Decoder, DraftModel, list[int]]:
    """A tiny backbone, itself as drafter, and the rows of the drafter's passes."""
    decoder, drafter = of(request.param, None, "int8"), draft_model(request.param)
    drafter.bind(decoder)
    return decoder, drafter, counted(drafter.decoder, monkeypatch)


families = pytest.mark.parametrize("pair", ["llama", "gemma3", "gemma4_unified"], indirect=True)


def followed(row: Tensor, more: int, seed: int) -> Tensor:
    return torch.cat((row, prompt(more, seed=seed)[0]))


@families
def test_a_prompt_is_read_in_chunks_and_once(pair: tuple[Decoder, DraftModel, list[int]]) -> None:
    decoder, drafter, rows = pair
    kept = Conversations(decoder.new_cache, PLENTY)
    first = Turn(decoder, drafter, rows, prompt(150, seed=1)[0], kept)
    assert first.rows[:3] == [64, 64, 22] and 150 + NEW - 5 < sum(first.rows) < 150 + NEW, "no token twice"
    assert max(first.rows[3:]) <= 2, "the pending token, and the last one of a draft that was wholly right"
    again = Turn(decoder, drafter, rows, followed(first.tokens, 9, seed=2), kept)
    assert again.stats.reused == 150 + NEW - 1
    assert sum(again.rows) <= 9 + 2 + NEW, "the new tokens alone"
    assert drafter.decoder is not decoder and first.cache is again.cache


@families
def test_a_text_that_parts_from_a_kept_one_reads_what_differs(pair: tuple[Decoder, DraftModel, list[int]]) -> None:
    """Asked something else about a document: the backbone's cache is copied, and the draft model's with it."""
    decoder, drafter, rows = pair
    kept = Conversations(decoder.new_cache, PLENTY)
    document = prompt(370, seed=8)[0]
    first = Turn(decoder, drafter, rows, followed(document, 30, seed=1), kept, new=20 + TAIL)
    second = Turn(decoder, drafter, rows, followed(document, 11, seed=3), kept)
    assert second.cache is not first.cache and second.stats.reused > 370 - EARLY - 64
    assert sum(second.rows) <= 381 + NEW - second.stats.reused + 64, "from a mark on where rings have lost the place"
    beside = [one.cache.companion(drafter._owner) for one in kept.kept]
    assert all(isinstance(one, DraftCache) and len(one._marks) <= MARKS for one in beside)


@pytest.mark.parametrize("pair", ["gemma3"], indirect=True)
def test_what_a_ring_has_lost_is_read_again(pair: tuple[Decoder, DraftModel, list[int]]) -> None:
    _, drafter, _ = pair
    cache = DraftCache(drafter.decoder.new_cache)
    text = prompt(200, seed=5)[0].tolist()
    for begin in range(0, 192, 64):
        assert cache.agree(text) == 200 - begin
        cache.read(drafter.decoder, text[begin : begin + 64])
    assert cache.agree(text) == 8
    assert cache.fork(100) is None and cache.fork(180) is not None, "the ring has 64 positions beside its window"
    cache.begin()
    other = [*text[:150], *prompt(30, seed=6)[0].tolist()]
    assert cache.agree(other) == 30, "within the ring's reach: a length"
    cache.begin()
    assert cache.agree([*text[:60], 5, 6]) == 62, "beyond it: from the first token on"
    assert cache.length == cache.nbytes == 0


def test_a_draft_cache_follows_any_text_like_a_fresh_one() -> None:
    """Random texts that share beginnings, one after the other and token by token, against a cache of its own."""
    drafter, generator = draft_model("gemma3"), torch.Generator().manual_seed(3)
    backbone = of("gemma3", None, "int8")
    drafter.bind(backbone)
    decoder = drafter.decoder
    base, kept = prompt(260, seed=2)[0].tolist(), DraftCache(decoder.new_cache)
    for _ in range(12):
        cut = int(torch.randint(2, 260, (), generator=generator))
        text = base[:cut] + torch.randint(3, 256, (5,), generator=generator).tolist()
        kept.begin()
        for end in (len(text) - 3, len(text)):
            while (left := kept.agree(text[:end])) > 0:
                at = end - left
                kept.mark(left, min(left, 64), end)
                states = kept.read(decoder, text[at : min(end, at + 64)])
                if left <= 64:
                    break
            fresh, alone_cache = DraftCache(decoder.new_cache), end
            for at in range(0, end, 64):
                expected = fresh.read(decoder, text[at : min(alone_cache, at + 64)])
            assert torch.equal(states.last[-1], expected.last[-1])
        base = base if cut % 3 else [*text, *base[len(text) :]]


def test_cancel_and_ctrl_c_leave_a_cache_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, drafter = of("gemma3", None, "int8"), draft_model("gemma3")
    kept = Conversations(decoder.new_cache, PLENTY)
    ids = prompt(100, seed=1)[0]
    plain = alone(decoder, request(ids, 40))
    engine = Engine(decoder, drafter, FixedLength(4), kept)
    sequence = engine.add(request(ids, 40))
    while sequence.length < 112:
        engine.step()
    forward, passes = drafter.decoder.forward_many, iter(range(3))

    def interrupted(*arguments: object) -> object:
        if next(passes, None) is None:
            monkeypatch.undo()
            raise KeyboardInterrupt
        return forward(*arguments)

    monkeypatch.setattr(drafter.decoder, "forward_many", interrupted)
    with pytest.raises(KeyboardInterrupt):
        to_end(engine)
    engine.cancel(sequence)
    assert not engine.in_flight and not kept._playing
    stats = GenerationStats()
    ((_, row, _),) = decode(decoder, drafter, FixedLength(4), [request(ids, 40)], stats, caches=kept)
    assert row.tolist() == plain and stats.reused == 99 and stats.accepted == stats.drafted


def test_what_lies_beside_a_cache_goes_with_the_drafter_and_with_the_cache() -> None:
    decoder, drafter = of("llama", None, "int8"), draft_model("llama")
    kept = Conversations(decoder.new_cache, PLENTY)
    list(decode(decoder, drafter, FixedLength(4), [request(prompt(30)[0], 9)], caches=kept))
    (conversation,) = kept.kept
    beside = conversation.cache.companion(drafter._owner)
    assert beside is not None and beside.nbytes == conversation.cache.nbytes - decoder.new_cache().nbytes > 0
    assert conversation.cache.companion(decoder) is None
    gone = weakref.ref(beside)
    del beside, drafter
    gc.collect()
    assert gone() is None and conversation.cache.nbytes == decoder.new_cache().nbytes


@pytest.mark.parametrize("kept", [torch.float32, torch.int8])
@pytest.mark.parametrize(("family", "drafts"), [("gemma4_unified", "gemma3"), ("gemma3", "gemma4_unified")])
def test_both_caches_take_what_was_planned(family: str, drafts: str, kept: torch.dtype) -> None:
    decoder, drafter = of(family, kept, "int8"), draft_model(drafts)
    ids = prompt(300, seed=4)[0]
    ((_, _, cache),) = decode(decoder, drafter, FixedLength(4), [request(ids, 1 + WINDOW)])
    found = cache.companion(drafter._owner)
    assert isinstance(found, DraftCache)
    marks = sum(mark.nbytes for mark in found._marks)
    assert cache.nbytes - marks == text_bytes(decoder.spec, 300 + WINDOW, kept, drafter.spec)
    planner = Planner(decoder.spec, decoder.nbytes, 7, draft=drafter.spec)
    name = str(kept).removeprefix("torch.")
    needs, without = planner.needs(316, name), Planner(decoder.spec, decoder.nbytes, 7).needs(316, name)
    assert needs.cache + needs.draft_cache == cache.nbytes - marks and needs.to_dict()["total"] == needs.total
    assert needs.total - without.total >= needs.draft_cache > 0


def test_a_memory_budget_counts_the_caches_of_both() -> None:
    whole, drafter = of("gemma3", None, "int8"), draft_model("llama")
    planner = Planner(whole.spec, whole.nbytes, 0, draft=drafter.spec)
    room = planner.room(planner.needs(512).total, "float32")
    assert room.positions == 512 and room.cache >= text_bytes(whole.spec, 512, torch.float32, drafter.spec)
    decoder = Decoder(whole.spec, whole.embedding, whole.layers, whole.norm, whole.head, room=room)
    conversation = conversations_of(decoder, drafter.spec).acquire(prompt(100)[0], 200)
    assert conversation.reserved == text_bytes(whole.spec, 200, torch.float32, drafter.spec)
    with pytest.raises(ValueError, match=r"the drafter's cache \d\.\d\d and Python"):
        planner.room(1, "float32")
