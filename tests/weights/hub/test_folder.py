"""A folder with a model, its drafter and its embedder: told apart by what the files hold, not by their names."""

from __future__ import annotations

import os
import struct
import time
from pathlib import Path

import gguf
import pytest

from drafter.files.gguf import DIALECTS
from drafter.files.head import ARCHITECTURE
from specdec.weights.gguf.kind import DRAFTERS, architecture, kind_of
from specdec.weights.hub.folder import companions, damaged_drafters, files_in, pick, tag_of
from specdec.weights.hub.paths import model_path
from specdec.weights.metadata import read_object
from specdec.weights.safetensors import SafetensorsCheckpoint
from tests.support.stores.gguf_kinds import write_kind


def test_names_lie(tmp_path: Path) -> None:
    model = write_kind(tmp_path / "mtp-Qwen-MTP-Q4_0.gguf", "qwen3")
    drafter = write_kind(tmp_path / "model.gguf", "gemma4-assistant")
    embedder = write_kind(tmp_path / "drafter.gguf", "clip")
    write_kind(tmp_path / "adapter.gguf", "gemma4", "adapter")
    write_kind(tmp_path / "imatrix.gguf", "", "imatrix")
    write_kind(tmp_path / "eagle3.gguf", "eagle3")
    (tmp_path / "notes.txt").write_text("")
    assert files_in(tmp_path) == ((model,), (drafter,), (embedder,))
    assert model_path(tmp_path) == model
    assert companions(model)[1:] == ((drafter,), (embedder,))
    write_kind(tmp_path / "other.gguf", "gemma4")
    with pytest.raises(ValueError, match=r"2 \.gguf files; name one of them: mtp-Qwen-MTP-Q4_0\.gguf, other\.gguf"):
        model_path(tmp_path)


@pytest.mark.parametrize("length", [3, 40, 400])
def test_a_damaged_file_beside_a_model_is_no_second_model(length: int, tmp_path: Path) -> None:
    model = write_kind(tmp_path / "gemma-4-12b-it-Q4_0.gguf", "gemma4")
    drafter = write_kind(tmp_path / "mtp-gemma-4-12b-it.gguf", "gemma4-assistant")
    assert model_path(tmp_path) == model and damaged_drafters(model) == []
    drafter.write_bytes(drafter.read_bytes()[:length] if length > 3 else b"<html>")
    if length == 400:  # the keys are whole enough to say what it is
        assert model_path(tmp_path) == model and companions(model).drafters == (drafter,)
        return
    with pytest.raises(ValueError, match=r"\A[^\n]*mtp-gemma-4-12b-it\.gguf: [^\n]+\Z") as raised:
        model_path(tmp_path)
    assert "name one of them" not in str(raised.value)
    assert damaged_drafters(model) == [str(raised.value)] and companions(model).drafters == ()
    model.unlink()
    assert model_path(tmp_path) == drafter, "whoever opens it says what is wrong"


def test_drafters_of_several_types_in_a_folder_of_their_own(tmp_path: Path) -> None:
    model = write_kind(tmp_path / "gemma-4-12b-it-UD-Q4_K_XL.gguf", "gemma4")
    for kind in ("BF16", "F16", "Q4_0", "Q8_0"):
        write_kind(tmp_path / "MTP" / f"mtp-gemma-4-12b-it-{kind}.gguf", "gemma4-assistant")
    assert model_path(tmp_path) == model
    assert [path.stem.rpartition("-")[2] for path in companions(model).drafters] == ["Q8_0", "BF16", "F16", "Q4_0"]
    assert model_path(tmp_path / "MTP").name == "mtp-gemma-4-12b-it-Q8_0.gguf"


def test_the_architectures_of_drafters_are_those_that_are_read() -> None:
    assert {*DRAFTERS} == {*DIALECTS, ARCHITECTURE}


def test_the_kind_is_known_whatever_stands_first(tmp_path: Path) -> None:
    """Ollama sorts its keys: those of gemma4 come before general.architecture."""

    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    string, array, number = gguf.GGUFValueType.STRING, gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32
    fields = [
        text("gemma4.block_count") + struct.pack("<II", number, 7),
        text("gemma4.heads") + struct.pack("<IIQ", array, number, 3) + struct.pack("<III", 1, 2, 3),
        text("gemma4.tokens") + struct.pack("<IIQ", array, string, 2) + text("a") + text("b"),
        text("general.architecture") + struct.pack("<I", string) + text("clip"),
    ]
    for order in (fields, [fields[3], *fields[:3]], [fields[0], fields[3]]):
        path = tmp_path / "m"
        path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, len(order)) + b"".join(order))
        assert architecture(path) == "clip" and kind_of(path) == "embedder"
    path.write_bytes(path.read_bytes()[:60])
    assert kind_of(path) == "model", "whoever opens it says what is wrong"


def test_a_large_file_is_not_read_for_its_kind(tmp_path: Path) -> None:
    path = write_kind(tmp_path / "m.gguf", "gemma4")
    with path.open("r+b") as stream:
        stream.truncate(1 << 40)
    began = time.perf_counter()
    assert kind_of(path) == "model"
    assert time.perf_counter() - began < 0.5


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("gemma-4-12b-it-Q4_K_M.gguf", "Q4_K_M"),
        ("gemma-4-12b-it-UD-Q4_K_XL.gguf", "UD-Q4_K_XL"),
        ("gemma-4-12b-it-UD-IQ3_XXS.gguf", "UD-IQ3_XXS"),
        ("gemma-3-270m-q4_k_m.gguf", "q4_k_m"),
        ("m.BF16.gguf", "BF16"),
        ("big-Q8_0-00001-of-00003.gguf", "Q8_0"),
        ("model.gguf", None),
    ],
)
def test_the_type_in_a_name(name: str, tag: str | None) -> None:
    assert tag_of(name) == tag


def test_tags_are_whole_words() -> None:
    names = ["m-Q4_0.gguf", "m-Q4_K_M.gguf", "m-Q4_K_S.gguf"]
    assert pick(names, "q4_k_s", "here") == "m-Q4_K_S.gguf"
    assert pick(names, None, "here") == "m-Q4_K_M.gguf"
    with pytest.raises(ValueError, match=r"here: no \.gguf file of 'Q4_K'; there are Q4_0, Q4_K_M, Q4_K_S"):
        pick(names, "Q4_K", "here")
    with pytest.raises(ValueError, match=r"2 \.gguf files of 'it': a-it\.gguf, b-it\.gguf; name one"):
        pick(["a-it.gguf", "b-it.gguf"], "it", "here")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="Windows has no named pipes in folders")
def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path: Path) -> None:
    model = write_kind(tmp_path / "m.gguf", "llama")
    for name in ("pipe", "p.gguf", "p.safetensors"):
        os.mkfifo(tmp_path / name)
    assert model_path(tmp_path) == model and companions(model).models == (model,)
    folder = tmp_path / "folder"
    folder.mkdir()
    os.mkfifo(folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"holds no \.gguf file"):
        SafetensorsCheckpoint(folder)
    os.mkfifo(folder / "config.json")
    with pytest.raises(ValueError, match=r"config\.json: is no file"):
        read_object(folder / "config.json")
