"""Compare drafted texts with plain ones on a GPU, each model in a process of its own.

A tiny pair of Gemma 4's layout is made on the spot, because a rented machine has no model: its window is shorter than
the texts, and halves of the texts are decoded from a saved cache. Models that are named are compared too.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from eval.cli.output import DIFFERS

TINY_LENGTH = ("--prompts", "6", "--tokens", "120")
NAMED_LENGTH = ("--prompts", "2", "--tokens", "600")  # past the window of Gemma 3 270M


def make_tiny(folder: Path, seconds: float) -> Path:
    """Write a tiny Gemma 4 with its assistant into `folder`, and return the model. Raises RuntimeError."""
    model = folder / "tiny"
    _run(["eval.synthetic", "--config", "gemma-4-tiny", "--out", str(model)], seconds, (0,))
    return model


def comparisons(tiny: Path, named: Sequence[str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield what is compared, in words, and the words of `eval.exactness` for it."""
    pair = ("--model", str(tiny), *TINY_LENGTH, "--drafter", str(tiny / "assistant"), "suffix", "scripted")
    yield "a tiny Gemma 4 in 4 bits", (*pair, "--quantize", "int4")
    yield "a tiny Gemma 4 in 8 bits, in halves", (*pair, "--quantize", "int8", "--reuse")
    for name in named:
        yield name, ("--model", name, *NAMED_LENGTH)


def text_figures(words: Sequence[str], device: str, seconds: float, record: Path) -> dict[str, Any]:
    """Return how many texts were compared and identical, and where the first of each kind differed. Raises RuntimeError
    where `eval.exactness` fails, and TimeoutExpired after `seconds`."""
    _run(["eval.exactness", *words, "--device", device, "--json", str(record)], seconds, (0, DIFFERS))
    found = json.loads(record.read_text(encoding="utf-8"))
    differing = [one for one in found["configurations"] if one["first"] is not None]
    return {"identical": found["identical"], "total": found["total"], "differing": differing}


def share(texts: Sequence[dict[str, Any]]) -> float:
    """Return the share of identical texts among all."""
    return float(sum(one["identical"] for one in texts) / sum(one["total"] for one in texts))


def _run(words: Sequence[str], seconds: float, well: Sequence[int]) -> None:
    """Run a module with `words`. Raises RuntimeError for an exit code that is not in `well`."""
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, timeout=seconds, check=False)
    if done.returncode not in well:
        raise RuntimeError(f"{words[0]} ended with {done.returncode}: {done.stderr.strip().splitlines()[-1:]}")
