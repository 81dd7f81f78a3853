"""What adapters' files say: settings of PEFT that count, names of modules, a sentence for what does not fit."""

from __future__ import annotations

import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specdec.model.adapters.build import add_adapters, check_adapters
from specdec.model.adapters.files import open_adapter
from specdec.model.adapters.peft_config import PeftConfig
from tests.support.adapters.tiny_adapter import (
    ALPHA,
    RANK,
    make_gguf,
    make_peft,
    modules,
    parts,
    rank_stabilised,
    tiny_spec,
)
from tests.support.tiny_decoder import of

FAMILY = "gemma3"
Q0, V1 = "layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj"


def some(*ends: str, rank: int = RANK, family: str = FAMILY) -> dict[str, Any]:
    return parts({name: shape for name, shape in modules(family).items() if name.endswith(ends)}, 1, rank)


def scales(folder: Path, family: str = FAMILY) -> dict[str, float]:
    file = open_adapter(folder, tiny_spec(family))
    return {name.removesuffix(".weight"): pair.scale for name, pair in file.parts.items()}


def test_scales_are_those_of_peft(tmp_path: Path) -> None:
    plain = make_peft(tmp_path / "plain", low_rank=some("q_proj", "v_proj"))
    assert {*scales(plain).values()} == {ALPHA / RANK}
    assert {*scales(make_peft(tmp_path / "rs", low_rank=some("q_proj"), use_rslora=True)).values()} == {
        rank_stabilised(RANK)
    }
    low_rank = {**some("q_proj"), **some("v_proj", rank=6)}
    told = {
        "rank_pattern": {"v_proj": 6},
        "alpha_pattern": {"layers.1.self_attn.v_proj": 30, r"layers\.\d\..*q_proj": 8},
    }
    found = scales(make_peft(tmp_path / "patterns", low_rank=low_rank, **told))
    assert found[Q0] == 8 / RANK and found[V1] == 30 / 6 and found["layers.0.self_attn.v_proj"] == ALPHA / 6


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", "language_model.model.", "language_model."])
def test_modules_are_those_of_text_models_and_of_models_of_more(prefix: str, tmp_path: Path) -> None:
    regex = r".*(?:language_model|model)\..*(?:q_proj|down_proj)"
    folder = make_peft(tmp_path / "a", low_rank=some("q_proj", "down_proj"), prefix=prefix, target_modules=regex)
    assert sorted(scales(folder)) == sorted(some("q_proj", "down_proj"))
    tensors = load_file(folder / "adapter_model.safetensors")
    renamed = {name.replace(".weight", ".default.weight"): tensor for name, tensor in tensors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")  # as training loops save it
    assert sorted(scales(folder)) == sorted(some("q_proj", "down_proj"))
    assert scales(folder / "adapter_config.json") == scales(folder)


def test_parts_that_a_text_model_has_not_are_passed_over(tmp_path: Path) -> None:
    tower = {
        f"base_model.model.model.vision_tower.layers.0.q_proj.lora_{part}.weight": torch.randn(4, 4) for part in "AB"
    }
    folder = make_peft(tmp_path / "a", low_rank=some("q_proj"), more=tower)
    assert sorted(scales(folder)) == sorted(some("q_proj"))
    shared = "base_model.model.model.layers.5.self_attn.k_proj.lora_"  # its K and V are another layer's
    more = {f"{shared}A.weight": torch.randn(4, 64), f"{shared}B.weight": torch.randn(32, 4)}
    folder = make_peft(tmp_path / "b", "gemma4-e2b", low_rank=some("q_proj", family="gemma4-e2b"), more=more)
    assert f"{shared}A.weight" not in scales(folder, "gemma4-e2b")


@pytest.mark.parametrize(
    ("settings", "module", "adapted"),
    [
        ({"target_modules": ["q_proj"]}, "model.layers.0.self_attn.q_proj", True),
        ({"target_modules": ["q_proj"]}, "model.layers.0.self_attn.xq_proj", False),
        ({"target_modules": "all-linear"}, "model.layers.0.mlp.up_proj", True),
        ({"target_modules": "all-linear"}, "lm_head", False),
        ({"target_modules": r".*\.layers\.0\..*_proj"}, "model.layers.1.mlp.up_proj", False),
        ({"target_modules": ["q_proj"], "layers_to_transform": [1, 2]}, "model.layers.0.self_attn.q_proj", False),
        ({"target_modules": ["q_proj"], "layers_to_transform": 2}, "model.layers.2.self_attn.q_proj", True),
        (
            {"target_modules": ["q_proj"], "layers_to_transform": [2], "layers_pattern": "blocks"},
            "model.layers.2.self_attn.q_proj",
            False,
        ),
        ({"target_modules": ["q_proj"], "exclude_modules": ["layers.0.self_attn.q_proj"]}, "model." + Q0, False),
        ({"target_modules": ["q_proj"], "exclude_modules": r".*\.1\..*"}, "model." + Q0, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["q_proj"]}, "model." + Q0, False),
    ],
)
def test_which_modules_are_adapted(settings: dict[str, Any], module: str, adapted: bool, tmp_path: Path) -> None:
    make_peft(tmp_path, low_rank=some("q_proj"), **settings)
    assert PeftConfig(tmp_path).adapts(module) is adapted


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, r"DoRA \(use_dora\).*not supported: merge it"),
    "aLoRA": ({"alora_invocation_tokens": [1, 2]}, "aLoRA"),
    "another kind": ({"peft_type": "LOHA"}, "'LOHA'; only LoRA"),
    "biases": ({"bias": "all"}, "trained biases"),
    "its own biases": ({"lora_bias": True}, "lora_bias"),
    "experts": ({"target_parameters": ["experts.gate_up_proj"]}, "target_parameters"),
    "tokens": ({"trainable_token_indices": [3]}, "trained tokens"),
    "copies": ({"layer_replication": [[0, 2]]}, "replicated layers"),
    "PiSSA": ({"init_lora_weights": "pissa_niter_4"}, "changed the weights when it began"),
    "no rank": ({"r": 0}, "'r' must be a whole number from 1"),
    "a rank in words": ({"r": "four"}, "'r' must be a whole number"),
    "another rank": ({"r": 8}, "q_proj has 4 ranks in the file and 8 by"),
    "a pattern that is none": ({"target_modules": "((q_proj"}, "is no regular expression"),
    "a pattern without end": ({"target_modules": r"(?:.|.)" * 26 + r"_\d"}, "too involved"),
    "a pattern of many choices": ({"rank_pattern": {r"(.|.)" * 25 + r"o\d": 4}}, "too involved"),
    "a pattern that is copied": ({"alpha_pattern": {"((a{1000}){1000}){1000}": 4}}, "too involved"),
    "a setting inside of a pattern": ({"modules_to_save": ["(?i)lm_head"]}, "too involved"),
    "a group that may be empty": ({"layers_to_transform": [1], "layers_pattern": "(x)?layers"}, "has a group"),
    "other modules": ({"target_modules": ["v_proj"]}, "the file adapts model.layers.0.self_attn.q_proj, which"),
    "more modules": ({"target_modules": ["q_proj", "k_proj"]}, "does not have: model.layers.0.self_attn.k_proj"),
    "more layers": ({"layers_to_transform": [1]}, "the file adapts model.layers.0.self_attn.q_proj, which"),
    "saved modules": ({"modules_to_save": ["lm_head"]}, "modules_to_save names 'lm_head'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_settings_that_do_not_do_are_named(case: str, tmp_path: Path) -> None:
    settings, message = REFUSED[case]
    folder = make_peft(tmp_path / "bad", low_rank=some("q_proj"), **settings)
    began = time.process_time()
    with pytest.raises(ValueError, match=message) as caught:
        open_adapter(folder, tiny_spec(FAMILY))
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert time.process_time() - began < 1


def extra(**named: tuple[int, ...]) -> dict[str, torch.Tensor]:
    return {
        f"base_model.model.model.{name.replace('__', '.')}.weight": torch.ones(shape, dtype=torch.float32)
        for name, shape in named.items()
    }


MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "a module of another model": (
        {"more": extra(layers__0__attn__c_proj__lora_A=(4, 64), layers__0__attn__c_proj__lora_B=(64, 4))},
        "layers.0.attn.c_proj, which is none of the matrices of this model",
    ),
    "more layers": (
        {"more": extra(layers__9__mlp__up_proj__lora_A=(4, 64), layers__9__mlp__up_proj__lora_B=(96, 4))},
        "layers.9.mlp.up_proj.*3 layers",
    ),
    "half of a pair": ({"more": extra(layers__0__mlp__up_proj__lora_A=(4, 64))}, "has lora_A and no lora_B"),
    "a vector": (
        {"more": extra(layers__0__mlp__up_proj__lora_A=(4,), layers__0__mlp__up_proj__lora_B=(96, 4))},
        "do not belong together",
    ),
    "two ranks": (
        {"more": extra(layers__0__mlp__up_proj__lora_A=(4, 64), layers__0__mlp__up_proj__lora_B=(96, 5))},
        "do not belong together",
    ),
    "another width": (
        {"more": extra(layers__0__mlp__up_proj__lora_A=(4, 128), layers__0__mlp__up_proj__lora_B=(96, 4))},
        r"layers.0.mlp.up_proj is \[96, 64\], and the adapter's is \[96, 128\]",
    ),
    "another vocabulary": (
        {"more": extra(embed_tokens=(300, 64)), "modules_to_save": ["embed_tokens"]},
        r"embed_tokens is \[256, 64\], and the adapter's is \[300, 64\]",
    ),
    "a norm": ({"more": extra(norm=(64,)), "modules_to_save": ["norm"]}, "norm, which is none of the matrices"),
    "an embedding": (
        {"more": extra(embed_tokens__lora_A=(4, 64), embed_tokens__lora_B=(256, 4))},
        "adapts the embedding",
    ),
    "DoRA without saying so": (
        {"more": extra(layers__0__mlp__up_proj__lora_magnitude_vector=(96,))},
        "is of DoRA",
    ),
    "not a number": (
        {
            "more": {
                name: tensor * float("nan")
                for name, tensor in extra(
                    layers__0__mlp__up_proj__lora_A=(4, 64), layers__0__mlp__up_proj__lora_B=(96, 4)
                ).items()
            }
        },
        "not finite",
    ),
}


