"""`python -m eval.acceptance`: how many drafted tokens are right, and the cost of drafting them.

What: drafts of one length in the real decoding loop, by kind of prompt, and d / V(1): a draft step's time against that
of a plain pass, measured in turns. By default the 80 prompts have nothing to do with the prompts that heads are trained
on. A head is always better on its own kind of prompts (`--own`), which says little about the prompts of others.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text
from torch import Tensor

from drafter.prompts.generator import held_out_prompts
from drafter.train.evaluate import measure_drafts
from eval.cli import options as cli
from eval.cli.output import INTERRUPTED, check_writable, file_name, put_record, run_guarded
from eval.cli.provenance import provenance
from eval.cli.session import Session, open_session
from eval.live.parts import count_bar, format_percent
from eval.prompts.sets import Prompt, foreign_prompts, load_prompts
from eval.train.texts import ends_of
from specdec.cache import KVCache
from specdec.drafting.protocol import Drafter, NoDraft, Proposer
from specdec.engine.sampling import Noise
from specdec.engine.stats import GenerationStats
from specdec.model.decoder import Decoder
from specdec.util.terminal import Terminal

OWN = 80
TIMED_TOKENS = 64  # of each of the texts that d and V(1) are taken from
TIMED_TEXTS = 5


def _parser() -> argparse.ArgumentParser:
    made = cli.module_parser("acceptance", __doc__)
    which = made.add_mutually_exclusive_group()
    which.add_argument(
        "--prompts", type=file_name, metavar="FILE", help="your own, .jsonl or .txt, as for run.py bench"
    )
    which.add_argument(
        "--own", action="store_true", help="80 prompts of the training generator's kind, never trained on"
    )
    made.add_argument("--limit", type=cli.whole_number(1), metavar="N", help="only the first N of each kind")
    made.add_argument(
        "--draft-length", type=cli.whole_number(1), default=4, metavar="K", help="tokens per draft (default 4)"
    )
    made.add_argument("--max-new-tokens", type=cli.whole_number(1), default=128, metavar="N", help="default 128")
    made.add_argument("--temperature", type=cli.temperature, default=0.0, metavar="X", help="0 is greedy (default)")
    made.add_argument("--seed", type=cli.whole_number(0), default=0, metavar="N", help="of sampling (default 0)")
    made.add_argument(
        "--without-noise", action="store_true", help="the head does not know what noise tokens are sampled with"
    )
    made.add_argument("--drafter", default="auto", metavar="NAME", help="as for run.py (default auto)")
    cli.add_json_option(made, "the figures")
    cli.add_model_options(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m eval.acceptance` with the words `argv` (None: the process's own); return its exit code."""
    arguments = _parser().parse_args(argv)
    return run_guarded(lambda: run(arguments), arguments.json)


def run(arguments: argparse.Namespace) -> int:
    """Print the table and the cost of a draft step, and write the record where `--json` asks for it.

    Raises ValueError: the model, the drafter or the prompts are unusable.
    """
    a = arguments
    check_writable(a.json)
    asked = prompts(a.prompts, a.own, a.limit)
    session = open_session(cli.settings_from(a))
    drafter = WithoutNoise(session.model.drafter) if a.without_noise else session.model.drafter
    found: dict[str, GenerationStats] = {}
    try:
        with count_bar("decoding", len(asked)) as advance:
            for prompt in asked:
                stats = count_drafts(session, drafter, prompt, a)
                kind = prompt.task or "all"
                found.setdefault(kind, GenerationStats()).merge(stats)
                advance()
            step, plain = costs(session, asked, a.draft_length)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return INTERRUPTED
    total = GenerationStats()
    for part in found.values():
        total.merge(part)
    Terminal().print(_table(found, total))
    print(f"one draft step {1000 * step:.3f} ms, a plain pass {1000 * plain:.3f} ms: d / V(1) = {step / plain:.3f}")
    record = {
        "command": "acceptance",
        **provenance(session),
        "draft_length": a.draft_length,
        "temperature": a.temperature,
        "prompts": len(asked),
        "all": figures(total),
        "tasks": {kind: figures(stats) for kind, stats in found.items()},
        "draft_step_seconds": step,
        "plain_pass_seconds": plain,
        "d_over_v1": step / plain,
    }
    put_record(a.json, record)
    return 0


