"""Keep what a loaded model is used for, beside the decoding: texts are handed over, and a thread writes them.

A text is written within milliseconds of its end, so a kill loses the texts that are under way, and no other. A disk
that is full is said once; no answer fails for it.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from drafter.use.log import UsedModel, UseLog
from specdec.model.decoder import Decoder

_log = logging.getLogger(__name__)


class UseRecorder:
    """Add texts of `backbone`, which was loaded as `name`, to its log in `folder`, one log for each adapter.
    All logs of the folder take at most `limit` bytes."""

    def __init__(self, backbone: Decoder, name: str, folder: Path, limit: int) -> None:
        self.backbone, self.name, self.folder, self.limit = backbone, name, folder, limit
        self._logs = dict[str, UseLog]()
        self._writer = ThreadPoolExecutor(1, "specdec use")
        self._failed = False

    def add(self, tokens: Sequence[int], answer: int, adapter: str | None = None) -> None:
        """Hand over a whole text, whose answer begins at token `answer`. `adapter`: the name in its cache ("": none;
        None: the default one). From any thread; returns at once."""
        name = self.backbone.adapters.default if adapter is None else adapter
        self._writer.submit(self._add, list(tokens), answer, name)

    def close(self) -> None:
        """Wait until all texts are written."""
        self._writer.shutdown()

    def _add(self, tokens: list[int], answer: int, adapter: str) -> None:
        try:
            if adapter not in self._logs:
                self._logs[adapter] = UseLog(self.folder, used_model(self.backbone, self.name, adapter), self.limit)
            self._logs[adapter].add(tokens, answer)
        except (OSError, ValueError) as error:
            if not self._failed:
                _log.warning("a text is not kept, and perhaps none of those to come: %s", error)
            self._failed = True


def used_model(backbone: Decoder, name: str, adapter: str) -> UsedModel:
    """Return what names the log of `backbone`, loaded as `name`, with the adapter of this name ("": none)."""
    found = backbone.adapters.of(adapter)
    return UsedModel(name, backbone.fingerprint, adapter, "" if found is None else found.identity)
