"""Models that other programs keep on this disk: LM Studio's folders and llama.cpp's cache.

What: `stored_path` finds a model there by the name of its file, or as OWNER/NAME[:TAG] or OWNER/NAME/FILE;
`store_files` lists what is there. Why before the hub: what was downloaded once need not be again. Left out: newer
llama.cpp keeps its files in the hub's own cache, which `huggingface_hub` finds.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

from specdec.weights.hub.folder import pick, sort_files
from specdec.weights.hub.names import HubName

_DEPTH = 3  # folders below LM Studio's: publisher, repository, and one for parts


def lm_studio_folders() -> list[Path]:
    """Return the folders in which LM Studio keeps models, as far as they are there."""
    home = Path(os.path.expanduser("~"))
    pointer = home / ".lmstudio-home-pointer"  # of a user who has moved them
    try:
        moved = [Path(pointer.read_text(encoding="utf-8").strip()) / "models"]
        moved = [folder for folder in moved if folder.is_dir()]  # what it says may be no path at all
    except (OSError, UnicodeDecodeError):
        moved = []
    usual = [home / ".lmstudio" / "models", home / ".cache" / "lm-studio" / "models"]
    return [folder for folder in dict.fromkeys([*moved, *usual]) if folder.is_dir()]


def llama_cpp_folder() -> Path:
    """Return the folder of llama.cpp's cache: $LLAMA_CACHE, else the one of the system; it need not exist."""
    if own := os.environ.get("LLAMA_CACHE"):
        return Path(own)
    if sys.platform == "darwin":
        return Path(os.path.expanduser("~/Library/Caches/llama.cpp"))
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", os.path.expanduser("~"))) / "llama.cpp"
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "llama.cpp"


def store_files() -> Iterator[tuple[str, Path]]:
    """Yield the program and the path of every .gguf file in these stores."""
    for folder in lm_studio_folders():
        for path in _files(folder, _DEPTH):
            yield "LM Studio", path
    for path in _files(llama_cpp_folder(), 0):
        yield "llama.cpp", path


def stored_path(name: str) -> Path | None:
    """Return the model that `name` means in one of the stores; None where none has it.

    Raises ValueError when several files are called so, or have the same tag.
    """
    wanted = HubName.of(name)
    if wanted is not None:
        return _of_repository(wanted, name)
    if "/" in name or os.sep in name or not name.endswith(".gguf"):
        return None
    found = [path for _, path in store_files() if path.name == name]
    if len(found) > 1:
        raise ValueError(f"{name}: several files are called so: {', '.join(map(str, found))}; name one by its path")
    return found[0] if found else None


def _of_repository(wanted: HubName, name: str) -> Path | None:
    owner, repository = wanted.repository.split("/")
    for folder in lm_studio_folders():
        paths = list(_files(folder / owner / repository, 1))
        if paths and (found := _chosen(paths, wanted, name)) is not None:
            return found
    prefix = f"{owner}_{repository}_"
    paths = [path for path in _files(llama_cpp_folder(), 0) if path.name.startswith(prefix)]
    return _chosen(paths, wanted, name) if paths else None


def _chosen(paths: list[Path], wanted: HubName, name: str) -> Path | None:
    if wanted.file is not None:
        last = wanted.file.rpartition("/")[2]
        return next((path for path in paths if path.name == last or path.name.endswith(f"_{last}")), None)
    models = {path.name: path for path in sort_files(paths).models}
    if not models:
        return None
    try:
        return models[pick(list(models), wanted.tag, name)]
    except ValueError:
        if wanted.tag is not None:
            return None  # the hub may have what is not here
        raise


def _files(folder: Path, depth: int) -> Iterator[Path]:
    """Yield the .gguf files of `folder` and `depth` folders below, by name."""
    try:
        entries = sorted(folder.iterdir())
    except OSError:
        return
    for entry in entries:
        if entry.suffix == ".gguf" and entry.is_file():
            yield entry
        elif depth and entry.is_dir():
            yield from _files(entry, depth - 1)
