"""From a user's choice (a name, a path, an object, nothing) to a `Drafter`.

Checkpoints of drafters are read by the package that is registered as the entry point `checkpoints` of the group
`specdec.drafters`. This project registers `drafter`, which stands above the engine and is never imported from here.
"""

from __future__ import annotations

import contextlib
import os
import warnings
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol, cast

import torch

from specdec.drafting.composite import CompositeDrafter
from specdec.drafting.draft_model.draft_model import DraftModel
from specdec.drafting.protocol import Drafter, NoDraft
from specdec.drafting.suffix import SuffixDrafter
from specdec.model.decoder import Decoder
from specdec.model.spec import DecoderSpec
from specdec.weights.hub.folder import companions, damaged_drafters
from specdec.weights.hub.paths import NAMED_DRAFTERS, drafter_path

DrafterLike = Drafter | str | os.PathLike[str] | None  # what `resolve_drafter` takes
GROUP, CHECKPOINTS = "specdec.drafters", "checkpoints"


class DrafterCheckpoints(Protocol):
    """Read checkpoints of drafters: what the package that is registered for them provides."""

    def open_drafter(self, name_or_path: str) -> Drafter:
        """Return the drafter of a file, folder or name, not bound to a backbone yet. Raises ValueError without one."""

    def stored_bytes(self, name_or_path: str, dtype: torch.dtype, quantized: bool) -> int:
        """Return the bytes of that drafter's weights, beside a backbone in `dtype` that is `quantized` or is not."""

    def weights_state(self, name_or_path: str) -> str:
        """Return what changes when the weights of that drafter do."""

    def heads_in(self, folder: Path) -> list[Path]:
        """Return the folders of drafters directly in `folder`."""

    def bundled_head(self, fingerprint: str) -> Path | None:
        """Return the folder of the package's head for a backbone (`Decoder.fingerprint`); None where it has none."""

    def largest_bundled_head(self) -> int:
        """Return the bytes of the largest head that comes with the package; 0 where none does."""


class AutoDrafter(CompositeDrafter):
    """Draft by suffix matches, and with a trained head where there is one: that beside the model, or the package's
    own."""

    def __init__(self) -> None:
        super().__init__(NoDraft())
        self._for: tuple[str, Path | None] | None = None  # fingerprint and path of the backbone that the head is for

    def bind(self, backbone: Decoder) -> None:
        """Load and bind the first head of `heads_beside` that fits `backbone`, else the package's own. Raises
        ValueError: the package's is damaged."""
        key = (backbone.fingerprint, backbone.path)
        if self._for != key:
            self.take(NoDraft())
            for head in heads_beside(backbone.path):
                try:
                    self.take(_bound(head, backbone))
                except ValueError as error:
                    warnings.warn(f"a drafter lies beside the model, and cannot be used: {error}", stacklevel=2)
                else:
                    break
            else:
                for sentence in damaged_drafters(backbone.path) if backbone.path is not None else ():
                    warnings.warn(f"a drafter lies beside the model, and cannot be used: {sentence}", stacklevel=2)
                if (bundled := checkpoints().bundled_head(backbone.fingerprint)) is not None:
                    self.take(checkpoints().open_drafter(str(bundled)))
            self._for = key
        super().bind(backbone)


def heads_beside(model: Path | None) -> list[Path]:
    """Return the drafters beside the file or folder of a model: .gguf files, then folders in the model's folder."""
    if model is None:
        return []
    return [*companions(model).drafters, *(checkpoints().heads_in(model) if model.is_dir() else ())]


def _bound(head: Path, backbone: Decoder) -> Drafter:
    drafter = checkpoints().open_drafter(str(head))
    drafter.bind(backbone)
    return drafter


