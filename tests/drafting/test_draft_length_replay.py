"""Adaptive draft lengths against every fixed length and plain decoding, in replays of recorded and made texts.

The best fixed length is the one that was best in hindsight, on the very tokens that it is compared on. Nothing here is
measured: costs are given, and every replay is the same each time.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest

from specdec.drafting import draft_length
from specdec.drafting.costs import CREDIT, FLOOR, Costs
from specdec.drafting.draft_length import PAUSE, AdaptiveLength
from specdec.drafting.planned_pass import PlannedPass
from specdec.drafting.protocol import Drafted, FixedLength
from tests.support.drafts.replay import (
    COSTS,
    HEAD,
    LONGEST,
    SHORT,
    SUFFIX,
    Process,
    Reached,
    Speed,
    Text,
    all_or_none,
    between,
    costs,
    each,
    first,
    fixed,
    joined,
    made,
    recorded,
    recorded_chances,
    replay,
)

SETTLED, ROUNDS = 64, 256
SOON, AFTER = 30, 60  # rounds until a text that repeats itself has its length, and as many more to compare
NEAR_BEST, NEAR_PLAIN = 0.97, 0.97
WITH_START = 0.94  # of the best fixed length, the first rounds included: the first drafts wait for credit
CHANCE = 0.02  # what a single order of some texts may make of it
TABLES = [(table, HEAD) for table in COSTS] + [("AVX2", SUFFIX)]

# By name: how many seeds (more where chance decides more), and the phases that a text goes through over and over.
STEADY: dict[str, tuple[int, Sequence[tuple[int, Process]]]] = {
    "always right": (1, [(1, first(8))]),
    "95% right": (6, [(1, each(0.95))]),
    "60% right": (6, [(1, each(0.6))]),
    "as a trained head": (6, [(1, each(0.7, 0.6, 0.55, 0.5, 0.45))]),
    "right for one token": (1, [(1, first(1))]),
    "right for two tokens": (1, [(1, first(2))]),
    "right for three tokens": (1, [(1, first(3))]),
    "always wrong": (1, [(1, first(0))]),
    "all right or all wrong": (16, [(1, all_or_none)]),
    "texts take turns": (8, [(60, each(0.95)), (60, first(0))]),
    "good texts and fair ones": (6, [(100, each(0.95)), (100, each(0.6))]),
}
# Every phase, in tokens, is long enough for 64 rounds and as many more.
DRIFTING: dict[str, list[tuple[int, Process]]] = {
    "good, wrong, good": [(1000, each(0.95)), (300, first(0)), (1200, each(0.95))],
    "good, fair, good": [(1000, each(0.95)), (500, each(0.6)), (1200, each(0.95))],
    "long, short, long": [(1200, first(8)), (400, first(1)), (1400, first(8))],
    "wrong, good": [(300, first(0)), (1200, each(0.95))],
}


@functools.cache
def drafts(kind: str, seed: int, source: str = HEAD) -> Text:
    """A text of one of the kinds above."""
    if kind in DRIFTING:
        return made(sum(tokens for tokens, _ in DRIFTING[kind]), seed, *DRIFTING[kind], source=source)
    return made(9 * ROUNDS, seed, *STEADY[kind][1], source=source)


def best(found: Sequence[Sequence[Speed]]) -> float:
    """Tokens a second of the best fixed length over several texts."""
    return max(total(of_length).rate for of_length in zip(*found, strict=True))


def total(parts: Sequence[Speed]) -> Speed:
    whole = Speed()
    for part in parts:
        whole = whole.plus(part)
    return whole


def assert_never_slower(history: Sequence[Reached]) -> None:
    """Than plain decoding: after every single round, from the first one on."""
    slowest = min(reached.token / reached.seconds for reached in history)
    assert slowest >= NEAR_PLAIN - 1e-9, f"{slowest:.4f} times as fast as plain"


@pytest.mark.parametrize(("table", "source"), TABLES)
@pytest.mark.parametrize("kind", STEADY)
def test_it_is_near_the_best_fixed_length_after_64_rounds(kind: str, table: str, source: str) -> None:
    costs, (seeds, _) = COSTS[table], STEADY[kind]
    settled, settled_fixed, whole, whole_fixed = [], [], [], []
    for seed in range(seeds):
        text = drafts(kind, seed, source)
        history = replay(AdaptiveLength(costs), text, costs, rounds=ROUNDS)
        assert_never_slower(history)
        settled.append(between(history, SETTLED, ROUNDS))
        settled_fixed.append(fixed(text, costs, history[SETTLED - 1].token, history[-1].token))
        whole.append(between(history, 0, ROUNDS))
        whole_fixed.append(fixed(text, costs, 0, history[-1].token))
    assert total(settled).rate >= NEAR_BEST * best(settled_fixed)
    assert total(whole).rate >= WITH_START * best(whole_fixed)


@pytest.mark.parametrize("table", COSTS)
@pytest.mark.parametrize("kind", DRIFTING)
def test_it_is_near_the_best_fixed_length_64_rounds_after_each_change(kind: str, table: str) -> None:
    costs, phases = COSTS[table], DRIFTING[kind]
    parts: list[list[Speed]] = [[] for _ in phases]
    parts_fixed: list[list[list[Speed]]] = [[] for _ in phases]
    for seed in range(6):
        text = drafts(kind, seed)
        history = replay(AdaptiveLength(costs), text, costs)
        assert_never_slower(history)
        begin = token = 0
        for part, (tokens, _) in enumerate(phases):
            token += tokens
            end = next(i for i, reached in enumerate(history, start=1) if reached.token >= token)
            settled = begin + SETTLED
            assert end - settled >= SETTLED, "the phase is too short to tell"
            parts[part].append(between(history, settled, end))
            parts_fixed[part].append(fixed(text, costs, history[settled - 1].token, history[end - 1].token))
            begin = end
    for part, (own, others) in enumerate(zip(parts, parts_fixed, strict=True)):
        assert total(own).rate >= NEAR_BEST * best(others), f"phase {part}"


@pytest.mark.parametrize("table", ["AVX-512", "AVX2", "AVX2, dear rows"])
@pytest.mark.parametrize("sources", [(HEAD, SUFFIX, SHORT), (HEAD,), (SHORT,)])
def test_recorded_texts(sources: tuple[str, ...], table: str) -> None:
    """One source alone, or a head and matches that compete and are added to its drafts; from each text on in turn."""
    costs, texts = COSTS[table], [{name: text[name] for name in sources} for text in recorded().values()]
    said = list(recorded_chances().values())
    settled, settled_fixed, whole, whole_fixed = [], [], [], []
    for i in range(len(texts)):
        text: Text = joined(texts[i:] + texts[:i])
        chances = {HEAD: [each for part in said[i:] + said[:i] for each in part[HEAD]]} if HEAD in sources else None
        history = replay(AdaptiveLength(costs), text, costs, chances=chances)
        assert_never_slower(history)
        end = history[-1].token
        settled.append(between(history, SETTLED, len(history)))
        settled_fixed.append(fixed(text, costs, history[SETTLED - 1].token, end))
        assert settled[-1].rate >= (NEAR_BEST - CHANCE) * best(settled_fixed[-1:])
        whole.append(between(history, 0, len(history)))
        whole_fixed.append(fixed(text, costs, 0, end))
    assert total(settled).rate >= NEAR_BEST * best(settled_fixed)
    assert total(whole).rate >= NEAR_BEST * best(whole_fixed)


@pytest.mark.parametrize("table", COSTS)
def test_drafts_that_are_always_right_are_soon_long(table: str) -> None:
    costs = COSTS[table]
    text = made(9 * ROUNDS, 0, (1, first(8)))
    history = replay(AdaptiveLength(costs), text, costs, rounds=ROUNDS)
    tokens = [after.token - before.token for before, after in itertools.pairwise(history)]
    assert min(tokens[32:]) >= 8, "seven or eight drafted tokens, and one more"


STEPS = costs(1, 1.07, 1.13, 1.2, 1.9, 2.0, 2.1, 2.2, 2.9)  # a kernel that takes four rows at once
REPEATING = COSTS | {"AVX2, measured": costs(1, 1.22, 1.95, 2.53, 3.03, 3.5, 3.95, 4.4, 4.8), "AVX2, steps": STEPS}


@pytest.mark.parametrize("table", REPEATING)
@pytest.mark.parametrize("before", [None, (0.6, 0.5, 0.4), (0.9, 0.5, 0.3), (0.5, 0.8, 0.8)])
@pytest.mark.parametrize(("right", "near"), [(0.96, NEAR_BEST - CHANCE), (0.98, NEAR_BEST)])
def test_a_text_that_repeats_itself_has_its_length_within_30_rounds(
    right: float, near: float, before: tuple[float, ...] | None, table: str
) -> None:
    """`before`: how right the matches of an earlier text were, from which the record is. What was learned there of long
    drafts says nothing of this text, and no draft of this one reaches that far until one is tried."""
    costs, earlier = REPEATING[table], 300 if before else 0
    soon, soon_fixed = [], []
    for seed in range(12):
        phases = [(1500, each(right))] if before is None else [(earlier, each(*before)), (1500, each(right))]
        text = made(earlier + 1500, seed, *phases, source=SUFFIX)
        history = replay(AdaptiveLength(costs), text, costs)
        assert_never_slower(history)
        begin = next((i for i, reached in enumerate(history, 1) if reached.token >= earlier), 0) if earlier else 0
        soon.append(between(history, begin + SOON, begin + SOON + AFTER))
        soon_fixed.append(fixed(text, costs, history[begin + SOON - 1].token, history[begin + SOON + AFTER - 1].token))
    assert total(soon).rate >= near * best(soon_fixed)


@pytest.mark.parametrize("table", COSTS)
def test_whoever_decides_what_is_right_cannot_make_it_slower_than_plain(table: str) -> None:
    costs = COSTS[table]
    for seed in range(5):
        lengths, draws = AdaptiveLength(costs), random.Random(seed)
        tokens = seconds = lead = 0.0
        for _ in range(ROUNDS):
            source, k = lengths.plan([{HEAD: 8, SUFFIX: 8}])[0]
            # Short drafts are right until a long one was made: that one is wrong, and so is what follows for a while.
            right = 0 if k > draws.choice((1, 3, 7)) or draws.random() < 0.2 else k
            draft, verify = costs.of_draft(source, k), costs.of_pass(k + 1)
            lengths.observe([Drafted((source,) * k, right)], 0, draft, verify)
            tokens, seconds = tokens + right + 1, seconds + draft + verify
            lead = max(lead, tokens - FLOOR * seconds)
            assert tokens >= NEAR_PLAIN * seconds - 1e-9
            assert tokens - FLOOR * seconds >= min(lead - CREDIT, 0) - 1e-9


def test_a_fixed_length_is_replayed_the_same_alone_and_among_others() -> None:
    costs, text = COSTS["AVX2"], {SHORT: recorded()["JSON-02"][SHORT]}
    for k, speed in enumerate(fixed(text, costs, 0, len(text[SHORT]))):
        last = replay(FixedLength(k), text, costs)[-1]
        assert (last.token, last.seconds) == (speed.tokens, pytest.approx(speed.seconds))


@pytest.mark.parametrize("table", COSTS)
@pytest.mark.parametrize("chances", [(0.0,), (0.3,), (0.9, 0.5)])
def test_pauses_change_no_draft_and_save_plans_where_there_are_none(
    table: str, chances: tuple[float, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    text, made_plans, histories = made(600, 5, (1, each(*chances))), Counter[int](), []
    for pause in (1, PAUSE):

        class Counted(PlannedPass):
            def __init__(self, *args: Any, pause: int = pause) -> None:
                made_plans[pause] += 1
                super().__init__(*args)

        monkeypatch.setattr(draft_length, "PlannedPass", Counted)
        monkeypatch.setattr(draft_length, "PAUSE", pause)
        histories.append(replay(AdaptiveLength(COSTS[table]), text, COSTS[table]))
    assert histories[0] == histories[1]
    assert made_plans[1] == len(histories[0]), "without pauses every round is planned"
    assert made_plans[PAUSE] <= made_plans[1] / (4 if chances == (0.0,) else 1)


def with_chances(lengths: AdaptiveLength, costs: Costs, sure: bool) -> Speed:
    """All recorded texts, drafted by the head alone, one after the other; `sure`: it says how likely its tokens are."""
    spent = Speed()
    for (name, text), chances in zip(recorded().items(), recorded_chances().values(), strict=True):
        assert len(text[HEAD]) == len(chances[HEAD]), name
        history = replay(lengths, {HEAD: text[HEAD]}, costs, chances=chances if sure else None)
        spent = spent.plus(between(history, 0, len(history)))
    return spent


@pytest.mark.parametrize("table", COSTS)
def test_a_head_that_says_how_sure_it_is_wins_more(table: str) -> None:
    before, now = (with_chances(AdaptiveLength(COSTS[table]), COSTS[table], sure) for sure in (False, True))
    assert now.rate >= 1.02 * before.rate
    assert now.rate >= FLOOR


@pytest.mark.parametrize("table", COSTS)
@pytest.mark.parametrize("chance", [0.0, 0.5, 0.99, float("nan")])
def test_a_head_that_is_wrong_about_itself_costs_no_more_than_the_floor(table: str, chance: float) -> None:
    costs, chances = COSTS[table], {HEAD: [[chance] * LONGEST] * 400}
    for right in (0, 1, LONGEST):
        history = replay(AdaptiveLength(costs), {HEAD: [(LONGEST, right)] * 400}, costs, chances=chances)
        assert_never_slower(history)
        assert right < LONGEST or history[-1].token / history[-1].seconds > 1.1 or chance == 0.0
