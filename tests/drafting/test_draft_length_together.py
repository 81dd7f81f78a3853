"""The choice of who drafts and how long for several texts in one pass."""

from __future__ import annotations

import random

import pytest

from specdec.drafting.costs import FLOOR, Costs
from specdec.drafting.draft_length import AdaptiveLength
from specdec.drafting.protocol import Drafted, FixedLength

SOURCE = "suffix"


def test_drafts_of_several_texts_are_planned_together() -> None:
    table = {rows: 1 + 0.1 * (rows - 1) for rows in (1, 2, 4, 8, 16, 32)}
    lengths = AdaptiveLength(Costs(table, {SOURCE: 0.01, "mtp": 0.01}, text=0.0))
    for _ in range(40):  # one source is nearly always right, the other hardly ever
        lengths.observe([Drafted((SOURCE,) * 4, 4), Drafted(("mtp",) * 4, 0)], 0, 0.08, lengths.costs.of_pass(10))
    assert lengths.plan([{SOURCE: 8}, {"mtp": 8}, {SOURCE: 2}])[1] == ("mtp", 0)
    planned = lengths.plan([{SOURCE: 8}, {"mtp": 8}, {"mtp": 8, SOURCE: 3}])
    assert [source for source, _ in planned] == [SOURCE, "mtp", SOURCE]
    assert planned[0][1] >= 4 and planned[1][1] <= 1 and planned[2][1] == 3
    assert sum(k for _, k in lengths.plan([{SOURCE: 8}] * 6, most=5)) <= 5
    assert FixedLength(4).plan([{SOURCE: 8}, {"mtp": 2}], most=6) == [(SOURCE, 3), ("mtp", 2)]


def test_a_row_that_is_dear_beside_others_is_not_drafted() -> None:
    """Alone a row is cheap, as where a pass reads weights all the time; from four rows on it is arithmetic."""
    table = {1: 1.0, 2: 1.02, 3: 1.04, 4: 1.06, 8: 3.0, 16: 7.0}
    lengths = AdaptiveLength(Costs(table, {SOURCE: 0.01}, text=0.0))
    for i in range(60):  # seven in ten first tokens are right
        lengths.observe([Drafted((SOURCE,), int(i % 10 < 7))], 0, 0.01, 1.02)
    assert lengths.plan([{SOURCE: 8}])[0][1] > 0
    assert lengths.plan([{SOURCE: 8}] * 4) == [(SOURCE, 0)] * 4


@pytest.mark.parametrize("seed", range(3))
def test_drafts_beside_others_are_never_slower_than_the_floor(seed: int) -> None:
    """Four texts whose drafts are right by chance, and wrong in the end: time against plain passes, all along."""
    draws = random.Random(seed)
    costs = Costs({1: 1.0, 4: 1.4, 8: 2.1, 16: 3.6, 32: 7.0}, {SOURCE: 0.02}, text=0.05)
    lengths, emitted, seconds = AdaptiveLength(costs), 0, 0.0
    chance = draws.choice((0.3, 0.6, 0.9))
    for step in range(400):
        planned = lengths.plan([{SOURCE: 8}] * 4)
        right = chance if step < 200 else 0.0
        drafts = []
        for source, k in planned:
            accepted = next((i for i in range(k) if draws.random() >= right), k)
            drafts.append(Drafted((source,) * k, accepted))
        rows = sum(k for _, k in planned)
        spent = costs.of_pass(4 + rows, 4), 0.02 * rows
        lengths.observe(drafts, 0, spent[1], spent[0])
        emitted, seconds = emitted + 4 + sum(draft.accepted for draft in drafts), seconds + sum(spent)
        assert emitted / 4 >= FLOOR * seconds / costs.of_pass(4, 4) - 1e-9
    if chance == 0.9:
        assert emitted > 400 * 4 * 1.2


def test_a_further_text_costs_what_was_measured_and_nothing_is_drafted_beside_others_where_that_is_unknown() -> None:
    known = Costs({1: 1.0, 2: 1.1, 16: 1.5}, text=0.25)
    assert [known.of_pass(2, texts) for texts in (1, 2, 3)] == pytest.approx([1.1, 1.35, 1.6])
    assert AdaptiveLength(known).may_draft(2) and AdaptiveLength(known).may_draft(1)
    assert not AdaptiveLength(known).may_draft(2, beside=8), "rows of a prompt"
    assert not AdaptiveLength(Costs({1: 1.0, 2: 1.1, 16: 1.5})).may_draft(2)
    assert not AdaptiveLength(Costs({1: 1.0, 2: 2.0}, text=0.0)).may_draft(2), "a row costs as much as a pass"
    assert FixedLength(1).may_draft(2, beside=8) and not FixedLength(0).may_draft(1)
