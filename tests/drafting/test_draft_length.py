"""The choice of who drafts and how long, and costs as they were measured and as they change."""

from __future__ import annotations

import copy
import pickle
import random
import sys
import threading

import pytest
import torch

from specdec.drafting.acceptance import MEMORY, RETRY, RETRY_MOST
from specdec.drafting.calibrate import calibrate, measure_costs, plausible
from specdec.drafting.costs import DOUBT_SECONDS, Costs, LiveCosts
from specdec.drafting.draft_length import FLOOR, AdaptiveLength, Drafted, DraftLength, FixedLength
from specdec.drafting.protocol import NoDraft
from specdec.drafting.suffix import SuffixDrafter
from specdec.hf import SpecdecForCausalLM, decoder_of
from tests.support.tiny import FAMILIES, tiny_model

SOURCE = "suffix"


def line(row: float = 0.1, **steps: float) -> Costs:
    return Costs({1: 1.0, 2: 1.0 + row}, steps)


def chosen(control: DraftLength, limit: int = 8, source: str = SOURCE) -> int:
    name, k = control.plan([{source: limit}])[0]
    assert name == source
    return k


def rounds(
    control: DraftLength, count: int, accepts: float, step: float, row: float = 0.1, source: str = SOURCE
) -> None:
    for _ in range(count):
        k = chosen(control)
        control.observe([Drafted((SOURCE,) * k, round(k * accepts))], 0, k * step, 1 + row * k)


def test_bad_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="draft_length"):
        FixedLength(-1)


@pytest.mark.parametrize("costs", [None, line()])
def test_drafts_are_long_when_that_pays_and_stop_when_not(costs: Costs | None) -> None:
    good, bad, dear = AdaptiveLength(costs), AdaptiveLength(costs), AdaptiveLength(costs)
    rounds(good, 60, accepts=1.0, step=0.01)
    assert chosen(good) >= 7
    rounds(bad, 60, accepts=0.0, step=0.01)
    tries = 32 // RETRY + 1
    assert sum(chosen(bad) for _ in range(32)) <= tries
    rounds(dear, 60, accepts=1.0, step=3.0)
    assert sum(chosen(dear) for _ in range(32)) <= tries


def test_what_was_learned_can_be_copied_and_pickled() -> None:
    control = AdaptiveLength(line())
    rounds(control, 60, accepts=1.0, step=0.01)
    for copied in (copy.deepcopy(control), pickle.loads(pickle.dumps(control))):
        assert chosen(copied) == chosen(control)
        rounds(copied, 3, accepts=1.0, step=0.01)


def test_it_tries_again_after_a_while_and_respects_the_limit() -> None:
    control = AdaptiveLength(line())
    rounds(control, 60, accepts=0.0, step=0.01)
    assert 1 in {chosen(control) for _ in range(RETRY_MOST + 1)}
    rounds(control, 400, accepts=1.0, step=0.01)
    assert chosen(control, 3) == 3
    assert chosen(control, 0) == 0


def test_a_source_that_is_always_wrong_costs_next_to_nothing() -> None:
    control = AdaptiveLength(line(0.2, suffix=0.1))
    rounds(control, 100, 0.0, 0.1, 0.2)
    drafted = 0
    for _ in range(1000):
        k = chosen(control)
        drafted += k
        control.observe([Drafted((SOURCE,) * k, 0)], 0, 0.1 * k, 1 + 0.2 * k)
    assert 1000 // RETRY_MOST - 3 <= drafted <= 1000 // RETRY_MOST + 3, "tries become rarer, and never end"


def test_a_source_that_has_become_good_is_soon_back() -> None:
    control = AdaptiveLength(line(0.2, suffix=0.1))
    rounds(control, 300, 0.0, 0.1, 0.2)
    for _ in range(2 * RETRY_MOST):
        k = chosen(control)
        control.observe([Drafted((SOURCE,) * k, k)], 0, 0.1 * k, 1 + 0.2 * k)
        if k >= 2:
            return
    pytest.fail("it was right each time that it was tried")


def test_every_source_has_a_record_of_its_own_and_the_better_drafts() -> None:
    control = AdaptiveLength(line())
    rounds(control, 200, 0.0, 0.1)
    for _ in range(40):
        control.observe([Drafted(("mtp",) * 4, 4)], 0, 0.4, 1.4)
    assert chosen(control) <= 1 < chosen(control, source="mtp")
    assert control.plan([{SOURCE: 8, "mtp": 8}])[0][0] == "mtp"
    for _ in range(90):
        control.observe([Drafted(("mtp",) * 4, 0)], 0, 0.4, 1.4)
        control.observe([Drafted((SOURCE,) * 4, 4)], 0, 0.0, 1.4)
    assert control.plan([{"mtp": 8, SOURCE: 8}])[0][0] == SOURCE


