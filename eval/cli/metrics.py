"""From measured runs to the figures that are shown. Pure: no model, no clock; `peak_memory` alone asks the system.

Definitions are those of vLLM and Spec-Bench, so that figures can be compared: tokens are token ids, and tokens per
second count the whole call, prefill included.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from specdec.engine.stats import PHASES, GenerationStats
from specdec.engine.telemetry import speculative_decoding
from specdec.memory.system import peak_bytes

NOISE = 1.25  # by how much two timings of the same work may differ before they are called unreliable


@dataclass(frozen=True)
class TimedRun:
    """Keep one decoded prompt: the emitted token ids (empty for an engine that does not tell them), the seconds of the
    whole call, the counts of the decoding loop, and how the text ended: "stop", "length" (cut), or None: not known."""

    tokens: tuple[int, ...]
    seconds: float
    stats: GenerationStats
    finish: str | None = None

    @property
    def tokens_per_second(self) -> float:
        """Return emitted tokens over the seconds of the whole call, prefill included."""
        return self.stats.emitted / self.seconds if self.seconds > 0 else 0.0


def first_difference(plain: Sequence[int], other: Sequence[int]) -> int | None:
    """Return the first position at which two texts differ, the end of the shorter text included; None: equal."""
    for i, (a, b) in enumerate(zip(plain, other, strict=False)):
        if a != b:
            return i
    return None if len(plain) == len(other) else min(len(plain), len(other))


def percentile(values: Sequence[float], q: float) -> float:
    """Return the `q`-th percentile (0..100), linear between neighbours (numpy's default); 0 for no values."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = (len(ordered) - 1) * q / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def inter_token_latencies(timeline: Sequence[tuple[float, int]]) -> list[float]:
    """Return the ITL: seconds between deliveries.

    Tokens accepted together arrive together and count as one delivery (as `vllm bench serve` counts stream chunks).
    """
    times = [seconds for seconds, _ in timeline]
    return [later - sooner for sooner, later in pairwise(times)]


def time_per_output_token(timeline: Sequence[tuple[float, int]]) -> float | None:
    """Return the TPOT: mean seconds per token after the first; None when there is no second token."""
    if len(timeline) < 2 or timeline[-1][1] < 2:
        return None
    return (timeline[-1][0] - timeline[0][0]) / (timeline[-1][1] - timeline[0][1])


def spread(values: Iterable[float]) -> dict[str, float]:
    """Return the mean and the percentiles p50, p95 and p99 of `values`."""
    listed = list(values)
    figures = {"mean": statistics.fmean(listed) if listed else 0.0}
    return figures | {f"p{q}": percentile(listed, q) for q in (50, 95, 99)}


def merge_runs(runs: Iterable[TimedRun]) -> GenerationStats:
    """Add up the counts of several runs."""
    total = GenerationStats()
    for run in runs:
        total.merge(run.stats)
    return total


def acceptance_by_position(stats: GenerationStats) -> list[dict[str, float]]:
    """Return three figures for each draft position, as a dict.

    `accepted`: the share of all rounds in which the draft at the position was accepted (unconditional, vLLM's figure).
    `reached`: how many drafts had a token at the position. `accepted_of_reached`: the share of these drafts; a varying
    draft length does not dilute this share.
    """
    return [
        {
            "position": i + 1,
            "accepted": accepted / stats.rounds if stats.rounds else 0.0,
            "reached": drafted,
            "accepted_of_reached": accepted / drafted if drafted else 0.0,
        }
        for i, (accepted, drafted) in enumerate(
            zip(stats.accepted_per_position, stats.drafted_per_position, strict=True)
        )
    ]


def summarise(runs: Sequence[TimedRun]) -> dict[str, Any]:
    """Return the figures of several runs of one kind, in JSON types; seconds, tokens, shares from 0 to 1."""
    stats = merge_runs(runs)
    seconds = sum(run.seconds for run in runs)
    tpot = [value for run in runs if (value := time_per_output_token(run.stats.timeline)) is not None]
    return {
        "tokens": stats.emitted,
        "prompt_tokens": stats.prompt_tokens,
        "seconds": seconds,
        "tokens_per_second": stats.emitted / seconds if seconds > 0 else 0.0,
        "decode_tokens_per_second": stats.decode_tokens_per_second,
        "ttft": spread(run.stats.ttft for run in runs),
        "itl": spread(latency for run in runs for latency in inter_token_latencies(run.stats.timeline)),
        "tpot": spread(tpot),
        "rounds": stats.rounds,
        "drafted": stats.drafted,
        "accepted": stats.accepted,
        "mean_acceptance_length": stats.mean_acceptance_length,
        "acceptance_rate": stats.acceptance_rate,
        "acceptance_by_position": acceptance_by_position(stats),
        "draft_lengths": {str(k): n for k, n in sorted(Counter(stats.draft_lengths).items())},
        "draft_sources": stats.draft_sources,
        "phase_seconds": {phase: stats.seconds[phase] for phase in PHASES},
        "overhead": _overhead(stats),
        "cache_bytes": stats.cache_bytes,
        "graphs": dict(sorted(stats.graphs.items())),
        "speculative_decoding": speculative_decoding(stats),
    }


HOW = ("replayed", "eager", "captured", "op-by-op", "step-by-step")  # passes and drafts of a GPU


def graphs_text(graphs: Mapping[str, int]) -> str:
    """Say how a GPU ran passes and drafts, from `GenerationStats.graphs`: "passes: 90 replayed, 3 eager"."""
    said = []
    for what, plural in (("pass", "passes"), ("draft", "drafts")):
        counts = [f"{n:,} {how}" for how in HOW if (n := graphs.get(f"{what} {how}", 0))]
        said += [f"{plural}: {', '.join(counts)}"] if counts else []
    return "; ".join(said)


def _overhead(stats: GenerationStats) -> float:
    """Return the share of the rounds' time that is neither drafting nor verifying."""
    rounds = sum(stats.seconds[phase] for phase in ("draft", "verify", "other"))
    return stats.seconds["other"] / rounds if rounds > 0 else 0.0


def peak_memory(device: str = "cpu") -> dict[str, int | None]:
    """Return the bytes at the most: of this process since it began, and of torch on a CUDA device. None where
    unknown."""
    return {"process": peak_bytes(), "device": _peak_device(device)}


def _peak_device(device: str) -> int | None:
    if not device.startswith("cuda"):
        return None
    import torch

    ask: Callable[[str], int] = torch.cuda.max_memory_allocated
    return ask(device)