def resolve_drafter(drafter: DrafterLike) -> Drafter:
    """Return the drafter that `drafter` names: a fresh one, not bound to a backbone yet.

    None or "none": plain decoding. "auto": see `AutoDrafter`. "suffix": suffix matches. Any other string or path: the
    folder, .gguf file or name of a head (a trained one, a Gemma 4 assistant), or of a model that drafts for a larger
    one of the same vocabulary. An object is returned as is.

    Raises:
        ValueError: there is no such checkpoint, or it is neither a head nor a model; the object lacks a part of
            `Drafter`.
    """
    if drafter is None or drafter == "none":
        return NoDraft()
    if drafter == "auto":
        return AutoDrafter()
    if drafter == "suffix":
        return SuffixDrafter()
    if isinstance(drafter, str | os.PathLike):
        if not isinstance(drafter, str):  # a path is no name, even where it reads like one
            drafter = os.path.join(os.curdir, drafter) if os.fspath(drafter) in NAMED_DRAFTERS else os.fspath(drafter)
        drafter_path(drafter)
        return checkpoints().open_drafter(drafter)
    for part in ("name", "max_draft", "aux_layers", "bind", "start"):
        try:
            getattr(drafter, part)
        except AttributeError as error:
            raise ValueError(
                "a drafter is 'auto', 'suffix', None, a head, a model or a Drafter object with name, max_draft, "
                "aux_layers (the backbone's layers whose outputs it wants; () for none), bind and start (see "
                f"specdec.drafting.protocol.Drafter), and {error}"
            ) from error
    return drafter


def drafter_bytes(drafter: DrafterLike, dtype: torch.dtype, quantized: bool, model: Path | None = None) -> int:
    """Return the bytes of the weights of the drafter that `drafter` names, beside a backbone in `dtype`, quantised or
    not, from the file or folder `model`. For "auto" they are at most the larger ones of the head beside the model and
    of the largest bundled head. An object has its memory already: 0."""
    if not isinstance(drafter, str | os.PathLike) or drafter in ("none", "suffix"):
        return 0
    if drafter != "auto":
        return checkpoints().stored_bytes(os.fspath(drafter), dtype, quantized)
    sizes = [checkpoints().largest_bundled_head()]
    for head in heads_beside(model)[:1]:
        with contextlib.suppress(ValueError):  # which whoever loads it is told
            sizes.append(checkpoints().stored_bytes(str(head), dtype, quantized))
    return max(sizes)


def draft_spec(drafter: Drafter) -> DecoderSpec | None:
    """Return the spec of the model that drafts in `drafter`, which keeps a cache for every text; None without one."""
    inner = drafter.other if isinstance(drafter, CompositeDrafter) else drafter
    return inner.spec if isinstance(inner, DraftModel) else None


def drafter_identity(drafter: DrafterLike, backbone: Decoder) -> str:
    """Return what tells the drafter that `drafter` names from others: its name, and the state of the weights that it
    has beside `backbone`. Of an object it is the class."""
    if not isinstance(drafter, str | os.PathLike):
        return type(drafter).__qualname__
    name: str | os.PathLike[str] | None = drafter
    if drafter == "auto":
        beside = heads_beside(backbone.path)
        name = beside[0] if beside else checkpoints().bundled_head(backbone.fingerprint)
    if name in (None, "none", "suffix"):
        return os.fspath(drafter)
    try:
        return f"{os.fspath(drafter)} {checkpoints().weights_state(os.fspath(name))}"
    except ValueError:
        if drafter == "auto":
            return os.fspath(drafter)  # what lies beside the model is no drafter that is read
        raise


@cache
def checkpoints() -> DrafterCheckpoints:
    """Return the package that reads checkpoints of drafters.

    Raises:
        ValueError: none is registered, because this installation is older than the source beside it.
    """
    for found in entry_points(group=GROUP, name=CHECKPOINTS):
        return cast(DrafterCheckpoints, found.load())
    raise ValueError(
        f"no package is registered to read drafters ({GROUP}: {CHECKPOINTS}); install specdec again with pip install "
        "-e ., or load with drafter='suffix'"
    )
