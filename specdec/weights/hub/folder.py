"""What lies together: a model, its drafters and its embedders, told apart by what the files hold.

What: `files_in` sorts the GGUF files of a folder, `companions` those beside a model. "Beside" is the folder, its folder
`MTP` (unsloth's), and more where a program keeps models in its own way: in Ollama's store the other layers of the
model's manifest, in llama.cpp's flat cache the files of the same repository, in a snapshot of the hub all of the
snapshot. `pick` chooses among files of several types by a tag.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from specdec.weights.gguf.kind import damage, is_gguf, kind_of
from specdec.weights.gguf.split import first_part, part_names
from specdec.weights.hub import ollama

DRAFTERS_FIRST = ("Q8_0", "BF16", "F16", "F32", "Q4_0")  # 8 bits draft as well as floats, and twice as fast
_MODELS_FIRST = ("Q4_K_M", "Q4_0", "UD-Q4_K_XL", "Q4_K_XL", "Q4_K_S", "Q5_K_M", "Q8_0")
_DRAFTER = re.compile(r"(^|[-_.])(mtp|assistant)[-_.]", re.IGNORECASE)
_TAG = re.compile(r"(?:UD-)?(?:I?Q\d\w*|TQ\d_0|MXFP4\w*|BF16|F16|F32)(?=[-.]|$)", re.IGNORECASE)


class Files(NamedTuple):
    """Hold the GGUF files of a folder by what they are, each sort by name; of a split model the first part alone."""

    models: tuple[Path, ...] = ()
    drafters: tuple[Path, ...] = ()
    embedders: tuple[Path, ...] = ()


def sort_files(paths: Iterable[Path]) -> Files:
    """Return the GGUF files among `paths`, sorted by what they are; others are left out."""
    kinds: dict[str, list[Path]] = {"model": [], "drafter": [], "embedder": []}
    for path in sorted({first_part(path) for path in paths if is_gguf(path) and path.is_file()}):
        if (kind := kind_of(path)) in kinds:
            kinds[kind].append(path)
    return Files(*map(tuple, kinds.values()))


def files_in(folder: Path) -> Files:
    """Return the GGUF files of `folder` and of its folder `MTP`. Raises OSError where it cannot be read."""
    more = [folder / name for name in ("MTP", "mtp") if (folder / name).is_dir()]
    return sort_files(path for place in (folder, *more) for path in place.iterdir())


def companions(model: Path) -> Files:
    """Return the drafters and embedders beside the GGUF file or folder `model`, and models that lie there too.

    Drafters are in the order in which they are to be tried.
    """
    try:
        found = _beside(model)
    except OSError:
        return Files()
    drafters = sorted(found.drafters, key=lambda path: rank(path.name, DRAFTERS_FIRST))
    return found._replace(drafters=tuple(drafters))


def damaged_drafters(model: Path) -> list[str]:
    """Return a sentence about each file beside `model` that is a drafter by its name, and cannot be read."""
    named = [path for path in companions(model).models if path != model and _DRAFTER.search(path.name)]
    return [sentence for path in named if (sentence := damage(path)) is not None]


def _beside(model: Path) -> Files:
    if model.is_dir():
        return files_in(model)
    if (layers := ollama.layers_beside(model)) is not None:
        return sort_files(layers)
    folder = model.parent
    if (prefix := _prefix_in_cache(model)) is not None:
        return sort_files(path for path in folder.iterdir() if path.name.startswith(prefix))
    found = files_in(folder)
    if folder.parent.parent.name == "snapshots":  # of the hub's cache: a model in a folder of its repository
        upper = files_in(folder.parent)
        found = Files(found.models, found.drafters + upper.drafters, found.embedders + upper.embedders)
    return found


def _prefix_in_cache(model: Path) -> str | None:
    """Return how the names of the files of the model's repository begin in llama.cpp's flat cache, of which a file
    manifest=OWNER=REPOSITORY=TAG.json tells; None elsewhere."""
    for manifest in model.parent.glob("manifest=*=*=*.json"):
        _, owner, repository, _ = manifest.name.split("=", 3)
        if model.name.startswith(prefix := f"{owner}_{repository}_"):
            return prefix
    return None


def model_in(folder: Path) -> Path | None:
    """Return the only model among the GGUF files of `folder`; None where it has none.

    Raises ValueError when it has several, or one beside a file that cannot be read, which may be anything.
    """
    models = [path for path in files_in(folder).models if path.parent == folder]
    if len(models) > 1:
        damaged = [sentence for path in models if (sentence := damage(path)) is not None]
        if len(models) - len(damaged) == 1:
            raise ValueError(damaged[0])
        names = ", ".join(path.name for path in models)
        raise ValueError(f"{folder}: {len(models)} .gguf files; name one of them: {names}")
    return models[0] if models else None


def tag_of(name: str) -> str | None:
    """Return the type that a file's name says its weights have, such as Q4_K_M; None where it says none."""
    found = _TAG.findall(part_names(name)[0].rpartition("-000")[0] if part_names(name) else name)
    return str(found[-1]) if found else None


def pick(names: Sequence[str], tag: str | None, where: str) -> str:
    """Return the one of `names`, files of one model in several types, that `tag` means; without a tag the only one, or
    one of about 4 bits.

    Raises ValueError, and says which tags there are.
    """
    if tag is None:
        found = [min(names, key=lambda name: rank(name, _MODELS_FIRST))] if len(names) > 1 else list(names)
        if len(names) > 1 and rank(found[0], _MODELS_FIRST) == len(_MODELS_FIRST):
            found = list(names)
    else:
        word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(tag)}(?![A-Za-z0-9_])", re.IGNORECASE)
        found = [name for name in names if word.search(name)]
    if len(found) == 1:
        return found[0]
    tags = ", ".join(sorted({tag_of(Path(name).name) or Path(name).name for name in found or names}))
    if not found:
        raise ValueError(f"{where}: no .gguf file of {tag!r}; there are {tags or 'none at all'}")
    listed = ", ".join(found[:8]) + (" ..." if len(found) > 8 else "")
    raise ValueError(f"{where}: {len(found)} .gguf files{f' of {tag!r}' if tag else ''}: {listed}; name one of them")


def rank(name: str, order: Sequence[str]) -> int:
    """Return the place of the type in a file's name in `order`; after all of them where it is not there."""
    tag = (tag_of(name) or "").upper()
    return order.index(tag) if tag in order else len(order)
