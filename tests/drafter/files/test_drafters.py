"""Heads and models that draft, told apart by what a file holds; whose vocabulary a model must have."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM

import specdec
from drafter import open_drafter, stored_bytes, weights_state
from drafter.mtp_drafter import MTPDrafter
from specdec.drafting.composite import CompositeDrafter
from specdec.drafting.draft_model.draft_model import DraftModel
from specdec.drafting.registry import draft_spec, drafter_bytes, drafter_identity, resolve_drafter
from specdec.engine.sampling import Noise, Warping
from specdec.hf import decoder_of
from specdec.memory.plan import text_bytes
from specdec.model.states import States
from specdec.weights.hub.paths import drafter_path
from specdec.weights.tensors import BlockWeight
from tests.support.adapters.tiny_adapter import make_peft
from tests.support.stores.gguf_kinds import write_kind
from tests.support.tiny import SHAPE, VOCAB, WINDOW, prompt, tiny_model
from tests.support.tiny_assistant import save_assistant
from tests.support.tiny_folder import make_folder
from tests.support.tiny_gguf import write_model


def draft_model_of(drafter: object) -> DraftModel:
    assert isinstance(drafter, CompositeDrafter) and isinstance(drafter.other, DraftModel)
    return drafter.other


def small(folder: Path, vocabulary: int, renamed: int = 0, tokenizer: bool = True) -> Path:
    """A Llama whose matrix has `vocabulary` tokens: the backbone's, in their order, but for the `renamed` last ones."""
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**{**SHAPE, "vocab_size": vocabulary, "num_hidden_layers": 2})).save_pretrained(folder)
    if tokenizer:
        make_folder(folder / "other")
        for file in (folder / "other").glob("*token*"):
            file.rename(folder / file.name)
        tree = json.loads((folder / "tokenizer.json").read_text())
        entries = sorted(tree["model"]["vocab"].items(), key=lambda entry: entry[1])[:vocabulary]
        tree["model"]["vocab"] = {f"{token}{i}" if i >= len(entries) - renamed else token: i for token, i in entries}
        Tokenizer.from_str(json.dumps(tree)).save(str(folder / "tokenizer.json"))
    return folder


@pytest.fixture
def backbone(tmp_path: Path) -> Path:
    return make_folder(tmp_path / "backbone", "gemma4_unified")


def test_an_adapter_is_no_drafter(tmp_path: Path) -> None:
    folder = make_peft(tmp_path / "legal")
    with pytest.raises(ValueError, match="^" + re.escape(f"{folder}: an adapter (LoRA), which drafts nothing")):
        open_drafter(folder)


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_any_model_of_the_vocabulary_drafts(quantize: str | None, backbone: Path, tmp_path: Path) -> None:
    folder = small(tmp_path / "small", VOCAB)
    model = specdec.load(backbone, str(folder), quantize=quantize, kv_dtype="int8", device="cpu")
    drafts = draft_model_of(model.drafter)
    assert model.drafter.name == "suffix+model"
    assert isinstance(drafts.decoder.layers[0].q.weight, BlockWeight) == (quantize is not None), "8 bits, or as it is"
    assert drafts.decoder.kv_dtype == torch.int8
    for sampling in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7, "seed": 3}):
        how = {"max_new_tokens": 4 * WINDOW, "eos_token_id": None, **sampling}
        plain = model.generate(prompt(9), **how, speculation=False)
        assert torch.equal(model.generate(prompt(9), **how, draft_length=3), plain)
        assert "model" in model.last_stats.draft_sources
        assert torch.equal(model.generate(prompt(9), **how), plain)
    per_call = specdec.load(backbone, None, quantize=quantize, kv_dtype="int8", device="cpu")
    assert torch.equal(per_call.generate(prompt(9), **how, draft_length=3, drafter=folder), plain)
    assert "model" in per_call.last_stats.draft_sources


def test_a_matrix_of_another_size_with_the_same_tokens_drafts_those_that_both_have(
    backbone: Path, tmp_path: Path
) -> None:
    for name, vocabulary in (("narrow", 200), ("wide", VOCAB + 64)):
        folder = small(tmp_path / name, vocabulary)
        model = specdec.load(backbone, folder, device="cpu")
        ids = torch.arange(VOCAB - 30, VOCAB)[None]  # which the narrow one does not have
        how = {"max_new_tokens": 40, "do_sample": False, "eos_token_id": None}
        plain = model.generate(ids, **how, speculation=False)
        drafts = draft_model_of(model.drafter)
        assert torch.equal(model.generate(ids, **how, draft_length=4, drafter=drafts), plain)
        assert model.last_stats.drafted > 40
        text, states = prompt(12)[0].tolist(), States(torch.empty(0, dtype=torch.float32))
        seen = {
            token
            for seed in range(40)  # sampled at a temperature at which every token is about as likely
            for noise in [Noise(seed, Warping(50.0))]
            for token in drafts.start(model.decoder.new_cache(), noise).propose(text, states, 8).tokens
        }
        assert min(vocabulary, VOCAB) - 12 < max(seen) < min(vocabulary, VOCAB)


