"""What is said of modes, against figures worked out by hand."""

from __future__ import annotations

import json

import pytest

from eval.bench.comparison import PREFILL, Turn, Way, compare
from eval.cli.metrics import TimedRun
from eval.cli.names import PLAIN
from specdec.engine.stats import GenerationStats, Round

WAYS = [Way(PLAIN), Way("adaptive", "drafter suffix"), Way("other", "1.0", ours=False)]


def run(tokens: int, seconds: float, accepted: int = 0, first: int = 0, told: bool = True) -> TimedRun:
    """Rounds in which `accepted` of as many drafted tokens were right; the text begins with token `first`."""
    stats = GenerationStats(prompts=1, prompt_tokens=10, emitted=tokens)
    for _ in range((tokens - 1) // (accepted + 1)):
        stats.count_round(Round(("mtp",) * accepted, accepted, accepted + 1, 0.0, 0.0, 0.0))
    stats.timeline = [(seconds / 4, 1), (seconds, tokens)]
    stats.seconds |= {"prefill": seconds / 4, "verify": seconds / 2, "other": seconds / 4}
    return TimedRun(tuple(range(first, first + tokens)) if told else (), seconds, stats)


def turn(name: str, task: str, plain: float, adaptive: float, repetition: int = 1, first: int = 0) -> Turn:
    runs = {PLAIN: run(9, plain), "adaptive": run(9, adaptive, 3, first), "other": run(9, 2 * plain, told=False)}
    return Turn(name, task, repetition, runs)


def figures(*turns: Turn) -> dict[str, dict[str, object]]:
    return {mode["mode"]: mode for mode in compare(turns, WAYS)["modes"]}


def test_speed_ups_are_of_the_medians_of_the_repetitions() -> None:
    turns = [turn("a", "chat", 4, 2), turn("a", "chat", 8, 3, 2), turn("a", "chat", 5, 9, 3)]
    record = compare([*turns, turn("b", "code", 1, 2), turn("b", "code", 1, 2, 2), turn("b", "code", 1, 2, 3)], WAYS)
    assert (record["headline"], record["repetitions"], record["prompts"]) == ("adaptive", 3, 2)
    assert record["tasks"] == ["chat", "code"]
    assert record["speedup"] == pytest.approx((5 + 1) / (3 + 2))
    assert record["speedup_median"] == pytest.approx((5 / 3 + 1 / 2) / 2)
    assert record["speedup_lowest"] == pytest.approx(0.5)
    plain, adaptive, other = record["modes"]
    assert plain["tokens_per_second"] == pytest.approx(18 / 6) and plain["speedup"] == 1.0
    assert adaptive["by_task"]["chat"]["speedup"] == pytest.approx(5 / 3)
    assert adaptive["by_task"]["code"] == {
        "prompts": 1,
        "tokens": 9,
        "seconds": 2,
        "tokens_per_second": 4.5,
        "speedup": 0.5,
        "speedup_lowest": 0.5,
    }
    assert adaptive["spread"] == {"lowest": pytest.approx(18 / 11), "highest": pytest.approx(18 / 4)}
    assert other["speedup"] == pytest.approx(0.5)
    assert json.loads(json.dumps(record, allow_nan=False)) == record


def test_counts_are_of_all_repetitions_and_overhead_of_rounds() -> None:
    found = figures(turn("a", "", 4, 2), turn("a", "", 4, 2, 2))["adaptive"]
    assert (found["rounds"], found["drafted"], found["accepted"], found["tokens"]) == (4, 12, 12, 9)
    assert found["mean_acceptance_length"] == 4.0
    assert found["overhead"] == pytest.approx(1 / 3)


def test_an_interrupted_repetition_has_no_spread_of_its_own() -> None:
    turns = [turn("a", "", 1, 1), turn("b", "", 3, 1), turn("a", "", 9, 9, 2)]
    spread = figures(*turns)[PLAIN]["spread"]
    assert spread == {"lowest": pytest.approx(18 / 4), "highest": pytest.approx(18 / 4)}


def test_texts_of_ours_must_be_the_plain_ones_and_others_are_not_compared() -> None:
    record = compare([turn("a", "", 4, 2), turn("b", "", 4, 2), turn("b", "", 4, 2, 2, first=5)], WAYS)
    assert record["identical"] is False and record["differing"] == ["b"]
    assert [mode["identical"] for mode in record["modes"]] == [True, False, None]
    assert [row["first_differences"] for row in record["per_prompt"]] == [{}, {"adaptive": 0}]
    other = record["modes"][2]
    assert other["itl"] is other["overhead"] is other["speculative_decoding"] is None


def test_a_speed_up_beyond_the_acceptance_length_is_called_implausible() -> None:
    # Four tokens a round: up to 4x can be true, and up to 5x noise.
    record = compare([turn("a", "", 4.9, 1), turn("b", "", 5.1, 1)], WAYS)
    assert record["implausible"] == ["b"]


def test_a_prefill_counts_for_itself_alone() -> None:
    read = Turn(PREFILL, "", 1, {way.name: run(1, seconds) for way, seconds in zip(WAYS, (4, 8, 2), strict=True)})
    record = compare([turn("a", "", 4, 2), read], WAYS)
    assert record["prompts"] == 1 and record["tasks"] == [""]
    assert [mode["prefill_tokens_per_second"] for mode in record["modes"]] == pytest.approx([10, 5, 20])
    assert figures(turn("a", "", 4, 2))[PLAIN]["prefill_tokens_per_second"] is None


def test_of_nothing_there_is_nothing_to_claim() -> None:
    for ways in (WAYS, [Way(PLAIN)]):
        record = compare([], ways)
        assert record["identical"] is None and record["speedup"] == 0.0 and record["per_prompt"] == []
        json.dumps(record, allow_nan=False)
