"""Costs of passes and drafts: how they are measured, once, and read between what was measured."""

from __future__ import annotations

import pytest
import torch

from specdec.drafting.calibrate import calibrate, measure_costs
from specdec.drafting.costs import Costs
from specdec.drafting.draft_length import AdaptiveLength
from specdec.drafting.protocol import NoDraft
from specdec.drafting.suffix import SuffixDrafter
from specdec.hf import decoder_of
from tests.support.tiny import FAMILIES, tiny_model


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