def test_other_vocabularies_are_refused_in_a_sentence_that_says_how_they_differ(backbone: Path, tmp_path: Path) -> None:
    assert specdec.load(backbone, small(tmp_path / "one", VOCAB, renamed=2), device="cpu").drafter.name
    for vocabulary in (VOCAB, 200):
        folder = small(tmp_path / f"other{vocabulary}", vocabulary, renamed=30)
        with pytest.raises(ValueError, match="cannot draft for this model") as error:
            specdec.load(backbone, folder, device="cpu")
        first = vocabulary - 30
        for part in (
            f"{vocabulary} tokens against 256",
            f"of the {vocabulary} that both have 30 differ",
            f"token {first} is",
        ):
            assert part in str(error.value)
    with pytest.raises(ValueError, match="200 tokens against 256, and there is no tokenizer of its own"):
        specdec.load(backbone, small(tmp_path / "mute", 200, tokenizer=False), device="cpu")
    with pytest.raises(ValueError, match="200 tokens against 256, and there is no tokenizer of this model's own"):
        open_drafter(small(tmp_path / "narrow", 200)).bind(decoder_of(tiny_model("llama")))
    open_drafter(small(tmp_path / "silent", VOCAB, tokenizer=False)).bind(decoder_of(tiny_model("llama")))


def test_what_a_file_holds_decides(backbone: Path, tmp_path: Path) -> None:
    file = write_model(tmp_path / "mtp-by-name-only.gguf", "llama", Type.Q8_0)
    assert draft_model_of(open_drafter(file)).path == file
    assert isinstance(open_drafter(save_assistant(tmp_path / "head", "gemma4_unified")), MTPDrafter)
    assert draft_model_of(resolve_drafter(backbone)).spec.model_type.startswith("gemma4")
    assert drafter_path("gemma-3-270m") is drafter_path("smollm2-135m-instruct") is drafter_path("auto") is None
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    write_kind(tmp_path / "seeing.gguf", "clip")
    write_kind(tmp_path / "strange.gguf", "gemma4-assistent")
    write_kind(tmp_path / "eagle.gguf", "eagle3")
    for name in ("bert", "strange.gguf"):
        with pytest.raises(
            ValueError, match=rf"{name}.*; a drafter is a head \(of type .*\) or a model that can be loaded"
        ):
            open_drafter(tmp_path / name)
    for name in ("seeing.gguf", "eagle.gguf"):
        with pytest.raises(ValueError, match=rf"{name}.* is not a drafter"):
            open_drafter(tmp_path / name)
    (tmp_path / "cut.gguf").write_bytes(file.read_bytes()[:-5000])
    with pytest.raises(ValueError, match=r"cut\.gguf: the download is incomplete"):
        open_drafter(tmp_path / "cut.gguf")
    with pytest.raises(ValueError, match="no such file or folder"):
        resolve_drafter("nothing")


def test_what_a_draft_model_takes_and_is_known_by(backbone: Path, tmp_path: Path) -> None:
    folder, decoder = small(tmp_path / "small", VOCAB), decoder_of(tiny_model("llama"))
    sizes = {quantized: stored_bytes(folder, torch.float32, quantized) for quantized in (False, True)}
    assert sizes[False] == drafter_bytes(str(folder), torch.float32, False) > 3 * sizes[True]
    for quantize in (None, "int8"):
        model = specdec.load(backbone, folder, quantize=quantize, device="cpu")
        assert draft_model_of(model.drafter).decoder.nbytes == sizes[quantize is not None]
    before = drafter_identity(str(folder), decoder)
    assert before == f"{folder} {weights_state(folder)}" and "model.safetensors" in before
    small(folder, VOCAB, tokenizer=False)
    assert drafter_identity(str(folder), decoder) != before
    spec = draft_spec(resolve_drafter(folder))
    assert spec is not None and len(spec.layers) == 2 and draft_spec(resolve_drafter("suffix")) is None
    budget = specdec.load(backbone, folder, memory_budget="64GB", device="cpu")
    conversation = budget.conversations.acquire(prompt(20)[0], 100)
    assert conversation.reserved == text_bytes(budget.decoder.spec, 100, torch.float32, spec)
