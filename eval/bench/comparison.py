"""From the turns of a bench to the figures of its modes. Pure: no model, no clock.

A speed-up is a mode's tokens per second over plain decoding's, on the same prompts (Spec-Bench's definition).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.cli.metrics import NOISE, TimedRun, first_difference, merge_runs, summarise
from eval.cli.names import PLAIN

PREFILL = "prefill"  # a turn that only reads its prompt


@dataclass(frozen=True)
class Way:
    """Describe a mode, as figures name it. `ours`: its text must be the plain one's."""

    name: str
    details: str = ""
    ours: bool = True


@dataclass(frozen=True)
class Turn:
    """Keep the same prompt decoded in every way, by name, in one repetition (from 1)."""

    name: str
    task: str
    repetition: int
    runs: dict[str, TimedRun]

    @property
    def plain(self) -> TimedRun:
        """Return the run of plain decoding, which every turn has."""
        return self.runs[PLAIN]

    def difference(self, way: str) -> int | None:
        """Return the index of the first token that is not the plain run's, a missing token included; None: equal."""
        return first_difference(self.plain.tokens, self.runs[way].tokens)

    def speedup(self, way: str) -> float:
        """Return tokens a second of the mode `way` over plain decoding's; 0 where that is 0."""
        rate = self.plain.tokens_per_second
        return self.runs[way].tokens_per_second / rate if rate > 0 else 0.0


def compare(turns: Sequence[Turn], ways: Sequence[Way]) -> dict[str, Any]:
    """Compare every way with the plain one, which comes first; counts and latencies are of all repetitions together.

    A prompt's seconds are the median over its repetitions. `tokens_per_second` and `speedup` are of all tokens over the
    sum of these medians, as in Spec-Bench; `speedup_median` and `speedup_lowest` are of prompts; `spread` is of whole
    repetitions. A turn called `PREFILL` counts for `prefill_tokens_per_second` alone.
    """
    decoded = [turn for turn in turns if turn.name != PREFILL]
    prefills = [turn for turn in turns if turn.name == PREFILL]
    cases = _by_name(decoded)
    headline = ways[1].name if len(ways) > 1 else PLAIN
    found = [_mode(way, cases, prefills) for way in ways]
    main = next(mode for mode in found if mode["mode"] == headline)
    differing = [name for name, same in cases.items() if not all(_identical(same, way) for way in ways)]
    return {
        "prompts": len(cases),
        "tasks": list(dict.fromkeys(turn.task for turn in decoded)),
        "repetitions": max((turn.repetition for turn in decoded), default=0),
        "identical": not differing if cases else None,
        "differing": differing,
        "headline": headline,
        **{name: main[name] for name in ("speedup", "speedup_median", "speedup_lowest")},
        "implausible": [name for name, same in cases.items() if _implausible(same, headline)],
        "modes": found,
        "per_prompt": [_describe(same, ways) for same in cases.values()],
    }


def _mode(way: Way, cases: dict[str, list[Turn]], prefills: Sequence[Turn]) -> dict[str, Any]:
    every = [turn.runs[way.name] for same in cases.values() for turn in same]
    ratios = [_speedup(same, way.name) for same in cases.values()]
    found = summarise(every) | _rates(cases, way.name)
    if not way.ours:
        found |= {"itl": None, "overhead": None, "speculative_decoding": None}  # not told
    tasks: dict[str, dict[str, list[Turn]]] = {}
    for name, same in cases.items():
        tasks.setdefault(same[0].task, {})[name] = same
    return {
        "mode": way.name,
        "details": way.details,
        "identical": all(_identical(same, way) for same in cases.values()) if way.ours and cases else None,
        **found,
        "speedup_median": statistics.median(ratios) if ratios else 0.0,
        "speedup_lowest": min(ratios, default=0.0),
        "spread": _spread(cases, way.name),
        "prefill_tokens_per_second": _prefill(prefills, way.name),
        "by_task": {
            task: {
                "prompts": len(of_task),
                **_rates(of_task, way.name),
                "speedup_lowest": min(_speedup(same, way.name) for same in of_task.values()),
            }
            for task, of_task in tasks.items()
        },
    }


