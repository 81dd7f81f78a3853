"""Prefix reuse: a text that begins as an earlier one has the bits of one that was computed alone, and less work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from specdec.cache import KVCache, StoreShape
from specdec.cache.conversation_file import load_conversation, save_conversation
from specdec.cache.reuse import EARLY, MARKS, TAIL, Conversations
from specdec.drafting.protocol import FixedLength
from specdec.drafting.suffix import SuffixDrafter
from specdec.engine.sampling import Sampler
from specdec.engine.sequence import Request
from specdec.engine.stats import GenerationStats
from specdec.model.decoder import Decoder
from tests.support.decoding import decode, never
from tests.support.tiny import FAMILIES, VOCAB, prompt
from tests.support.tiny_decoder import of

PLENTY = 1 << 30


def texts(
    decoder: Decoder,
    prompts: list[Tensor],
    kept: Conversations | None,
    temperature: float = 0.0,
    answer: int = 90,
    together: int = 1,
) -> tuple[list[list[int]], GenerationStats]:
    """The rows of `prompts`, decoded one call after the other (or in one), and what all calls did."""
    stats, rows = GenerationStats(), []
    groups = [prompts] if together > 1 else [[each] for each in prompts]
    for group in groups:
        requests = [
            Request(
                ids,
                len(ids) + answer,
                Sampler((lambda ids, logits: logits / temperature) if temperature else None, 7),
                never,
            )
            for ids in group
        ]
        done = decode(decoder, SuffixDrafter(), FixedLength(5), requests, stats, together, kept)
        rows += [row.tolist() for _, row, _ in sorted(done)]
    return rows, stats


def kept_by(decoder: Decoder, limit: int = PLENTY) -> Conversations:
    return Conversations(decoder.new_cache, limit)


def turns(decoder: Decoder, question: int = 9) -> list[Tensor]:
    """Three turns of a conversation: the prompts as they are when the answers are repeated to the letter."""
    first = prompt(120, seed=5)[0]
    found = [first]
    for turn in range(2):
        (row,), _ = texts(decoder, [found[-1]], None)
        found.append(torch.cat((torch.tensor(row), prompt(question, seed=turn)[0])))
    return found


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("kept", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_conversation_goes_on_to_the_bit(family: str, kept: torch.dtype, temperature: float) -> None:
    decoder = of(family, kept, "int8")
    prompts = turns(decoder)
    alone, _ = texts(decoder, prompts, None, temperature)
    again, stats = texts(decoder, prompts, kept_by(decoder), temperature)
    assert again == alone
    if not temperature:  # else the answers are not the ones that the prompts repeat
        assert stats.reused == sum(len(ids) + 90 - 1 for ids in prompts[:2])


@pytest.mark.parametrize("family", FAMILIES)
def test_other_texts_with_the_same_beginning(family: str) -> None:
    """Asked again; asked something else about the same document; an answer that comes back in other words."""
    decoder, kept = of(family, torch.float32, "int8"), None
    document = prompt(400, seed=8)[0]
    prompts = [torch.cat((document, prompt(n, seed=n)[0])) for n in (30, 70, 11)]
    prompts += [prompts[0], torch.cat((prompts[0], prompt(50, seed=3)[0])), prompts[2][:300], prompt(5, seed=9)[0]]
    alone, _ = texts(decoder, prompts, None)
    kept = kept_by(decoder)
    again, stats = texts(decoder, prompts, kept)
    assert again == alone
    assert stats.reused > 3 * (400 - EARLY)
    assert all(len(each.marks) <= MARKS for each in kept.kept)
    assert all(len(each.tokens) == each.cache.length for each in kept.kept)


def test_what_a_ring_has_lost_is_not_used() -> None:
    decoder = of("gemma3", torch.float32)
    first = prompt(200, seed=5)[0]
    kept = kept_by(decoder)
    texts(decoder, [first], kept)
    (conversation,) = kept.kept
    conversation.marks.clear()
    assert not conversation.cache.rewindable(200 - TAIL)
    other = torch.cat((first[: 200 - TAIL], prompt(40, seed=1)[0]))
    again, stats = texts(decoder, [other], kept)
    assert (again, stats.reused) == (texts(decoder, [other], None)[0], 0)


def test_rewindable_says_what_the_ring_holds() -> None:
    """Against a ring that is told apart position by position."""
    window, rows = 8, 5
    for passes in ([3], [5, 5], [5] * 6, [1] * 30, [5, 5, 1, 5]):
        cache = KVCache([StoreShape(1, 1, window)], torch.float32, torch.device("cpu"), rows)
        store = cache.stores[0]
        assert store is not None
        for count in passes:
            start = cache.begin(count)
            written = torch.arange(start, start + count, dtype=torch.float32).view(-1, 1, 1)
            store.write(start, written, written)
            cache.commit(max(1, count - 2))
        held = set(store.values.flatten().tolist())
        for length in range(1, cache.length + 1):
            seen = range(max(0, length - window + 1), length)
            assert not cache.rewindable(length) or held.issuperset(seen), (passes, length)
        assert cache.rewindable(cache.length)
        assert not cache.rewindable(cache.length + 1)


def test_texts_of_a_batch_and_an_interrupt_leave_their_caches() -> None:
    decoder = of("gemma3", torch.float32)
    prompts = [torch.cat((prompt(90, seed=1)[0], prompt(n, seed=n)[0])) for n in (3, 14, 15)]
    alone, _ = texts(decoder, prompts, None)
    kept = kept_by(decoder)
    assert texts(decoder, prompts, kept, together=3)[0] == alone
    again, stats = texts(decoder, prompts, kept, together=3)
    assert again == alone
    # By way of marks: the rings have gone round. Beside a text that decodes, chunks and so marks are half as far apart.
    assert stats.reused == 64 + 96 + 96

    def stop(tokens: Tensor, choice: object) -> bool:
        if len(tokens) > 140:
            raise KeyboardInterrupt
        return False

    kept, long = kept_by(decoder), prompt(130, seed=12)[0]
    request = Request(long, 300, Sampler(None, None), stop)
    with pytest.raises(KeyboardInterrupt):
        list(decode(decoder, SuffixDrafter(), FixedLength(3), [request], GenerationStats(), 1, kept))
    again, stats = texts(decoder, [long], kept)
    assert again == texts(decoder, [long], None)[0]
    assert stats.reused == len(long) - 1


def test_memory_stays_within_the_limit() -> None:
    decoder = of("gemma3", torch.float32)
    one = decoder.new_cache().nbytes
    kept = kept_by(decoder, 3 * one)
    generator = torch.Generator().manual_seed(3)
    for i in range(40):
        length = int(torch.randint(5, 150, (1,), generator=generator))
        texts(decoder, [prompt(length, seed=i)[0]], kept, answer=12)
        assert kept.nbytes <= kept.limit
    assert len(kept.kept) >= 2
    assert [len(c.tokens) for c in kept.kept][-1] == length + 11  # the last one is there
    kept.forget()
    assert kept.nbytes == 0
    nothing = kept_by(decoder, 0)
    assert texts(decoder, turns(decoder), nothing)[1].reused == 0
    assert not nothing.kept


def test_a_budget_counts_texts_on_their_way() -> None:
    decoder = of("gemma3", torch.float32)
    size = decoder.new_cache().nbytes
    kept = Conversations(decoder.new_cache, 2 * size, lambda positions: size)
    first, second = prompt(60, seed=1)[0], prompt(60, seed=2)[0]
    texts(decoder, [first], kept, answer=5)
    assert len(kept.kept) == 1
    mine = kept.acquire(second, 65)
    assert len(kept.kept) == 1  # both fit
    other = kept.acquire(prompt(60, seed=3)[0], 65)
    assert not kept.kept
    for text in (mine, other):
        kept.release(text)


def test_the_least_recently_used_goes_first() -> None:
    decoder = of("llama", torch.float32)
    kept = kept_by(decoder, 2 * decoder.new_cache().nbytes)
    a, b, c = (prompt(30, seed=seed)[0] for seed in (1, 2, 3))
    texts(decoder, [a, b, a, c], kept, answer=4)
    assert [each.tokens[0].item() for each in kept.kept] == [a[0].item(), c[0].item()]


def save(kept: Conversations, path: Path, decoder: Decoder) -> None:
    with kept.lent() as conversation:
        save_conversation(conversation, path, decoder.identity, {})


@pytest.mark.parametrize("kept_as", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("family", ["llama", "gemma3", "gemma4", "gemma4-e2b", "gemma4-moe"])
def test_a_saved_conversation_goes_on_to_the_bit(family: str, kept_as: torch.dtype, tmp_path: Path) -> None:
    decoder, path = of(family, kept_as, "int8"), tmp_path / "talk"
    first, second, third = turns(decoder)
    kept = kept_by(decoder)
    texts(decoder, [first, second], kept)
    save(kept, path, decoder)
    loaded = kept_by(decoder)
    loaded.add(load_conversation(path, decoder.identity, decoder.new_cache))
    prompts = [third, second, torch.cat((second, prompt(7, seed=1)[0]))]  # on, again, and in other words
    for each in prompts:
        again, stats = texts(decoder, [each], loaded)
        assert again == texts(decoder, [each], None)[0]
        assert stats.reused >= len(second) - 64
    assert [file.name for file in tmp_path.iterdir()] == ["talk"]


def test_files_that_are_not_this_conversation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, path = of("gemma3", None), tmp_path / "talk"
    kept = kept_by(decoder)
    with pytest.raises(ValueError, match="no such conversation"), kept.lent():
        pass
    texts(decoder, [prompt(100, seed=1)[0]], kept)
    with pytest.raises(ValueError, match="no such conversation"), kept.lent(torch.tensor([VOCAB - 1, 1])):
        pass
    save(kept, path, decoder)
    whole = path.read_bytes()

    def refused(match: str, identity: str = decoder.identity) -> None:
        with pytest.raises(ValueError, match=match):
            load_conversation(path, identity, decoder.new_cache)

    refused("another model", of("gemma3", torch.int8).identity)
    refused("another model", of("llama", None).identity)
    path.write_bytes(whole[:-100])
    refused("damaged")
    path.write_bytes(whole[:-100] + bytes(100))
    refused("was changed")
    path.write_bytes(b"hello")
    refused("damaged")
    with pytest.raises(ValueError, match="holds something that is no conversation"), kept.lent() as found:
        save_conversation(found, path, decoder.identity, {})
    assert path.read_bytes() == b"hello"
    path.unlink()
    refused("no such file")

    def full(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    path.write_bytes(whole)
    monkeypatch.setattr("specdec.cache.conversation_file.save_file", full)
    with pytest.raises(ValueError, match="cannot be saved"):
        save(kept, path, decoder)
    assert path.read_bytes() == whole
    assert [file.name for file in tmp_path.iterdir()] == ["talk"]


def test_marks_are_made_where_there_is_room_for_them() -> None:
    decoder, ids = of("gemma3", torch.float32), prompt(400, seed=2)[0]
    cache = decoder.new_cache()
    cache.begin(1)
    rings = sum(ring.nbytes for ring in cache.rings)
    (_, stats), kept = texts(decoder, [ids], kept_by(decoder)), kept_by(decoder)
    texts(decoder, [ids], kept)
    size = kept.kept[0].cache.nbytes
    for room, expected in ((0, 0), (rings - 1, 0), (rings, 1), (2 * rings, 2)):
        kept = kept_by(decoder, size + room)
        texts(decoder, [ids], kept)
        assert [len(each.marks) for each in kept.kept] == [expected]
        assert kept.nbytes <= kept.limit
    assert stats.reused == 0
