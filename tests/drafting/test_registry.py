"""What "auto" chooses: the head that comes with the package, for the backbone that it was trained for and no other."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import drafter
from drafter.config import HeadConfig, head_spec
from drafter.files.head import save_head
from drafter.train.initial import initial_tensors
from specdec.drafting.registry import resolve_drafter
from specdec.hf import SpecdecForCausalLM, decoder_of
from tests.support.tiny import prompt, tiny_model
from tests.support.tiny_assistant import backbone


def save(folder: Path, family: str) -> None:
    decoder, ids = backbone(family), torch.arange(64)
    config = HeadConfig.like(decoder.spec, draft_vocab=64)
    tensors = initial_tensors(head_spec(config, decoder.spec), decoder, ids)
    save_head(folder, config, tensors, ids, decoder, {"backbone_name": family})


def test_auto_is_the_head_of_this_backbone_or_suffix_matching(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "one", "llama")
    save(tmp_path / "two", "gemma3")
    monkeypatch.setattr("drafter.files.bundled.HEADS", tmp_path)
    drafter.files.bundled._heads.cache_clear()
    try:
        auto = resolve_drafter("auto")
        for family, name in (("llama", "suffix+mtp"), ("qwen3", "suffix"), ("gemma3", "suffix+mtp")):
            auto.bind(backbone(family))
            assert auto.name == name and auto.max_draft > 0
        auto.bind(decoder_of(tiny_model("llama", seed=1)))
        assert auto.name == "suffix", "another model of the same shape"
        model = tiny_model("llama")
        ours = SpecdecForCausalLM(backbone("llama"), model.config, model.generation_config, resolve_drafter("auto"))
        texts = [ours.generate(prompt(9), max_new_tokens=40, do_sample=False, speculation=s) for s in (False, True)]
        assert torch.equal(*texts) and "mtp" in ours.last_stats.draft_sources
    finally:
        drafter.files.bundled._heads.cache_clear()
