"""Which files `run.py remove` deletes: those of caches, never what a user put somewhere or another program keeps."""

from __future__ import annotations

from pathlib import Path

from specdec.weights.gguf.split import part_names
from specdec.weights.hub.folder import companions, pick, sort_files
from specdec.weights.hub.names import HubName
from specdec.weights.hub.ollama import SCHEME
from specdec.weights.hub.paths import NAMED_MODELS, cache_folder
from specdec.weights.hub.repository import cached_repositories


def files_of(name: str) -> list[Path]:
    """Return the files of the model `name` in the cache of this project or of the hub; none where it is not there.

    Of a repository all files, of one of its .gguf files that one alone, and the drafter and the embedder with the last.
    Raises ValueError for a model that another program keeps.
    """
    if name in NAMED_MODELS:
        folder, file = cache_folder(), NAMED_MODELS[name].file
        return [path for path in (folder / file, folder / f"{file}.verified.json") if path.is_file()]
    if name.startswith(SCHEME):
        raise ValueError(f"{name}: Ollama keeps it; `ollama rm {name.removeprefix(SCHEME)}` deletes it")
    if Path(name).exists():
        raise ValueError(f"{name}: a file or folder of yours, which only you delete")
    wanted = HubName.of(name)
    if wanted is None:
        return []
    files = dict(cached_repositories()).get(wanted.repository, [])
    if not files or wanted.whole:
        return files
    models = {path.name: path for path in sort_files(files).models}
    if wanted.file is not None:
        chosen = next((path for path in files if _in_snapshot(path) == wanted.file), None)
    else:
        chosen = models[pick(list(models), wanted.tag, wanted.repository)] if models else None
    if chosen is None:
        return []
    parts = [chosen.with_name(part) for part in part_names(chosen.name)] or [chosen]
    last = {*models.values()} <= {chosen}
    found = companions(chosen)
    return [*(part for part in parts if part.is_file()), *((*found.drafters, *found.embedders) if last else ())]


def _in_snapshot(path: Path) -> str:
    """Return the name that a file has in its repository, with its folders."""
    snapshot = next(parent for parent in path.parents if parent.parent.name == "snapshots")
    return path.relative_to(snapshot).as_posix()
