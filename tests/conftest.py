"""Tiny models run on one thread, real ones on all: two threads cost a tiny model more than they win."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

ALL = torch.get_num_threads()


@pytest.fixture(autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    torch.set_num_threads(ALL if request.node.get_closest_marker("model") else 1)
    yield
    torch.set_num_threads(ALL)
