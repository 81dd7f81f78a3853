"""Models from the Hugging Face hub, through `huggingface_hub`: its cache, its login, its progress bars.

What: `fetch` brings the safetensors of a repository, or one .gguf file with all its parts, and with it the repository's
drafter and embedder where their names say so; what they are is looked at once they are here. `fetch_adapter` brings an
adapter. A download that broke off
goes on; each file's SHA-256 is compared with the one that the hub tells, once. Left out: pickled weights.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from specdec.weights.gguf.split import part_names
from specdec.weights.hub.folder import DRAFTERS_FIRST, pick, rank
from specdec.weights.hub.names import HubName
from specdec.weights.hub.pip_download import FetchError
from specdec.weights.hub.wheels import file_sha256
from specdec.weights.metadata import one_line

SETTINGS = ["*.json", "*.jinja", "*.txt", "tokenizer.model"]
ADAPTER = ["adapter_config.json", "adapter_model.safetensors"]
SAFETENSORS = ["*.safetensors", *SETTINGS]
NOT_SAFETENSORS = ["*/*.safetensors", "*/*.json", "*/*.txt", "consolidated*"]  # the same weights for other programs
_EMBEDDER = re.compile(r"(^|/)mmproj", re.IGNORECASE)
_DRAFTER = re.compile(r"(^|/)mtp[-/]|gemma-4.*(-mtp|-assistant)", re.IGNORECASE)
_NEITHER = re.compile(r"imatrix|(^|/)(eagle3|dflash|dspark)-", re.IGNORECASE)
_EMBEDDERS_FIRST = ("BF16", "F16", "F32", "Q8_0")


def fetch(name: HubName, known: Sequence[str]) -> Path:
    """Return the folder of safetensors, or the .gguf file, that `name` means, fetched where it is not here.

    `known`: names to propose where the hub has no such model. Raises FetchError with what to do.
    """
    files = _files(name.repository, known)
    ggufs = sorted(file for file in files if file.endswith(".gguf"))
    if name.whole and any(file.endswith(".safetensors") and "/" not in file for file in files):
        return _snapshot_of(name.repository, files, SAFETENSORS, known)
    if not ggufs:
        raise FetchError(f"{name.repository}: this model of the hub has neither safetensors nor .gguf files")
    chosen = _chosen(name, ggufs)
    wanted = [*(part_names(chosen) or [chosen]), *([] if name.file is not None else _beside(ggufs, chosen))]
    if missing := [file for file in wanted if file not in files]:
        raise FetchError(f"{name.repository}: {missing[0]} is not among its files; choose another one")
    _check_room(name.repository, {file: files[file] for file in wanted})
    paths = [_download(name.repository, file, files[file], known) for file in wanted]
    return paths[0]


def fetch_adapter(name: HubName) -> Path:
    """Return the PEFT folder, or the .gguf file, of the adapter that `name` means, fetched where it is not here.

    Raises FetchError with what to do.
    """
    files = _files(name.repository, ())
    peft = [file for file in ADAPTER if file in files]
    ggufs = sorted(file for file in files if file.endswith(".gguf"))
    if name.whole and len(peft) == len(ADAPTER):
        wanted = peft
    elif ggufs:
        wanted = [_chosen(name, ggufs)]
    else:
        raise FetchError(
            f"{name.repository}: no adapter of the hub that can be read: it has neither {' with '.join(ADAPTER)} nor "
            ".gguf files; convert another form with PEFT's save_pretrained"
        )
    _check_room(name.repository, {file: files[file] for file in wanted})
    paths = [_download(name.repository, file, files[file], ()) for file in wanted]
    return paths[0].parent if wanted is peft else paths[0]


def fetch_settings(repository: str, known: Sequence[str]) -> Path | None:
    """Return the folder with the config, the tokenizer and the chat template of a repository, fetched where they are
    not here; None where it has .gguf files alone, which have these in themselves.

    `known`: as for `fetch`. Raises FetchError with what to do.
    """
    files = _files(repository, known)
    if any(file.endswith(".gguf") for file in files) and not any(file.endswith(".safetensors") for file in files):
        return None
    return _snapshot_of(repository, files, SETTINGS, known)


def _snapshot_of(repository: str, files: dict[str, _File], wanted: Sequence[str], known: Sequence[str]) -> Path:
    """Return the folder of those of `files` that match `wanted`, fetched where they are not here."""
    here = [about.here for file, about in files.items() if "/" not in file and about.here is not None]
    if here:
        return here[0].parent
    names = [file for file in files if _matches(file, wanted) and not _matches(file, NOT_SAFETENSORS)]
    _check_room(repository, {name: files[name] for name in names})
    # Not snapshot_download, after which nobody knows which files have just arrived and are to be checked.
    folders = {
        _download(repository, name, files[name], known).parents[name.count("/")]: None
        for name in sorted(names, key=lambda name: files[name].size or 0)
    }
    if len(folders) != 1:
        raise FetchError(f"{repository}: changed while it was fetched; try again")
    return next(iter(folders))


def _matches(file: str, patterns: Sequence[str]) -> bool:
    return any(fnmatchcase(file, pattern) for pattern in patterns)


class _File:
    """Hold what the hub says of a file: bytes and SHA-256, None where it does not say; whether it is on this disk
    alone."""

    def __init__(self, size: int | None = None, sha256: str | None = None, here: Path | None = None) -> None:
        self.size, self.sha256, self.here = size, sha256, here


def _files(repository: str, known: Sequence[str]) -> dict[str, _File]:
    """Return the files of a repository: those of the hub, or of the cache where the hub cannot be asked."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        with _explained(repository, known):
            info = HfApi().model_info(repository, files_metadata=True)
    except FetchError as error:
        if isinstance(error.__cause__, (GatedRepoError, RepositoryNotFoundError)):
            raise
        if (folder := _snapshot(repository)) is None:
            raise
        paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
        return {path.relative_to(folder).as_posix(): _File(here=path) for path in paths}
    found = {}
    for sibling in info.siblings or []:
        lfs = sibling.lfs
        found[sibling.rfilename] = _File(sibling.size, None if lfs is None else lfs.sha256)
    return found


