"""One tiny model behind the server, for all tests of a file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from starlette.testclient import TestClient

from tests.support.serving.served import Served, served


@pytest.fixture(scope="module")
def tiny(folder: Path) -> Iterator[Served]:
    with served(folder, max_sequences=2, max_waiting=2) as one:
        yield one


@pytest.fixture
def client(tiny: Served) -> Iterator[TestClient]:
    with tiny.client() as client:
        yield client
