"""Checkpoints of random weights: in the real format, loaded as the real one is, by us and by transformers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers

import specdec
from drafter.config import MTPHeadConfig
from drafter.files.assistant import assistant_config
from eval.synthetic import command as synthetic
from eval.synthetic.byte_tokenizer import byte_tokenizer
from eval.synthetic.command import main, model_bytes, write_model
from specdec.model.families import decoder_spec
from tests.support.tiny import FAMILIES, tiny_model

ROOM = 600  # tokens of a vocabulary that bytes fit into


def config_of(family: str) -> object:
    config = tiny_model(family).config.get_text_config()
    return type(config)(**{**config.to_dict(), "vocab_size": ROOM, "vocab_size_per_layer_input": ROOM})


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "gemma4-e2b"])
def test_a_written_model_is_read_by_us_and_by_transformers(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(synthetic, "SHARD", 60_000)
    config = config_of(family)
    drafter = None
    if family == "gemma4_unified":
        spec = decoder_spec(config)
        drafter = assistant_config(config, spec, MTPHeadConfig.like(spec, draft_vocab=ROOM))
    written: list[int] = []
    write_model(config, drafter, tmp_path / "made", written.append)
    files = list((tmp_path / "made").rglob("*.safetensors"))
    assert len(files) > 2
    assert sum(written) == model_bytes(config, drafter) <= sum(file.stat().st_size for file in files)
    model = specdec.load(tmp_path / "made", drafter=None if drafter is None else str(tmp_path / "made" / "assistant"))
    tokenizer = specdec.load_tokenizer(tmp_path / "made")
    ids = tokenizer.apply_chat_template(
        [{"role": "user", "content": "héllo\n"}], add_generation_prompt=True, return_tensors="pt", return_dict=True
    )["input_ids"]
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "user\nhéllo\n\nmodel\n"
    arguments = {"max_new_tokens": 12, "eos_token_id": None, "draft_length": 2}
    text = model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
    assert len(text[0].unique()) > 3  # not one token for ever
    if drafter is not None:
        assert model.last_stats.draft_sources
    outer = json.loads((tmp_path / "made" / "config.json").read_text())["architectures"]
    theirs = getattr(transformers, outer[0])
    reference, info = theirs.from_pretrained(tmp_path / "made", dtype=torch.float32, output_loading_info=True)
    assert not [name for name in info["missing_keys"] if "language_model" in name or "vision" not in name]
    expected = reference(ids).logits
    assert (model(ids).logits - expected).abs().max() < 1e-3 * expected.abs().max()


def test_the_command_writes_what_it_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(synthetic, "full_size_config", lambda name: config_of("gemma3"))
    monkeypatch.setattr(synthetic, "full_size_drafter", lambda name: None)
    assert main(["--out", str(tmp_path / "made"), "--json", str(tmp_path / "record")]) == 0
    record = json.loads((tmp_path / "record").read_text())
    said = " ".join(capsys.readouterr().out.split())  # a long path wraps
    assert "{" not in said and f"{record['bytes'] / 1000:.1f} KB of random weights" in said
    assert record["bytes"] == model_bytes(config_of("gemma3"), None)
    assert main(["--out", str(tmp_path / "made")]) == 2
    assert "is there already" in capsys.readouterr().err
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 1000}))
    assert main(["--out", str(tmp_path / "other")]) == 2
    assert "KB are needed, and 1.0 KB are free" in capsys.readouterr().err


def test_full_size_is_what_was_published() -> None:
    config, drafter = synthetic.full_size_config("gemma-4-12b"), synthetic.full_size_drafter("gemma-4-12b")
    assert 23.5e9 < model_bytes(config, None) < 24e9
    assert 0.8e9 < model_bytes(config, drafter) - model_bytes(config, None) < 0.95e9


def test_a_vocabulary_needs_room_for_bytes() -> None:
    with pytest.raises(ValueError, match="no room"):
        byte_tokenizer(256)


@pytest.mark.parametrize("gguf", [None, "q8_0", "q4_0"])
def test_the_tiny_model_sees_and_hears_in_every_format(gguf: str | None, tmp_path: Path) -> None:
    folder = tmp_path / "made"
    words = ["--config", "gemma-4-tiny", "--out", str(folder), "--json", str(tmp_path / "record")]
    assert main([*words, *(["--gguf", gguf] if gguf else [])]) == 0
    record = json.loads((tmp_path / "record").read_text())
    files = [file for file in folder.rglob("*") if file.suffix in (".gguf", ".safetensors")]
    assert record["bytes"] < sum(file.stat().st_size for file in files) < record["bytes"] + 100_000
    assert {file.suffix for file in folder.glob("*.*")} >= ({".gguf"} if gguf else {".safetensors"})
    model = specdec.load(folder, drafter=str(folder / "assistant"), device="cpu")
    media = model.decoder.media
    assert media is not None
    published = decoder_spec(synthetic.full_size_config("gemma-4-tiny")).media
    assert published is not None
    assert media.spec.tensors() == published.tensors() and media.spec.tokens == published.tokens
    assert model.generation_config.suppress_tokens == sorted(media.spec.tokens.ids)
    assert model.config.get_text_config().hidden_size == media.spec.hidden
    assert json.loads((folder / "processor_config.json").read_text())["processor_class"] == "Gemma4UnifiedProcessor"
    tokenizer = specdec.load_tokenizer(folder)
    content = [{"type": "image"}, {"type": "text", "text": "hé"}, {"type": "audio"}]
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False)
    assert text == "<bos><start>user\n<|image|>hé<|audio|><end>\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    tokens = media.spec.tokens
    assert tokens.image in ids and tokens.audio in ids and tokenizer.decode(ids[-5:-2]) == "é<|audio|>"


def test_the_two_formats_of_the_tiny_model_hold_the_same_numbers(tmp_path: Path) -> None:
    config = synthetic.full_size_config("gemma-4-tiny")
    write_model(config, None, tmp_path / "folder")
    write_model(config, None, tmp_path / "file", gguf="q8_0")
    ours, theirs = (specdec.load(tmp_path / name, drafter=None, quantize="none", device="cpu").decoder for name in
                    ("folder", "file"))  # fmt: skip
    for one, other in (
        (ours.layers[0].q.weight, theirs.layers[0].q.weight),
        (ours.embedding, theirs.embedding),
        (ours.media.audio.embedding_projection.weight, theirs.media.audio.embedding_projection.weight),
    ):
        a, b = one.dequantize(), other.dequantize()
        assert (a - b).abs().max() < 0.02 * a.abs().max()
