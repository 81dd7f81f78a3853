"""A bench record as `run.py bench --json` writes it, with plausible figures, for tests of what is drawn of it."""

from __future__ import annotations

from typing import Any

TASKS = ("chat", "code editing", "summary", "reasoning", "extraction", "translation")
GAIN = dict(zip(TASKS, (0.9, 1.35, 1.15, 0.95, 1.1, 0.82), strict=True))
# Name, how much sooner over all, tokens a round, what it is.
MODES = (
    ("plain", 1.0, 1.0, "one token a pass"),
    ("adaptive", 1.52, 1.98, "head and suffix, length chosen by cost"),
    ("k2", 1.41, 1.74, "two tokens a draft"),
    ("suffix", 1.08, 1.15, "repetitions alone"),
)
MANY = (
    *MODES[:2],
    *((f"k{k}", 1.2 + 0.08 * k - 0.012 * k * k, 1 + 0.25 * k, f"{k} tokens a draft") for k in range(1, 7)),
    ("suffix", 1.08, 1.15, "repetitions alone"),
    ("mtp", 1.44, 1.9, "the head alone"),
    ("transformers float32", 0.61, 1.0, "transformers 5.22, eager attention, float32 weights as stored"),
    ("transformers assisted generation bfloat16", 0.48, 1.0, "transformers 5.22, assisted generation"),
    ("llama.cpp", 0.94, 1.0, "xllamacpp 2026.10, Q8_0, built for AVX2"),
)


def record(modes: tuple[tuple[str, float, float, str], ...] = MODES, prompts: int = 24) -> dict[str, Any]:
    """What run.py bench --json writes, with plausible figures for a model of 135M on two cores."""
    names = [f"{TASKS[i % len(TASKS)].split()[0]}-{i // len(TASKS) + 1:02d}" for i in range(prompts)]
    made = [mode(*one, prompts) for one in modes]
    return {
        "command": "bench",
        "interrupted": False,
        "prompts_file": None,
        "limit": None,
        "repeat": 3,
        "synthetic_acceptance": None,
        "arguments": {
            "model": "smollm2-135m-instruct",
            "drafter": "auto",
            "draft_length": "adaptive",
            "max_new_tokens": 128,
            "temperature": 0.0,
            "top_p": None,
            "seed": 0,
            "threads": 2,
        },
        "versions": {"python": "3.11.2", "specdec-mtp": "0.1.0", "torch": "2.13.0", "transformers": "5.22.0"},
        "host": {
            "cpu": "AMD EPYC 9R14",
            "logical_cpus": 2,
            "load_average": [0.12, 0.2, 0.31],
            "threads": 2,
            "system": "Linux-6.1-x86_64-with-glibc2.36",
            "kernels": "native:avx512",
            "device": "cpu",
        },
        "model": {"name": "smollm2-135m-instruct", "dtype": "float32", "weight_bytes": 145_000_000, "drafter": "auto"},
        "memory": {"process": 612_000_000, "device": None, "budget": 2_000_000_000},
        "costs": {
            "pass_seconds": {str(t): 0.0146 + 0.00045 * t + 0.00009 * t * t for t in range(1, 9)},
            "draft_seconds": {"mtp": 0.00113, "suffix": 0.00001},
        },
        "prompts": prompts,
        "tasks": list(TASKS),
        "identical": True,
        "differing": [],
        "implausible": [],
        "headline": modes[1][0],
        **{name: made[1][name] for name in ("speedup", "speedup_median", "speedup_lowest")},
        "modes": made,
        "per_prompt": [
            {
                "name": name,
                "task": TASKS[i % len(TASKS)],
                "prompt_tokens": 40 + 7 * i,
                "tokens": 128 - i % 5,
                "identical": True,
                "modes": {
                    one[0]: {
                        "seconds": 1.9 / one[1],
                        "speedup": one[1] * GAIN[TASKS[i % len(TASKS)]] * (1 + 0.01 * (i % 7)),
                        "mean_acceptance_length": one[2],
                        "acceptance_rate": 0.4,
                    }
                    for one in modes
                },
            }
            for i, name in enumerate(names)
        ],
    }


def mode(name: str, speedup: float, length: float, details: str, prompts: int) -> dict[str, Any]:
    engine = name.startswith(("transformers", "llama"))
    drafts = length > 1
    rate, rounds = 58.4 * speedup, round(3000 / length)
    positions = [(0.62, 0.62), (0.33, 0.56), (0.16, 0.51), (0.07, 0.47)]
    return {
        "mode": name,
        "details": details,
        "identical": None if engine else True,
        "tokens": 3000,
        "prompt_tokens": 2900,
        "seconds": 3000 / rate,
        "tokens_per_second": rate,
        "decode_tokens_per_second": rate * 1.06,
        "spread": {"lowest": rate * 0.985, "highest": rate * 1.012},
        "speedup": speedup,
        "speedup_median": speedup * 0.97,
        "speedup_lowest": speedup * 0.78,
        "by_task": {
            task: {
                "prompts": prompts // len(TASKS),
                "tokens_per_second": rate * gain,
                "speedup": speedup * gain if drafts else speedup,
                "speedup_lowest": speedup * gain * 0.9,
            }
            for task, gain in GAIN.items()
        },
        "ttft": {"mean": 0.081, "p50": 0.074, "p95": 0.142, "p99": 0.181},
        "itl": None if engine else {"mean": 0.0171, "p50": 0.0163, "p95": 0.0214, "p99": 0.0302},
        "tpot": {"mean": 0.0169 / speedup, "p50": 0.0166 / speedup, "p95": 0.0192 / speedup, "p99": 0.0211 / speedup},
        "rounds": 0 if engine else rounds,
        "drafted": round(rounds * 1.9) if drafts else 0,
        "accepted": round(rounds * (length - 1)),
        "mean_acceptance_length": length,
        "acceptance_rate": (length - 1) / 1.9,
        "acceptance_by_position": [
            {"position": i, "accepted": a, "reached": round(rounds * 0.9 / i), "accepted_of_reached": c}
            for i, (a, c) in enumerate(positions if drafts else [], start=1)
        ],
        "draft_lengths": {str(k): round(rounds * s) for k, s in enumerate((0.11, 0.24, 0.3, 0.22, 0.13))}
        if drafts
        else {},
        "draft_sources": {"mtp": [round(rounds * 1.7), round(rounds * 0.8)], "suffix": [410, 322]} if drafts else {},
        "phase_seconds": {}
        if engine
        else {
            "prefill": 1.9,
            "draft": 3000 / rate * 0.09 if drafts else 0.0,
            "verify": 3000 / rate * 0.84,
            "other": 3000 / rate * 0.02,
        },
        "cache_bytes": 0 if engine else 47_000_000,
    }
