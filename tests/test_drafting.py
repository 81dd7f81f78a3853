"""Suffix matching and the choice of the draft length."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from specdec.cache import KVCache
from specdec.control import AdaptiveLength, DraftLength, FixedLength
from specdec.drafting import Draft, NoDraft, SuffixDrafter, SuffixOr, proposers
from specdec.hf import decoder_of
from specdec.model.decoder import Decoder
from tests.tiny import tiny_model

HIDDEN = torch.zeros(4)


def fresh(**settings: int) -> SuffixDrafter:
    drafter = SuffixDrafter(**settings)
    drafter.start(KVCache([], torch.float32, torch.device("cpu")))
    return drafter


def test_proposes_what_followed_the_longest_match() -> None:
    text = [1, 2, 3, 9, 9, 5, 1, 2, 3, 4, 4, 7, 5, 1, 2, 3]
    assert fresh().propose(text, HIDDEN, 2).tokens == (4, 4)  # 5 1 2 3 matches four tokens, 1 2 3 at the start three
    assert fresh().propose(text, HIDDEN, 2).source == "suffix"


def test_the_latest_of_equal_matches_wins() -> None:
    assert fresh().propose([1, 2, 8, 0, 1, 2, 9, 0, 0, 1, 2], HIDDEN, 1).tokens == (9,)


def test_no_match_no_draft() -> None:
    assert fresh().propose([1, 2, 3, 4], HIDDEN, 4).tokens == ()
    assert fresh().propose([1], HIDDEN, 4).tokens == ()


def test_a_run_of_one_token_matches_itself() -> None:
    assert fresh().propose([7] * 9, HIDDEN, 4).tokens == (7,)


def test_short_matches_give_short_drafts() -> None:
    text = [1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2]
    assert fresh().propose(text, HIDDEN, 8).tokens == (3, 4, 5, 6)


def test_incremental_index_equals_a_fresh_one() -> None:
    generator = torch.Generator().manual_seed(1)
    text = torch.randint(0, 4, (300,), generator=generator).tolist()
    growing = fresh()
    for length in range(2, len(text), 3):
        assert growing.propose(text[:length], HIDDEN, 5) == fresh().propose(text[:length], HIDDEN, 5)


def test_start_forgets_the_last_request() -> None:
    drafter = fresh()
    drafter.propose([1, 2, 3, 1, 2], HIDDEN, 4)
    drafter.start(KVCache([], torch.float32, torch.device("cpu")))
    assert drafter.propose([9, 1, 2], HIDDEN, 4).tokens == ()


def test_bad_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="min_match"):
        SuffixDrafter(min_match=5, max_match=2)
    with pytest.raises(ValueError, match="draft_length"):
        FixedLength(-1)


SOURCE = "suffix"


def observe(control: AdaptiveLength, rounds: int, accepts: float, step: float, row: float = 0.1) -> None:
    for _ in range(rounds):
        k = control.choose(8, SOURCE)
        accepted = round(k * accepts)
        control.observe(SOURCE, k, accepted, k * step, 1 + row * k)


def test_adaptive_drafts_long_when_it_pays_and_stops_when_it_does_not() -> None:
    good, bad, dear = AdaptiveLength(), AdaptiveLength(), AdaptiveLength()
    observe(good, 60, accepts=1.0, step=0.01)
    assert good.choose(8, SOURCE) >= 7
    observe(bad, 60, accepts=0.0, step=0.01)
    assert sum(bad.choose(8, SOURCE) for _ in range(32)) <= 2  # the odd try excepted
    observe(dear, 60, accepts=1.0, step=3.0)
    assert sum(dear.choose(8, SOURCE) for _ in range(32)) <= 2


def test_adaptive_tries_again_after_a_while_and_respects_the_limit() -> None:
    control = AdaptiveLength()
    observe(control, 60, accepts=0.0, step=0.01)
    assert 1 in {control.choose(8, SOURCE) for _ in range(40)}
    observe(control, 200, accepts=1.0, step=0.01)
    assert control.choose(3, SOURCE) == 3
    assert control.choose(0, SOURCE) == 0


def test_every_source_has_a_record_of_its_own() -> None:
    control = AdaptiveLength()
    observe(control, 40, 0.0, 0.1)
    assert control.choose(8, SOURCE) <= 1 < control.choose(8, "mtp")
    for _ in range(40):
        control.observe("mtp", 4, 4, 0.1, 1.2)
    assert control.choose(8, "mtp") >= 4 and control.choose(8, SOURCE) <= 1


@pytest.mark.parametrize(
    ("accepts", "step", "row"), [(0.5, 0.08, 0.12), (0.7, 0.08, 0.2), (0.35, 0.05, 0.1), (0.2, 0.1, 0.2)]
)
def test_chance_does_not_lead_it_far_from_the_best_length(accepts: float, step: float, row: float) -> None:
    draws = random.Random(3)

    def speed(control: DraftLength, rounds: int = 3000) -> float:
        emitted = seconds = 0.0
        for _ in range(rounds):
            k = control.choose(8, SOURCE)
            accepted = next((i for i in range(k) if draws.random() >= accepts), k)
            draft, verify = k * step, (1 + row * k) * (0.95 + 0.1 * draws.random())
            control.observe(SOURCE, k, accepted, draft, verify)
            emitted, seconds = emitted + accepted + 1, seconds + draft + verify
        return emitted / seconds

    best = max(speed(FixedLength(k)) for k in range(5))
    assert speed(AdaptiveLength()) > 0.96 * best


class Scripted:
    """Proposes the tokens that it was given."""

    name, max_draft = "scripted", 4

    def __init__(self, tokens: list[int]) -> None:
        self.tokens = tokens

    def bind(self, backbone: Decoder) -> None:
        pass

    def start(self, cache: KVCache) -> None:
        pass

    def propose(self, tokens: Sequence[int], hidden: torch.Tensor, k: int) -> Draft:
        return Draft(tuple(self.tokens[:k]), self.name)


def test_long_matches_come_first_and_the_other_drafter_elsewhere() -> None:
    both = SuffixOr(Scripted([7, 7, 7, 7]))
    decoder = decoder_of(tiny_model("llama"))
    both.bind(decoder)
    both.start(decoder.new_cache())
    hidden = torch.empty(0)
    text = [3, 4, 5, 6, 8, 9, 3, 4, 5]
    assert [d.name for d in proposers(both, text)] == ["scripted"], "three tokens are too short a match"
    assert both.propose(text, hidden, 2) == Draft((7, 7), "scripted")
    text.append(6)
    assert [d.name for d in proposers(both, text)] == ["suffix", "scripted"]
    assert both.propose(text, hidden, 2) == Draft((8, 9), "suffix")
    assert both.max_draft == 16 and both.name == "suffix+scripted"
    both.take(NoDraft())
    assert both.name == "suffix" and both.suffix.min_match == 2
