"""`python -m eval.ablations --set FOLDER --steps N`: what each part of the training recipe is worth.

Every variant differs from the base in one thing, is trained on the same set for the same number of tokens, saved, and
judged by drafting for the same foreign prompts in the real decoding loop. The set is one that `run.py train` collected
(its `training/set`). Some variants are mistakes that other trainers have shipped: these variants show the cost of the
mistake. Other layers' states are fused where the set has them (`run.py train --aux-layers`).
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from drafter.data.dataset import BEGINNING, Dataset, Position, frequent
from drafter.data.features import AttentionStates, Features
from drafter.files.checkpoint import load_drafter
from drafter.files.formats import Form, Trained, form_for
from drafter.settings import Shape, TrainerSettings
from drafter.train.evaluate import measure_drafts
from drafter.train.initial import initial_tensors
from drafter.train.loss import Candidates
from drafter.train.model import Network, Sight
from drafter.train.trainer import Trainer
from eval.acceptance import figures, ids_of, prompts
from eval.cli import options as cli
from eval.cli.output import check_writable, file_name, put_record, run_guarded
from eval.cli.provenance import machine
from eval.cli.session import Session, open_session
from eval.train.texts import ends_of
from specdec.util.terminal import Terminal


class SeesItself(Network):
    """Make the mask mistake: row p also sees key p, which does not exist yet when drafts are made."""

    def sight(self, texts: Sequence[tuple[Tensor, Mapping[int, AttentionStates]]]) -> Sight:
        """Return the network's sight of `texts` (rows and K/V of each), with key p added to the mask of row p."""
        right = super().sight(texts)
        views = []
        for view, (rows, _) in zip(right.texts, texts, strict=True):
            own = {
                kind: mask.index_put(
                    (torch.arange(len(rows), dtype=torch.int64), rows), torch.tensor(True, dtype=torch.bool)
                )
                for kind, mask in view.masks.items()
            }
            views.append(view._replace(masks=own))
        return right._replace(texts=views)


class Shifted(Dataset):
    """Make the shift mistake: row p is trained with the state of token p, which is not known when drafts are made."""

    def texts(
        self, seed: int, start: Position = BEGINNING, epochs: int | None = None
    ) -> Iterator[tuple[Position, Features]]:
        """Yield the texts of the set with their hidden states moved by one: position p gets the state of position p +
        1."""
        for position, text in super().texts(seed, start, epochs):
            states = torch.cat((text.hidden[1:], text.hidden[-1:]))
            yield position, replace(text, hidden=states)


BASE = Shape()


@dataclass(frozen=True)
class Variant:
    """Describe one change; all else is as the recipe has it."""

    name: str
    shape: Shape = BASE
    settings: Callable[[TrainerSettings], TrainerSettings] = lambda base: base
    network: type[Network] = Network
    dataset: type[Dataset] = Dataset
    fitted: bool = True  # whether pre_projection begins as the least-squares solution
    fused: slice | None = None  # which of the other layers' states that the set has join the last one

    def of(self, aux_layers: tuple[int, ...]) -> Variant:
        """Return this variant for a set that has the states of `aux_layers`, in ascending order."""
        return (
            self if self.fused is None else replace(self, shape=replace(self.shape, aux_layers=aux_layers[self.fused]))
        )


def _recipe(**changes: Any) -> Callable[[TrainerSettings], TrainerSettings]:
    return lambda base: replace(base, recipe=replace(base.recipe, **changes))


VARIANTS = (
    Variant("base"),
    Variant("not fitted: an average of embedding and state", fitted=False),
    Variant("mistake: state of the wrong position", dataset=Shifted),
    Variant("mistake: sees its own key", network=SeesItself),
    Variant("K = 1", settings=_recipe(steps=1)),
    Variant("K = 2", settings=_recipe(steps=2)),
    Variant("all positions unrolled", settings=_recipe(deeper=1.0)),
    Variant("no feature loss", settings=_recipe(feature_weight=0.0)),
    Variant("feature loss x 3", settings=_recipe(feature_weight=1.0)),
    Variant("the model's choices as targets", settings=_recipe(soft=False)),
    Variant("one layer", Shape(depth=1)),
    Variant("two layers", Shape(depth=2)),
    Variant("AdamW alone", settings=lambda base: replace(base, matrix_rate=0.0)),
    Variant("half the feed-forward width", Shape(width=768)),
    Variant("draft vocabulary 4,096", Shape(draft_vocab=4096)),
    Variant("draft vocabulary 16,384", Shape(draft_vocab=16384)),
    Variant("bigram bias of rank 256", Shape(bigram=256)),
    Variant("a high layer's state fused", fused=slice(-1, None)),
    Variant("low, middle and high layers' states fused", fused=slice(None)),
)