@pytest.mark.parametrize("case", MISFITS)
def test_tensors_that_do_not_fit_are_named(case: str, tmp_path: Path) -> None:
    given, message = MISFITS[case]
    targets = "all-linear" if "layers" in str(given) and case != "a norm" else ["q_proj"]
    low_rank = {} if targets == "all-linear" else some("q_proj")
    if targets == "all-linear":  # everything that the settings name, but for what is damaged
        low_rank = {name: pair for name, pair in parts(modules(FAMILY), 1).items() if name != "layers.0.mlp.up_proj"}
    folder = make_peft(tmp_path / "bad", low_rank=low_rank, **{"target_modules": targets, **given})
    began = time.perf_counter()
    with pytest.raises(ValueError, match=message) as caught:
        add_adapters(of(FAMILY, None), {"bad": folder})
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)
    assert time.perf_counter() - began < 1


def test_an_adapter_of_another_family_is_refused(tmp_path: Path) -> None:
    folder = make_peft(tmp_path / "llama", "llama")
    with pytest.raises(ValueError, match=r"adapts model.layers.3.* \(gemma3_text, 3 layers\).*another model"):
        check_adapters({"llama": folder}, tiny_spec("gemma3"))
    nothing = make_peft(tmp_path / "towers", low_rank={}, more=extra(vision_tower__q_proj__lora_A=(4, 4)))
    with pytest.raises(ValueError, match="adapts nothing of this model"):
        check_adapters({"x": nothing}, tiny_spec("gemma3"))


