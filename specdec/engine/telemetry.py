"""Counts of generations under the names that monitoring already knows: vLLM's per-request JSON, and Prometheus.

Both count drafts: rounds in which at least one token was drafted. Here, unlike there, a round may be a plain one.
"""

from __future__ import annotations

from typing import Any

from specdec.engine.stats import GenerationStats

PREFIX = "specdec:"  # as vLLM's "vllm:"


def speculative_decoding(stats: GenerationStats) -> dict[str, Any]:
    """Return the object that vLLM's answers carry as `speculative_decoding`, in JSON types.

    `acceptance_histogram[i]`: drafts of which exactly i tokens were accepted. `num_spec_tokens`: the longest draft.
    `mean_acceptance_length` counts only rounds with a draft; that of `GenerationStats` counts all rounds.
    """
    drafts = _drafts(stats)
    reached = [drafts, *stats.accepted_per_position]  # drafts of which at least i tokens were accepted
    return {
        "mean_acceptance_length": 1 + stats.accepted / drafts if drafts else 1.0,
        "draft_acceptance_rate": stats.acceptance_rate,
        "acceptance_histogram": [n - more for n, more in zip(reached, [*reached[1:], 0], strict=True)],
        "num_spec_steps": drafts,
        "num_accepted_draft_tokens": stats.accepted,
        "num_draft_tokens": stats.drafted,
        "num_spec_tokens": len(stats.drafted_per_position),
    }


def prometheus(stats: GenerationStats, model: str) -> str:
    """Return the counters of `stats` in Prometheus' text format, with a label that names `model`.

    The text is for a file that node_exporter's textfile collector reads, or for the body of an endpoint of your own.
    """
    label = f'model_name="{_escaped(model)}"'
    counters: list[tuple[str, str, list[tuple[str, float]]]] = [
        ("spec_decode_num_drafts_total", "Drafts that were checked.", [(label, _drafts(stats))]),
        ("spec_decode_num_draft_tokens_total", "Drafted tokens.", [(label, stats.drafted)]),
        ("spec_decode_num_accepted_tokens_total", "Accepted drafted tokens.", [(label, stats.accepted)]),
        (
            "spec_decode_num_accepted_tokens_per_pos_total",
            "Accepted drafted tokens, by position in the draft from 0.",
            [(f'{label},position="{i}"', n) for i, n in enumerate(stats.accepted_per_position)],
        ),
        ("prompt_tokens_total", "Prompt tokens.", [(label, stats.prompt_tokens)]),
        ("prompt_tokens_cached_total", "Prompt tokens that an earlier text's cache held.", [(label, stats.reused)]),
        ("generation_tokens_total", "Emitted tokens.", [(label, stats.emitted)]),
        ("rounds_total", "Rounds of all texts; a pass over several texts is a round of each.", [(label, stats.rounds)]),
        (
            "seconds_total",
            "Seconds by phase.",
            [(f'{label},phase="{phase}"', seconds) for phase, seconds in stats.seconds.items()],
        ),
    ]
    if stats.graphs:
        graphs = [(f'{label},phase="{name.split()[0]}",how="{name.split()[1]}"', n) for name, n in stats.graphs.items()]
        counters.append(("graph_passes_total", "Passes and drafts of a GPU, by how they were run.", sorted(graphs)))
    lines = []
    for name, about, samples in counters:
        lines += [f"# HELP {PREFIX}{name} {about}", f"# TYPE {PREFIX}{name} counter"]
        lines += [f"{PREFIX}{name}{{{labels}}} {value}" for labels, value in samples]
    return "\n".join(lines) + "\n"


def _drafts(stats: GenerationStats) -> int:
    return stats.rounds - stats.draft_lengths[0]


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
