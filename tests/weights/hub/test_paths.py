"""Names to files: paths, named models and ids of the hub; what is mistyped or no model."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Type

from specdec.weights.hub.paths import (
    NAMED_MODELS,
    cache_folder,
    drafter_path,
    local_path,
    model_path,
)
from specdec.weights.tokenizer import load_tokenizer
from tests.support.media.tiny_media import write_mmproj


def test_cache_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", "/one")
    monkeypatch.setenv("XDG_CACHE_HOME", "/two")
    monkeypatch.setenv("HOME", "/three")
    assert cache_folder() == Path("/one")
    monkeypatch.delenv("SPECDEC_CACHE")
    assert cache_folder() == Path("/two/specdec")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == Path("/three/.cache/specdec")
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, says its specification
    assert cache_folder() == Path("/three/.cache/specdec")
    monkeypatch.setenv("SPECDEC_CACHE", "~/models")
    assert cache_folder() == Path("/three/models")


def touch(folder: Path, *names: str) -> Path:
    folder.mkdir(exist_ok=True)
    for name in names:
        (folder / name).write_bytes(b"")
    return folder


def test_local_paths(tmp_path: Path) -> None:
    one = touch(tmp_path / "one", "m.gguf", "tokenizer.json")
    write_mmproj(one / "seeing.gguf", Type.F16)  # known by what it holds, not by its name
    both = touch(tmp_path / "both", "m.gguf", "model.safetensors", "config.json")
    bare = touch(tmp_path / "bare", "config.json")
    assert model_path(one / "m.gguf") == one / "m.gguf"
    assert model_path(str(one)) == one / "m.gguf"
    assert model_path(both) == both
    assert model_path(bare) == bare


@pytest.mark.parametrize(
    ("files", "name", "message"),
    [
        (["a.gguf", "b.gguf"], "", "2 .gguf files; name one of them: a.gguf, b.gguf"),
        (["pytorch_model.bin"], "", "only pickled weights"),
        (["m.pt"], "m.pt", "pickled weights are refused"),
        (["model.safetensors"], "model.safetensors", "name the folder that holds it"),
        (["notes.txt"], "notes.txt", "not a model"),
        ([], "missing.gguf", "no such file or folder. Named models: smollm2-135m-instruct, gemma-3-270m"),
    ],
)
def test_paths_that_are_no_model(tmp_path: Path, files: list[str], name: str, message: str) -> None:
    folder = touch(tmp_path / "folder", *files)
    with pytest.raises(ValueError, match=message):
        model_path(folder / name)


@pytest.mark.parametrize("name", ["gemma", "models/missing.gguf", "./owner/name", "a/b/c", "files/gemma/m.gguf"])
def test_names_that_are_nothing(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "files").mkdir()
    with pytest.raises(ValueError, match="owner/name"):
        model_path(name)


@pytest.mark.parametrize("name", ["smolm2-135m-instruct", "Smollm2-135m-instruct", "smollm2-135m"])
def test_a_mistyped_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"no such file or folder\. Did you mean smollm2-135m-instruct\? Named models"):
        model_path(name)


def test_a_mistyped_drafter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"no such file or folder\. Did you mean suffix\? Drafters: auto, suffix, none"
    ):
        drafter_path("sufix")
    assert drafter_path("auto") is drafter_path("owner/name") is None
    assert drafter_path(str(tmp_path)) == local_path(str(tmp_path)) == tmp_path


@pytest.mark.parametrize(
    ("name", "complaint"),
    [("x" * 5000, "5,000 characters"), ("owner/" + "x" * 5000, "5,006 characters"), ("a\0b", "NUL character")],
)
def test_names_that_no_file_can_have(name: str, complaint: str) -> None:
    for find in (model_path, load_tokenizer, drafter_path):
        with pytest.raises(ValueError, match=complaint):
            find(name)


@pytest.mark.model
@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_named_models(name: str) -> None:
    path = model_path(name)
    assert path.name == NAMED_MODELS[name].file
    assert hashlib.sha256(path.read_bytes()).hexdigest() == NAMED_MODELS[name].sha256
