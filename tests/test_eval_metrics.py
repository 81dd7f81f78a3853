"""Figures, against figures worked out by hand."""

from __future__ import annotations

import json
import sys

import pytest

from eval.metrics import (
    Pair,
    Run,
    acceptance_by_position,
    compare,
    first_difference,
    inter_token_latencies,
    peak_memory,
    percentile,
    spread,
    summarise,
    time_per_output_token,
)
from specdec.stats import GenerationStats, Round


def stats(rounds: list[tuple[int, int]], timeline: list[tuple[float, int]], prefill: float = 0.5) -> GenerationStats:
    """`rounds`: (drafted, accepted) of each."""
    made = GenerationStats(prompts=1, prompt_tokens=10)
    made.emitted = 1
    for drafted, accepted in rounds:
        made.count_round(Round(("suffix",) * drafted, accepted, accepted + 1, 0.0, 0.0, 0.0))
        made.emitted += accepted + 1
    made.timeline = timeline
    made.seconds["prefill"] = prefill
    made.seconds["verify"] = timeline[-1][0] - prefill
    return made


PLAIN = Run(tuple(range(8)), 4.0, stats([(0, 0)] * 7, [(0.5 + 0.5 * i, 1 + i) for i in range(8)]))
# Three rounds: 3 drafted 2 accepted, 1 drafted 0 accepted, 4 drafted 2 accepted: 1 + 3 + 1 + 3 = 8 tokens.
DRAFTED = Run(tuple(range(8)), 2.0, stats([(3, 2), (1, 0), (4, 2)], [(0.5, 1), (1.0, 4), (1.4, 5), (2.0, 8)]))


def test_first_difference() -> None:
    assert first_difference([1, 2, 3], [1, 2, 3]) is None
    assert first_difference([], []) is None
    assert first_difference([1, 2, 3], [1, 9, 3]) == 1
    assert first_difference([1, 2], [1, 2, 3]) == 2
    assert first_difference([1, 2, 3], [1]) == 1


def test_percentile_is_linear_between_neighbours() -> None:
    assert percentile([4.0, 1.0, 3.0, 2.0], 50) == 2.5
    assert percentile([10.0, 20.0], 95) == pytest.approx(19.5)
    assert percentile([7.0], 99) == 7.0
    assert percentile([1.0, 2.0, 3.0], 100) == 3.0
    assert percentile([], 50) == 0.0


def test_spread() -> None:
    assert spread([1.0, 3.0])["mean"] == 2.0
    assert spread([]) == {"mean": 0.0, "p50": 0.0, "p95": 0.0, "p99": 0.0}


def test_latencies_from_the_timeline() -> None:
    assert inter_token_latencies(DRAFTED.stats.timeline) == pytest.approx([0.5, 0.4, 0.6])
    assert time_per_output_token(DRAFTED.stats.timeline) == pytest.approx(1.5 / 7)
    assert time_per_output_token(PLAIN.stats.timeline) == pytest.approx(0.5)
    assert time_per_output_token([(0.5, 1)]) is None
    assert inter_token_latencies([]) == []


def test_acceptance_by_position_is_of_all_rounds_and_of_those_that_reached_it() -> None:
    first, second, third, fourth = acceptance_by_position(DRAFTED.stats)
    assert first == {"position": 1, "accepted": pytest.approx(2 / 3), "reached": 3, "accepted_of_reached": 2 / 3}
    assert second == {"position": 2, "accepted": pytest.approx(2 / 3), "reached": 2, "accepted_of_reached": 1.0}
    assert third == {"position": 3, "accepted": 0.0, "reached": 2, "accepted_of_reached": 0.0}
    assert fourth == {"position": 4, "accepted": 0.0, "reached": 1, "accepted_of_reached": 0.0}


def test_summary_of_a_drafted_run() -> None:
    figures = summarise([DRAFTED])
    assert figures["tokens"] == 8
    assert figures["tokens_per_second"] == 4.0
    assert figures["decode_tokens_per_second"] == pytest.approx(7 / 1.5)
    assert figures["mean_acceptance_length"] == pytest.approx(1 + 4 / 3)
    assert figures["acceptance_rate"] == pytest.approx(4 / 8)
    assert figures["ttft"]["p50"] == 0.5
    assert figures["itl"]["p50"] == pytest.approx(0.5)
    assert figures["tpot"]["mean"] == pytest.approx(1.5 / 7)
    assert figures["draft_lengths"] == {"1": 1, "3": 1, "4": 1}
    assert figures["draft_sources"] == {"suffix": [8, 4]}
    assert figures["phase_seconds"] == {"prefill": 0.5, "draft": 0.0, "verify": 1.5, "other": 0.0}


def test_summary_of_several_runs_weighs_by_tokens_not_by_run() -> None:
    short = Run((1, 2), 0.25, stats([(0, 0)], [(0.1, 1), (0.2, 2)], prefill=0.1))
    figures = summarise([DRAFTED, short])
    assert figures["tokens_per_second"] == pytest.approx(10 / 2.25)
    assert figures["mean_acceptance_length"] == pytest.approx(1 + 4 / 4)
    assert figures["ttft"]["p50"] == pytest.approx(0.3)


def test_comparison() -> None:
    slower = Pair("b", "", Run((1, 2), 1.0, GenerationStats()), Run((1, 9), 2.0, GenerationStats()))
    figures = compare([Pair("a", "chat", PLAIN, DRAFTED), slower])
    assert figures["speedup"] == pytest.approx((10 / 4) / (10 / 5))
    assert figures["speedup_median"] == pytest.approx((2.0 + 0.5) / 2)
    assert figures["speedup_lowest"] == pytest.approx(0.5)
    assert figures["identical"] is False
    assert figures["differing"] == ["b"]
    assert [row["first_difference"] for row in figures["per_prompt"]] == [None, 1]
    json.dumps(figures, allow_nan=False)


def test_a_speed_up_beyond_the_acceptance_length_is_called_implausible() -> None:
    # 7/3 tokens per round: up to 2.33x can be true, and up to 2.92x noise.
    disturbed = Run(PLAIN.tokens, 2.0 * 3, PLAIN.stats)
    assert not Pair("a", "", PLAIN, DRAFTED).implausible
    assert Pair("b", "", disturbed, DRAFTED).implausible
    assert compare([Pair("a", "", PLAIN, DRAFTED), Pair("b", "", disturbed, DRAFTED)])["implausible"] == ["b"]


def test_of_nothing_there_is_nothing_to_claim() -> None:
    figures = compare([])
    assert figures["identical"] is None
    assert figures["speedup"] == 0.0
    json.dumps(figures, allow_nan=False)


@pytest.mark.skipif(sys.platform == "win32", reason="no resource module there")
def test_peak_memory_is_in_bytes() -> None:
    peak = peak_memory()["process"]
    assert peak is not None and 50e6 < peak < 1e12  # torch alone takes more than 50 MB
    assert peak_memory()["device"] is None
