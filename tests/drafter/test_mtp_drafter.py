"""The Gemma 4 assistant in the loop: the plain text, the right draft every round; what `load_drafter` refuses."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import specdec
from drafter import MTPDrafter, load_drafter
from drafter.mtp_drafter import MTPProposer
from specdec.cache import KVCache
from specdec.drafting.protocol import Draft
from specdec.engine.sampling import Noise, Warping
from specdec.hf import decoder_of
from specdec.model.decoder import Decoder
from specdec.model.states import States
from specdec.weights.tensors import BlockWeight
from tests.support.tiny import VOCAB, WINDOW, prompt, tiny_model
from tests.support.tiny_assistant import (
    CENTROIDS,
    assistant_config,
    backbone,
    bound,
    prefilled,
    proposed,
    save_assistant,
)


class Recorded(MTPDrafter):
    """Remembers what was asked and answered, of the last text."""

    rounds: list[tuple[list[int], int, Draft]]

    def start(self, cache: KVCache, noise: Noise | None = None) -> RecordedDrafts:
        self.rounds = []
        return RecordedDrafts(super().start(cache, noise), self.rounds)


class RecordedDrafts:
    name, max_draft = Recorded.name, Recorded.max_draft

    def __init__(self, proposer: MTPProposer, rounds: list[tuple[list[int], int, Draft]]) -> None:
        self.proposer, self.rounds = proposer, rounds

    def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
        draft = self.proposer.propose(tokens, states, k)
        self.rounds.append((list(tokens), k, draft))
        return draft


def engine(decoder: Decoder, family: str, drafter: MTPDrafter) -> specdec.SpecdecForCausalLM:
    model = tiny_model(family)
    config = type(model.config).from_dict(model.config.to_dict())  # as from a file: without what the class noted in it
    return specdec.SpecdecForCausalLM(decoder, config, model.generation_config, drafter)


@pytest.mark.parametrize("head", [{}, CENTROIDS], ids=["dense", "centroids"])
@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("family", ["gemma4_unified", "gemma4-e2b", "gemma4-e4b", "gemma4-moe"])
def test_text_is_the_plain_text(family: str, sample: bool, head: dict[str, Any], tmp_path: Path) -> None:
    drafter = load_drafter(save_assistant(tmp_path, family, **head))
    model = engine(backbone(family), family, drafter)
    settings = {"max_new_tokens": 5 * WINDOW, "do_sample": sample, "temperature": 0.7 if sample else None}
    ids = prompt(7)
    plain = model.generate(ids, speculation=False, seed=3, **settings)
    assert plain.shape[1] == 7 + 5 * WINDOW
    for length in (1, 3, 8, "adaptive"):
        text = model.generate(ids, draft_length=length, seed=3, **settings)
        assert torch.equal(text, plain), f"draft length {length} changes the text"
        assert list(model.last_stats.draft_sources) == ["mtp"]
        assert model.last_stats.drafted > 0


def test_every_draft_of_a_text_is_that_of_a_fresh_cache(tmp_path: Path) -> None:
    """Also after rounds in which drafts were accepted: position, state and keys are those of the committed text."""
    decoder = backbone("gemma4_unified")
    folder = save_repeating_assistant(tmp_path)
    drafter = Recorded(load_drafter(folder)._build)
    model = engine(decoder, "gemma4_unified", drafter)
    model.generate(
        prompt(7), draft_length=3, max_new_tokens=5 * WINDOW, do_sample=True, temperature=0.2, top_k=2, seed=1
    )
    assert model.last_stats.accepted > 5
    assert model.last_stats.accepted < model.last_stats.drafted
    rounds = drafter.rounds
    for tokens, k, draft in rounds[::3]:
        ids = torch.tensor(tokens)
        cache, states = prefilled(decoder, ids[:-1])
        assert proposed(drafter, cache, ids, states, k, Noise(1, Warping(0.2, top_k=2))).tokens == draft.tokens


def save_repeating_assistant(folder: Path) -> Path:
    """An assistant that mostly proposes what the tiny backbone's embedding is nearest to: the pending token again."""
    save_assistant(folder, "gemma4_unified", text={"hidden_size": 64})
    tensors = load_file(folder / "model.safetensors")
    embedding = tiny_model("gemma4_unified").get_input_embeddings().weight.detach()
    tensors["model.embed_tokens.weight"] = embedding.clone()
    tensors["pre_projection.weight"] = torch.cat((torch.eye(64), torch.zeros(64, 64)), dim=1)
    tensors["model.norm.weight"] = torch.ones(64)
    for name, tensor in tensors.items():
        if name.endswith(("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")):
            tensors[name] = tensor * 0.05
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("quantize", [None, "int4"])
def test_load_takes_the_folder_of_an_assistant(dtype: torch.dtype, quantize: str | None, tmp_path: Path) -> None:
    tiny_model("gemma4_unified").save_pretrained(tmp_path / "backbone")
    folder = save_assistant(tmp_path / "assistant", "gemma4_unified")
    model = specdec.load(tmp_path / "backbone", str(folder), dtype=dtype, quantize=quantize, device="cpu")
    assistant = model.drafter._assistant
    assert assistant.stack.norm.dtype == dtype
    in_blocks = isinstance(assistant.head.weight, BlockWeight)
    assert in_blocks == (quantize is not None), "a quantised backbone's drafter takes 8 bits"
    how = {"max_new_tokens": 30, "do_sample": False, "draft_length": 3}
    text = [model.generate(prompt(5), **how, speculation=s) for s in (False, True)]
    assert torch.equal(*text)
    assert model.last_stats.drafted > 0


