"""The model as clients look at it: parameters, counts, conversions, copies and pickles."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import specdec
from specdec.hf import SpecdecForCausalLM
from tests.support.tiny import FAMILIES, prompt, tiny_model


def loaded(family: str, folder: Path, **how: Any) -> SpecdecForCausalLM:
    tiny_model(family).save_pretrained(folder)
    return specdec.load(folder, drafter="suffix", device="cpu", **how)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> SpecdecForCausalLM:
    return loaded("llama", tmp_path_factory.mktemp("tiny-llama"))


def text(model: SpecdecForCausalLM) -> list[int]:
    return model.generate(prompt(9), max_new_tokens=8, do_sample=False)[0].tolist()  # type: ignore[no-any-return]


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_transformers_parameters(family: str, tmp_path: Path) -> None:
    theirs, mine = tiny_model(family), loaded(family, tmp_path)
    expected, got = dict(theirs.named_parameters()), dict(mine.named_parameters())
    unused = expected.keys() - got.keys()  # k and v of layers that read another layer's
    assert got.keys() <= expected.keys() and all(".self_attn." in name for name in unused)
    for name, weight in got.items():
        torch.testing.assert_close(weight, expected[name], msg=name)
        assert not weight.requires_grad
    left_out = sum(expected[name].numel() for name in unused)
    assert mine.num_parameters() == theirs.num_parameters() - left_out == sum(p.numel() for p in mine.parameters())
    embeddings = sum(p.numel() for name, p in expected.items() if "embed_tokens" in name)
    assert mine.num_parameters(exclude_embeddings=True) == mine.num_parameters() - embeddings
    assert mine.num_parameters(only_trainable=True) == 0


@pytest.mark.parametrize("how", [{}, {"dtype": "bfloat16"}, {"quantize": "int4"}])
def test_the_first_parameter_tells_where_and_what(how: dict[str, Any], tmp_path: Path) -> None:
    model = loaded("gemma3", tmp_path, **how)
    first = next(model.parameters())
    assert first.device == model.device == torch.device("cpu")
    assert first.dtype == model.dtype == (torch.bfloat16 if "dtype" in how else torch.float32)
    assert {p.dtype for p in model.parameters()} == {model.dtype}
    assert model.num_parameters() == tiny_model("gemma3").num_parameters()


def test_embeddings(tmp_path: Path) -> None:
    theirs, mine = tiny_model("gemma3").get_input_embeddings(), loaded("gemma3", tmp_path).get_input_embeddings()
    ids = prompt(6).expand(3, -1)
    torch.testing.assert_close(mine(ids), theirs(ids).detach())  # Gemma scales them
    torch.testing.assert_close(mine.weight, theirs.weight.data)
    assert (mine.num_embeddings, mine.embedding_dim) == (theirs.num_embeddings, theirs.embedding_dim)


def test_conversions_that_change_nothing_are_taken_and_others_refused(model: SpecdecForCausalLM) -> None:
    before = text(model)
    assert model.float() is model and model.cpu() is model and model.to("cpu", torch.float32) is model
    assert model.eval() is model and model.requires_grad_(False) is model
    others = (
        model.half,
        model.bfloat16,
        model.double,
        model.cuda,
        lambda: model.to("meta"),
        lambda: model.type(torch.half),
    )
    for other in (*others, model.cuda):
        with pytest.raises(ValueError, match=r"specdec\.load\(\.\.\., device=\.\.\., dtype=\.\.\.\)"):
            other()
    for change in (
        lambda: model.state_dict(),
        lambda: model.load_state_dict({}),
        lambda: model.save_pretrained("folder"),
        lambda: model.resize_token_embeddings(300),
        lambda: model.set_input_embeddings(nn.Embedding(3, 3)),
    ):
        with pytest.raises(ValueError, match="keep the checkpoint"):
            change()
    with pytest.raises(ValueError, match="does not train"):
        model.requires_grad_()
    with pytest.raises(ValueError, match=r"specdec\.load"):
        SpecdecForCausalLM.from_pretrained("folder")
    model.tie_weights()
    assert text(model) == before


def test_its_representation_says_what_it_is(model: SpecdecForCausalLM) -> None:
    assert repr(model) == (
        "SpecdecForCausalLM(llama, 4 layers, 0 million weights in 1 MB (float32), drafter suffix, context 512, "
        "torch.float32 on cpu)"
    )


def test_compiling_changes_nothing(model: SpecdecForCausalLM) -> None:
    expected, ids = text(model), prompt(5)
    compiled = torch.compile(model)
    assert text(compiled) == expected
    assert torch.equal(compiled(ids).logits, model(ids).logits)
    with pytest.raises(ValueError, match="call generate"):
        model.compile()


@pytest.mark.parametrize("name", ["generate_batch", "init_continuous_batching", "continuous_batching_context_manager"])
def test_continuous_batching_is_refused(model: SpecdecForCausalLM, name: str) -> None:
    with pytest.raises(NotImplementedError, match="one padded batch"):
        getattr(model, name)([[3, 4]])


def test_hooks_on_the_model_are_refused(tmp_path: Path) -> None:
    model = loaded("llama", tmp_path)
    handle = model.register_forward_hook(lambda module, given, out: out)
    with pytest.raises(ValueError, match="has the forward hook"):
        text(model)
    handle.remove()
    model.forward = lambda *given, **more: None
    with pytest.raises(ValueError, match=r"another forward\(\)"):
        text(model)
    del model.forward
    with pytest.raises(ValueError, match="the speculative loop already"):
        model.generate(prompt(4), custom_generate=specdec.speculative)


def test_pickling_is_refused_at_once(model: SpecdecForCausalLM) -> None:
    for thing in (model, model.generate, {"model": [model]}, model.decoder, model.decoder.new_cache):
        with pytest.raises(TypeError, match=r"cannot be pickled.*specdec\.load"):
            pickle.dumps(thing)
    assert text(model)
    assert pickle.loads(pickle.dumps(model.last_stats)).emitted == 8


def test_a_deep_copy_shares_weights_and_nothing_else(model: SpecdecForCausalLM) -> None:
    expected = text(model)
    twin = copy.deepcopy({"model": model})["model"]
    assert twin.decoder is model.decoder
    assert twin.config is not model.config and twin.generation_config is not model.generation_config
    assert twin.conversations is not model.conversations and not twin.conversations.kept
    assert twin.conversations.limit == model.conversations.limit
    twin.generation_config.max_new_tokens = 3
    assert twin.generate(prompt(9), do_sample=False).shape == (1, 12)
    assert text(twin) == expected == text(model)
    assert text(copy.copy(model)) == expected
