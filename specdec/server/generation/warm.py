"""A warm start: the newest conversations are kept in a folder when the server ends, and taken in when it begins."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

from specdec.cache.conversation_file import save_conversation
from specdec.hf import SpecdecForCausalLM

_log = logging.getLogger(__name__)

MOST = 8  # conversations
LEAST = 64  # tokens: shorter ones are computed sooner than they are read
_SUFFIX = ".conversation"


def save(model: SpecdecForCausalLM, folder: Path) -> int:
    """Write the newest conversations of `model` to `folder`, and delete those there that are no more; return how many
    there are. Conversations of other models stay."""
    identity = model.decoder.identity
    prefix = _prefix(identity)
    newest = [one for one in list(model.conversations.kept) if len(one.tokens) >= LEAST][-MOST:]
    names = set[str]()
    for conversation in newest:
        digest = hashlib.sha256(conversation.tokens.numpy().tobytes()).hexdigest()[:24]
        name = f"{prefix}{digest}{_SUFFIX}"
        try:
            save_conversation(conversation, folder / name, identity, {})
            names.add(name)
        except ValueError as error:
            _log.warning("%s", error)
    for old in folder.glob(f"{prefix}*{_SUFFIX}"):
        if old.name not in names:
            old.unlink(missing_ok=True)
    return len(names)


def load(model: SpecdecForCausalLM, folder: Path) -> int:
    """Take in the conversations that `save` wrote for such a model; return how many. Damaged files are passed over."""
    loaded = 0
    files = sorted(folder.glob(f"{_prefix(model.decoder.identity)}*{_SUFFIX}"), key=lambda file: file.stat().st_mtime)
    for file in files:
        try:
            model.load_conversation(file)
            loaded += 1
        except ValueError as error:
            _log.warning("%s", error)
    return loaded


def _prefix(identity: str) -> str:
    return f"{hashlib.sha256(identity.encode()).hexdigest()[:12]}-"
