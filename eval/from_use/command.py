"""`python -m eval.from_use`: one person's prompts are answered with learning on, the head is adapted to them, and both
heads draft for other prompts of the same person, and for foreign ones.

What: `run.py chat --learn` and `run.py train --from-use` in one go, with a log and a head in `--out`, and no trace in
the user's own log. The prompts that the heads are compared on are in no training text and judge no training. A
command that was stopped goes on where it was, with the same `--out`.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from drafter.files.checkpoint import load_drafter
from drafter.train.evaluate import measure_drafts
from drafter.use.log import UseLog
from drafter.use.recorder import UseRecorder, used_model
from eval.acceptance import figures, ids_of
from eval.cli import options as cli
from eval.cli.output import INTERRUPTED, check_head_folder, check_writable, file_name, put_record, run_guarded
from eval.cli.parser import Parser
from eval.cli.provenance import provenance
from eval.cli.session import Session, open_session
from eval.from_use.prompts import PROMPTS, one_persons_prompts
from eval.live.parts import count_bar
from eval.prompts.sets import Prompt, foreign_prompts
from eval.train.command import options_from, train
from eval.train.from_use import head_in_use
from eval.train.options import add_train_options
from eval.train.texts import ends_of
from eval.use.options import LIMIT
from specdec.util.terminal import Terminal


def _parser() -> argparse.ArgumentParser:
    made = cli.module_parser("from_use", __doc__)
    made.add_argument(
        "--out", type=file_name, required=True, metavar="FOLDER", help="for the log and the head: a new one"
    )
    made.add_argument(
        "--learn", type=cli.whole_number(20), default=200, metavar="N", help="prompts that are learned (default 200)"
    )
    made.add_argument(
        "--ask", type=cli.whole_number(1), default=40, metavar="N", help="more of the same person (default 40)"
    )
    made.add_argument(
        "--foreign",
        type=cli.whole_number(0),
        default=80,
        metavar="N",
        help="foreign prompts, which show what the head forgot (default 80: all)",
    )
    made.add_argument("--minutes", type=cli.number, default=10.0, metavar="M", help="of training (default 10)")
    made.add_argument(
        "--train",
        type=shlex.split,
        default=[],
        metavar="OPTIONS",
        help="more options of run.py train, in quotes: '--start heads/x --learning-rate 1e-4'",
    )
    made.add_argument(
        "--draft-length", type=cli.whole_number(1), default=4, metavar="K", help="tokens per draft (default 4)"
    )
    made.add_argument("--max-new-tokens", type=cli.whole_number(1), default=128, metavar="N", help="default 128")
    made.add_argument("--temperature", type=cli.temperature, default=0.0, metavar="X", help="0 is greedy (default)")
    made.add_argument(
        "--seed", type=cli.whole_number(0), default=0, metavar="N", help="of sampling, and of who is asked"
    )
    cli.add_json_option(made, "the figures")
    cli.add_model_options(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m eval.from_use` with the words `argv` (None: the process's own); return its exit code."""
    arguments = _parser().parse_args(argv)
    return run_guarded(lambda: run(arguments), arguments.json)


