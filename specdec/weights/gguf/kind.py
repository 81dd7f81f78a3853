"""What a GGUF file is: a model, a drafter, an embedder or an adapter, by its first keys and never by its name.

What: `kind_of`. A vocabulary takes long to read, so only the beginning of the file is, where `general.architecture`
stands among the first keys, as all writers put it. Left out: whether such a drafter or model is one that is supported.
"""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path
from typing import Literal

from gguf import GGUFValueType

from specdec.weights.gguf.header import MAX_NAME, check_preamble, read_header

Kind = Literal["model", "drafter", "embedder", "adapter", "other"]
DRAFTERS = ("gemma4-assistant", "gemma4_assistant", "gemma4_mtp", "specdec-mtp")
"""The architectures of drafters that are read here."""
_NOT_MODELS = {"clip": "embedder", "eagle3": "other", "dflash": "other", "dspark": "other", "": "other"}
_INSTEAD = {
    "drafter": "a drafter, which goes with a model: load the model, with drafter= this file, or this file beside it",
    "embedder": "an embedder of pictures and sound: name the .gguf file of the model, and leave this one beside it",
    "adapter": "an adapter (LoRA), which goes with a model: load the model, with adapter= (--adapter) this file",
}
_MAGIC = b"GGUF"
_PREAMBLE = 24  # bytes of magic, version and counts
_START = 1 << 16  # bytes that are looked at
_ARCHITECTURE, _TYPE = "general.architecture", "general.type"
_SIZES = {
    **dict.fromkeys((GGUFValueType.UINT8, GGUFValueType.INT8, GGUFValueType.BOOL), 1),
    **dict.fromkeys((GGUFValueType.UINT16, GGUFValueType.INT16), 2),
    **dict.fromkeys((GGUFValueType.UINT32, GGUFValueType.INT32, GGUFValueType.FLOAT32), 4),
    **dict.fromkeys((GGUFValueType.UINT64, GGUFValueType.INT64, GGUFValueType.FLOAT64), 8),
}


def is_gguf(path: Path) -> bool:
    """Return whether `path` is a GGUF file: by its name, or by its first bytes, for Ollama's are called by a hash.

    A file of that name is one for whoever opens it, who says what is wrong with it.
    """
    if path.suffix == ".gguf":
        return True
    try:
        if not path.is_file():  # a pipe would be waited for
            return False
        with path.open("rb") as stream:
            return stream.read(len(_MAGIC)) == _MAGIC
    except OSError:
        return False


def architecture(path: Path) -> str:
    """Return `general.architecture` of a GGUF file; "" where it has none. Raises ValueError as `read_header` does."""
    return _first_texts(path).get(_ARCHITECTURE, "")


def kind_of(path: Path) -> Kind:
    """Return what the GGUF file `path` is. A file that cannot be read is a model, for whoever opens it to complain."""
    try:
        found = _first_texts(path)
    except (ValueError, OSError):
        return "model"
    name = found.get(_ARCHITECTURE, "")
    if name in DRAFTERS:
        return "drafter"
    if found.get(_TYPE) in ("adapter", "imatrix"):
        return "adapter" if found[_TYPE] == "adapter" else "other"
    if name == "clip":
        return "embedder"
    return "other" if name in _NOT_MODELS else "model"


def damage(path: Path) -> str | None:
    """Return the sentence about a file whose beginning cannot be read, so that nobody knows what it is; else None."""
    try:
        _first_texts(path)
    except ValueError as error:
        return str(error)
    return None


def check_is_model(path: Path) -> None:
    """Raise a ValueError that says what to do where the GGUF file `path` goes with a model and is none."""
    if (instead := _INSTEAD.get(kind_of(path))) is not None:
        raise ValueError(f"{path}: {instead}")


def _first_texts(path: Path) -> dict[str, str]:
    """Return the texts among the first keys of a file, the architecture among them where the file has one."""
    if not path.is_file():
        raise ValueError(f"{path}: there is no such file")
    check_preamble(path)
    with path.open("rb") as stream:
        start = stream.read(_START)
    found: dict[str, str] = {}
    # A long value, or a damaged file: what stands before it counts.
    with contextlib.suppress(struct.error, ValueError, KeyError):
        _walk(start, found)
    if _ARCHITECTURE not in found:
        value = read_header(path).metadata.get(_ARCHITECTURE, "")
        found[_ARCHITECTURE] = value if isinstance(value, str) else ""
    return found


def _walk(start: bytes, found: dict[str, str]) -> None:
    """Put the texts of the keys that lie in `start` into `found`, in their order. Raises an error at the end of
    `start`."""
    (count,) = struct.unpack_from("<Q", start, 16)
    at = _PREAMBLE
    for _ in range(count):
        key, at = _text(start, at)
        (kind,) = struct.unpack_from("<I", start, at)
        at += 4
        if kind == GGUFValueType.STRING:
            found[key], at = _text(start, at)
        elif kind == GGUFValueType.ARRAY:
            of, length = struct.unpack_from("<IQ", start, at)
            at += 12 + _SIZES.get(GGUFValueType(of), _START) * length
        else:
            at += _SIZES[GGUFValueType(kind)]
        if _ARCHITECTURE in found and not key.startswith("general."):
            return


def _text(start: bytes, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<Q", start, at)
    if length > MAX_NAME or at + 8 + length > len(start):
        raise ValueError
    return start[at + 8 : at + 8 + length].decode("utf-8", "replace"), at + 8 + length
