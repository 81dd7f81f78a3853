"""Loading: what a folder or a file must hold, and what a bad one is told. Every refusal comes in under a second."""

from __future__ import annotations

import json
import time
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file, save_file

import specdec
from specdec.model.families import decoder_spec
from specdec.model.stack import Stack
from specdec.util.device import resolve_device
from tests.support.stores.gguf_kinds import write_kind
from tests.support.tiny import FAMILIES, prompt, tiny_model
from tests.support.tiny_gguf import write_model


@pytest.mark.parametrize(
    ("given", "instead"),
    [
        ("torch_dtype", "write dtype="),
        ("device_map", 'write device="cpu"'),
        ("trust_remote_code", "code from a model folder is never run"),
        ("load_in_4bit", 'write quantize="int4"'),
    ],
)
def test_arguments_of_from_pretrained_are_answered(folder: Path, given: str, instead: str) -> None:
    assert instead in refusal(folder, **{given: True})


def test_names_that_are_none(folder: Path) -> None:
    assert "the name is empty" in refusal("")
    assert "the name is empty" in refusal(folder, drafter="")
    assert "must be a name or a path, not None" in refusal(None)
    assert "kv_dtype must be" in refusal(folder, kv_dtype="int3")


def test_an_argument_that_nobody_knows_is_a_type_error(folder: Path) -> None:
    with pytest.raises(TypeError, match=r"'quantise'\. Did you mean quantize\?"):
        specdec.load(folder, quantise="int4")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model("gemma3").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refusal(name: Path | str, **settings: Any) -> str:
    """What loading `name` raises, in under a second."""
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r".") as raised:
        specdec.load(name, **{"device": "cpu", **settings})
    assert time.perf_counter() - began < 1.0
    return str(raised.value)


def change(folder: Path, tensors: dict[str, torch.Tensor | None]) -> None:
    """Replace, add or (None) remove tensors of the folder's checkpoint."""
    file = folder / "model.safetensors"
    kept = {**load_file(file), **tensors}
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, file, metadata={"format": "pt"})


def greedy(model: Any, **arguments: Any) -> list[int]:
    return model.generate(prompt(20), max_new_tokens=30, do_sample=False, **arguments)[0].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_saved_folder_generates_transformers_text(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path, max_shard_size="100KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert greedy(specdec.load(tmp_path, device="cpu")) == greedy(tiny_model(family))


def test_a_multimodal_checkpoint_is_read_as_text(tmp_path: Path) -> None:
    from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration

    text = tiny_model("gemma4_unified")
    config = Gemma4UnifiedConfig(
        text_config=text.config.to_dict(),
        vision_config={"mm_embed_dim": 64, "mm_posemb_size": 20, "output_proj_dims": 64},
        audio_config={"audio_embed_dim": 16},
    )
    whole = Gemma4UnifiedForConditionalGeneration(config).float()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.tie_weights()
    whole.generation_config = text.generation_config
    whole.save_pretrained(tmp_path)
    assert greedy(specdec.load(tmp_path, device="cpu")) == greedy(text)


def test_missing_surplus_and_misshapen_tensors_are_all_listed(folder: Path) -> None:
    change(
        folder,
        {
            "model.layers.1.mlp.up_proj.weight": None,
            "model.layers.0.self_attn.q_norm.weight": torch.ones(7),
            "model.layers.9.mlp.up_proj.weight": torch.ones(96, 64),
        },
    )
    assert "1 missing: model.layers.1.mlp.up_proj.weight [96, 64]" in refusal(folder)
    assert "1 misshapen: model.layers.0.self_attn.q_norm.weight is [7], needs [32]" in refusal(folder)
    assert "1 surplus: model.layers.9.mlp.up_proj.weight" in refusal(folder)


def test_a_truncated_checkpoint(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])
    assert "model.safetensors" in refusal(folder)


def test_pickles_are_refused(folder: Path) -> None:
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert "safetensors" in refusal(folder)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, "'gpt2' is not supported; supported are: gemma3_text"),
        ({"model_type": "no_such_thing"}, "supported text architectures are: gemma3_text"),
        ({"model_type": "gemma4_text", "use_bidirectional_attention": "all"}, "makes an encoder of this model"),
        ({"model_type": "llama", "hidden_act": "relu"}, "activation 'relu'"),
    ],
)
def test_unknown_architectures_list_the_known_ones(tmp_path: Path, config: dict[str, Any], message: str) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    assert message in refusal(tmp_path)


def test_nothing_there() -> None:
    assert "smollm2-135m-instruct" in refusal("/no/such/model")


@pytest.mark.parametrize(
    ("architecture", "kind", "message"),
    [
        ("gemma4-assistant", None, "a drafter, which goes with a model: load the model, with drafter= this file"),
        ("clip", None, "an embedder of pictures and sound: name the .gguf file of the model"),
        ("gemma4", "adapter", "an adapter (LoRA), which goes with a model: load the model, with adapter= "),
        ("rwkv7", None, "'rwkv7' is not supported; supported are: gemma3"),
    ],
)
def test_files_that_are_no_models(tmp_path: Path, architecture: str, kind: str | None, message: str) -> None:
    said = refusal(write_kind(tmp_path / "m.gguf", architecture, kind))
    assert message in said and "m.gguf" in said