def prompts(file: Path | None, own: bool, limit: int | None) -> list[Prompt]:
    """Return the prompts to decode, at most `limit` of each task. Raises ValueError: see `load_prompts`."""
    if own:
        asked = [
            Prompt(f"own-{i}", "own kind", (prompt.messages[-1][1],), prompt.messages[:-1])
            for i, prompt in enumerate(held_out_prompts(OWN))
        ]
    else:
        asked = foreign_prompts() if file is None else load_prompts(file)
    kept: list[Prompt] = []
    for prompt in asked:
        if limit is None or sum(other.task == prompt.task for other in kept) < limit:
            kept.append(prompt)
    return kept


class WithoutNoise:
    """Draft with `drafter` without the noise: the drafts are its own likeliest tokens, as other engines' drafters
    propose."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter, self.name, self.max_draft = drafter, drafter.name, drafter.max_draft

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """Return the layers whose outputs the wrapped drafter wants."""
        return self._drafter.aux_layers

    def bind(self, backbone: Decoder) -> None:
        """Bind the wrapped drafter. Raises ValueError as that drafter does."""
        self._drafter.bind(backbone)

    def start(self, cache: KVCache, noise: Noise | None = None) -> Proposer:
        """Return the wrapped drafter's proposer of a text that it takes for greedy: `noise` is kept from it."""
        return self._drafter.start(cache)


def count_drafts(session: Session, drafter: Drafter, prompt: Prompt, a: argparse.Namespace) -> GenerationStats:
    """Count the drafts of the answer to a prompt's first turn."""
    return measure_drafts(
        session.model.decoder,
        drafter,
        [ids_of(session, prompt)],
        draft_length=a.draft_length,
        max_new_tokens=a.max_new_tokens,
        eos_ids=ends_of(session),
        temperature=a.temperature,
        seed=a.seed,
    )


def ids_of(session: Session, prompt: Prompt) -> Tensor:
    """Return the token ids [n] of a prompt up to its first turn, in the model's chat template."""
    return session.encode(prompt.opening())[0]


def costs(session: Session, asked: Sequence[Prompt], draft_length: int) -> tuple[float, float]:
    """Measure the seconds of a draft step and of a plain pass: medians over a few texts, taken in turns."""
    backbone = session.model.decoder
    steps, passes = [], []
    for prompt in asked[:TIMED_TEXTS]:

        def once(drafter: Drafter, length: int, ids: Tensor) -> GenerationStats:
            return measure_drafts(
                backbone, drafter, [ids], draft_length=length, max_new_tokens=TIMED_TOKENS, eos_ids=frozenset()
            )

        ids = ids_of(session, prompt)
        plain = once(NoDraft(), 0, ids)
        with_drafts = once(session.model.drafter, draft_length, ids)
        passes.append(plain.seconds["verify"] / plain.rounds)
        steps.append(with_drafts.seconds["draft"] / max(1, with_drafts.drafted))
    return statistics.median(steps), statistics.median(passes)


def figures(stats: GenerationStats) -> dict[str, Any]:
    """Return the figures of drafts in JSON types: lengths in tokens, rates and shares from 0 to 1."""
    return {
        "mean_acceptance_length": stats.mean_acceptance_length,
        "acceptance_rate": stats.acceptance_rate,
        "per_position": stats.acceptance_per_position,
        "rounds": stats.rounds,
        "emitted": stats.emitted,
    }


def _table(found: dict[str, GenerationStats], total: GenerationStats) -> Table:
    made = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    made.add_column("prompts")
    for name in ("tokens per round", "accepted by position, of all rounds", "tokens"):
        made.add_column(name, justify="right", no_wrap=True)
    rows = [*found.items(), *([("all", total)] if len(found) > 1 else [])]
    for kind, stats in rows:
        positions = "  ".join(format_percent(value) for value in stats.acceptance_per_position)
        style = "bold" if kind == "all" else ""
        made.add_row(Text(kind, style=style), f"{stats.mean_acceptance_length:.3f}", positions, str(stats.emitted))
    return made


if __name__ == "__main__":
    sys.exit(main())
