"""A warm start: the newest conversations are kept in a folder when the server ends, and taken in when it begins."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from specdec.cache.conversation_file import save_conversation
from specdec.hf import SpecdecForCausalLM
from specdec.model.adapters.adapter import PLAIN

_log = logging.getLogger(__name__)

MOST = 8  # conversations
LEAST = 64  # tokens: shorter ones are computed sooner than they are read
_SUFFIX = ".conversation"


def save(model: SpecdecForCausalLM, folder: Path, loaded: Collection[str] = ()) -> None:
    """Write the newest conversations of `model` to `folder`, in place of those that were `loaded` from there.

    What other servers wrote there stays, as long as it is among the newest of this model's.
    """
    newest = [one for one in list(model.conversations.kept) if len(one.tokens) >= LEAST][-MOST:]
    names = set[str]()
    for conversation in newest:
        identity = model.decoder.identity_of(conversation.cache.adapter)
        digest = hashlib.sha256(conversation.tokens.numpy().tobytes()).hexdigest()[:24]
        name = f"{_prefix(identity)}{digest}{_SUFFIX}"
        try:
            save_conversation(conversation, folder / name, identity, {})
            names.add(name)
        except ValueError as error:
            _log.warning("%s", error)
    gone_on_from = [folder / name for name in loaded if name not in names]
    for old in (*gone_on_from, *_files(folder, model)[:-MOST]):
        old.unlink(missing_ok=True)


def load(model: SpecdecForCausalLM, folder: Path) -> set[str]:
    """Take in the newest conversations that `save` wrote for such a model; return their files' names. Damaged files are
    passed over."""
    loaded = set[str]()
    for file in _files(folder, model)[-MOST:]:
        try:
            model.load_conversation(file)
            loaded.add(file.name)
        except ValueError as error:
            _log.warning("%s", error)
    return loaded


def _files(folder: Path, model: SpecdecForCausalLM) -> list[Path]:
    """Return the files of a model's conversations, with whatever adapter of it, the oldest first; other servers may
    delete them meanwhile."""
    written = list[tuple[float, Path]]()
    for adapter in (PLAIN, *model.decoder.adapters.names):
        for file in folder.glob(f"{_prefix(model.decoder.identity_of(adapter))}*{_SUFFIX}"):
            with suppress(FileNotFoundError):
                written.append((file.stat().st_mtime, file))
    return [file for _, file in sorted(written)]


def _prefix(identity: str) -> str:
    return f"{hashlib.sha256(identity.encode()).hexdigest()[:12]}-"
