"""The choice of who drafts and how long, by what was accepted and by costs as they change."""

from __future__ import annotations

import copy
import pickle
import random
import sys
import threading

import pytest
import torch

from specdec.drafting.acceptance import FORCED, MEMORY, RETRY, RETRY_MOST
from specdec.drafting.costs import FLOOR, Costs
from specdec.drafting.draft_length import AdaptiveLength
from specdec.drafting.protocol import Drafted, DraftLength, FixedLength
from specdec.drafting.suffix import SuffixDrafter
from specdec.hf import SpecdecForCausalLM, decoder_of
from tests.support.tiny import tiny_model

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


def test_what_was_learned_outlives_the_request() -> None:
    hf = tiny_model("llama")
    model = SpecdecForCausalLM(decoder_of(hf), hf.config, hf.generation_config, SuffixDrafter())
    ids = torch.tensor([[5, 6, 7, 8] * 8])
    model.generate(ids, max_new_tokens=40, do_sample=False)
    records = {name: list(record.seen) for name, record in model.lengths._records.items()}
    model.generate(ids, max_new_tokens=40, do_sample=False, reuse=False)
    assert records and any(list(model.lengths._records[name].seen) != seen for name, seen in records.items())


def test_forced_tokens_are_certain_from_the_first_on_until_they_are_wrong() -> None:
    costs = Costs({1: 1.0, 2: 1.2, 9: 2.6})
    assert AdaptiveLength(costs).plan([{"suffix": 5}]) == [("suffix", 0)], "nothing was won yet that could be lost"
    lengths = AdaptiveLength(costs)
    assert lengths.plan([{FORCED: 5}]) == [(FORCED, 5)]
    for _ in range(6):
        lengths.observe([Drafted((FORCED,) * 5, 0)], 0, 0.0, costs.of_pass(6))
    assert lengths.plan([{FORCED: 5}])[0][1] < 2
