"""From a user's choice (a name, a path, an object, nothing) to a `Drafter`.

Checkpoints of drafters are read by the package that is registered as the entry point `checkpoints` of the group
`specdec.drafters`. This project registers `drafter`, which stands above the engine and is never imported from here.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import Protocol, cast

import torch

from specdec.drafting.composite import CompositeDrafter
from specdec.drafting.protocol import Drafter, NoDraft
from specdec.drafting.suffix import SuffixDrafter
from specdec.model.decoder import Decoder
from specdec.weights.hub.paths import NAMED_DRAFTERS, drafter_path

DrafterLike = Drafter | str | os.PathLike[str] | None  # what `resolve_drafter` takes
GROUP, CHECKPOINTS = "specdec.drafters", "checkpoints"


class DrafterCheckpoints(Protocol):
    """The functions of a package that reads checkpoints of drafters."""

    def load_drafter(self, name_or_path: str) -> Drafter:
        """Return the drafter of a folder or hub id, not bound to a backbone yet. Raises ValueError without one."""

    def stored_bytes(self, name_or_path: str, dtype: torch.dtype, quantized: bool) -> int:
        """Return the bytes of that drafter's weights, beside a backbone in `dtype` that is `quantized` or is not."""

    def weights_state(self, name_or_path: str) -> str:
        """Return what changes when the weights of that drafter do."""

    def bundled_head(self, fingerprint: str) -> Path | None:
        """Return the folder of the package's head for a backbone (`Decoder.fingerprint`); None where it has none."""

    def largest_bundled_head(self) -> int:
        """Return the bytes of the largest head that comes with the package; 0 where none does."""


class AutoDrafter(CompositeDrafter):
    """Suffix matches, and the trained head that comes with the package for the backbone, where there is one."""

    def __init__(self) -> None:
        super().__init__(NoDraft())
        self._for: str | None = None  # fingerprint of the backbone that the head is for

    def bind(self, backbone: Decoder) -> None:
        """Load the bundled head of `backbone` where there is one, and bind it. Raises ValueError: the head is
        damaged."""
        if self._for != backbone.fingerprint:
            folder = checkpoints().bundled_head(backbone.fingerprint)
            self.take(NoDraft() if folder is None else checkpoints().load_drafter(str(folder)))
            self._for = backbone.fingerprint
        super().bind(backbone)


def resolve_drafter(drafter: DrafterLike) -> Drafter:
    """Return the drafter that `drafter` names: a fresh one, not bound to a backbone yet.

    None or "none": plain decoding. "auto": see `AutoDrafter`. "suffix": suffix matches. Any other string or path: the
    folder or hub id of a drafter checkpoint (a trained head, a Gemma 4 assistant). An object is returned as is.

    Raises:
        ValueError: there is no such checkpoint, or it is not a drafter's; the object lacks a part of `Drafter`.
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
        return checkpoints().load_drafter(drafter)
    for part in ("name", "max_draft", "aux_layers", "bind", "start"):
        try:
            getattr(drafter, part)
        except AttributeError as error:
            raise ValueError(
                "a drafter is 'auto', 'suffix', None, a checkpoint or a Drafter object with name, max_draft, "
                "aux_layers (the backbone's layers whose outputs it wants; () for none), bind and start (see "
                f"specdec.drafting.protocol.Drafter), and {error}"
            ) from error
    return drafter


def drafter_bytes(drafter: DrafterLike, dtype: torch.dtype, quantized: bool) -> int:
    """Return the bytes of the weights of the drafter that `drafter` names, beside a backbone in `dtype`, quantised or
    not. For "auto" they are at most those of the largest bundled head. An object has its memory already: 0."""
    if not isinstance(drafter, str | os.PathLike) or drafter in ("none", "suffix"):
        return 0
    if drafter == "auto":
        return checkpoints().largest_bundled_head()
    return checkpoints().stored_bytes(os.fspath(drafter), dtype, quantized)


def drafter_identity(drafter: DrafterLike, backbone: Decoder) -> str:
    """Return what tells the drafter that `drafter` names from others: its name, and the state of the weights that it
    has beside `backbone`. Of an object it is the class."""
    if not isinstance(drafter, str | os.PathLike):
        return type(drafter).__qualname__
    name: str | os.PathLike[str] | None = drafter
    if drafter == "auto":
        name = checkpoints().bundled_head(backbone.fingerprint)
    if name in (None, "none", "suffix"):
        return os.fspath(drafter)
    return f"{os.fspath(drafter)} {checkpoints().weights_state(os.fspath(name))}"


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
