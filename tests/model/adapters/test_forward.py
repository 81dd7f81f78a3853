"""The arithmetic of adapters: transformers with merged weights is the oracle, and every path has the same bits."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from specdec.hf import decoder_of
from specdec.model.adapters.build import add_adapters
from specdec.model.decoder import Decoder
from tests.support.adapters.tiny_adapter import RANK, make_gguf, make_peft, merged, modules, parts, unmerged
from tests.support.native.needs_native import needs_library
from tests.support.tiny import FAMILIES, WINDOW, prompt, tiny_model
from tests.support.tiny_decoder import of, quantised

LENGTH = 5 * WINDOW
# Without gemma4-e4b, the layers of gemma4-e2b twice over: with random adapters in all of them float32 is off by 1e-4.
SHALLOW = tuple(family for family in FAMILIES if family != "gemma4-e4b")
DOUBLE = tuple(family for family in SHALLOW if family != "gemma4-moe")  # transformers' grouped products have no float64
LowRankParts = dict[str, tuple[Tensor, Tensor]]


def states_of(decoder: Decoder, ids: Tensor, rows: int, adapter: str | None = None) -> Tensor:
    cache, found = decoder.new_cache(adapter=adapter), []
    for chunk in ids.split(rows):
        found.append(decoder.forward(chunk, cache).last)
        cache.commit(len(chunk))
    return torch.cat(found)


@pytest.mark.parametrize("family", SHALLOW)
def test_logits_are_those_of_merged_weights(family: str, tmp_path: Path) -> None:
    low_rank = parts(modules(family), 3)
    decoder = decoder_of(tiny_model(family))
    add_adapters(decoder, {"mine": make_peft(tmp_path / "mine", family, low_rank=low_rank)})
    ids = prompt(LENGTH, seed=2)[0]
    with torch.no_grad():
        expected = merged(family, low_rank)(ids[None]).logits[0]
        plain = tiny_model(family)(ids[None]).logits[0]
    bar = 1.5e-4 if family == "gemma4-moe" else 1e-4  # of a mixture: 8.4e-5 from float64 here, 8.8e-5 there
    assert (decoder.logits(states_of(decoder, ids, 16)) - expected).abs().max() < bar
    without = decoder.logits(states_of(decoder, ids, 16, "none"), [""] * len(ids))
    assert (without - plain).abs().max() < bar
    assert (expected - plain).abs().max() > 0.5, "an adapter that changes nothing shows nothing"


def logits_of(
    family: str, low_rank: LowRankParts, scales: dict[str, float], folder: Path
) -> tuple[Tensor, Tensor, Tensor]:
    """Our logits, and those of PEFT's arithmetic in float32 and in float64, all [LENGTH, vocabulary] float64."""
    decoder = decoder_of(tiny_model(family))
    add_adapters(decoder, {"mine": folder})
    ids = prompt(LENGTH, seed=2)[0]
    model = unmerged(family, low_rank, scales)
    with torch.no_grad():
        single = model(ids[None]).logits[0]
        double = model.double()(ids[None]).logits[0]
    assert (single.dtype, double.dtype) == (torch.float32, torch.float64)
    return decoder.logits(states_of(decoder, ids, 16)).double(), single.double(), double


@pytest.mark.parametrize("scale", [0.5, 1.0, 4.0])  # lora_alpha / r of trained adapters
@pytest.mark.parametrize("family", DOUBLE)
def test_logits_are_those_of_low_rank_parts_beside_the_weights(family: str, scale: float, tmp_path: Path) -> None:
    low_rank = parts(modules(family), 3)
    folder = make_peft(tmp_path / "mine", family, low_rank=low_rank, lora_alpha=scale * RANK)
    ours, single, double = logits_of(family, low_rank, dict.fromkeys(low_rank, scale), folder)
    assert (ours - single).abs().max() < 1e-4
    assert (ours - double).abs().max() < 1e-4