def test_storage_of_its_own(tmp_path: Path) -> None:
    decoder = backbone("gemma4_unified")
    folder = save_assistant(tmp_path, "gemma4_unified", **CENTROIDS)
    sizes = {}
    for storage in ("none", "int8", "int4"):
        drafter = load_drafter(folder, storage)
        drafter.bind(decoder)
        assert drafter._assistant is not None
        sizes[storage] = drafter._assistant.nbytes
        cache, states = prefilled(decoder, prompt(20)[0, :-1])
        assert len(proposed(drafter, cache, prompt(20)[0], states, 5).tokens) == 5
    assert sizes["int4"] < sizes["int8"] < sizes["none"] / 3


def test_the_same_backbone_wrapped_anew_needs_no_second_reading(tmp_path: Path) -> None:
    drafter, assistant = bound(save_assistant(tmp_path, "gemma4_unified"), backbone("gemma4_unified"))
    other = backbone("gemma4_unified")
    drafter.bind(other)
    assert drafter._assistant is assistant
    assert drafter._backbone is other


# What is refused


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"text": {"vocab_size": 128}}, "vocabulary is 128, the backbone's 256"),
        ({"backbone_hidden_size": 48}, "backbone_hidden_size is 48, the backbone's 64"),
        ({"text": {"num_key_value_heads": 4}}, "kv_heads of sliding_attention is 4, the backbone's 2"),
        ({"text": {"head_dim": 8}}, "head_dim of sliding_attention is 8, the backbone's 16"),
        ({"text": {"global_head_dim": 16}}, "head_dim of full_attention is 16, the backbone's 32"),
        ({"text": {"sliding_window": 32}}, "window of sliding_attention is 32, the backbone's 16"),
        ({**CENTROIDS, "num_centroids": 100}, "num_centroids=100"),
        ({**CENTROIDS, "centroid_intermediate_top_k": 33}, "centroid_intermediate_top_k=33"),
    ],
)
def test_another_backbones_assistant_is_refused(change: dict[str, Any], complaint: str, tmp_path: Path) -> None:
    save_assistant(tmp_path, "gemma4_unified")
    assistant_config("gemma4_unified", **change).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=complaint):
        load_drafter(tmp_path).bind(backbone("gemma4_unified"))


def test_a_backbone_without_such_layers_is_refused(tmp_path: Path) -> None:
    drafter = load_drafter(save_assistant(tmp_path, "gemma4_unified"))
    with pytest.raises(ValueError, match="sliding_attention layers, of which the backbone has none"):
        drafter.bind(decoder_of(tiny_model("llama")))


def test_every_wrong_tensor_is_listed(tmp_path: Path) -> None:
    save_assistant(tmp_path, "gemma4_unified", **CENTROIDS)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["post_projection.weight"]
    del tensors["masked_embedding.centroids.weight"]
    tensors["pre_projection.weight"] = torch.zeros(32, 64)
    tensors["mystery.weight"] = torch.zeros(1)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="2 missing: post_projection") as error:
        load_drafter(tmp_path).bind(backbone("gemma4_unified"))
    for complaint in ("masked_embedding.centroids", "pre_projection.weight is [32, 64], needs [32, 128]", "mystery"):
        assert complaint in str(error.value)


def test_a_damaged_ordering_is_refused(tmp_path: Path) -> None:
    save_assistant(tmp_path, "gemma4_unified", **CENTROIDS)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["masked_embedding.token_ordering"][3] = VOCAB
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not list every token once"):
        load_drafter(tmp_path).bind(backbone("gemma4_unified"))


def test_what_is_not_an_assistant_is_refused(tmp_path: Path) -> None:
    tiny_model("llama").save_pretrained(tmp_path / "llama")
    with pytest.raises(ValueError, match=r"'llama' checkpoint is not a drafter.*gemma4_unified_assistant"):
        load_drafter(tmp_path / "llama")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"no readable config\.json"):
        load_drafter(tmp_path / "empty")
    (tmp_path / "file.gguf").write_bytes(b"GGUF")
    with pytest.raises(ValueError, match=r"file\.gguf: the download is incomplete"):
        load_drafter(tmp_path / "file.gguf")
    with pytest.raises(ValueError, match="no such file or folder"):
        load_drafter(tmp_path / "nothing")
    broken = save_assistant(tmp_path / "broken", "gemma4_unified")
    config = json.loads((broken / "config.json").read_text())
    config["text_config"]["num_attention_heads"] = "many"
    (broken / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"cannot be read.*num_attention_heads"):
        load_drafter(broken)
