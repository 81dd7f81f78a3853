"""What tests of damaged files share: copies of whole files, and how a refusal must be."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import specdec

TERMINAL = "\x1b]0;owned\x07\x1b[2Jx"
SECONDS = 5.0  # of processor time; a second is what it takes, and many times less


@contextmanager
def refused(folder: Path, match: str | None = None) -> Iterator[None]:
    """Expect a ValueError that names `folder` in a sentence and comes soon."""
    began = time.process_time()
    with pytest.raises(ValueError, match=match) as caught:
        yield
    assert time.process_time() - began < SECONDS
    assert str(folder) in str(caught.value)
    assert str(caught.value).isprintable()


def copied(seeds: Path, name: str, folder: Path) -> Path:
    return Path(shutil.copytree(seeds / name, folder / name))


def load(path: Path) -> Any:
    """Load a model and decode with it."""
    model = specdec.load(path, drafter=None, device="cpu")
    ids = torch.tensor([[5, 6, 7]], dtype=torch.int64)
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)