def test_a_source_that_is_not_chosen_is_tried_too() -> None:
    control = AdaptiveLength(line())
    for _ in range(40):
        control.observe([Drafted(("mtp",) * 4, 4)], 0, 0.4, 1.4)
        control.observe([Drafted((SOURCE,) * 4, 1)], 0, 0.0, 1.4)
    names = [control.plan([{SOURCE: 8, "mtp": 8}])[0][0] for _ in range(2 * RETRY)]
    assert 1 <= names.count(SOURCE) <= 2 and names[0] == "mtp"


def test_a_draft_is_extended_while_that_pays() -> None:
    control = AdaptiveLength(line(0.1, mtp=0.1))
    for _ in range(60):
        control.observe([Drafted(("mtp", "mtp", SOURCE, SOURCE, SOURCE), 4)], 0, 0.2, 1.5)  # the third match is wrong
    assert control.extend(["mtp", "mtp"], SOURCE, 6) == 2
    assert control.extend(["mtp", "mtp"], SOURCE, 1) == 1
    assert control.extend(["mtp", "mtp"], SOURCE, 0) == 0
    assert control.extend(["mtp"] * control.longest, SOURCE, 6) == 0
    assert FixedLength(3).extend(["mtp"] * 3, SOURCE, 6) == 0


@pytest.mark.parametrize(
    ("accepts", "step", "row"), [(0.5, 0.08, 0.12), (0.7, 0.08, 0.2), (0.35, 0.05, 0.1), (0.2, 0.1, 0.2)]
)
@pytest.mark.parametrize("known", [False, True])
def test_chance_does_not_lead_it_far_from_the_best_length(accepts: float, step: float, row: float, known: bool) -> None:
    draws = random.Random(3)

    def speed(control: DraftLength, count: int = 3000) -> float:
        emitted = seconds = 0.0
        for _ in range(count):
            k = chosen(control)
            accepted = next((i for i in range(k) if draws.random() >= accepts), k)
            draft, verify = k * step, (1 + row * k) * (0.95 + 0.1 * draws.random())
            control.observe([Drafted((SOURCE,) * k, accepted)], 0, draft, verify)
            emitted, seconds = emitted + accepted + 1, seconds + draft + verify
        return emitted / seconds

    best = max(speed(FixedLength(k)) for k in range(5))
    # What was measured at load is worth having: a first guess at the costs of row counts is corrected slowly.
    assert speed(AdaptiveLength(line(row, suffix=step) if known else None)) > (0.97 if known else 0.95) * best


def test_what_was_never_drafted_is_expected_to_go_on_as_the_draft_began() -> None:
    right, wrong = AdaptiveLength(line()), AdaptiveLength(line())
    for _ in range(20):
        right.observe([Drafted((SOURCE,), 1)], 0, 0.01, 1.1)
        wrong.observe([Drafted((SOURCE,), 0)], 0, 0.01, 1.1)
    a, b = right._record(SOURCE).acceptance(), wrong._record(SOURCE).acceptance()
    assert min(a) == max(a[1:]) > 0.9 and max(b) == min(b[1:]) < 0.1
    assert chosen(right) >= 7


def test_one_wrong_token_makes_no_length_hopeless_and_many_do() -> None:
    control, chances = AdaptiveLength(line()), []
    for _ in range(MEMORY):
        control.observe([Drafted((SOURCE,) * 2, 1)], 0, 0.01, 1.2)
        chances.append(control._record(SOURCE).acceptance()[1])
    assert chances[0] > 0.5 and chances[-1] < 0.05 and chances == sorted(chances, reverse=True)


def test_a_first_draft_waits_until_plain_rounds_have_earned_it() -> None:
    for step, row in ((0.1, 0.1), (0.02, 0.05)):
        control, waited = AdaptiveLength(line(row, suffix=step)), 0
        while chosen(control) == 0:
            control.observe([Drafted((), 0)], 0, 0.0, 1.0)
            waited += 1
        assert (waited + 1) / (waited + 1 + row + step) >= FLOOR, "even if it is wrong"
        assert waited / (waited + row + step) < FLOOR, "and not longer"


