"""Figures, against figures worked out by hand."""

from __future__ import annotations

import pytest

from eval.cli.metrics import (
    TimedRun,
    acceptance_by_position,
    first_difference,
    inter_token_latencies,
    peak_memory,
    percentile,
    spread,
    summarise,
    time_per_output_token,
)
from specdec.engine.stats import GenerationStats, Round


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


PLAIN = TimedRun(tuple(range(8)), 4.0, stats([(0, 0)] * 7, [(0.5 + 0.5 * i, 1 + i) for i in range(8)]))
# Three rounds: 3 drafted 2 accepted, 1 drafted 0 accepted, 4 drafted 2 accepted: 1 + 3 + 1 + 3 = 8 tokens.
DRAFTED = TimedRun(tuple(range(8)), 2.0, stats([(3, 2), (1, 0), (4, 2)], [(0.5, 1), (1.0, 4), (1.4, 5), (2.0, 8)]))


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
    assert figures["overhead"] == 0.0
    assert figures["speculative_decoding"]["num_spec_steps"] == 3
    assert figures["phase_seconds"] == {"prefill": 0.5, "draft": 0.0, "verify": 1.5, "other": 0.0}


def test_summary_of_several_runs_weighs_by_tokens_not_by_run() -> None:
    short = TimedRun((1, 2), 0.25, stats([(0, 0)], [(0.1, 1), (0.2, 2)], prefill=0.1))
    figures = summarise([DRAFTED, short])
    assert figures["tokens_per_second"] == pytest.approx(10 / 2.25)
    assert figures["mean_acceptance_length"] == pytest.approx(1 + 4 / 4)
    assert figures["ttft"]["p50"] == pytest.approx(0.3)


def test_peak_memory_is_in_bytes() -> None:
    peak = peak_memory()["process"]
    assert peak is not None and 50e6 < peak < 1e12  # torch alone takes more than 50 MB
    assert peak_memory()["device"] is None