def _snapshot(repository: str) -> Path | None:
    """Return the folder of what the cache has of a repository's newest known state; None where it has nothing."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    try:
        found = folder / "snapshots" / (folder / "refs" / "main").read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
    return found if found.is_dir() else None


def _chosen(name: HubName, ggufs: Sequence[str]) -> str:
    if name.file is not None:
        if name.file not in ggufs:
            near = ", ".join(ggufs[:8]) + (" ..." if len(ggufs) > 8 else "")
            raise FetchError(f"{name.repository}: there is no {name.file}; there are {near}")
        return (part_names(name.file) or [name.file])[0]
    models = [file for file in ggufs if not any(kind.search(file) for kind in (_EMBEDDER, _DRAFTER, _NEITHER))]
    firsts = [file for file in models if part_names(file)[:1] in ([], [file])]
    try:
        return pick(firsts or ggufs, name.tag, name.repository)
    except ValueError as error:
        raise FetchError(str(error)) from None


def _beside(ggufs: Sequence[str], chosen: str) -> list[str]:
    """Return the embedder and the drafter that go with a model, by name, one of each at the most."""
    found = []
    for kind, order in ((_EMBEDDER, _EMBEDDERS_FIRST), (_DRAFTER, DRAFTERS_FIRST)):
        those = [file for file in ggufs if kind.search(file) and file != chosen and not _NEITHER.search(file)]
        if those:
            found.append(min(those, key=lambda file: (rank(file.rpartition("/")[2], order), file)))
    return found


def _check_room(repository: str, files: dict[str, _File]) -> None:
    from huggingface_hub import constants, try_to_load_from_cache

    needed = sum(
        file.size or 0
        for name, file in files.items()
        if file.here is None and not isinstance(try_to_load_from_cache(repository, name), str)
    )
    place = Path(constants.HF_HUB_CACHE)
    while not place.exists():
        place = place.parent
    if needed > (free := shutil.disk_usage(place).free):
        raise FetchError(
            f"{repository}: {needed / 1e9:.1f} GB are to be fetched, and {free / 1e9:.1f} are free in {place}; make "
            "room, or set HF_HOME to a folder on another disk"
        )


def _download(repository: str, name: str, about: _File, known: Sequence[str]) -> Path:
    """Return the file `name`, fetched and checked where it is not in the cache."""
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if about.here is not None:
        return about.here
    before = try_to_load_from_cache(repository, name)
    with _explained(repository, known):
        path = Path(hf_hub_download(repository, name))
    if str(path) != before and about.sha256 is not None and (found := _sha256_or_unlink(path)) != about.sha256:
        path.resolve().unlink(missing_ok=True)  # the blob, which would be taken for whole the next time
        path.unlink(missing_ok=True)
        raise FetchError(
            f"{repository}: {name} arrived with SHA-256 {found}, and the hub says {about.sha256}; it was not kept. Try "
            "again"
        )
    return path


def _sha256_or_unlink(path: Path) -> str:
    """Return the SHA-256 of a file that has arrived. After Ctrl-C its link goes, or it would be taken for checked the
    next time; what the link led to stays, and need not be fetched again."""
    try:
        return file_sha256(path)
    except BaseException:
        if path.is_symlink():
            path.unlink()
        raise


@contextmanager
def _explained(repository: str, known: Sequence[str]) -> Iterator[None]:
    """Turn what `huggingface_hub` raises into a FetchError that says what to do."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    named = ", ".join(known)
    try:
        yield
    except GatedRepoError as error:
        raise FetchError(
            f"{repository}: accept the model's terms on its page of the hub, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise FetchError(
            f"{repository}: neither a folder here nor a model of the hub that you may read; check the spelling"
            f"{f'. Named models: {named}' if known else ''}"
        ) from error
    except Exception as error:  # the kinds differ between versions of the hub client and of its transport
        offline = " (HF_HUB_OFFLINE is set)" if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0") else ""
        reason = one_line((str(error).strip() or type(error).__name__).splitlines()[0])
        raise FetchError(
            f"{repository}: no such folder here, and the hub could not be reached{offline}: {reason.rstrip('.')}. "
            f"Name a local folder or .gguf file{f', or one of {named}' if known else ''}"
        ) from error


def cached_repositories() -> list[tuple[str, list[Path]]]:
    """Return every model of the hub's cache on this disk, by its name, with the files of its newest snapshot."""
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        found: Any = scan_cache_dir(constants.HF_HUB_CACHE)
    except (CacheNotFound, OSError):
        return []
    repositories = []
    for repo in sorted(found.repos, key=lambda repo: str(repo.repo_id)):
        if repo.repo_type == "model" and repo.revisions:
            newest = max(repo.revisions, key=lambda revision: revision.last_modified)
            repositories.append((str(repo.repo_id), sorted(Path(file.file_path) for file in newest.files)))
    return repositories
