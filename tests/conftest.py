"""Tiny models run on one thread, real ones on all: two threads cost a tiny model more than they win.

`folder` is a tiny model that converses, as commands take it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.tiny_folder import make_folder, threads_restored

ALL = torch.get_num_threads()


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_num_threads(ALL if request.node.get_closest_marker("model") else 1)
    yield
    torch.set_num_threads(ALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with threads_restored():
        yield make_folder(tmp_path_factory.mktemp("tiny"))
