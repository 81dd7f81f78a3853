"""Where tokenizers come from besides a GGUF file: the cache of converted ones, folders, and names that are none."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from specdec.weights import tokenizer as module
from specdec.weights.tokenizer import load_tokenizer
from tests.support.tiny_gguf import byte_level


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pieces(tokenizer: Any, text: str) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]))


def test_the_second_load_converts_nothing(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = byte_level(tmp_path / "m.gguf")
    first = load_tokenizer(path)
    monkeypatch.setattr(module, "tokenizer_json", lambda metadata: pytest.fail("converted again"))
    second = load_tokenizer(path)
    assert second.get_vocab() == first.get_vocab()
    assert second("hello <think>")["input_ids"] == first("hello <think>")["input_ids"]
    assert sorted(entry.suffix for entry in (cache / "tokenizers").iterdir()) == [".json", ".sha256"]


def test_another_header_is_another_entry(tmp_path: Path, cache: Path) -> None:
    assert pieces(load_tokenizer(byte_level(tmp_path / "m.gguf")), "12") == ["1", "2"]
    assert pieces(load_tokenizer(byte_level(tmp_path / "m.gguf", pre="gpt-2")), "12") == ["12"]
    assert len(list((cache / "tokenizers").glob("*.json"))) == 2


@pytest.mark.parametrize("suffix", [".json", ".sha256"])
@pytest.mark.parametrize("damage", ["empty", "half", "flip", "gone"])
def test_a_damaged_entry_is_rebuilt(tmp_path: Path, cache: Path, suffix: str, damage: str) -> None:
    path = byte_level(tmp_path / "m.gguf")
    good = load_tokenizer(path).get_vocab()
    entry = next((cache / "tokenizers").glob(f"*{suffix}"))
    content = entry.read_bytes()
    if damage == "gone":
        entry.unlink()
    else:
        flipped = content[:40] + bytes([content[40] ^ 1]) + content[41:]
        entry.write_bytes({"empty": b"", "half": content[:40], "flip": flipped}[damage])
    assert load_tokenizer(path).get_vocab() == good
    assert entry.read_bytes() == content


def test_works_without_a_cache(tmp_path: Path, cache: Path) -> None:
    cache.write_text("a file where the folder should be")
    assert pieces(load_tokenizer(byte_level(tmp_path / "m.gguf")), "hell") == ["hell"]


def test_folders(tmp_path: Path) -> None:
    folder = tmp_path / "saved"
    original = load_tokenizer(byte_level(tmp_path / "m.gguf"))
    original.save_pretrained(folder)
    saved = load_tokenizer(folder)
    assert saved.padding_side == "left"
    assert saved("hello <think>12")["input_ids"] == original("hello <think>12")["input_ids"]
    (tmp_path / "with").mkdir()
    os.rename(tmp_path / "m.gguf", tmp_path / "with" / "m.gguf")
    assert load_tokenizer(tmp_path / "with").get_vocab() == original.get_vocab()
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no tokenizer here; put the model's tokenizer\.json"):
        load_tokenizer(tmp_path / "empty")
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="its tokenizer could not be loaded"):
        load_tokenizer(folder)


def test_an_unknown_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = r"nobody/nothing: no such folder here, and the hub could not be reached.*gemma-3-270m"
    with pytest.raises(ValueError, match=message):
        load_tokenizer("nobody/nothing")
    with pytest.raises(ValueError, match="there is no such file or folder"):
        load_tokenizer("nothing")
