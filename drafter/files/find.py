"""Where a drafter is: a name's file or folder, and the drafters in the folder of a model."""

from __future__ import annotations

import os
from pathlib import Path

from drafter.config import HEAD_TYPE, MODEL_TYPES
from specdec.weights.gguf.kind import kind_of
from specdec.weights.hf_config import CONFIG
from specdec.weights.hub.folder import companions
from specdec.weights.hub.paths import drafter_path, model_path
from specdec.weights.metadata import read_object


def find_drafter(name_or_path: str | os.PathLike[str]) -> Path:
    """Return the file or folder that a drafter's name means; of a folder or repository with a model in it, the drafter
    beside the model.

    Raises ValueError when nothing is there.
    """
    named = drafter_path(os.fspath(name_or_path))
    if named is not None and named.is_dir() and (beside := companions(named).drafters):
        return beside[0]
    found = model_path(name_or_path)
    if named is None and found.is_file() and (beside := companions(found).drafters) and kind_of(found) == "model":
        return beside[0]
    return found


def heads_in(folder: Path) -> list[Path]:
    """Return the folders directly in `folder` that hold a drafter, by their names."""
    found = []
    for place in sorted(folder.iterdir()) if folder.is_dir() else []:
        try:
            if (place / CONFIG).is_file() and read_object(place / CONFIG).get("model_type") in (
                *MODEL_TYPES,
                HEAD_TYPE,
            ):
                found.append(place)
        except (ValueError, OSError):
            continue
    return found
