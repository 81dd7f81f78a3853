"""What arrives from a hub: broken off, damaged, not checked yet, or more than there is room for."""

from __future__ import annotations

from pathlib import Path

import pytest

from specdec.weights.hub.paths import FetchError, model_path
from tests.support.stores.hub import Hub
from tests.support.stores.models import SAFE, UNSLOTH, fetched


def test_safetensors_without_pickles(hub: Hub) -> None:
    folder = model_path(SAFE)
    assert {file.name for file in folder.iterdir()} == {
        "config.json",
        "model-00001-of-00001.safetensors",
        "tokenizer.json",
        "merges.txt",
    }


def test_a_download_that_broke_off_goes_on(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    name, cut = "gemma-4-12b-it-Q4_0.gguf", 20_000
    whole = hub.repositories[UNSLOTH][name]
    hub.breaks[name] = cut
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # what is written at a time
    path = model_path(f"{UNSLOTH}/{name}")
    assert path.read_bytes() == whole
    assert hub.sent[name] == len(whole), "bytes were sent twice"
    assert any(f"bytes={cut}-" in asked for asked in hub.asked)


def test_what_arrives_damaged_is_not_kept(hub: Hub, tmp_path: Path) -> None:
    name = "gemma-4-12b-it-Q4_0.gguf"
    whole = hub.repositories[UNSLOTH][name]
    hub.instead[name] = whole[:-1] + b"X"
    with pytest.raises(FetchError, match=r"arrived with SHA-256 .*and the hub says .*not kept"):
        model_path(f"{UNSLOTH}/{name}")
    assert not [path for path in (tmp_path / "hub").rglob("*") if path.is_file() and path.stat().st_size == len(whole)]
    hub.instead.clear()
    assert model_path(f"{UNSLOTH}/{name}").read_bytes() == whole


def test_safetensors_that_arrive_damaged_are_not_kept(hub: Hub) -> None:
    name = "model-00001-of-00001.safetensors"
    hub.instead[name] = b"weighty"
    with pytest.raises(FetchError, match=rf"{name} arrived with SHA-256 .*not kept"):
        model_path(SAFE)
    hub.instead.clear()
    assert (model_path(SAFE) / name).read_bytes() == b"weights"


def test_what_ctrl_c_kept_from_being_checked_is_checked_the_next_time(
    hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "gemma-4-12b-it-Q4_0.gguf"
    whole = hub.repositories[UNSLOTH][name]
    hub.instead[name] = whole[:-1] + b"X"

    def interrupt(path: Path) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("specdec.weights.hub.repository.file_sha256", interrupt)
        with pytest.raises(KeyboardInterrupt):
            model_path(f"{UNSLOTH}/{name}")
    sent = hub.sent[name]
    with pytest.raises(FetchError, match="arrived with SHA-256"):
        model_path(f"{UNSLOTH}/{name}")
    assert hub.sent[name] == sent == len(whole), "it was fetched again"


@pytest.mark.parametrize("name", [f"{UNSLOTH}:Q4_0", SAFE])
def test_too_little_room_is_told_first(name: str, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda place: type("Usage", (), {"free": 3})())
    with pytest.raises(FetchError, match=r"0\.0 GB are to be fetched, and 0\.0 are free.*HF_HOME"):
        model_path(name)
    assert not fetched(hub)