def _parser() -> argparse.ArgumentParser:
    made = cli.module_parser("ablations", __doc__)
    made.add_argument("--set", type=file_name, required=True, metavar="FOLDER", help="what run.py train collected")
    made.add_argument(
        "--steps", type=cli.whole_number(1), default=150, metavar="N", help="of 2048 tokens (default 150)"
    )
    made.add_argument("--only", nargs="+", metavar="WORD", help="variants whose names contain one of these words")
    made.add_argument(
        "--limit", type=cli.whole_number(1), default=8, metavar="N", help="prompts of each kind (default 8)"
    )
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
    kept, aux_layers = about.get("layers", []), tuple(about.get("aux_layers", ()))
    session = open_session(replace(cli.settings_from(a), drafter="none"))
    asked = [ids_of(session, prompt) for prompt in prompts(None, False, a.limit)]
    possible = [variant.of(aux_layers) for variant in VARIANTS if aux_layers or variant.fused is None]
    chosen = [v for v in possible if not a.only or any(word in v.name for word in a.only)]
    if not chosen:
        raise ValueError(f"no variant is called like that; there are: {', '.join(v.name for v in VARIANTS)}")
    reads = {layer for v in chosen for layer in _form(session, v).spec(session.model.decoder.spec).reads}
    if not reads <= set(kept):
        raise ValueError(f"{a.set}: keeps the K/V of layers {kept}, and these heads read {sorted(reads)}")
    rows = []
    for variant in chosen:
        began = time.monotonic()
        found = judge_variant(session, variant, a.set, a.steps, asked, a.max_new_tokens)
        rows.append({"name": variant.name, "seconds": time.monotonic() - began, **found})
        print(f"{variant.name}: {found['mean_acceptance_length']:.3f}, {rows[-1]['seconds']:.0f} s", flush=True)
    Terminal().print(_table(rows))
    record = {"command": "ablations", **machine(session.model.device), "steps": a.steps, "variants": rows}
    put_record(a.json, record)
    return 0


def judge_variant(
    session: Session, variant: Variant, folder: Path, steps: int, asked: Sequence[Tensor], max_new_tokens: int
) -> dict[str, Any]:
    """Train a head as `variant` says, save it, and draft 4 tokens a round for `asked` (ids [n]); return the figures."""
    backbone = session.model.decoder
    base = TrainerSettings()
    settings, dataset = variant.settings(base), variant.dataset(folder)
    form = _form(session, variant)
    spec, vocab = form.spec(backbone.spec), backbone.spec.vocab_size
    ids, coverage = frequent(dataset, vocab, form.draft_vocab or vocab)
    texts = (text for _, text in Dataset(folder).texts(0, epochs=1)) if variant.fitted else ()
    network = variant.network(spec, initial_tensors(spec, backbone, ids, texts))
    candidates = Candidates.of(ids, vocab, backbone.head.rows(ids, torch.float32))
    trainer = Trainer(network, dataset, lambda t: backbone.embed(t).float().clone(), candidates, settings)
    began = time.monotonic()
    for step in range(steps):
        trainer.step(step / steps)
    seconds = time.monotonic() - began
    head = Path(tempfile.mkdtemp())
    try:
        form.save(head, Trained(network.tensors(), ids, backbone, {}, 4))
        stats = measure_drafts(
            backbone,
            load_drafter(head),
            asked,
            draft_length=4,
            max_new_tokens=max_new_tokens,
            eos_ids=ends_of(session),
        )
        size = sum(path.stat().st_size for path in head.iterdir())
    finally:
        shutil.rmtree(head)
    return {**figures(stats), "tokens_per_second": trainer.tokens / seconds, "bytes": size, "coverage": coverage}


def _form(session: Session, variant: Variant) -> Form:
    return form_for(variant.shape, session.model.decoder.spec, session.model.config.get_text_config())


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    made = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    made.add_column("variant")
    for name in ("tokens per round", "by position", "trained tokens/s", "MB"):
        made.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        positions = " ".join(f"{value:.2f}" for value in row["per_position"])
        cells = (f"{row['mean_acceptance_length']:.3f}", positions, f"{row['tokens_per_second']:.0f}")
        made.add_row(row["name"], *cells, f"{row['bytes'] / 1e6:.1f}")
    return made


if __name__ == "__main__":
    sys.exit(main())
