"""Gemma 4 as Ollama keeps it: no suffix, encoders inside, and a tokenizer under another name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

import specdec
from specdec.weights.gguf.kind import is_gguf
from specdec.weights.hub.paths import model_path
from specdec.weights.tokenizer import load_tokenizer
from tests.support.tiny import prompt
from tests.support.tiny_gguf import gemma4_tokens, write_model

BLOB = "sha256-" + "0123456789abcdef" * 4
STRANGE = np.zeros((2, 36 * 4), np.uint8), Type.F64  # a type that is not read
ENCODERS = {
    "v.blk.0.attn_q.weight": STRANGE,
    "v.clamp_data": (np.ones(4, np.float32), None),
    "v.position_embd.weight": (np.ones((2, 3, 8), np.float32), None),
    "a.blk.0.ffn_up.weight": STRANGE,
    "mm.input_projection.weight": (np.ones((4, 4), np.float32), None),
}


def test_a_blob_is_the_model_without_its_encoders(tmp_path: Path) -> None:
    whole = write_model(tmp_path / "m.gguf", "gemma4-e2b", Type.Q8_0)
    kv = {f"blk.{i}.attn_k.weight": (np.ones((32, 64), np.float32), None) for i in (3, 4)}  # of layers that share K/V
    blob = write_model(tmp_path / BLOB, "gemma4-e2b", Type.Q8_0, extra={**ENCODERS, **kv})
    assert is_gguf(blob) and model_path(blob) == blob
    ids = prompt(40)
    ours, theirs = (specdec.load(path, drafter=None, device="cpu")(ids).logits for path in (blob, whole))
    assert torch.equal(ours, theirs)


def test_a_tensor_that_is_needed_has_a_type_that_is_read(tmp_path: Path) -> None:
    blob = write_model(tmp_path / BLOB, "gemma4", Type.Q8_0)
    raw = blob.read_bytes()
    name = b"blk.2.ffn_up.weight"
    at = raw.index(name) + len(name) + 4 + 2 * 8
    (tmp_path / "damaged").write_bytes(raw[:at] + int(Type.I8).to_bytes(4, "little") + raw[at + 4 :])
    with pytest.raises(ValueError, match=r"damaged: tensor 'blk\.2\.ffn_up\.weight' is stored as I8"):
        specdec.load(tmp_path / "damaged", drafter=None, device="cpu")


def test_other_files_are_no_models(tmp_path: Path) -> None:
    (tmp_path / "sha256-1").write_bytes(b"{}")
    with pytest.raises(ValueError, match="sha256-1: not a model"):
        model_path(tmp_path / "sha256-1")


def test_its_tokenizer_merges_in_the_order_of_the_list(tmp_path: Path) -> None:
    published = load_tokenizer(gemma4_tokens(tmp_path / "m.gguf"))
    ollamas = load_tokenizer(gemma4_tokens(tmp_path / "n.gguf", model="llama", pre="gemma4"))
    by_scores = load_tokenizer(gemma4_tokens(tmp_path / "o.gguf", model="llama", pre="default"))
    for text in ("abc", " abc a", "cab<|turn>b", "\u00e9 bc"):
        assert ollamas(text).input_ids == published(text).input_ids
        assert ollamas.decode(ollamas(text).input_ids, skip_special_tokens=True) == text
    assert ollamas("abc").input_ids != by_scores("abc").input_ids  # what the name alone would give
    assert (ollamas.unk_token, ollamas.bos_token, ollamas.pad_token) == ("<unk>", "<bos>", "<pad>")
    assert ollamas.add_bos_token
    without = gemma4_tokens(tmp_path / "p.gguf", model="llama", pre="gemma4", merges=None)
    with pytest.raises(ValueError, match="lists no merges"):
        load_tokenizer(without)
