"""`run.py export`: a drafter for llama.cpp, which drafts as before; what cannot be exported leaves no file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import specdec
from drafter import load_drafter
from drafter.files.bundled import HEADS
from drafter.files.checkpoint import read_stored
from eval.files.options import TYPES as WORDS
from eval.synthetic.command import write_model
from eval.synthetic.full_size import full_size_config, full_size_drafter
from run import main
from specdec.weights.gguf.header import read_header
from specdec.weights.gguf.tokenizer import CONTROL
from specdec.weights.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("export") / "model"
    write_model(full_size_config("gemma-4-tiny"), full_size_drafter("gemma-4-tiny"), made)
    return made


def export(*words: object) -> int:
    return main(["export", *map(str, words)])


def test_the_file_drafts_as_the_folder_does(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, record = tmp_path / "mtp-tiny.gguf", tmp_path / "out.json"
    assert export(folder / "assistant", "--model", folder, "--out", out, "--type", "f32", "--json", record) == 0
    assert "matrices in f32" in capsys.readouterr().out
    assert json.loads(record.read_text())["bytes"] == out.stat().st_size
    model = specdec.load(folder, drafter=None, device="cpu")
    ids = torch.arange(40)[None] + 300
    texts, drafted = [], []
    for path in (folder / "assistant", out):
        texts.append(model.generate(ids, drafter=load_drafter(path), draft_length=3, max_new_tokens=80).tolist())
        drafted.append((model.last_stats.drafted, model.last_stats.accepted))
    assert texts[0] == texts[1] == model.generate(ids, speculation=False, max_new_tokens=80).tolist()
    assert drafted[0] == drafted[1] and drafted[0][0] > 50


def test_the_file_has_the_vocabulary_of_the_model(folder: Path, tmp_path: Path) -> None:
    assert export(folder / "assistant", "--model", folder, "--out", tmp_path / "m.gguf") == 0
    metadata, tokenizer = read_header(tmp_path / "m.gguf").metadata, load_tokenizer(folder)
    tokens = metadata["tokenizer.ggml.tokens"]
    assert len(tokens) == 640 and all(tokens[number] == token for token, number in tokenizer.get_vocab().items())
    assert metadata["tokenizer.ggml.model"] == "gemma4"
    assert metadata["tokenizer.ggml.bos_token_id"] == tokenizer.bos_token_id
    assert metadata["tokenizer.ggml.token_type"][tokenizer.eos_token_id] == CONTROL
    for key in ("embedding_length_out", "nextn_predict_layers", "attention.key_length_swa", "rope.dimension_count"):
        assert isinstance(metadata[f"gemma4-assistant.{key}"], int), key
    again = tmp_path / "again.gguf"  # from one file to another: what was written is read
    assert export(tmp_path / "m.gguf", "--model", folder, "--out", again, "--type", "q4_0") == 0
    assert read_stored(again).shape.to_dict() == read_stored(tmp_path / "m.gguf").shape.to_dict()
    assert again.stat().st_size < (tmp_path / "m.gguf").stat().st_size


def test_what_cannot_be_exported_leaves_no_file(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(b"GGUF")
    head = next(HEADS.glob("*/config.json")).parent
    for words, message in (
        ((head, "--model", folder, "--out", tmp_path / "m.gguf"), "a head of this project's own format"),
        ((folder, "--model", folder, "--out", tmp_path / "m.gguf"), "is not a drafter"),
        ((folder / "assistant", "--model", folder, "--out", tmp_path / "m.bin"), "ends in .gguf"),
        ((folder / "assistant", "--model", folder, "--out", other), "export did not write"),
    ):
        assert export(*words) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "m.gguf").exists() and other.read_bytes() == b"GGUF"


def test_the_words_of_types_are_those_of_the_writer() -> None:
    from drafter.files.gguf_writer import TYPES

    assert {*WORDS} == {*TYPES}
