"""`python -m eval.follow --out FOLDER`: what it is worth to adapt a head to a changed backbone.

What: a small LoRA teaches the model another style, numbered lists in capitals, which a rule makes of the model's own
answers. With it, three heads draft for the same foreign prompts, greedy and in the real decoding loop: the old head as
it is; the old head after `run.py train --start HEAD --adapter LORA` for some minutes; one that was trained from scratch
for as long. Every part is kept in the folder, and one that is there is not made again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from drafter.data.answering import generate_answers
from drafter.data.build_dataset import BUILT_IN, encode_prompts, training_prompts
from drafter.data.given import GivenText
from drafter.files.bundled import bundled_head
from drafter.files.checkpoint import load_drafter
from drafter.prompts.texts import Chat
from drafter.settings import Answering
from drafter.train.evaluate import measure_drafts
from eval.acceptance import figures, ids_of, prompts
from eval.cli import options as cli
from eval.cli.output import check_writable, file_name, put_record, run_guarded
from eval.cli.parser import Parser
from eval.cli.provenance import machine
from eval.cli.session import Session, open_session
from eval.train.command import options_from, train
from eval.train.low_rank import restyle, train_adapter
from eval.train.options import add_train_options
from eval.train.texts import encode_chat, ends_of, messages_of
from specdec.util.terminal import Terminal

STYLE_SEED, HEAD_SEED = 11, 12  # of the prompts that the LoRA, and the heads, are trained on
AS_IT_IS, ADAPTED, SCRATCH = "the old head as it is", "adapted", "from scratch"


def _parser() -> argparse.ArgumentParser:
    made = cli.module_parser("follow", __doc__)
    made.add_argument("--out", type=file_name, required=True, metavar="FOLDER", help="for the LoRA and the heads")
    made.add_argument("--start", metavar="HEAD", help="the old head (default: the one that comes with the package)")
    made.add_argument("--minutes", type=cli.positive, default=10.0, metavar="M", help="of each head (default 10)")
    made.add_argument("--lora-minutes", type=cli.positive, default=5.0, metavar="M", help="of the LoRA (default 5)")
    made.add_argument(
        "--answers",
        type=cli.whole_number(1),
        default=240,
        metavar="N",
        help="that the LoRA is trained on (default %(default)s)",
    )
    made.add_argument(
        "--learning-rate", type=cli.positive, default=5e-4, metavar="X", help="to adapt with (default %(default)s)"
    )
    made.add_argument(
        "--prompts", type=file_name, metavar="FILE", help="to decode: .jsonl or .txt, as for run.py bench"
    )
    made.add_argument("--limit", type=cli.whole_number(1), metavar="N", help="only the first N prompts of each kind")
    made.add_argument("--max-new-tokens", type=cli.whole_number(8), default=128, metavar="N", help="default 128")
    cli.add_json_option(made, "the figures")
    made.add_argument("--model", default=cli.DEFAULT_MODEL, metavar="NAME", help="as for run.py (default %(default)s)")
    made.add_argument("--device", help="as for run.py")
    made.add_argument("--threads", type=cli.threads, metavar="N", help="CPU threads (default: torch's choice)")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m eval.follow` with the words `argv` (None: the process's own); return its exit code."""
    arguments = _parser().parse_args(argv)
    return run_guarded(lambda: run(arguments), arguments.json)


