"""Predictions: where drafts are taken from an expected answer, whom they compete with, and that they change no text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from specdec.drafting.composite import CompositeDrafter, PredictedProposer
from specdec.drafting.draft_length import AdaptiveLength
from specdec.drafting.protocol import Drafted, Drafter, DraftLength, FixedLength, NoDraft
from specdec.drafting.suffix import PREDICTION, PredictionMatches, SuffixDrafter
from specdec.engine.stats import GenerationStats
from specdec.hf import decoder_of
from specdec.model.states import States
from tests.support.decoding import alone, decode, request
from tests.support.scripted import SCRIPTS, ScriptedDrafter
from tests.support.tiny import VOCAB, prompt, tiny_model

STATES = States(torch.zeros(4))
ASKED = [90, 91, 92]


def drafted(prediction: Sequence[int], answer: Sequence[int], k: int = 8) -> tuple[int, ...]:
    """The draft after the whole of `answer`, which came token by token."""
    matches = PredictionMatches(prediction, len(ASKED))
    for end in range(len(answer)):
        matches.match([*ASKED, *answer[:end]])
    return matches.propose([*ASKED, *answer], STATES, k).tokens


def test_it_is_followed_from_the_first_token_on() -> None:
    expected = [1, 2, 3, 4, 5, 6, 7]
    assert drafted(expected, []) == (), "nothing says yet that it fits"
    assert drafted(expected, [1]) == (2, 3, 4, 5)
    assert drafted(expected, [1, 2, 3]) == (4, 5, 6, 7)
    assert drafted(expected, [1, 2, 3], k=2) == (4, 5)
    assert drafted(expected, expected) == ()
    assert drafted([5, 6, 7], [5, 6]) == (7,), "and the prompt is no part of the answer"


def test_it_is_found_again_after_an_edit() -> None:
    expected = list(range(1, 30))
    assert drafted(expected, [1, 2, 3, 80]) == ()
    assert drafted(expected, [1, 2, 3, 80, 4]) == ()
    assert drafted(expected, [1, 2, 3, 80, 4, 5])[:3] == (6, 7, 8), "inserted"
    assert drafted(expected, [1, 2, 3, 10, 11, 12])[:3] == (13, 14, 15), "left out"
    assert drafted(expected, [70, 71, 1, 2])[:3] == (3, 4, 5), "a fence before the file"


def test_repetitions_are_followed_in_their_order() -> None:
    blocks = [token for i in range(40) for token in (1, 2, 3, 4, 50 + i)]
    for at in range(2, 40):
        begun = blocks[: 5 * at + 4]
        assert drafted(blocks, begun, k=1) == (50 + at,)
        edited = [*begun[:-5], 99, *begun[-4:]]
        assert drafted(blocks, edited, k=1) == (50 + at,), "of equal matches the next one, not the last"


def test_media_are_not_proposed() -> None:
    assert PredictionMatches([1, 2, 3, 77, 4], 3, frozenset({77})).propose([*ASKED, 1, 2], STATES, 8).tokens == (3,)


def test_the_longer_of_prediction_and_suffix_match_is_offered() -> None:
    def names(drafter: Drafter, text: Sequence[int], expected: Sequence[int], begin: int) -> list[str]:
        drafter.bind(decoder_of(tiny_model("llama")))
        inner = drafter.start(tiny.new_cache())
        proposer = PredictedProposer(PredictionMatches(expected, begin), inner)
        found = [one.name for one in proposer.able(text)]
        if found[0] != other.name:
            assert {*proposer.propose(text, STATES, 4).sources} <= {found[0]}
        return found

    tiny = decoder_of(tiny_model("llama"))
    other = ScriptedDrafter((), SCRIPTS["all right"], VOCAB)
    text = [1, 2, 3, 4, 5, 6, 9, 1, 2, 3, 4, 5]
    assert names(SuffixDrafter(), text, [7, 7], 6) == ["suffix"]
    assert names(SuffixDrafter(), text, [8, 4, 5, 6], 6) == ["suffix"], "its match is longer"
    assert names(SuffixDrafter(), text, [9, 1, 2, 3, 4, 5, 6], 6) == [PREDICTION]
    assert names(NoDraft(), text, [8, 8, 4, 5, 6], 6) == [PREDICTION]
    assert names(NoDraft(), text, [8, 8], 6) == ["none"]
    assert names(CompositeDrafter(other), text, [9, 1, 2, 3, 4, 5, 6], 6) == [PREDICTION, "scripted"]
    assert names(other, [8, 8, 8, 4, 5], [7, 4, 5, 6], 2) == ["scripted", PREDICTION], "a short match comes last"
    assert names(other, [8, 8, 3, 4, 5], [3, 4, 5, 6], 2) == [PREDICTION, "scripted"], "one of three tokens first"


@pytest.mark.parametrize(("family", "seed"), [("gemma4_unified", None), ("llama", 5)], ids=["greedy", "sampled"])
def test_no_prediction_changes_the_text_and_a_right_one_is_accepted(family: str, seed: int | None) -> None:
    decoder, new = decoder_of(tiny_model(family)), 120
    asked = request(prompt(12)[0], new, seed)
    plain = alone(decoder, asked)
    answer = plain[12:]
    edited = [*answer[:30], 7, 8, 9, *answer[35:80], *answer[90:]]
    wrong = torch.randint(0, VOCAB, (200,), generator=torch.Generator().manual_seed(1)).tolist()

    def counted(prediction: Sequence[int], lengths: DraftLength, drafter: Drafter) -> tuple[GenerationStats, list[int]]:
        stats = GenerationStats()
        ((_, row, _),) = decode(decoder, drafter, lengths, [replace(asked, prediction=prediction)], stats)
        assert row.tolist() == plain
        return stats, stats.draft_sources.get(PREDICTION, [0, 0])

    for drafter in (NoDraft(), SuffixDrafter()):
        stats, (tried, right) = counted(answer, FixedLength(8), drafter)
        assert right > 0.8 * new and right / tried > 0.95 and stats.rounds < new / 5
        _, (_, most) = counted(edited, FixedLength(8), drafter)
        assert 0.6 * new < most < right
        counted(wrong, FixedLength(8), drafter)
        counted(answer, AdaptiveLength(), drafter)
    stats, _ = counted(wrong, AdaptiveLength(), NoDraft())
    assert stats.rounds == new - 1 - stats.accepted and stats.drafted < new / 8
    assert counted(answer, FixedLength(0), NoDraft())[0].drafted == 0


def test_looking_through_a_text_for_the_first_time_is_no_cost_of_drafts() -> None:
    class Heard(FixedLength):
        def observe(self, drafts: Sequence[Drafted], beside: int, draft_seconds: float, verify_seconds: float) -> None:
            heard.append(draft_seconds)

    heard: list[float] = []
    asked = replace(request(prompt(12)[0], 9), prediction=tuple(range(100)))
    list(decode(decoder_of(tiny_model("llama")), SuffixDrafter(), Heard(2), [asked]))
    assert heard[0] == 0 and len(heard) > 1 and all(seconds > 0 for seconds in heard[1:])
    lengths = AdaptiveLength()
    lengths.observe([Drafted(("a",), 1)], 0, 0.0, 1.0)
    lengths.observe([Drafted(("b",), 1)], 0, 0.5, 1.0)
    assert lengths.costs.steps == {"b": 0.5}
