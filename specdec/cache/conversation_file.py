"""A conversation's cache on disk, so that it goes on in another process, or another day, without being computed again.

What: a safetensors file with the tokens, the positions that are in use of every store, the rings of the marks, and in
its metadata whose cache it is: K and V mean something to one model, stored in one way, with one arithmetic. Left out:
compression; files for machines with another byte order.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec.atomic import is_foreign, replacing, user_path
from specdec.cache.kv_cache import KVCache, Mark
from specdec.cache.reuse import Conversation

_FORMATS = "specdec conversation "  # of all versions
FORMAT = f"{_FORMATS}1"


def save_conversation(conversation: Conversation, path: Path, identity: str, notes: dict[str, Any]) -> None:
    """Write `conversation` to `path` (`~` is the home folder), all or nothing. `identity`: what its bits depend on
    besides its tokens; `notes`: any JSON.

    Raises ValueError when the file cannot be written, or holds something else than a conversation; what was there is
    then still there.
    """
    path = user_path(path)
    try:
        foreign = is_foreign(path, _is_conversation)
    except OSError as error:
        raise ValueError(f"{path}: the conversation cannot be saved ({error.strerror})") from error
    if foreign:
        raise ValueError(
            f"{path}: holds something that is no conversation; name another file, or delete this one first"
        )
    cache = conversation.cache
    tensors = {"tokens": conversation.tokens}
    for i, store in enumerate(cache.stores):
        if store is not None:
            used = store.slots if store.window is not None else cache.length
            tensors |= {f"store.{i}.{j}": part[:, :used] for j, part in enumerate(store.parts)}
    for m, mark in enumerate(conversation.marks):
        for r, ring in enumerate(mark.rings):
            tensors |= {f"mark.{m}.{r}.{j}": part for j, part in enumerate(ring)}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    about = {
        "identity": identity,
        "notes": notes,
        "reach": cache.reach,
        "marks": [[mark.length, mark.reach, len(mark.rings)] for mark in conversation.marks],
        "checksums": {name: _checksum(tensor) for name, tensor in tensors.items()},
    }
    try:
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"format": FORMAT, "about": json.dumps(about)})
    except Exception as error:  # safetensors has errors of its own
        raise ValueError(f"{path}: the conversation cannot be saved ({error})") from error


def _is_conversation(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as stored:
            return str((stored.metadata() or {}).get("format", "")).startswith(_FORMATS)
    except Exception:  # safetensors has errors of its own
        return False


def load_conversation(path: Path, identity: str, new_cache: Callable[[], KVCache]) -> Conversation:
    """What `save_conversation` wrote. Raises ValueError: no such file, a damaged one, one of another model."""
    path = user_path(path)
    try:
        there = path.is_file()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if not there:
        raise ValueError(f"{path}: there is no such file; a conversation is saved with model.save_conversation")
    try:
        with safe_open(path, "pt") as stored:
            metadata = stored.metadata() or {}
            if metadata.get("format") != FORMAT:
                raise ValueError("it is not a conversation, or one of another version")
            about = json.loads(metadata["about"])
            if about["identity"] != identity:
                raise ValueError(
                    "it was saved with another model, or with other weights, kv_dtype, dtype or kernels, whose cache "
                    "has other bits; load the model as it was then"
                )
            return _read(about, lambda name: _checked(name, stored.get_tensor(name), about), new_cache())
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    except Exception as error:  # safetensors, json and missing names have errors of their own
        raise ValueError(f"{path}: damaged ({error!r}); delete it, and the conversation is computed again") from error


@torch.inference_mode()
def _read(about: dict[str, Any], get: Callable[[str], Tensor], cache: KVCache) -> Conversation:
    tokens = get("tokens")
    for i, store in enumerate(cache.stores):
        if store is not None:
            store.reserve(len(tokens))
            store.put_back([get(f"store.{i}.{j}") for j in range(len(store.parts))])
    cache.restored(len(tokens), about["reach"])
    marks = [
        Mark(length, reach, tuple(_ring(get, m, r, cache) for r in range(rings)))
        for m, (length, reach, rings) in enumerate(about["marks"])
    ]
    return Conversation(cache, marks, tokens, notes=about["notes"])


def _ring(get: Callable[[str], Tensor], mark: int, ring: int, cache: KVCache) -> tuple[Tensor, ...]:
    store = cache.rings[ring]
    return tuple(get(f"mark.{mark}.{ring}.{j}").to(store.values.device) for j in range(len(store.parts)))


def _checked(name: str, tensor: Tensor, about: dict[str, Any]) -> Tensor:
    if _checksum(tensor) != about["checksums"][name]:
        raise ValueError(f"damaged ({name} was changed); delete it, and the conversation is computed again")
    return tensor


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.view(-1).view(torch.uint8).numpy().data)
