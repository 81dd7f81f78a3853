"""From what a user says (a name, a path, an object, nothing) to a `Drafter`."""

from __future__ import annotations

import importlib
from typing import Any, cast

import torch

from specdec.drafting.protocol import Drafter, Joined, NoDraft, SuffixDrafter
from specdec.model.decoder import Decoder
from specdec.weights.hub.paths import drafter_path


class AutoDrafter(Joined):
    """Suffix matches, and the trained head that comes with the package for the backbone, where there is one."""

    def __init__(self) -> None:
        super().__init__(NoDraft())
        self._for: str | None = None  # whose head it is

    def bind(self, backbone: Decoder) -> None:
        if self._for != backbone.fingerprint:
            folder = _drafters().bundled_head(backbone.fingerprint)
            self.take(NoDraft() if folder is None else _drafters().load_drafter(folder))
            self._for = backbone.fingerprint
        super().bind(backbone)


def resolve_drafter(drafter: Drafter | str | None) -> Drafter:
    """The drafter that `drafter` names; a fresh one, not bound to a backbone yet.

    None or "none": plain decoding. "auto": see `AutoDrafter`. "suffix": suffix matching. Any other string: the folder
    or hub id of a drafter checkpoint (a trained head, a Gemma 4 assistant). An object is returned as is.

    Raises:
        ValueError: there is no such checkpoint, or it is not a drafter's.
    """
    if drafter is None or drafter == "none":
        return NoDraft()
    if drafter == "auto":
        return AutoDrafter()
    if drafter == "suffix":
        return SuffixDrafter()
    if isinstance(drafter, str):
        drafter_path(drafter)
        return cast(Drafter, _drafters().load_drafter(drafter))
    if not callable(getattr(drafter, "start", None)):
        raise ValueError(f"a drafter is 'auto', 'suffix', None, a checkpoint or a Drafter object, not {drafter!r}")
    return drafter


def drafter_bytes(drafter: Drafter | str | None, dtype: torch.dtype, quantized: bool) -> int:
    """What the weights of the drafter that `drafter` names take beside a backbone in `dtype`, quantised or not; at most
    that for "auto". An object takes what it has taken already: 0."""
    if not isinstance(drafter, str) or drafter in ("none", "suffix"):
        return 0
    if drafter == "auto":
        return int(_drafters().largest_bundled_head())
    return int(_drafters().stored_bytes(drafter, dtype, quantized))


def _drafters() -> Any:
    # The one import that points up: trained heads live in their own package, above the engine that runs them.
    return importlib.import_module("drafter")
