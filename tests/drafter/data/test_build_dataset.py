"""Growing a training set: what is written is let go, so that a set of any size is made in the same memory."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from drafter.data.features import Features
from tests.support.tiny_run import PER_SHARD, collector, make_shards_small


def test_texts_that_are_written_are_let_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_shards_small(monkeypatch)
    made = collector(tmp_path)
    written = list[weakref.ref[Features]]()
    add = made.writer.add

    def noting(texts: Sequence[Features], *more: Any, **named: Any) -> None:
        written.extend(map(weakref.ref, texts))
        add(texts, *more, **named)

    monkeypatch.setattr(made.writer, "add", noting)
    growing = made.grow()
    for blocks in (1, 2, 3):
        next(growing)
        gc.collect()
        assert len(written) == blocks * PER_SHARD
        assert sum(text() is not None for text in written) <= 1, "only the text that came last may be in use still"
    growing.close()