def test_bad_arguments(folder: Path) -> None:
    assert "quantize" in refusal(folder, quantize="int5")
    assert "device" in refusal(folder, device="abacus")
    assert "dtype" in refusal(folder, dtype="float99")


@pytest.mark.parametrize(("cuda", "mps", "chosen"), [(0, 0, "cpu"), (0, 1, "cpu"), (1, 0, "cuda")])
def test_the_device_that_nobody_named(monkeypatch: pytest.MonkeyPatch, cuda: int, mps: int, chosen: str) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: bool(cuda))
    monkeypatch.setattr("torch.cuda.device_count", lambda: cuda)
    monkeypatch.setattr("torch.backends.mps.is_available", lambda: bool(mps))
    assert resolve_device(None).type == chosen
    if mps:
        assert resolve_device("mps").type == "mps"
    else:
        with pytest.raises(ValueError, match=r"there is no such device here; choose (cuda or )?cpu"):
            resolve_device("mps")


def test_a_model_that_the_interpreter_runs_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    monkeypatch.setattr("specdec.kernels.interpreted", lambda device: True)
    with pytest.warns(UserWarning, match="Triton's interpreter computes, on the CPU.* takes minutes"):
        model = specdec.load(tmp_path, drafter=None, device="cpu")
    assert model.device.type == "cpu"
    monkeypatch.undo()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        specdec.load(tmp_path, drafter=None, device="cpu")


GGUF_FAMILIES = [name for name in FAMILIES if name not in ("llama3-rope", "qwen2-sliding", "qwen3-yarn")]
ATTENTION_SCALE_OF_GGUF = {"gemma3"}  # the file cannot say query_pre_attn_scalar; published models use the head size


@pytest.mark.parametrize("family", GGUF_FAMILIES)
def test_a_gguf_of_every_family_computes_what_its_folder_does(family: str, tmp_path: Path) -> None:
    model, ids = tiny_model(family), prompt(40)
    ours = specdec.load(write_model(tmp_path / "m.gguf", family, GGMLQuantizationType.F32), device="cpu")
    expected = specdec.hf.decoder_of(model)
    if family in ATTENTION_SCALE_OF_GGUF:
        old = expected.stack
        expected.stack = Stack([_rescaled(layer) for layer in old.layers], old.stores, old.norm, old.eps)
    cache = expected.new_cache()
    torch.testing.assert_close(
        ours(ids).logits[0], expected.logits(expected.forward(ids[0], cache).last), rtol=1e-4, atol=1e-4
    )


def _rescaled(layer: Any) -> Any:
    from dataclasses import replace

    return replace(layer, scale=layer.spec.head_dim**-0.5)


def test_llama3_rope_divisors(tmp_path: Path) -> None:
    spec = decoder_spec(tiny_model("llama3-rope").config)
    plain = decoder_spec(tiny_model("llama").config)
    divisors = torch.tensor(plain.ropes["full_attention"].frequencies) / torch.tensor(
        spec.ropes["full_attention"].frequencies
    )
    from specdec.model.gguf_config import with_rope_divisors

    divided = with_rope_divisors(plain, divisors).ropes["full_attention"].frequencies
    assert divided == pytest.approx(spec.ropes["full_attention"].frequencies)
    with pytest.raises(ValueError, match="rope_freqs"):
        with_rope_divisors(plain, divisors[:3])


@pytest.mark.parametrize("kind", [GGMLQuantizationType.Q4_0, GGMLQuantizationType.Q8_0])
def test_a_quantised_gguf_stays_quantised(kind: GGMLQuantizationType, tmp_path: Path) -> None:
    file = write_model(tmp_path / "m.gguf", "llama", kind)
    kept, expanded = specdec.load(file, device="cpu"), specdec.load(file, device="cpu", quantize="none")
    assert kept.get_memory_footprint() < 0.45 * expanded.get_memory_footprint()
    ids = prompt(50)
    error = (kept(ids).logits - expanded(ids).logits).norm() / expanded(ids).logits.norm()
    assert 0 < error < 0.05  # activations take 8 bits
    assert greedy(kept) == greedy(kept, speculation=False)


def test_a_gguf_without_what_its_architecture_needs(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tensor("token_embd.weight", np.zeros((32, 32), dtype=np.float32))
    writer.add_embedding_length(32)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "llama.block_count" in refusal(tmp_path / "m.gguf")


def test_a_gguf_of_an_unknown_architecture(tmp_path: Path) -> None:
    writer = GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((32, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "'mamba' is not supported; supported are: gemma3, gemma4, llama" in refusal(tmp_path / "m.gguf")
