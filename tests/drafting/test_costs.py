"""Costs of passes and drafts: how they are measured, once, and read between what was measured."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from specdec.drafting.calibrate import calibrate, measure_costs, plausible, sampled_text
from specdec.drafting.costs import DOUBT_SECONDS, Costs, LiveCosts
from specdec.drafting.draft_length import AdaptiveLength
from specdec.drafting.protocol import Draft, Drafted, NoDraft
from specdec.drafting.suffix import SuffixDrafter
from specdec.hf import decoder_of
from specdec.model.states import States
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
    costs = measure_costs(decoder, SuffixDrafter(), 9, seconds=600.0)  # however slow the machine is now
    assert costs is not None and list(costs.passes) == list(range(1, 10))
    times = list(costs.passes.values())
    assert times[0] > 0 and times == sorted(times), "more rows never take less"


def test_every_draft_is_measured_after_a_pass_which_has_cleared_the_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder, events = decoder_of(tiny_model("llama")), list[str]()
    real = decoder.forward_many

    def forward_many(ids: Any, *arguments: Any) -> Any:
        events.append("pass")
        return real(ids, *arguments)

    class Heard(NoDraft):
        max_draft = 4

        def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
            events.append(f"draft of {k}")
            return Draft.by("heard", [1] * k)

    monkeypatch.setattr(decoder, "forward_many", forward_many)
    costs = measure_costs(decoder, Heard(), 9, seconds=600.0)
    before = [last for last, this in itertools.pairwise(events) if this.startswith("draft")]
    assert {"draft of 1", "draft of 4"} <= set(events) and set(before) == {"pass"}
    assert costs is not None and list(costs.steps) == ["heard"]


def test_calibration_is_once_for_a_number_of_threads_and_never_for_plain_decoding() -> None:
    decoder = decoder_of(tiny_model("llama"))
    lengths = AdaptiveLength()
    calibrate(lengths, decoder, NoDraft())
    assert lengths.measured_for is None
    first = calibrate(lengths, decoder, SuffixDrafter()).costs
    assert lengths.measured_for == (torch.get_num_threads(), 1)
    assert calibrate(lengths, decoder, SuffixDrafter()).costs == first


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


def plain_rounds(control: AdaptiveLength, count: int) -> None:
    for _ in range(count):
        control.observe([Drafted((), 0)], 0, 0.0, 1.0)


def test_costs_that_passes_contradict_are_measured_anew_by_the_next_request() -> None:
    control = AdaptiveLength()
    assert control.claim(2)
    control.calibrate(Costs({1: 3.0, 2: 3.1}))  # something else ran
    plain_rounds(control, int(DOUBT_SECONDS / 2))
    assert not control.claim(2), "too early to tell"
    plain_rounds(control, int(DOUBT_SECONDS / 2) + 1)
    assert control.claim(2) and not control.claim(2), "one of those who ask measures"
    control.calibrate(Costs({1: 1.0, 2: 1.1}))
    plain_rounds(control, 2 * int(DOUBT_SECONDS))
    assert not control.claim(2)


def test_a_mixture_of_experts_is_measured_on_text_that_it_writes_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a pass use experts as those of a draft would: they are different tokens, of the model's own text."""
    decoder = decoder_of(tiny_model("gemma4-moe"))
    text, passes = sampled_text(decoder, 18), list[list[int]]()
    assert text == sampled_text(decoder, 18) and len(text) == 18 and len(set(text)) > 12
    real = decoder.forward_many

    def forward_many(ids: Any, *arguments: Any) -> Any:
        passes.append([token for part in ids for token in part.tolist()])
        return real(ids, *arguments)

    monkeypatch.setattr(decoder, "forward_many", forward_many)
    costs = measure_costs(decoder, SuffixDrafter(), 9, seconds=600.0)
    assert costs is not None and costs.passes[9] > costs.passes[1] > 0
    measured = passes[passes.index(text[:9]) + 1 :]
    of_nine = [rows for rows in measured if len(rows) == 9]
    assert of_nine[0] == text[9:] and of_nine[1] == text[8:17]
    assert all("".join(map(chr, rows)) in "".join(map(chr, text)) for rows in measured)
