"""`python -m eval.ablations --set FOLDER --steps N`: what each part of the training recipe is worth.

Every variant differs from the base in one thing, is trained on the same set for the same number of tokens, saved, and
judged by drafting for the same prompts in the real decoding loop, foreign ones or those of `--prompts`. The set is one
that `run.py train` collected (its `training/set`). With `--held-out`, a set that was collected from other prompts, the
drafts from every position of its answers are judged too: teacher-forced, from many more drafts, with less noise. With
`--start` every variant goes on from a head that is stored, as training that continues does, and only those that leave
its shape alone are possible. Some variants are mistakes that other trainers have shipped: these variants show the cost
of the mistake. Other layers' states are fused where the set has them (`run.py train --aux-layers`).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from drafter.config import MTPHeadSpec
from drafter.data.dataset import Dataset, frequent
from drafter.files.checkpoint import load_drafter
from drafter.files.formats import Form, Start, Trained, form_for, read_start
from drafter.settings import TrainerSettings
from drafter.train.evaluate import measure_drafts, teacher_forced
from drafter.train.initial import initial_tensors
from drafter.train.loss import Candidates
from drafter.train.trainer import Trainer
from eval.acceptance import figures, ids_of, prompts
from eval.cli import options as cli
from eval.cli.output import check_writable, file_name, put_record, run_guarded
from eval.cli.provenance import machine
from eval.cli.session import Session, open_session
from eval.train.texts import ends_of
from eval.train.variants import BASE, VARIANTS, Variant
from specdec.util.terminal import Terminal


def _parser() -> argparse.ArgumentParser:
    made = cli.module_parser("ablations", __doc__)
    made.add_argument("--set", type=file_name, required=True, metavar="FOLDER", help="what run.py train collected")
    made.add_argument(
        "--steps", type=cli.whole_number(1), default=150, metavar="N", help="of 2048 tokens (default 150)"
    )
    made.add_argument("--only", nargs="+", metavar="WORD", help="variants whose names contain one of these words")
    made.add_argument(
        "--start", metavar="HEAD", help="go on from a trained head (a folder or hub id), whose shape all variants have"
    )
    made.add_argument(
        "--learning-rate",
        type=cli.positive,
        default=TrainerSettings.learning_rate,
        metavar="X",
        help="default %(default)s",
    )
    made.add_argument("--held-out", type=file_name, metavar="SET", help="a set to judge on, of other prompts")
    made.add_argument(
        "--prompts", type=file_name, metavar="FILE", help="to decode: .jsonl or .txt, as for run.py bench"
    )
    made.add_argument(
        "--limit",
        type=cli.whole_number(1),
        metavar="N",
        help="prompts of each kind (default: 8 foreign ones, all of a file)",
    )
    made.add_argument("--temperature", type=cli.temperature, default=0.0, metavar="X", help="0 is greedy (default)")
    made.add_argument("--max-new-tokens", type=cli.whole_number(1), default=128, metavar="N", help="default 128")
    cli.add_json_option(made, "the figures")
    cli.add_model_options(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m eval.ablations` with the words `argv` (None: the process's own); return its exit code."""
    arguments = _parser().parse_args(argv)
    return run_guarded(lambda: run(arguments), arguments.json)


def run(arguments: argparse.Namespace) -> int:
    """Print a line for each variant, then the table. Raises ValueError: the model or the set is not usable."""
    a = arguments
    check_writable(a.json)
    about = Dataset(a.set).about
    aux_layers = tuple(about.get("aux_layers", ()))
    asked_prompts = prompts(a.prompts, False, a.limit or (8 if a.prompts is None else None))
    session = open_session(replace(cli.settings_from(a), drafter="none"))
    start = None if a.start is None else read_start(a.start, session.model.decoder)
    asked = [ids_of(session, prompt) for prompt in asked_prompts]
    possible = [variant.of(aux_layers) for variant in VARIANTS if aux_layers or variant.fused is None]
    if start is not None:
        possible = [v for v in possible if v.fitted and v.fused is None and v.shape == BASE]
    chosen = [v for v in possible if not a.only or any(word in v.name for word in a.only)]
    if not chosen:
        raise ValueError(f"no variant is called like that; there are: {', '.join(v.name for v in possible)}")
    specs = [_form(session, v, start).spec(session.model.decoder.spec) for v in chosen]
    check_layers(specs, [a.set, *([a.held_out] if a.held_out else [])])
    how = Judging(asked, a.max_new_tokens, a.temperature, a.held_out)
    base = TrainerSettings(learning_rate=a.learning_rate)
    rows = []
    for variant in chosen:
        began = time.monotonic()
        found = judge_variant(session, variant, a.set, a.steps, how, base, start)
        rows.append({"name": variant.name, "seconds": time.monotonic() - began, **found})
        held_out = f" ({found['teacher_forced_length']:.4f} on the held-out set)" if a.held_out else ""
        length = f"{found['mean_acceptance_length']:.3f}{held_out}"
        print(f"{variant.name}: {length}, {rows[-1]['seconds']:.0f} s", flush=True)
    Terminal().print(_table(rows))
    record = {
        "command": "ablations",
        **machine(session.model.device),
        "set": str(a.set),
        "steps": a.steps,
        "start": a.start,
        "learning_rate": a.learning_rate,
        "held_out": None if a.held_out is None else str(a.held_out),
        "prompts": len(asked),
        "temperature": a.temperature,
        "variants": rows,
    }
    put_record(a.json, record)
    return 0