def run(arguments: argparse.Namespace) -> int:
    """Make what is not in the folder yet, measure, print the table and write the record.

    Raises ValueError: the model, the head or the prompts are not usable, or training ends without a head.
    """
    a = arguments
    check_writable(a.json)
    asked = prompts(a.prompts, False, a.limit)
    settings = replace(cli.settings_from(a), drafter="none")
    lora, learned = a.out / "lora", None
    session = open_session(settings)
    start = a.start or bundled_head(session.model.decoder.fingerprint)
    if start is None:
        raise ValueError(f"no head comes with the package for {a.model}; name one with --start")
    if not (lora / "adapter_config.json").is_file():
        learned = train_adapter(a.model, styled_texts(session, a.answers, a.max_new_tokens), lora, a.lora_minutes)
        print(f"a LoRA in {lora}: {learned.steps} steps, loss {learned.first:.2f} -> {learned.last:.2f}", flush=True)
    del session
    heads = {AS_IT_IS: Path(start), ADAPTED: a.out / "adapted", SCRATCH: a.out / "scratch"}
    for name, more in (
        (ADAPTED, ["--start", str(start), "--learning-rate", f"{a.learning_rate:g}"]),
        (SCRATCH, []),
    ):
        if not (heads[name] / "config.json").is_file() and (code := _train(a, lora, heads[name], more)):
            return code
    session = open_session(replace(settings, adapter=(("style", str(lora)),)))
    rows = []
    for name, head in heads.items():
        stats = measure_drafts(
            session.model.decoder,
            load_drafter(head),
            [ids_of(session, prompt) for prompt in asked],
            draft_length=4,
            max_new_tokens=a.max_new_tokens,
            eos_ids=ends_of(session),
        )
        rows.append({"name": name, "head": str(head), **figures(stats)})
        print(f"{name}: {stats.mean_acceptance_length:.3f}", flush=True)
    gains = {name: _gain(rows[1], row) for name, row in zip((AS_IT_IS, SCRATCH), (rows[0], rows[2]), strict=True)}
    Terminal().print(_table(rows))
    for name, gain in gains.items():
        print(f"adapted against {name}: {gain:+.1%} tokens a round")
    record: dict[str, Any] = {
        "command": "follow",
        **machine(session.model.device),
        "model": a.model,
        "minutes": a.minutes,
        "lora": None if learned is None else learned._asdict(),
        "style": style_share(session, [ids_of(session, prompt) for prompt in asked[:4]], a.max_new_tokens),
        "prompts": len(asked),
        "heads": rows,
        "gains": gains,
    }
    put_record(a.json, record)
    return 0


def styled_texts(session: Session, count: int, max_new_tokens: int) -> list[GivenText]:
    """Return conversations of `count` generated prompts and the model's own answers, which `restyle` has rewritten."""
    how = Answering(max_new_tokens)
    drawn = training_prompts([(BUILT_IN, 1.0)], STYLE_SEED)
    asked = list(islice(encode_prompts(drawn, lambda p: session.encode(messages_of(p))[0], how.max_prompt), count))
    answers = generate_answers(
        session.model.decoder,
        (one.ids for one in asked),
        layers=list(session.model.decoder.spec.shared_kv_layers.values()),
        max_new_tokens=max_new_tokens,
        eos_ids=ends_of(session),
        max_batch=how.max_batch,
    )
    texts = []
    for number, text in sorted(answers, key=lambda found: found[0]):
        said = restyle(session.text(text.tokens[text.answer :].tolist()))
        if said:
            messages = (*asked[number].prompt.messages, ("assistant", said))
            chat = encode_chat(session, Chat(messages, f"answer {number}"), session.context)
            if chat.answer < len(chat.tokens):
                texts.append(chat)
    if not texts:
        raise ValueError(f"{session.settings.model} said nothing to {count} prompts that a style could be made of")
    return texts


def style_share(session: Session, asked: Sequence[Any], max_new_tokens: int) -> float:
    """Return the share of capitals among the letters of the model's answers to `asked` (ids [n]): whether it has the
    style."""
    letters = ""
    for ids in asked:
        found = session.run(ids[None], speculation=False, max_new_tokens=max_new_tokens)
        letters += "".join(filter(str.isalpha, session.text(found.tokens)))
    return sum(map(str.isupper, letters)) / max(1, len(letters))


def _train(a: argparse.Namespace, lora: Path, out: Path, more: Sequence[str]) -> int:
    parser = Parser(prog="run.py train")
    add_train_options(parser)
    cli.add_model_options(parser)
    cli.add_json_option(parser, "the figures")
    words = ["--model", a.model, "--adapter", f"style={lora}", "--out", str(out), "--minutes", f"{a.minutes:g}"]
    words += ["--seed", str(HEAD_SEED), *more]
    words += ["--device", a.device] if a.device else []
    words += ["--threads", str(a.threads)] if a.threads else []
    chosen = parser.parse_args(words)
    return train(cli.settings_from(chosen), options_from(chosen), None)


def _gain(row: dict[str, Any], other: dict[str, Any]) -> float:
    return float(row["mean_acceptance_length"]) / float(other["mean_acceptance_length"]) - 1


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    made = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    made.add_column("head")
    for name in ("tokens per round", "by position"):
        made.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        positions = " ".join(f"{value:.2f}" for value in row["per_position"])
        made.add_row(row["name"], f"{row['mean_acceptance_length']:.3f}", positions)
    return made


if __name__ == "__main__":
    sys.exit(main())
