"""A conversation's cache on disk: it goes on in another process, or another day, without being computed again.

What: a safetensors file with the tokens, the used positions of every store, and the rings of the marks. Its metadata
says whose cache it is, because K and V mean something to one model, stored in one way, with one arithmetic, and has the
keys of the text's media. A text without media is written as format 1, which programs without media read. Left out:
compression; files for machines with another byte order; pictures and sound themselves.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from specdec.cache.conversation import Conversation, MediaKey
from specdec.cache.kv_cache import KVCache, RingCheckpoint
from specdec.cache.stores import LayerStore
from specdec.util.atomic import is_foreign, replacing, user_path
from specdec.weights.metadata import LARGEST, Values, foreign, naming

_FORMATS = "specdec conversation "  # of all versions
TEXT, MEDIA = (f"{_FORMATS}{number}" for number in (1, 2))


def save_conversation(conversation: Conversation, path: Path, identity: str, notes: dict[str, Any]) -> None:
    """Write `conversation` to `path` (`~` is the home folder), all or nothing.

    `identity`: the hash of what its bits depend on besides its tokens; `notes`: any JSON. Raises ValueError when the
    file cannot be written, or holds something else than a conversation; the old content is then still there.
    """
    path = user_path(path)
    try:
        holds_other = is_foreign(path, _is_conversation)
    except OSError as error:
        raise ValueError(f"{path}: the conversation cannot be saved ({error.strerror})") from error
    if holds_other:
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
    if conversation.media:
        about["media"] = [[*one[:2], one.key.hex()] for one in conversation.media]
    try:
        with replacing(path) as temporary:
            save_file(
                tensors,
                temporary,
                metadata={"format": MEDIA if conversation.media else TEXT, "about": json.dumps(about)},
            )
    except Exception as error:  # safetensors has errors of its own
        raise ValueError(f"{path}: the conversation cannot be saved ({error})") from error


def _is_conversation(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as stored:
            return str((stored.metadata() or {}).get("format", "")).startswith(_FORMATS)
    except Exception:  # safetensors has errors of its own
        return False


def load_conversation(
    path: Path,
    identity: str,
    new_cache: Callable[[], KVCache],
    others: Mapping[str, Callable[[], KVCache]] | None = None,
) -> Conversation:
    """Return the conversation that `save_conversation` wrote to `path`.

    `new_cache` makes caches of `identity`; `others`: what makes those of other identities, such as an adapter's. Raises
    ValueError when there is no such file, the file is damaged, or it belongs to another model.
    """
    path = user_path(path)
    try:
        there = path.is_file()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from error
    if not there:
        raise ValueError(f"{path}: there is no such file; a conversation is saved with model.save_conversation")
    advice = "delete it, and the conversation is computed again"
    with naming(path), ExitStack() as stack:
        with foreign(path, "name a file that was saved so", "is no saved conversation, or a damaged one"):
            stored = stack.enter_context(safe_open(path, "pt"))
            metadata = stored.metadata() or {}
        if metadata.get("format") not in (TEXT, MEDIA):
            raise ValueError("it is not a conversation, or one of another version")
        with foreign(path, advice, "damaged"):
            about = Values({"about": json.loads(metadata["about"])}).inner("about")
        make = {**(others or {}), identity: new_cache}.get(about.text("identity"))
        if make is None:
            raise ValueError(
                "it was saved with another model, or with other weights, adapter, kv_dtype, dtype or kernels, whose "
                "cache has other bits; load the model as it was then"
            )
        with foreign(path, advice, "damaged"):
            return _read(_Stored(stored, about.mapping("checksums")), about, make())


@dataclass(frozen=True)
class _Stored:
    """Read the tensors of a file. A tensor that has another shape than is due, or that was changed, is refused."""

    file: Any
    checksums: Mapping[str, Any]

    def get(self, name: str, like: Tensor | None = None, columns: int | None = None) -> Tensor:
        """Return the tensor `name`, shaped and typed like `like` but for `columns` columns; without `like`, int64
        [n]."""
        shape = tuple(self.file.get_slice(name).get_shape())
        due = shape[:1] if like is None else (like.shape[0], columns or like.shape[1], *like.shape[2:])
        if shape != due or not shape:
            raise ValueError(f"{name} is {list(shape)} where {list(due)} is due")
        tensor: Tensor = self.file.get_tensor(name)
        if tensor.dtype != (torch.int64 if like is None else like.dtype) or 0 in shape:
            raise ValueError(f"{name} holds {tensor.numel()} values of {tensor.dtype}")
        if _checksum(tensor) != self.checksums.get(name):
            raise ValueError(f"{name} was changed")
        return tensor


@torch.inference_mode()
def _read(stored: _Stored, about: Values, cache: KVCache) -> Conversation:
    tokens = stored.get("tokens")
    if int(tokens.min()) < 0 or int(tokens.max()) >= LARGEST:
        raise ValueError("its tokens are none of a vocabulary's")
    for i, store in enumerate(cache.stores):
        if store is not None:
            used = store.slots if store.window is not None else len(tokens)
            parts = [stored.get(f"store.{i}.{j}", part, used) for j, part in enumerate(store.parts)]
            store.reserve(len(tokens))
            store.put_back(parts)
    cache.restore(len(tokens), about.whole("reach", len(tokens)))
    marks = [_mark(stored, m, entry, cache) for m, entry in enumerate(about.sequence("marks"))]
    media = tuple(map(_media_key, about.sequence("media"))) if about.has("media") else ()
    if any(one.end > after.start for one, after in pairwise(media)) or (media and media[-1].start >= len(tokens)):
        raise ValueError("its media overlap, or lie behind its tokens")
    return Conversation(cache, marks, tokens, notes=about.mapping("notes"), media=media)


def _media_key(entry: Any) -> MediaKey:
    start, end, key = entry
    start, end = Values({"media": [start, end]}).wholes("media", length=2)
    if not start < end:
        raise ValueError(f"a block of media is at {start} to {end}")
    return MediaKey(start, end, bytes.fromhex(key))


def _mark(stored: _Stored, number: int, entry: Any, cache: KVCache) -> RingCheckpoint:
    length, reach, count = Values({"marks": entry}).wholes("marks", length=3)
    if count != len(cache.rings) or not length <= min(reach, cache.length):
        raise ValueError(f"mark {number} is at {length} of {cache.length} tokens, with {count} rings")
    return RingCheckpoint(length, reach, tuple(_ring(stored, number, r, ring) for r, ring in enumerate(cache.rings)))


def _ring(stored: _Stored, mark: int, ring: int, store: LayerStore) -> tuple[Tensor, ...]:
    parts = (stored.get(f"mark.{mark}.{ring}.{j}", part) for j, part in enumerate(store.parts))
    return tuple(part.to(store.values.device) for part in parts)


def _checksum(tensor: Tensor) -> int:
    return zlib.crc32(tensor.view(-1).view(torch.uint8).numpy().data)