@dataclass(frozen=True)
class Judging:
    """Say what heads are judged on: prompts to decode (ids [n]), and the folder of a held-out set."""

    asked: Sequence[Tensor]
    max_new_tokens: int
    temperature: float = 0.0
    held_out: Path | None = None


def check_layers(specs: Sequence[MTPHeadSpec], folders: Sequence[Path]) -> None:
    """Raise a ValueError where a set does not keep what heads of `specs` read."""
    reads = {layer for spec in specs for layer in spec.reads}
    fuses = {layer for spec in specs for layer in spec.aux_layers}
    for folder in folders:
        about = Dataset(folder).about
        kept, fused = about.get("layers", []), about.get("aux_layers", [])
        if not reads <= set(kept):
            raise ValueError(f"{folder}: keeps the K/V of layers {kept}, and these heads read {sorted(reads)}")
        if not fuses <= set(fused):
            raise ValueError(f"{folder}: keeps the states of layers {fused}, and these heads fuse {sorted(fuses)}")


def judge_variant(
    session: Session,
    variant: Variant,
    folder: Path,
    steps: int,
    how: Judging,
    base: TrainerSettings,
    start: Start | None = None,
) -> dict[str, Any]:
    """Train a head on the set in `folder` as `variant` of `base` says, from `start` if there is one, save it, and draft
    4 tokens a round; return the figures."""
    backbone = session.model.decoder
    settings, dataset = variant.settings(base), variant.dataset(folder)
    form = _form(session, variant, start)
    spec, vocab = form.spec(backbone.spec), backbone.spec.vocab_size
    ids, coverage = frequent(dataset, vocab, form.draft_vocab or vocab, None if start is None else start.draft_ids)
    if start is not None:
        tensors = start.tensors
    else:
        texts = (text for _, text in Dataset(folder).texts(0, epochs=1)) if variant.fitted else ()
        tensors = initial_tensors(spec, backbone, ids, texts)
    network = variant.network(spec, tensors)
    candidates = Candidates.of(ids, vocab, backbone.head.rows(ids, torch.float32))

    def embed(tokens: Tensor) -> Tensor:
        return backbone.embed(tokens).float().clone()

    trainer = Trainer(network, dataset, embed, candidates, settings, form.stored)
    began = time.monotonic()
    for step in range(steps):
        trainer.step(step / steps)
    seconds = time.monotonic() - began
    with torch.no_grad():  # the head that is judged is the saved one, here as in decoding
        for name, parameter in network.by_name():
            parameter.copy_(form.stored(name, parameter.detach()))
    found: dict[str, Any] = {}
    if how.held_out is not None:
        texts = (text for _, text in Dataset(how.held_out).texts(0, epochs=1))
        shares = teacher_forced(network, embed, texts, candidates, 4)
        found |= {"teacher_forced": shares, "teacher_forced_length": 1 + sum(shares)}
    head = Path(tempfile.mkdtemp())
    try:
        form.save(head, Trained(network.tensors(), ids, backbone, {}, 4))
        stats = measure_drafts(
            backbone,
            load_drafter(head),
            how.asked,
            draft_length=4,
            max_new_tokens=how.max_new_tokens,
            eos_ids=ends_of(session),
            temperature=how.temperature,
        )
        size = sum(path.stat().st_size for path in head.iterdir())
    finally:
        shutil.rmtree(head)
    speed = trainer.tokens / seconds
    return {**figures(stats), **found, "tokens_per_second": speed, "bytes": size, "coverage": coverage}


def _form(session: Session, variant: Variant, start: Start | None) -> Form:
    if start is not None:
        return start.form
    return form_for(variant.shape, session.model.decoder.spec, session.model.config.get_text_config())


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    made = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    made.add_column("variant")
    for name in ("tokens per round", "by position", "held-out set", "trained tokens/s", "MB"):
        made.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        positions = " ".join(f"{value:.2f}" for value in row["per_position"])
        held_out = f"{row['teacher_forced_length']:.4f}" if "teacher_forced_length" in row else "-"
        cells = (f"{row['mean_acceptance_length']:.3f}", positions, held_out, f"{row['tokens_per_second']:.0f}")
        made.add_row(row["name"], *cells, f"{row['bytes'] / 1e6:.1f}")
    return made


if __name__ == "__main__":
    sys.exit(main())