def cut(file: Path, share: float = 0.5) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "a short file": (lambda folder: cut(folder / "adapter_model.safetensors"), "damaged or incomplete safetensors"),
    "no tensors": (lambda folder: (folder / "adapter_model.safetensors").unlink(), "there is no adapter_model"),
    "a pickle": (
        lambda folder: (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin"),
        "but a pickle, which can run code",
    ),
    "no settings": (lambda folder: (folder / "adapter_config.json").unlink(), "not an adapter: it holds neither"),
    "short settings": (lambda folder: cut(folder / "adapter_config.json"), "cannot be read as JSON"),
    "a list": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "where a JSON object is due"),
    "a model's": (lambda folder: (folder / "adapter_config.json").write_text('{"model_type": "x"}'), "only LoRA"),
    "a length": (
        lambda folder: (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", 1 << 60)),
        "damaged or incomplete",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_folder_is_told_at_once(case: str, tmp_path: Path) -> None:
    damage, message = DAMAGE[case]
    folder = make_peft(tmp_path / "a")
    damage(folder)
    before = sorted(tmp_path.rglob("*"))
    began = time.perf_counter()
    with pytest.raises(ValueError, match=message) as caught:
        add_adapters(of(FAMILY, None), {"a": folder})
    assert time.perf_counter() - began < 1 and str(folder) in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_gguf_adapters_that_do_not_do_are_told(tmp_path: Path) -> None:
    decoder, low_rank = of(FAMILY, None), some("q_proj")

    def refused(message: str, path: Path) -> None:
        with pytest.raises(ValueError, match=message):
            add_adapters(decoder, {"x": path})

    refused("an adapter for 'llama', and the model is 'gemma3'", make_gguf(tmp_path / "a.gguf", arch="llama"))
    refused("of another kind", make_gguf(tmp_path / "b.gguf", **{"general.type": "model"}))
    refused("of another kind", make_gguf(tmp_path / "c.gguf", **{"adapter.type": "control_vector"}))
    refused("aLoRA", make_gguf(tmp_path / "d.gguf", **{"adapter.alora.invocation_tokens": "1"}))
    norm = {**low_rank, "token_embd.weight": parts({"x": (256, 64)}, 1)["x"]}
    refused("adapts the embedding", make_gguf(tmp_path / "e.gguf", low_rank=norm))
    other = {**low_rank, "blk.0.attn_qkv.weight": parts({"x": (64, 64)}, 1)["x"]}
    refused("blk.0.attn_qkv, which is none of the matrices", make_gguf(tmp_path / "f.gguf", low_rank=other))
    short = make_gguf(tmp_path / "g.gguf")
    cut(short, 0.7)
    refused(str(short), short)
    (tmp_path / "h.gguf").write_bytes(b"GGUF" + bytes(40))
    refused("h.gguf", tmp_path / "h.gguf")
    (tmp_path / "words.txt").write_text("hello")
    refused("not an adapter: name a folder", tmp_path / "words.txt")
    refused("there is no such file or folder; an adapter is", tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    refused("not an adapter: it holds neither", tmp_path / "empty")


def test_the_identity_follows_the_numbers_and_the_scale(tmp_path: Path) -> None:
    decoder = of(FAMILY, None)
    files = {
        "a": make_peft(tmp_path / "a", seed=1),
        "same": make_peft(tmp_path / "same", seed=1),
        "numbers": make_peft(tmp_path / "numbers", seed=2),
        "scale": make_peft(tmp_path / "scale", seed=1, lora_alpha=ALPHA + 1),
    }
    add_adapters(decoder, files)
    added = {name: decoder.adapters.of(name) for name in files}
    identities = {name: adapter.identity for name, adapter in added.items() if adapter is not None}
    assert identities["a"] == identities["same"] and len({*identities.values()}) == 3
    assert decoder.adapters.nbytes <= check_adapters(files, decoder.spec)


def test_copies_of_the_models_own_matrices_are_passed_over(tmp_path: Path) -> None:
    # PEFT saves embedding and head of the model beside a low-rank part of either.
    copies = {
        "base_model.model.lm_head.base_layer.weight": torch.ones(256, 64, dtype=torch.float32),
        **extra(embed_tokens=(256, 64)),
    }
    low_rank = parts({"lm_head": (256, 64)}, 2)
    file = open_adapter(make_peft(tmp_path / "a", low_rank=low_rank, more=copies), tiny_spec(FAMILY))
    assert [*file.parts] == ["lm_head.weight"] and not file.replaced
    grown = {**copies, **extra(embed_tokens=(259, 64))}
    with pytest.raises(ValueError, match=r"embed_tokens is \[256, 64\], and the adapter's is \[259, 64\]"):
        open_adapter(make_peft(tmp_path / "b", low_rank=low_rank, more=grown), tiny_spec(FAMILY))
