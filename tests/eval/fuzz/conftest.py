"""`seeds`: whole files of every kind, which no test changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.fuzz.seeds import write_seeds


@pytest.fixture(scope="session")
def cache_of_seeds(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def seeds(tmp_path_factory: pytest.TempPathFactory, cache_of_seeds: Path) -> Path:
    folder = tmp_path_factory.mktemp("seeds")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SPECDEC_CACHE", str(cache_of_seeds))
        write_seeds(folder)
    return folder


@pytest.fixture(autouse=True)
def cache(cache_of_seeds: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(cache_of_seeds))