def test_a_longer_draft_is_tried_and_a_success_is_followed_up() -> None:
    control = AdaptiveLength(line(0.1, suffix=0.01))
    for _ in range(100):
        k = chosen(control)
        control.observe([Drafted((SOURCE,) * k, min(k, 2))], 0, 0.01 * k, 1 + 0.1 * k)
    lengths = []
    for _ in range(64):  # from here on all of it is right
        lengths.append(chosen(control))
        control.observe([Drafted((SOURCE,) * lengths[-1], lengths[-1])], 0, 0.01 * lengths[-1], 1 + 0.1 * lengths[-1])
    assert min(lengths) == 2 and min(lengths[-8:]) >= 7


def test_threads_share_one_object() -> None:
    control, rounds_each = AdaptiveLength(line(0.1, suffix=0.01, mtp=0.1)), 300
    failed: list[BaseException] = []
    begin = threading.Barrier(9)

    def request(seed: int) -> None:
        draws = random.Random(seed)
        try:
            begin.wait()
            for i in range(rounds_each):
                source, k = control.plan([{"mtp": 8, f"{SOURCE}-{i}": 8}])[0]
                sources = [source] * k
                if k:
                    sources += [SOURCE] * control.extend(sources, SOURCE, 8 - k)
                assert len(sources) <= 8
                accepted = draws.randint(0, len(sources))
                control.observe([Drafted(tuple(sources), accepted)], 0, 0.1 * k, 1 + 0.1 * len(sources))
                assert len(control.costs.passes) == 9
                if i % 50 == 0:
                    control.calibrate(line(0.1, suffix=0.01, mtp=0.1))
        except BaseException as error:
            failed.append(error)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        running = [threading.Thread(target=request, args=(seed,)) for seed in range(8)]
        for thread in running:
            thread.start()
        begin.wait()
        for thread in running:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert not failed
    assert control._record("mtp").rounds == 8 * rounds_each, "no round was lost"


def test_one_of_those_who_ask_at_once_measures() -> None:
    control = AdaptiveLength()
    assert [control.claim(2) for _ in range(3)] == [True, False, False]
    assert control.claim(1) and control.measured_for == (1, 1)


def test_costs_that_could_not_be_measured_are_measured_the_next_time(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object) -> Costs:
        raise KeyboardInterrupt

    decoder, lengths = decoder_of(tiny_model("llama")), AdaptiveLength()
    with monkeypatch.context() as patched:
        patched.setattr("specdec.drafting.calibrate.measure_costs", interrupted)
        with pytest.raises(KeyboardInterrupt):
            calibrate(lengths, decoder, SuffixDrafter())
    assert lengths.measured_for is None
    assert calibrate(lengths, decoder, SuffixDrafter()).measured_for == (torch.get_num_threads(), 1)


def test_costs_between_and_beyond_what_was_measured() -> None:
    costs = Costs({1: 10.0, 2: 11.0, 5: 17.0})
    assert [costs.of_pass(n) for n in (1, 2, 3, 5, 7)] == [10.0, 11.0, 13.0, 17.0, 21.0]


def test_a_machine_that_slows_down_changes_the_pace_and_not_the_ratios() -> None:
    control = AdaptiveLength(line(0.2, suffix=0.1))
    before = chosen(control)
    for _ in range(100):
        control.observe([Drafted((SOURCE,) * 2, 1)], 0, 0.6, 3 * 1.4)  # all takes three times as long
    costs = control.costs
    assert costs.of_pass(3) == pytest.approx(3 * 1.4, rel=0.02)
    assert costs.of_pass(3) / costs.of_pass(1) == pytest.approx(1.4, rel=0.15)
    assert costs.steps[SOURCE] == pytest.approx(0.3, rel=0.02)
    assert abs(chosen(control) - before) <= 1


def test_one_disturbed_round_changes_little() -> None:
    control = AdaptiveLength(line(0.2, suffix=0.1))
    control.observe([Drafted((SOURCE,) * 2, 2)], 0, 50.0, 500.0)
    assert control.costs.of_pass(1) < 1.2 and control.costs.steps[SOURCE] < 0.12


@pytest.mark.parametrize("family", FAMILIES)
def test_measured_costs_are_of_this_backbone_and_leave_it_as_it_was(family: str) -> None:
    decoder = decoder_of(tiny_model(family))
    costs = measure_costs(decoder, SuffixDrafter(), 9)
    assert costs is not None and list(costs.passes) == list(range(1, 10))
    times = list(costs.passes.values())
    assert times[0] > 0 and times == sorted(times), "more rows never take less"


