"""Texts with pictures and sound in flight: drafted as plain, beside others, and from the caches of earlier texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch

from drafter import load_drafter
from specdec.cache import Conversations
from specdec.cache.conversation_file import MEDIA, TEXT, load_conversation, save_conversation
from specdec.drafting.composite import CompositeDrafter
from specdec.drafting.protocol import Drafter, DraftLength, FixedLength, NoDraft
from specdec.drafting.suffix import SuffixDrafter
from specdec.engine.engine import Engine
from specdec.engine.sampling import Sampler
from specdec.engine.schedule import ROWS_BESIDE
from specdec.engine.sequence import Request
from specdec.engine.sequence import Sequence as Text
from specdec.engine.stats import GenerationStats
from specdec.model.decoder import Decoder
from specdec.model.media import MediaBlock
from tests.support.decoding import counted, never, to_end
from tests.support.media.prompts import (
    IMAGE,
    MEDIA_IDS,
    MediaPrompt,
    embedded,
    frame,
    knowing_media,
    media_prompt,
    picture,
    read,
    sound,
)
from tests.support.tiny import WINDOW, prompt
from tests.support.tiny_assistant import save_assistant
from tests.support.tiny_decoder import of

NEW, PLENTY = 3 * WINDOW, 1 << 30
SEEN = media_prompt(6, picture(30), 40, seed=1)
PROMPTS = [
    SEEN,
    media_prompt(20, picture(70, 1), 3, sound(80, 2), 20, seed=2),
    MediaPrompt(prompt(80, seed=3)[0] % MEDIA_IDS.start, ()),
    media_prompt(5, *(part for i in range(4) for part in (2, frame(20, i))), 9, seed=4),
    media_prompt(picture(150, 3), 12, seed=5),
]


def request(given: MediaPrompt, seed: int | None = None, new: int = NEW) -> Request:
    return Request(given.ids, len(given.ids) + new, Sampler(seed=seed), never, media=given.media)


def texts(
    decoder: Decoder,
    requests: Sequence[Request],
    drafter: Drafter | None = None,
    max_batch: int = 1,
    caches: Conversations | None = None,
) -> tuple[list[list[int]], GenerationStats]:
    lengths: DraftLength = FixedLength(4 if drafter else 0)
    engine = Engine(decoder, drafter or NoDraft(), lengths, caches, max_batch)
    sequences = [engine.add(one) for one in requests]
    to_end(engine)
    return [one.row.tolist() for one in sequences], engine.stats


def by_hand(decoder: Decoder, given: MediaPrompt, new: int) -> list[int]:
    """The greedy text, without an engine."""
    cache, ids = decoder.new_cache(), given.ids.tolist()
    state = read(decoder, given, 64, cache).last[-1:]
    for _ in range(new):
        ids.append(int(decoder.logits(state).argmax()))
        state = decoder.forward(torch.tensor(ids[-1:]), cache).last
        cache.commit(1)
    return ids


@pytest.fixture(scope="module")
def assistant(tmp_path_factory: pytest.TempPathFactory) -> Drafter:
    return load_drafter(save_assistant(tmp_path_factory.mktemp("assistant"), "gemma4_unified"))


def test_an_engine_decodes_what_a_loop_by_hand_does() -> None:
    decoder = of("gemma4_unified", None)
    for given in PROMPTS:
        ((found,), _) = texts(decoder, [request(given)])
        assert found == by_hand(decoder, given, NEW)


@pytest.mark.parametrize("seed", [None, 3], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("storage", "kept"), [(None, None), ("int8", torch.int8)], ids=["op by op", "native"])
def test_drafted_texts_are_plain_ones(
    assistant: Drafter, storage: str | None, kept: torch.dtype | None, seed: int | None
) -> None:
    decoder = knowing_media(of("gemma4_unified", kept, storage))
    requests = [request(given, seed) for given in PROMPTS]
    plain = [texts(decoder, [one])[0][0] for one in requests]
    for drafter, together in ((assistant, 1), (SuffixDrafter(1), 3), (CompositeDrafter(assistant), 3)):
        drafted, stats = texts(decoder, requests, drafter, together)
        assert drafted == plain, f"{drafter.name}, {together} at a time"
        assert stats.drafted > 0, "drafts begin behind media"


def test_a_picture_beside_texts_that_decode_is_a_pass_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = of("gemma4_unified", None)
    rows = counted(decoder, monkeypatch)
    engine = Engine(decoder, max_batch=2)
    talking = engine.add(request(PROMPTS[2], new=40))
    engine.step()
    engine.step()
    rows.clear()
    seeing = engine.add(request(media_prompt(10, picture(100), 70, seed=6), new=3))
    while not seeing.decoding:
        before = talking.length
        engine.step()
        assert talking.length == before + 1, "a token in every pass"
    assert rows == [1 + 11, 1 + 100, *[1 + ROWS_BESIDE] * 2, 1 + 7]
    to_end(engine)
    assert [seeing.row.tolist()] == texts(decoder, [seeing.request])[0]
    assert [talking.row.tolist()] == texts(decoder, [talking.request])[0]


def test_suffix_matches_propose_no_token_of_media() -> None:
    ids = [10, 11, 12, 13, 243, *[IMAGE] * 5, 244, 10, 11, 12]
    drafter, states = SuffixDrafter(), read(of("gemma4_unified", None), MediaPrompt(torch.tensor([1]), ()), 1)[0]
    for bound_to, expected in ((of("gemma4_unified", None), 6), (knowing_media(of("gemma4_unified", None)), 1)):
        drafter.bind(bound_to)
        draft = drafter.start().propose(ids, states, 6)
        assert len(draft.tokens) == expected
        assert draft.tokens[0] == 13


def test_rows_are_embedded_once_and_only_when_they_are_read() -> None:
    decoder, kept = of("gemma4_unified", None), None
    made = list[str]()

    def counting(given: MediaPrompt, name: str) -> MediaPrompt:
        def rows(block: MediaBlock) -> torch.Tensor:
            made.append(name)
            return block.rows()

        media = tuple(replace(block, rows=lambda block=block: rows(block)) for block in given.media)  # type: ignore[misc]
        return MediaPrompt(given.ids, media)

    long = media_prompt(5, sound(300), 10, picture(30), 9)
    kept = Conversations(decoder.new_cache, PLENTY)
    texts(decoder, [request(counting(long, "first"))], caches=kept)
    assert made == ["first", "first"]
    again = counting(long.and_then(torch.tensor([9, 9])), "again")
    texts(decoder, [request(again)], caches=kept)
    assert made == ["first", "first"], "the cache has what they made"
    engine, left = Engine(decoder), list[int]()
    sequence = engine.add(request(long))
    while not sequence.decoding:
        left.append(len(sequence.media))
        engine.step()
    assert left == sorted(left, reverse=True)
    assert {*left} == {2, 1, 0}, "what was read is let go"


@pytest.mark.parametrize("storage", [None, "int8"], ids=["op by op", "native"])
def test_a_second_picture_never_answers_for_the_first(storage: str | None) -> None:
    decoder = of("gemma4_unified", None, storage)
    same = [media_prompt(6, picture(30, shows), 20, seed=1) for shows in (0, 1)]
    assert torch.equal(same[0].ids, same[1].ids)
    text = MediaPrompt(same[0].ids, ())  # the same ids, and nothing behind them
    shorter, after = media_prompt(6, picture(29), 21, seed=1), same[0].and_then(prompt(5)[0])
    turns = [same[0], same[1], text, same[1], shorter, same[0], after, text]
    new = 18  # the rings hold all of a text, so that a cache goes back to where media begin; a copy of it does
    alone = [texts(decoder, [request(given, new=new)])[0][0] for given in turns]
    assert len({tuple(one) for one in alone[:3]}) == 3
    kept = Conversations(decoder.new_cache, PLENTY)
    reused = []
    for given, expected in zip(turns, alone, strict=True):
        (found,), stats = texts(decoder, [request(given, new=new)], caches=kept)
        assert found == expected
        reused.append(stats.reused)
    start, all_of_it = 7, len(same[0].ids) - 1
    assert reused == [0, start, start, all_of_it, start, all_of_it, all_of_it + 1, all_of_it]


def test_another_question_about_the_same_media_computes_the_new_text_alone() -> None:
    decoder = of("gemma4_unified", None, "int8")
    video = [part for i in range(40) for part in (4, frame(20, i))]
    shown = media_prompt(8, *video, 3, sound(200, 50), seed=1)
    kept = Conversations(decoder.new_cache, PLENTY)
    for number, length in enumerate((70, 3, 40)):
        asked = shown.and_then(prompt(length, seed=number)[0] % MEDIA_IDS.start)
        (found,), stats = texts(decoder, [request(asked)], caches=kept)
        assert [found] == texts(decoder, [request(asked)])[0]
        assert not number or stats.reused >= len(shown.ids) - 1, "the end token of the sound is text"


def test_a_saved_conversation_has_its_media(tmp_path: Path) -> None:
    decoder, path = of("gemma4_unified", torch.int8, "int8"), tmp_path / "talk"
    identity, kept = decoder.identity, Conversations(decoder.new_cache, PLENTY)
    given = PROMPTS[1]
    texts(decoder, [request(given)], caches=kept)
    with kept.lent() as conversation:
        save_conversation(conversation, path, identity, {})
    assert MEDIA.encode() in path.read_bytes()[:4000]
    other = MediaPrompt(given.ids, (replace(given.media[0], key=b"another"), given.media[1]))
    for asked, expected in ((given, len(given.ids) - 1), (other, given.media[0].start)):
        loaded = Conversations(decoder.new_cache, PLENTY)
        loaded.add(load_conversation(path, identity, decoder.new_cache))
        (found,), stats = texts(decoder, [request(asked)], caches=loaded)
        assert [found] == texts(decoder, [request(asked)])[0]
        assert stats.reused == (expected if expected < WINDOW or asked is given else 0)

    def damaged(old: bytes, new: bytes) -> None:
        content = path.read_bytes()
        assert old in content
        assert len(old) == len(new)
        (tmp_path / "damaged").write_bytes(content.replace(old, new))
        with pytest.raises(ValueError, match="damaged"):
            load_conversation(tmp_path / "damaged", identity, decoder.new_cache)

    key = given.media[0].key.hex().encode()
    damaged(key, key[:-1] + b"x")
    damaged(b"[21, 91,", b"[21, 21,")
    damaged(b"[21, 91,", b"[91, 21,")
    damaged(b"[21, 91,", b"[21, 99,")
    texts(decoder, [request(PROMPTS[2])], caches=kept)
    with kept.lent() as conversation:
        save_conversation(conversation, path, identity, {})
    assert TEXT.encode() in path.read_bytes()[:4000], "programs without media read it"
    assert load_conversation(path, identity, decoder.new_cache).media == ()


def test_an_error_behind_the_pass_of_a_picture_leaves_the_text_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, kept = of("gemma4_unified", None, "int8"), None
    ids, media = media_prompt(60, picture(200), seed=7)
    asked = request(MediaPrompt(ids[:-1], media))  # the pass that chooses is the picture's
    expected, _ = texts(decoder, [asked])
    for goes_on in (True, False):
        kept = Conversations(decoder.new_cache, PLENTY)
        engine, calls, logits = Engine(decoder, caches=kept), count(), decoder.logits

        def failing(
            hidden: torch.Tensor, adapters: object, calls: count[int] = calls, logits: Any = logits
        ) -> torch.Tensor:
            if next(calls) == 0:
                raise KeyboardInterrupt
            found: torch.Tensor = logits(hidden, adapters)
            return found

        monkeypatch.setattr(decoder, "logits", failing)
        sequence = engine.add(asked)
        with pytest.raises(KeyboardInterrupt):
            to_end(engine)
        if goes_on:
            to_end(engine)
            assert [sequence.row.tolist()] == expected
        else:
            engine.close()
            size = decoder.new_cache().rings[0].nbytes
            assert [ring.nbytes for ring in kept.kept[0].cache.rings] == [size] * 4
            again, stats = texts(decoder, [asked], caches=kept)
            assert again == expected
            assert stats.reused == asked.media[0].start
        monkeypatch.undo()


def test_a_text_that_was_stopped_inside_of_sound_is_still_told_from_others() -> None:
    decoder = of("gemma4_unified", None, "int8")
    given, kept = media_prompt(9, sound(50), 4), Conversations(decoder.new_cache, PLENTY)
    engine = Engine(decoder, caches=kept)
    sequence = engine.add(request(given))
    sequence.chunk = 30
    engine._admit()
    engine._pass([sequence])
    assert sequence.conversation.cache.length == 30
    engine.close()
    for asked in (MediaPrompt(given.ids, ()), given):
        (found,), stats = texts(decoder, [request(asked)], caches=kept)
        assert [found] == texts(decoder, [request(asked)])[0]
        assert stats.reused == given.media[0].start


def test_the_conversation_that_ids_begin_with_is_found_whatever_they_show() -> None:
    decoder, kept = of("gemma4_unified", None, "int8"), None
    kept = Conversations(decoder.new_cache, PLENTY)
    shown = [media_prompt(6, picture(70, shows), 9, seed=1) for shows in (0, 1)]
    other = media_prompt(6, picture(70), 9, seed=2)
    texts(decoder, [request(given, new=4) for given in (*shown, other)], caches=kept)
    assert len(kept.kept) == 3
    for media, expected in ((None, shown[1]), *(([one.media[0].place], one) for one in shown)):
        with kept.lent(shown[0].ids, media) as found:
            assert found.media == (expected.media[0].place,)


def test_what_a_request_says_of_its_media_is_checked() -> None:
    (block,) = SEEN.media
    with pytest.raises(ValueError, match="list blocks by their positions"):
        Request(SEEN.ids[: block.end - 1], 200, Sampler(), never, media=(block,))
    padded = torch.cat((torch.zeros(9, dtype=torch.int64), SEEN.ids))
    row = Request(padded, len(padded) + NEW, Sampler(), never, padding=9, media=SEEN.media)
    decoder = of("gemma4_unified", None)
    assert texts(decoder, [row])[0][0][9:] == texts(decoder, [request(SEEN)])[0][0]
    assert Text(row).next_rows == chunk_of(SEEN)
    assert torch.equal(embedded(picture(30)), block.rows())


def chunk_of(given: MediaPrompt) -> int:
    """The rows of the first chunk of a prompt whose one picture ends it: text behind media has a pass of its own."""
    return given.media[-1].end
