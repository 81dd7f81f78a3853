"""From what a user says (a name, a path, an object, nothing) to a `Drafter`."""

from __future__ import annotations

import importlib
from typing import cast

from specdec.drafting import Drafter, NoDraft, SuffixDrafter


def resolve_drafter(drafter: Drafter | str | None) -> Drafter:
    """The drafter that `drafter` names; a fresh one, not bound to a backbone yet.

    None or "none": plain decoding. "auto": the best that needs no checkpoint, which is suffix matching. "suffix".
    Any other string: the folder or hub id of a drafter checkpoint (a Gemma 4 assistant). An object is returned as is.

    Raises:
        ValueError: there is no such checkpoint, or it is not a drafter's.
    """
    if drafter is None or drafter == "none":
        return NoDraft()
    if drafter in ("auto", "suffix"):
        return SuffixDrafter()
    if isinstance(drafter, str):
        # The one import that points up: trained heads live in their own package, above the engine that runs them.
        return cast(Drafter, importlib.import_module("drafter").load_drafter(drafter))
    if not callable(getattr(drafter, "propose", None)):
        raise ValueError(f"a drafter is 'auto', 'suffix', None, a checkpoint or a Drafter object, not {drafter!r}")
    return drafter
