"""Suffix matches, and drafters that compete and join."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from specdec.cache import KVCache
from specdec.drafting.composite import CompositeDrafter, CompositeProposer
from specdec.drafting.costs import Costs
from specdec.drafting.draft_length import AdaptiveLength
from specdec.drafting.propose import OpenEnd, propose_together
from specdec.drafting.protocol import Draft, Drafted, DraftLength, FixedLength, NoDraft, Proposer, tokens_until
from specdec.drafting.suffix import SuffixDrafter, SuffixMatches
from specdec.engine.sampling import Noise
from specdec.hf import decoder_of
from specdec.model.decoder import Decoder
from specdec.model.states import States
from tests.support.tiny import tiny_model

STATES = States(torch.zeros(4))


def drafted(proposer: Proposer, lengths: DraftLength, text: Sequence[int], room: int) -> Draft:
    """The draft for `text` when it is alone."""
    return propose_together([OpenEnd(proposer, text, STATES, room)], lengths).drafts[0]


def fresh(**settings: int) -> SuffixMatches:
    return SuffixDrafter(**settings).start()


def test_proposes_what_followed_the_longest_match() -> None:
    text = [1, 2, 3, 9, 9, 5, 1, 2, 3, 4, 4, 7, 5, 1, 2, 3]
    assert fresh().propose(text, STATES, 2).tokens == (4, 4)  # 5 1 2 3 matches four tokens, 1 2 3 at the start three
    assert fresh().propose(text, STATES, 2).sources == ("suffix", "suffix")


def test_the_latest_of_equal_matches_wins() -> None:
    assert fresh().propose([1, 2, 8, 0, 1, 2, 9, 0, 0, 1, 2], STATES, 1).tokens == (9,)


def test_no_match_no_draft() -> None:
    assert fresh().propose([1, 2, 3, 4], STATES, 4).tokens == ()
    assert fresh().propose([1], STATES, 4).tokens == ()


def test_a_run_of_one_token_matches_itself() -> None:
    assert fresh().propose([7] * 9, STATES, 4).tokens == (7,)


def test_short_matches_give_short_drafts() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]
    assert fresh().propose(text, STATES, 8).tokens == (3, 4, 5, 6)


def test_incremental_index_equals_a_fresh_one() -> None:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, 4, (300,), generator=generator).tolist()
    growing = fresh()
    for length in range(2, len(text), 3):
        assert growing.propose(text[:length], STATES, 5) == fresh().propose(text[:length], STATES, 5)


def test_texts_of_one_drafter_know_nothing_of_each_other() -> None:
    drafter = SuffixDrafter()
    first, second = drafter.start(), drafter.start()
    assert first.propose([1, 2, 3, 1, 2], STATES, 4).tokens == (3, 1, 2)
    assert second.propose([9, 1, 2], STATES, 4).tokens == ()
    assert first.propose([1, 2, 3, 1, 2, 3], STATES, 1).tokens == (1,)


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="min_match"):
        SuffixDrafter(min_match=5, max_match=2)


class Scripted:
    """Proposes the tokens that it was given."""

    name, max_draft, aux_layers = "scripted", 4, ()

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def bind(self, backbone: Decoder) -> None:
        pass

    def start(self, cache: KVCache, noise: Noise | None = None) -> Scripted:
        return self

    def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
        return Draft.by(self.name, self.tokens[:k])


def joined(*tokens: int) -> tuple[CompositeDrafter, CompositeProposer]:
    both = CompositeDrafter(Scripted(list(tokens)))
    decoder = decoder_of(tiny_model("llama"))
    both.bind(decoder)
    return both, both.start(decoder.new_cache())


def test_long_matches_compete_and_the_other_drafter_is_asked_elsewhere() -> None:
    (both, proposer), text = joined(7, 7, 7, 7), [3, 4, 5, 6, 8, 9, 3]
    assert [d.name for d in proposer.able(text)] == ["scripted"]
    text.append(4)
    assert [d.name for d in proposer.able(text)] == ["scripted", "suffix-short"], "the other one is the preferred"
    assert proposer.propose(text, STATES, 2) == Draft.by("scripted", (7, 7))
    text.append(5)
    assert [d.name for d in proposer.able(text)] == ["suffix", "scripted"], "a match of three tokens"
    assert proposer.propose(text, STATES, 2) == Draft.by("suffix", (6, 8))
    assert both.max_draft == 16 and both.name == "suffix+scripted"
    both.take(NoDraft())
    assert both.name == "suffix" and both.suffix.min_match == 2


def test_who_does_better_drafts() -> None:
    (_, both), text = joined(7, 7), [3, 4, 5, 6, 8, 9, 3, 4, 5, 6]
    lengths = AdaptiveLength(Costs({1: 1.0, 2: 1.1}))
    for _ in range(40):
        lengths.observe([Drafted(("suffix",), 0)], 0, 0.0, 1.1)
        lengths.observe([Drafted(("scripted", "scripted"), 2)], 0, 0.1, 1.2)
    assert set(drafted(both, lengths, text, 4).sources) == {"scripted"}
    for _ in range(90):
        lengths.observe([Drafted(("suffix",), 1)], 0, 0.0, 1.1)
        lengths.observe([Drafted(("scripted", "scripted"), 0)], 0, 0.1, 1.2)
    assert set(drafted(both, lengths, text, 4).sources) == {"suffix"}


def test_a_draft_goes_on_where_it_leads_into_earlier_text() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 3]  # then 4 5: three tokens that were there, and 6 7 8 came next
    (_, both), lengths = joined(4, 5), AdaptiveLength(Costs({1: 1.0, 2: 1.1}, {"scripted": 0.01}))
    lengths.observe([Drafted(("scripted", "scripted"), 2)], 0, 0.02, 1.2)
    draft = drafted(both, FixedLength(2), text, 8)
    assert draft == Draft.by("scripted", (4, 5)), "a fixed length is that length"
    for _ in range(40):
        lengths.observe([Drafted(("scripted",) * 2 + ("suffix",) * 3, 5)], 0, 0.02, 1.5)
    draft = drafted(both, lengths, text, 8)
    added = len(draft.tokens) - 2
    assert added >= 3 and draft.tokens == (4, 5, 6, 7, 8, 9, 1, 3)[: 2 + added]
    assert draft.sources == ("scripted",) * 2 + ("suffix",) * added
    assert len(drafted(both, lengths, text, 4).tokens) == 4, "no draft outruns its room"
    assert joined(4, 5)[1].suffix.extend(text, Draft.by("scripted", (4, 6)), 4).tokens == ()
    for _ in range(90):
        lengths.observe([Drafted(("scripted",) * 2 + ("suffix",) * 3, 2)], 0, 0.02, 1.5)
    assert "suffix" not in drafted(both, lengths, text, 8).sources


class Sure(Scripted):
    """Draft as it is told to, and say how likely each token is; end a draft as `SureProposer` has it."""

    chances = (0.9, 0.8, 0.1, 0.9)

    def start(self, cache: KVCache, noise: Noise | None = None) -> Sure:
        return self

    def propose_while(self, tokens: Sequence[int], states: States, k: int, floors: Sequence[float]) -> Draft:
        chances = self.chances[:k]
        until = tokens_until(chances, floors)
        return Draft.by(self.name, self.tokens[:until], chances[:until])


def test_a_draft_ends_where_its_source_is_not_sure_and_keeps_what_is_worth_a_row() -> None:
    sure, lengths = Sure([7, 7, 7, 7]), AdaptiveLength(Costs({1: 1.0, 2: 1.2}, {"scripted": 0.05}))
    for _ in range(40):
        lengths.observe([Drafted(("scripted",) * 4, 4, (0.9, 0.8, 0.9, 0.9))], 0, 0.2, 1.8)
    draft = drafted(sure, lengths, [1, 2, 3], 4)
    assert draft.tokens == (7, 7), "0.9 * 0.8 * 0.1 is worth no row that costs 0.2 of a pass"
    assert draft.chances == (0.9, 0.8, 0.1) and draft.given_up == ("scripted",), "and nothing is drafted after it"
    assert drafted(sure, FixedLength(4), [1, 2, 3], 4).tokens == (7, 7, 7, 7), "a fixed length is that length"
    lengths.observe([Drafted((), 0, (0.1,), ("scripted",))], 0, 1.0, 1.0)
    assert lengths.costs.steps["scripted"] > 0.05, "what was given up was paid for"


@pytest.mark.parametrize(
    "said", [(), (0.9,), (0.9,) * 12, (float("nan"),) * 4, (-0.5,) * 4, (1e308,) * 4, (float("inf"),) * 4]
)
def test_chances_that_are_none_cost_no_draft(said: tuple[float, ...]) -> None:
    class Odd(Sure):
        def propose_while(self, tokens: Sequence[int], states: States, k: int, floors: Sequence[float]) -> Draft:
            return Draft.by(self.name, self.tokens[:k], said)

    odd, lengths = Odd([7, 7, 7, 7]), AdaptiveLength(Costs({1: 1.0, 2: 1.2}, {"scripted": 0.05}))
    assert drafted(odd, FixedLength(3), [1, 2, 3], 4).tokens == (7, 7, 7)
    for chances in ((0.9,) * 4, said):  # known chances make the exponent another one than 1
        for _ in range(40):
            sound = Draft.by("scripted", (7,) * 4, chances).sound()
            lengths.observe([sound.checked(4)], 0, 0.2, 1.8)
        assert len(drafted(odd, lengths, [1, 2, 3], 4).tokens) == 4


def test_floors_are_numbers_where_a_further_row_costs_less() -> None:
    lengths = AdaptiveLength(Costs({1: 1.0, 2: 1.2, 3: 1.1, 4: 1.3}, {"scripted": 0.0}))
    for _ in range(40):
        lengths.observe([Drafted(("scripted",) * 4, 4, (0.9, 0.8, 0.9, 0.9))], 0, 0.0, 1.5)
    lengths.plan([{"scripted": 4}])
    floors = lengths.floors("scripted", 4)
    assert floors[0] == 0.0 and floors[1] > 0.0 and floors[3] == 0.0


def test_a_forbidden_token_is_not_counted_as_right_as_its_chance() -> None:
    draft = Draft.by("mtp", (5, 6, 7), (0.9, 0.8, 0.7)).then(Draft.by("suffix", (8,)))
    assert draft.allowed(4) == draft
    assert draft.allowed(3).chances == draft.chances and draft.allowed(3).given_up == ("suffix",)
    assert draft.allowed(1).tokens == (5,) and draft.allowed(1).chances == (0.9, 0.0, 0.0)
    assert draft.first(2).allowed(2).chances == draft.chances, "what was given up may be right"
