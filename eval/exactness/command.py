"""`python -m eval.exactness`: does drafting emit, token for token, the text of plain decoding?

What: every prompt is decoded plainly and then with each drafter, greedily and sampled, and the token ids are compared.
With `--media` the prompts have pictures, sound and video, go on from each other's caches, and are decoded as one batch
too. Texts go on past EOS to the full length, so that many of them outgrow sliding windows. Why a scripted drafter
beside the real one: its drafts are all right, all wrong and right up to the middle of the plain text in turn, at every
length, which no real drafter does on request. Left out: speed, which `run.py bench` measures.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from eval.cli import options as cli
from eval.cli.output import DIFFERS, INTERRUPTED, check_writable, put_record, run_guarded
from eval.cli.provenance import provenance
from eval.cli.session import open_session
from eval.exactness.checker import Checker, Tally
from eval.live.parts import count_bar
from eval.prompts.media import MediaPrompt, media_prompts
from eval.prompts.sets import exactness_prompts
from specdec.util.terminal import Terminal
from specdec.weights.metadata import naming

ABOUT = """\
Decode prompts plainly and with drafting, greedily and sampled, and compare the token ids. Texts go on past EOS to the
full length. The scripted drafter knows the plain text: its drafts are all right, all wrong, and right up to the middle,
in turn. With --media, prompts with the same ids and other pictures follow one another. Exit code 1 when anything
differs."""
LONG = 1024  # tokens, prompt and answer together, above which a text counts as long


def exactness(checker: Checker, prompts: Sequence[MediaPrompt], json_file: Path | None) -> int:
    """Check, show and write; return the exit code: 0, 1 when anything differs, 130 after Ctrl-C."""
    runs = len(prompts) * len(checker.temperatures) * (1 + len(checker.drafters))
    runs += len(prompts) * (checker.media and 0 in checker.temperatures)
    interrupted = False
    with count_bar("texts", runs) as advance:
        try:
            for tally in checker.check(prompts, advance):
                if tally.identical < tally.total:
                    advance(0, "texts [red]DIFFERENT[/red]")
        except KeyboardInterrupt:
            interrupted = True
    tallies = list(checker.tallies.values())
    identical, total = sum(t.identical for t in tallies), sum(t.total for t in tallies)
    record = {
        "command": "exactness",
        "interrupted": interrupted,
        **provenance(checker.session),
        "prompts": len(prompts),
        "tokens": checker.tokens,
        "draft_length": checker.draft_length,
        "seed": checker.seed,
        "reuse": checker.reuse,
        "media": checker.media,
        "identical": identical,
        "total": total,
        "texts": len(checker.lengths),
        "texts_over_1024": sum(length > LONG for length in checker.lengths),
        "shortest_text": min(checker.lengths, default=0),
        "longest_text": max(checker.lengths, default=0),
        "configurations": [tally.to_dict() for tally in tallies],
    }
    _show(tallies, record)
    put_record(json_file, record)
    return INTERRUPTED if interrupted else 0 if identical == total else DIFFERS


def _show(tallies: Sequence[Tally], record: dict[str, Any]) -> None:
    console = Terminal(highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("sampling", "drafter"):
        table.add_column(name)
    for name in ("identical", "drafted", "accepted", "reused"):
        table.add_column(name, justify="right")
    for tally in tallies:
        same = Text(f"{tally.identical}/{tally.total}", style="green" if tally.identical == tally.total else "bold red")
        counts = (f"{count:,}" for count in (tally.drafted, tally.accepted, tally.reused))
        table.add_row(tally.sampling, tally.drafter, same, *counts)
    console.print(table)
    console.print(
        f"{record['identical']}/{record['total']} identical, token for token. {record['texts']} plain texts of "
        f"up to {record['tokens']} new tokens; {record['texts_over_1024']} of them longer than {LONG:,} tokens in "
        f"total (shortest {record['shortest_text']:,}, longest {record['longest_text']:,})."
    )
    for tally in tallies:
        if tally.first is not None:
            text = f"first difference, {tally.sampling}, {tally.drafter}: {tally.first}"
            console.print(text, style="red", markup=False)
    if record["interrupted"]:
        console.print("interrupted: these are the texts that were compared", style="yellow")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m eval.exactness` with the words `argv` (None: the process's own); return its exit code."""
    parser = cli.module_parser("exactness", ABOUT)
    parser.add_argument(
        "--prompts", type=cli.whole_number(1), default=40, metavar="N", help="the first N of 40 (default: all)"
    )
    parser.add_argument(
        "--tokens", type=cli.whole_number(1), default=256, metavar="M", help="new tokens each (default 256)"
    )
    parser.add_argument(
        "--drafter",
        nargs="+",
        default=["auto", "suffix", "scripted"],
        metavar="NAME",
        help="auto, suffix, scripted, or a drafter checkpoint (default: auto suffix scripted)",
    )
    parser.add_argument(
        "--temperature", nargs="+", type=cli.temperature, default=[0.0, 0.8], metavar="X", help="default: 0 0.8"
    )
    parser.add_argument("--top-p", type=cli.fraction, default=0.95, metavar="P", help="when sampling (default 0.95)")
    parser.add_argument("--seed", type=cli.whole_number(0), default=0, metavar="N", help="when sampling (default 0)")
    parser.add_argument("--draft-length", type=cli.whole_number(1), default=8, metavar="N", help="fixed (default 8)")
    parser.add_argument(
        "--reuse",
        action="store_true",
        help="decode drafted texts in two halves, between which their cache is saved, forgotten and loaded",
    )
    parser.add_argument(
        "--media",
        action="store_true",
        help="prompts with pictures, sound and video instead, of which --prompts takes the first",
    )
    cli.add_json_option(parser, "the figures and the first differences")
    cli.add_model_options(parser)
    arguments = parser.parse_args(argv)

    def command() -> int:
        check_writable(arguments.json)
        asked = exactness_prompts(arguments.prompts)
        settings = cli.settings_from(arguments)
        session = open_session(replace(settings, drafter="none", max_new_tokens=arguments.tokens, temperature=0.0))
        if arguments.media:
            with naming(arguments.model):
                prompts = media_prompts(session.model.decoder.spec)[: arguments.prompts]
        else:
            prompts = [MediaPrompt(prompt.name, session.encode(prompt.opening())) for prompt in asked]
        checker = Checker(
            session,
            arguments.temperature,
            arguments.drafter,
            arguments.tokens,
            arguments.top_p,
            arguments.seed,
            arguments.draft_length,
            arguments.reuse,
            arguments.media,
        )
        return exactness(checker, prompts, arguments.json)

    return run_guarded(command, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
