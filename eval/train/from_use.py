"""`run.py train --from-use`: the head that is adapted, and the texts of a model's use that it learns from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from drafter.data.features import longest_text
from drafter.files.formats import read_start
from drafter.use.log import UseLog
from drafter.use.recorder import used_model
from drafter.use.texts import LONGEST, UseSplit, check_enough
from eval.cli.session import Session
from specdec.drafting.registry import checkpoints, heads_beside
from specdec.model.decoder import Decoder

TEXTS = "use.json"


def head_in_use(backbone: Decoder) -> str:
    """Return the folder or file of the head that `drafter="auto"` takes for `backbone`. Raises ValueError: none."""
    for head in heads_beside(backbone.path):
        try:
            read_start(head, backbone)
        except ValueError:  # no head, of another model, or one that is not trained here: `auto` passes it over too
            continue
        return str(head)
    if (bundled := checkpoints().bundled_head(backbone.fingerprint)) is None:
        raise ValueError(
            "--from-use: there is no head of this model to adapt; name one with --start, or train without --from-use"
        )
    return str(bundled)


def texts_of_use(folder: Path, out: Path, session: Session, layers: Sequence[int], first: bool) -> UseSplit:
    """Return the texts that the run in `out` learns from and is judged by: those that it began with, or those that the
    log of the model of `session` in `folder` has now. `first`: whether this process writes them down.

    Raises ValueError: there are too few, or the run has lost them.
    """
    backbone, written = session.model.decoder, out / "training" / TEXTS
    if written.is_file():
        return UseSplit.read(written)
    if (out / "training" / "state.pt").is_file():
        raise ValueError(
            f"{written}: is missing, and with it the texts of this run; delete {out}/training to begin anew"
        )
    name = session.settings.model
    found, _ = UseLog(folder, used_model(backbone, name, backbone.adapters.default)).texts()
    check_enough(found, name)
    split = UseSplit.of(found, min(LONGEST, longest_text(backbone, layers)))
    if first:
        written.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        split.write(written)
    return split


def use_record(split: UseSplit, scores: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return what the record says of use: how much text, and the acceptance before (the first of `scores`) and after
    (the best one)."""
    after = max(scores, key=lambda score: float(score["real"]))
    return {**counts(split), "before": scores[0], "after": after}


def counts(split: UseSplit) -> dict[str, Any]:
    """Return how many conversations and tokens there are to learn from and to judge by."""
    return {
        "conversations": len(split.texts),
        "tokens": sum(len(text.tokens) for text in split.texts),
        "held_out": len(split.held_out),
    }