def _by_name(turns: Sequence[Turn]) -> dict[str, list[Turn]]:
    found: dict[str, list[Turn]] = {}
    for turn in turns:
        found.setdefault(turn.name, []).append(turn)
    return found


def _seconds(same: Sequence[Turn], way: str) -> float:
    return statistics.median(turn.runs[way].seconds for turn in same)


def _speedup(same: Sequence[Turn], way: str) -> float:
    """Return the speed-up of one prompt, where both ways decode as many tokens."""
    rate = _rates({"": list(same)}, way)
    return float(rate["speedup"])


def _rates(cases: dict[str, list[Turn]], way: str) -> dict[str, float]:
    """Return the tokens of the prompts, once each, over the sum of their median seconds."""

    def rate(name: str) -> tuple[int, float]:
        return (
            sum(same[0].runs[name].stats.emitted for same in cases.values()),
            sum(_seconds(same, name) for same in cases.values()),
        )

    (tokens, seconds), (plain_tokens, plain_seconds) = rate(way), rate(PLAIN)
    own = tokens / seconds if seconds > 0 else 0.0
    plain = plain_tokens / plain_seconds if plain_seconds > 0 else 0.0
    return {
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": own,
        "speedup": own / plain if plain > 0 else 0.0,
    }


def _spread(cases: dict[str, list[Turn]], way: str) -> dict[str, float]:
    """Return the tokens per second of whole repetitions; an interrupted repetition did other work, and is left out."""
    by_repetition: dict[int, list[TimedRun]] = {}
    for same in cases.values():
        for turn in same:
            by_repetition.setdefault(turn.repetition, []).append(turn.runs[way])
    whole = [runs for runs in by_repetition.values() if len(runs) == len(cases)]
    rates = [sum(r.stats.emitted for r in runs) / max(sum(r.seconds for r in runs), 1e-9) for runs in whole]
    return {"lowest": min(rates, default=0.0), "highest": max(rates, default=0.0)}


def _prefill(turns: Sequence[Turn], way: str) -> float | None:
    if not turns:
        return None
    seconds = statistics.median(turn.runs[way].stats.ttft for turn in turns)
    return turns[0].plain.stats.prompt_tokens / seconds if seconds > 0 else None


def _identical(same: Sequence[Turn], way: Way) -> bool:
    return _first_difference(same, way) is None


def _first_difference(same: Sequence[Turn], way: Way) -> int | None:
    differences = [turn.difference(way.name) for turn in same] if way.ours else []
    return next((at for at in differences if at is not None), None)


def _implausible(same: Sequence[Turn], way: str) -> bool:
    """Tell whether the speed-up exceeds what acceptance can give.

    A verifying pass costs at least as much as a plain one, so tokens per round are the ceiling. Where the speed-up is
    above the ceiling and a margin for noise, something else slowed the plain run down.
    """
    return _speedup(same, way) > NOISE * merge_runs(turn.runs[way] for turn in same).mean_acceptance_length


def _describe(same: Sequence[Turn], ways: Sequence[Way]) -> dict[str, Any]:
    """Return one prompt's figures, in JSON types."""
    first = same[0]
    modes = {}
    for way in ways:
        stats = merge_runs(turn.runs[way.name] for turn in same)
        modes[way.name] = {
            "seconds": _seconds(same, way.name),
            "speedup": _speedup(same, way.name),
            "mean_acceptance_length": stats.mean_acceptance_length,
            "acceptance_rate": stats.acceptance_rate,
        }
    return {
        "name": first.name,
        "task": first.task,
        "prompt_tokens": first.plain.stats.prompt_tokens,
        "tokens": first.plain.stats.emitted,
        "identical": all(_identical(same, way) for way in ways),
        "first_differences": {
            way.name: at
            for way in ways
            if way.ours
            and (at := next((d for t in same if (d := t.difference(way.name)) is not None), None)) is not None
        },
        "modes": modes,
    }
