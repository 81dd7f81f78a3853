"""Models that other programs keep: Ollama's store, LM Studio's folders, llama.cpp's cache."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from specdec.weights.hub.folder import companions
from specdec.weights.hub.ollama import models_in_store
from specdec.weights.hub.paths import local_path, model_path
from specdec.weights.hub.stores import store_files
from tests.support.stores.gguf_kinds import MODEL, PROJECTOR, put_in_store, write_kind

GEMMA = "registry.ollama.ai/library/gemma4/12b"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "home"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.setenv("USERPROFILE", str(folder))
    for name in ("OLLAMA_MODELS", "LLAMA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def store(home: Path) -> Path:
    return home / ".ollama" / "models"


def refusal(name: str) -> str:
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r".") as raised:
        model_path(name)
    assert time.perf_counter() - began < 1
    return str(raised.value)


def test_ollamas_names(store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {
        kind: write_kind(tmp_path / kind.rpartition(".")[2], arch)
        for kind, arch in ((MODEL, "gemma4"), (PROJECTOR, "clip"))
    }
    blobs = put_in_store(store, GEMMA, {**files, "application/vnd.ollama.image.license": b"terms"})
    other = put_in_store(store, "hf.co/owner/name/Q4_0", {MODEL: write_kind(tmp_path / "other", "gemma4", seed=1)})
    assert model_path("ollama:gemma4:12b") == local_path("ollama:library/gemma4:12b") == blobs[MODEL]
    assert model_path("ollama:hf.co/owner/name:Q4_0") == other[MODEL]
    assert companions(blobs[MODEL]).embedders == (blobs[PROJECTOR],)
    assert companions(other[MODEL]) == ((), (), ()), "the store is full of other models' files"
    assert models_in_store() == {"hf.co/owner/name:Q4_0": other[MODEL], "gemma4:12b": blobs[MODEL]}
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "elsewhere"))
    put_in_store(tmp_path / "elsewhere", "registry.ollama.ai/library/small/latest", files)
    assert model_path("ollama:small").parent.parent == tmp_path / "elsewhere"


def test_what_ollama_does_not_have(store: Path, tmp_path: Path) -> None:
    assert "the store is empty" in refusal("ollama:gemma4")
    blobs = put_in_store(store, GEMMA, {MODEL: write_kind(tmp_path / "m", "gemma4")})
    said = refusal("ollama:gemma4:12B")
    assert "Did you mean ollama:gemma4:12b?" in said and "`ollama pull gemma4:12B`" in said
    assert "name a model of Ollama like ollama:gemma4:12b" in refusal("ollama:../../../etc:passwd")
    assert "name a model of Ollama like" in refusal("ollama:")
    whole = blobs[MODEL].read_bytes()
    blobs[MODEL].write_bytes(whole[:-5])
    assert f"{blobs[MODEL]}: is not there as a whole ({len(whole)} bytes)" in refusal("ollama:gemma4:12b")
    assert models_in_store() == {}
    manifest = store / "manifests" / GEMMA
    for content, message in (
        (b"{", "cannot be read as JSON"),
        (b"[]", "where a JSON object is due"),
        (b"{}", "there is no 'layers'"),
        (b'{"layers": [7]}', "12b"),
        (b'{"layers": []}', "lists no model"),
        (json.dumps({"layers": [{"digest": "sha256:../x", "mediaType": MODEL, "size": 1}]}).encode(), "is no hash"),
    ):
        manifest.write_bytes(content)
        said = refusal("ollama:gemma4:12b")
        assert message in said and str(manifest) in said and "\n" not in said


def test_files_of_lm_studio(home: Path) -> None:
    folder = home / ".lmstudio" / "models" / "lmstudio-community" / "gemma-4-12b-it-GGUF"
    model = write_kind(folder / "gemma-4-12b-it-Q4_K_M.gguf", "gemma4")
    large = write_kind(folder / "gemma-4-12b-it-Q8_0.gguf", "gemma4")
    write_kind(folder / "mmproj-gemma-4-12b-it-BF16.gguf", "clip")
    drafter = write_kind(folder / "mtp-gemma-4-12b-it-Q8_0.gguf", "gemma4-assistant")
    repository = "lmstudio-community/gemma-4-12b-it-GGUF"
    assert model_path(repository) == model_path(f"{repository}:Q4_K_M") == model
    assert model_path(f"{repository}/{large.name}") == model_path(f"{repository}:q8_0") == large
    assert model_path(large.name) == large
    assert companions(model).drafters == (drafter,)
    assert next((owner, path.name) for owner, path in store_files()) == ("LM Studio", model.name)
    write_kind(home / ".lmstudio" / "models" / "other" / "copy" / large.name, "gemma4")
    assert "several files are called so" in refusal(large.name)
    assert local_path("lmstudio-community/another") is None  # of the hub


def test_llama_cpps_flat_cache(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cache = tmp_path / "llama"
    monkeypatch.setenv("LLAMA_CACHE", str(cache))
    prefix = "unsloth_gemma-4-12b-it-GGUF_"
    model = write_kind(cache / f"{prefix}gemma-4-12b-it-Q4_0.gguf", "gemma4")
    drafter = write_kind(cache / f"{prefix}mtp-gemma-4-12b-it.gguf", "gemma4-assistant")
    other = write_kind(cache / "unsloth_gemma-4-E4B-it-GGUF_gemma-4-E4B-it-Q4_0.gguf", "gemma4")
    write_kind(cache / "unsloth_gemma-4-E4B-it-GGUF_mmproj-F16.gguf", "clip")
    for repository in ("gemma-4-12b-it-GGUF", "gemma-4-E4B-it-GGUF"):
        (cache / f"manifest=unsloth={repository}=latest.json").write_text("{}")
    assert model_path("unsloth/gemma-4-12b-it-GGUF") == model_path("unsloth/gemma-4-12b-it-GGUF:Q4_0") == model
    assert model_path("unsloth/gemma-4-12b-it-GGUF/gemma-4-12b-it-Q4_0.gguf") == model
    assert model_path(model.name) == model
    beside = companions(model)
    assert beside.drafters == (drafter,) and beside.embedders == ()
    assert len(companions(other).embedders) == 1 and companions(other).drafters == ()