@pytest.mark.parametrize("family", DOUBLE)
def test_large_scales_are_as_near_to_float64_as_float32_is(family: str, tmp_path: Path) -> None:
    """rsLoRA with patterns: scales from 6.5 to 16, at which PEFT in float32 and PEFT in float64 may be more than 1e-4
    apart. So the measure is float64, and the bar what float32 itself loses there."""
    low_rank, scales, shapes = LowRankParts(), dict[str, float](), modules(family)
    for name in filter(lambda name: name.endswith(("q_proj", "o_proj", "up_proj", "down_proj")), shapes):
        rank = 6 if name.endswith("q_proj") else 3 if name == "layers.1.mlp.up_proj" else RANK
        low_rank |= parts({name: shapes[name]}, len(scales), rank)
        scales[name] = (32 if name.endswith("o_proj") else 16) / math.sqrt(rank)
    patterns = {"rank_pattern": {"q_proj": 6, r"layers\.1\.mlp\.up_proj": 3}, "alpha_pattern": {"o_proj": 32}}
    settings = {"lora_alpha": 16, "use_rslora": True, **patterns}
    folder = make_peft(tmp_path / "mine", family, low_rank=low_rank, **settings)
    ours, single, double = logits_of(family, low_rank, scales, folder)
    assert (ours - double).norm() < 1.5 * (single - double).norm()
    assert (ours - double).abs().max() < 2e-4


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gemma4"])
def test_a_gguf_adapter_is_its_peft_folder(family: str, tmp_path: Path) -> None:
    decoder, low_rank = of(family, None), parts(modules(family), 4)
    files = {
        "peft": make_peft(tmp_path / "peft", family, low_rank=low_rank),
        "gguf": make_gguf(tmp_path / "any.name", family, low_rank),
        "unscaled": make_gguf(tmp_path / "unscaled.gguf", family, low_rank, alpha=None),
    }
    add_adapters(decoder, files)
    ids = prompt(20, seed=2)[0]
    found = {name: states_of(decoder, ids, 20, name) for name in files}
    assert torch.equal(found["gguf"], found["peft"])
    assert not torch.equal(found["unscaled"], found["peft"])


def head_of(family: str, tmp_path: Path) -> tuple[Decoder, dict[str, tuple[Tensor, Tensor]]]:
    decoder = of(family, None)
    low_rank = parts({"lm_head": decoder.head.shape}, 5)
    add_adapters(decoder, {"head": make_peft(tmp_path / "head", family, low_rank=low_rank)})
    return decoder, low_rank


@pytest.mark.parametrize("family", ["llama", "llama-bias-untied", "gemma4"])
def test_the_output_matrix_may_be_adapted_though_it_is_the_embedding(family: str, tmp_path: Path) -> None:
    decoder, low_rank = head_of(family, tmp_path)
    ids = prompt(20, seed=2)[0]
    states = states_of(decoder, ids, 20)
    with torch.no_grad():
        expected = merged(family, low_rank)(ids[None]).logits[0]
    assert (decoder.logits(states) - expected).abs().max() < 1e-4
    names = ["head", "head", "", "head"] * 5
    mixed = decoder.logits(states, names)
    for i, name in enumerate(names):
        assert torch.equal(mixed[i], decoder.logits(states[i : i + 1], [name])[0])


def test_modules_to_save_replace_the_embedding_the_head_and_matrices(tmp_path: Path) -> None:
    family, generator = "llama", torch.Generator().manual_seed(8)
    model = merged(family, {})
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())  # untied
    more, names = {}, ("model.embed_tokens", "lm_head", "model.layers.1.mlp.up_proj")
    for name in names:
        weight = model.get_submodule(name).weight
        weight.data = torch.randn(weight.shape, generator=generator) * 0.08
        more[f"base_model.model.{name}.weight"] = weight.data.clone()
    saved = ["embed_tokens", "lm_head", "layers.1.mlp.up_proj"]
    low_rank = {"layers.0.self_attn.q_proj": parts(modules(family), 1)["layers.0.self_attn.q_proj"]}
    with torch.no_grad():
        a, b = low_rank["layers.0.self_attn.q_proj"]
        model.model.layers[0].self_attn.q_proj.weight += 3 * (b @ a)
    config = {"modules_to_save": saved, "layers_to_transform": [0], "target_modules": ["q_proj"]}
    folder = make_peft(tmp_path / "whole", family, low_rank=low_rank, more=more, **config)
    ids = prompt(30, seed=2)[0]
    with torch.no_grad():
        expected = model(ids[None]).logits[0]
    decoder = of(family, None)
    add_adapters(decoder, {"whole": folder})
    assert (decoder.logits(states_of(decoder, ids, 30)) - expected).abs().max() < 1e-4
    blocks = of(family, None, "int8")  # whole matrices then go into 8-bit blocks, and layers op by op
    add_adapters(blocks, {"whole": folder})
    adapter = blocks.adapters.of("whole")
    assert adapter is not None and adapter.layers.records is None
    assert blocks.layers[1].up.weight.packed is not None and adapter.layers.layers[1].up.weight.packed is not None
    found = blocks.logits(states_of(blocks, ids, 30))
    assert 0 < (found - expected).norm() < 0.1 * expected.norm()
    assert torch.equal(states_of(blocks, ids, 7), states_of(blocks, ids, 30))