def run(arguments: argparse.Namespace) -> int:
    """Answer, train and compare; return the exit code.

    Raises ValueError: the model is unusable or has no head, or there are fewer prompts than are asked for.
    """
    a = arguments
    check_writable(a.json)
    head, log = a.out / "head", a.out / "use"
    check_head_folder(head)
    if a.learn + a.ask > PROMPTS:
        raise ValueError(f"--learn and --ask: there are {PROMPTS} prompts, not {a.learn + a.ask}")
    prompts = one_persons_prompts(a.seed)
    learned, asked = prompts[: a.learn], prompts[a.learn : a.learn + a.ask]
    settings = cli.settings_from(a)
    words = ["--out", str(head), "--minutes", f"{a.minutes:g}", "--draft-length", str(a.draft_length), "--from-use"]
    words += ["--temperature", f"{a.temperature:g}", "--max-new-tokens", str(a.max_new_tokens)]
    training = Parser(prog="python -m eval.from_use --train")
    add_train_options(training)
    options = replace(options_from(training.parse_args(_timed(words, a.train))), from_use=log)
    try:
        session = open_session(settings)
        before = options.start or head_in_use(session.model.decoder)
        answered = _answer(session, learned, log)
        code = train(settings, replace(options, start=before, began=time.monotonic()), None)
        if code:
            return code
        foreign = foreign_prompts()[:: max(1, 80 // a.foreign)][: a.foreign] if a.foreign else []
        found = {
            name: _compare(session, those, [before, str(head)], a)
            for name, those in (("own", asked), ("foreign", foreign))
            if those
        }
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    Terminal().print(_table(found))
    record = {
        "command": "from_use",
        **provenance(session),
        "learned": {"prompts": len(learned), "answer_tokens": answered},
        "kinds": len({prompt.task for prompt in prompts}),
        "minutes": options.budget.minutes,
        "steps": options.budget.steps,
        "learning_rate": options.training.learning_rate,
        "draft_length": a.draft_length,
        "temperature": a.temperature,
        "heads": {"before": before, "after": str(head)},
        **found,
    }
    put_record(a.json, record)
    return 0


def _timed(words: list[str], more: list[str]) -> list[str]:
    """Return the words of a training, without the minutes where `more` counts steps."""
    if "--steps" in more:
        at = words.index("--minutes")
        words = words[:at] + words[at + 2 :]
    return words + more


def _answer(session: Session, prompts: Sequence[Prompt], folder: Path) -> int:
    """Answer `prompts` as chat does, and keep the texts in `folder`; return the tokens of all answers. Texts that an
    earlier sitting has kept stay."""
    decoder, name = session.model.decoder, session.settings.model
    log = UseLog(folder, used_model(decoder, name, decoder.adapters.default))
    kept = {tuple(text.prompt) for text in log.texts()[0]}
    recorder = UseRecorder(decoder, name, folder, LIMIT)
    try:
        with count_bar("answering", len(prompts)) as advance:
            for prompt in prompts:
                ids = ids_of(session, prompt)
                if tuple(ids.tolist()) not in kept:
                    run = session.run(ids[None])
                    recorder.add([*ids.tolist(), *run.tokens], len(ids))
                advance()
    finally:
        recorder.close()
    return sum(len(text.tokens) - text.answer for text in log.texts()[0])


def _compare(
    session: Session, prompts: Sequence[Prompt], heads: Sequence[str], a: argparse.Namespace
) -> dict[str, Any]:
    """Return the figures of drafts of the heads before and after, in the real decoding loop, and what the second one
    gains: of tokens per round, and of the acceptance rate."""
    found = []
    for head in heads:
        stats = measure_drafts(
            session.model.decoder,
            load_drafter(head),
            [ids_of(session, prompt) for prompt in prompts],
            draft_length=a.draft_length,
            max_new_tokens=a.max_new_tokens,
            eos_ids=ends_of(session),
            temperature=a.temperature,
            seed=a.seed,
        )
        found.append(figures(stats))
    before, after = found
    rate = after["acceptance_rate"] / before["acceptance_rate"] - 1 if before["acceptance_rate"] else None
    return {
        "prompts": len(prompts),
        "before": before,
        "after": after,
        "gain": after["mean_acceptance_length"] / before["mean_acceptance_length"] - 1,
        "gain_of_rate": rate,
    }


def _table(found: dict[str, dict[str, Any]]) -> Table:
    made = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for name in ("prompts", "tokens per round before", "after", "gain", "accepted before", "after"):
        made.add_column(name, justify="left" if name == "prompts" else "right")
    for name, part in found.items():
        before, after = part["before"], part["after"]
        made.add_row(
            f"{part['prompts']} {name}",
            f"{before['mean_acceptance_length']:.3f}",
            f"{after['mean_acceptance_length']:.3f}",
            f"{part['gain']:+.1%}",
            f"{before['acceptance_rate']:.1%}",
            f"{after['acceptance_rate']:.1%}",
        )
    return made