def test_calibration_is_once_for_a_number_of_threads_and_never_for_plain_decoding() -> None:
    decoder = decoder_of(tiny_model("llama"))
    lengths = AdaptiveLength()
    calibrate(lengths, decoder, NoDraft())
    assert lengths.measured_for is None
    first = calibrate(lengths, decoder, SuffixDrafter()).costs
    assert lengths.measured_for == (torch.get_num_threads(), 1)
    assert calibrate(lengths, decoder, SuffixDrafter()).costs == first


def test_what_was_learned_outlives_the_request() -> None:
    hf = tiny_model("llama")
    model = SpecdecForCausalLM(decoder_of(hf), hf.config, hf.generation_config, SuffixDrafter())
    ids = torch.tensor([[5, 6, 7, 8] * 8])
    model.generate(ids, max_new_tokens=40, do_sample=False)
    records = {name: list(record.seen) for name, record in model.lengths._records.items()}
    model.generate(ids, max_new_tokens=40, do_sample=False, reuse=False)
    assert records and any(list(model.lengths._records[name].seen) != seen for name, seen in records.items())


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


def test_passes_of_several_texts_correct_what_a_text_costs_too() -> None:
    live = LiveCosts()
    live.calibrate(Costs({1: 1.0, 2: 1.1, 4: 1.3, 8: 1.7}, text=0.0), 8)
    true = Costs({1: 1.0, 2: 1.1, 4: 1.3, 8: 1.7}, text=0.4)
    for i in range(2000):
        rows, texts = ((1, 1), (2, 1), (4, 4), (8, 4))[i % 4]
        live.correct_pass(rows, true.of_pass(rows, texts), texts)
    for rows, texts in ((1, 1), (2, 1), (4, 4), (8, 4)):
        assert live.of_pass(rows, texts) == pytest.approx(true.of_pass(rows, texts), rel=0.05)


def test_what_a_text_costs_is_measured_where_several_are_decoded() -> None:
    decoder, lengths = decoder_of(tiny_model("llama")), AdaptiveLength()
    assert calibrate(lengths, decoder, SuffixDrafter()).costs.text is None
    text = calibrate(lengths, decoder, SuffixDrafter(), texts=3).costs.text
    assert text is not None and text >= 0 and lengths.measured_for == (torch.get_num_threads(), 3)
    assert calibrate(lengths, decoder, SuffixDrafter(), texts=2).costs.text == text


def test_disturbances_only_add_time() -> None:
    true = {1: 1.0, 2: 1.1, 4: 1.3, 8: 2.0}
    assert plausible(true) == true
    assert plausible(true | {1: 9.0})[1] == 1.1, "one row never takes longer than two"
    assert plausible(true | {4: 9.0})[4] == 2.0
    assert plausible(true | {2: 9.0, 4: 9.0, 8: 9.0}) == {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}, "one row after the other"


def test_a_row_count_that_is_never_used_is_corrected_with_its_neighbours() -> None:
    live = LiveCosts()
    live.calibrate(Costs({1: 1.0, 2: 1.2, 3: 4.0, 4: 4.2, 8: 8.0}), 8)
    for _ in range(300):
        live.correct_pass(1, 1.0)
        live.correct_pass(3, 1.4)
    assert live.of_pass(3) < 1.6 and live.of_pass(1) == pytest.approx(1.0, rel=0.15)
    assert live.of_pass(4) < 0.6 * 4.2, "four rows cost nearly what three cost"


def test_costs_that_passes_contradict_are_measured_anew_by_the_next_request() -> None:
    control = AdaptiveLength()
    assert control.claim(2)
    control.calibrate(Costs({1: 3.0, 2: 3.1}))  # something else ran
    rounds(control, int(DOUBT_SECONDS / 2), accepts=0.0, step=0.0)
    assert not control.claim(2), "too early to tell"
    rounds(control, int(DOUBT_SECONDS / 2) + 1, accepts=0.0, step=0.0)
    assert control.claim(2) and not control.claim(2), "one of those who ask measures"
    control.calibrate(Costs({1: 1.0, 2: 1.1}))
    rounds(control, 2 * int(DOUBT_SECONDS), accepts=0.0, step=0.0)
    assert not control.claim(2)