def adapted(family: str, storage: str, tmp_path: Path, kept: torch.dtype | None = None) -> Decoder:
    """A decoder with three adapters: of all matrices, of some with other ranks, and none of whose layers is adapted."""
    made = quantised(family, storage)
    decoder = Decoder(made.spec, made.embedding, made.layers, made.norm, made.head, made.per_layer, kept)
    some = {name: shape for name, shape in modules(family).items() if name.endswith(("v_proj", "k_proj", "down_proj"))}
    other = parts(some, 6, rank=9)
    files = {
        "all": make_peft(tmp_path / "all", family, 5),
        "some": make_peft(tmp_path / "some", family, low_rank=other, r=9),
        "head": make_peft(tmp_path / "head", family, low_rank=parts({"lm_head": made.head.shape}, 7)),
    }
    add_adapters(decoder, files)
    return decoder


@needs_library
@pytest.mark.parametrize("storage", ["int4", "mixed"])
@pytest.mark.parametrize("family", ["llama-bias-untied", "qwen3", "gemma3", "gemma4", "gemma4-e2b", "gemma4-moe"])
def test_one_call_has_the_bits_of_op_by_op(family: str, storage: str, tmp_path: Path) -> None:
    decoder, ids = adapted(family, storage, tmp_path), prompt(LENGTH, seed=4)[0]
    assert decoder.stack.fused is not None
    found = {
        (name, rows): states_of(decoder, ids, rows, name) for name in decoder.adapters.names for rows in (1, 7, 64)
    }
    long = states_of(decoder, ids.repeat(2), 160, "all")  # in pieces, each layer for all rows before the next
    decoder.stack._fused = None
    for name in decoder.adapters.names:
        expected = states_of(decoder, ids, 16, name)
        for rows in (1, 7, 64):
            assert torch.equal(found[name, rows], expected), f"{name}, {rows} rows in a pass"
    assert torch.equal(long, states_of(decoder, ids.repeat(2), 16, "all"))
    assert not torch.equal(found["all", 64], found["some", 64])


@pytest.mark.parametrize("fused", [pytest.param(True, marks=needs_library), False])
@pytest.mark.parametrize("kept", [None, torch.int8])
@pytest.mark.parametrize("family", ["gemma4", "gemma4-e2b"])
def test_texts_with_other_adapters_share_a_pass(
    family: str, kept: torch.dtype | None, fused: bool, tmp_path: Path
) -> None:
    decoder = adapted(family, "int4", tmp_path, kept)
    if not fused:
        decoder.stack._fused = None
    names = ["all", "none", "some", "all", "head"]
    texts = [prompt(40, seed=i)[0] for i in range(len(names))]
    alone = [states_of(decoder, ids, 16, name) for ids, name in zip(texts, names, strict=True)]
    caches = [decoder.new_cache(adapter=name) for name in names]
    found: list[list[Tensor]] = [[] for _ in names]
    at = [0] * len(names)
    for step in range(60):
        rows = [min(1 + (step + 2 * i) % 5, 40 - at[i]) for i in range(len(names))]
        active = [i for i in range(len(names)) if rows[i] > 0]
        if not active:
            break
        pieces = [texts[i][at[i] : at[i] + rows[i]] for i in active]
        states = decoder.forward_many(pieces, [caches[i] for i in active]).split([len(one) for one in pieces])
        for i, one in zip(active, states, strict=True):
            found[i].append(one.last)
            caches[i].commit(rows[i])
            at[i] += rows[i]
    for i, name in enumerate(names):
        assert torch.equal(torch.cat(found[i]), alone[i]), name
