"""A mixture of experts beside the MLP, as Gemma 4 26B-A4B has it: what transformers makes of the same weights, in every
format and storage; a row alone decides its bits; files that do not fit."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

import specdec
from drafter.config import MTPHeadConfig, head_spec
from eval.synthetic.random_weights import random_blocks
from specdec import kernels
from specdec.drafting.protocol import Drafter, FixedLength, NoDraft
from specdec.drafting.suffix import SuffixDrafter
from specdec.hf import decoder_of
from specdec.model import quantized
from specdec.model.experts import ExpertPages, Experts, Routes
from specdec.model.names import expected_tensors
from specdec.weights.tensors import BlockWeight, DenseWeight, quantize, row_range
from tests.support.decoding import decode, request
from tests.support.tiny import WINDOW, prompt, tiny_model
from tests.support.tiny_decoder import of
from tests.support.tiny_gguf import write_model

FAMILY = "gemma4-moe"


def experts() -> Experts:
    found = decoder_of(tiny_model(FAMILY)).layers[0].experts
    assert found is not None
    return found


def rows(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 64, generator=torch.Generator().manual_seed(seed))


def greedy(model: Any) -> list[int]:
    return model.generate(prompt(20), max_new_tokens=40, do_sample=False)[0].tolist()


def test_routes_are_transformers_own() -> None:
    router, x = tiny_model(FAMILY).model.layers[0].router, rows(50)
    with torch.inference_mode():
        _, weights, ids = router(x)
        ours = experts().route(x)
    assert [sorted(row) for row in ours.ids] == [sorted(row) for row in ids.tolist()]
    torch.testing.assert_close(torch.tensor(ours.weights), weights, rtol=1e-5, atol=1e-6)


def test_of_equal_scores_the_first_experts_are_chosen() -> None:
    with torch.inference_mode():
        ours = experts().route(torch.zeros(2, 64))
    assert ours.ids == [[0, 1, 2]] * 2
    assert ours.weights[0] == pytest.approx([float(scale) / 3 for scale in experts().expert_scale[:3]])


@pytest.mark.parametrize("storage", ["none", "int4", "int8"])
def test_a_row_s_bits_do_not_depend_on_the_other_rows(storage: str) -> None:
    mixture = experts()
    if storage != "none":
        stored = {name: quantize(getattr(mixture, name).tensor, storage) for name in ("gate_up", "down")}
        mixture = replace(mixture, **stored)
    x, dense = rows(40), rows(40, seed=1)
    with torch.inference_mode():
        alone = torch.cat([mixture(x[i : i + 1], dense[i : i + 1]) for i in range(40)])
        for count in (2, 3, 7, 40):
            together = torch.cat([mixture(*pair) for pair in zip(x.split(count), dense.split(count), strict=True)])
            assert torch.equal(together, alone), f"{count} rows"


def test_experts_that_nobody_uses_are_not_read() -> None:
    mixture, x = experts(), rows(2)
    broken = mixture.gate_up.dequantize().clone()
    broken[64:] = torch.nan  # all but the first
    with torch.inference_mode():
        found = replace(mixture, gate_up=DenseWeight(broken)).mix(x, Routes([[0], [0]], [[1.0], [0.5]]))
        assert torch.isfinite(found).all()
        assert torch.equal(found, mixture.mix(x, Routes([[0], [0]], [[1.0], [0.5]])))


@pytest.mark.parametrize("bits", [4, 5, 8])
def test_a_range_of_rows_is_in_the_memory_of_the_whole(bits: int) -> None:
    whole = BlockWeight(random_blocks(96, 64, bits, minimum=bits != 8))
    part = row_range(whole, 32, 64)
    assert part.packed is not None
    assert part.packed.q.untyped_storage().data_ptr() == whole.blocks.q.untyped_storage().data_ptr()
    x = rows(3)
    assert torch.equal(part.linear(x), kernels.block_linear(x, whole.blocks)[:, 32:64])


@pytest.mark.parametrize(
    ("kind", "ollama"), [(Type.F32, False), (Type.F32, True), (Type.Q8_0, False), (Type.Q4_0, True)]
)
def test_a_file_computes_what_transformers_does_with_its_weights(kind: Type, ollama: bool, tmp_path: Path) -> None:
    path, ids = write_model(tmp_path / "m.gguf", FAMILY, kind, ollama=ollama), prompt(60)
    ours = specdec.load(path, drafter=None, quantize="none", device="cpu")
    theirs = tiny_model(FAMILY)
    if kind is not Type.F32:
        theirs = copy.deepcopy(theirs)
        theirs.load_state_dict(dict(ours.named_parameters()), strict=False)
    with torch.inference_mode():
        expected = theirs(ids).logits[0]
    assert float((ours(ids).logits[0] - expected).abs().max() / expected.abs().max()) < 1e-4
    assert greedy(ours) == greedy(theirs)


@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q8_0])
def test_both_names_of_the_experts_lead_to_the_same_model(kind: Type, tmp_path: Path) -> None:
    files = [
        write_model(tmp_path / f"{name}.gguf", FAMILY, kind, ollama=name == "ollama") for name in ("own", "ollama")
    ]
    one, other = (specdec.load(file, drafter=None, device="cpu") for file in files)
    assert torch.equal(one(prompt(30)).logits, other(prompt(30)).logits)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny_model(FAMILY).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


EXPERTS = "model.layers.2.experts"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({f"{EXPERTS}.down_proj": None}, f"1 missing: {EXPERTS}.down_proj [8, 64, 32]"),
        ({f"{EXPERTS}.gate_up_proj": torch.zeros(7, 64, 64)}, "gate_up_proj is [7, 64, 64], needs [8, 64, 64]"),
        ({"model.layers.9.experts.down_proj": torch.zeros(8, 64, 32)}, "1 surplus: model.layers.9.experts.down_proj"),
        ({"model.layers.1.router.proj.weight": torch.zeros(9, 64)}, "router.proj.weight is [9, 64], needs [8, 64]"),
        ({"model.layers.1.router.per_expert_scale": None}, "1 missing: model.layers.1.router.per_expert_scale [8]"),
    ],
)
def test_experts_that_do_not_fit_the_config_are_listed(changes: dict[str, Any], said: str, folder: Path) -> None:
    file = folder / "model.safetensors"
    tensors = {**load_file(file), **changes}
    save_file({name: t for name, t in tensors.items() if t is not None}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match="its tensors do not fit a gemma4_text decoder") as raised:
        specdec.load(folder, device="cpu")
    assert said in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"top_k_experts": 9}, "'top_k_experts' must be a whole number from 1 to 8"),
        ({"num_experts": 0}, "'num_experts' must be a whole number from 1 to 4096"),
        ({"moe_intermediate_size": 40}, "experts with a moe_intermediate_size of 40 are not supported"),
    ],
)
def test_sizes_that_no_mixture_has(changes: dict[str, Any], said: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ValueError, match="config") as raised:
        specdec.load(folder, device="cpu")
    assert said in str(raised.value)


def test_gate_without_up_is_missing_and_surplus(tmp_path: Path) -> None:
    gate = np.zeros((8, 32, 64), dtype=np.float32)
    path = write_model(tmp_path / "m.gguf", FAMILY, Type.F32, extra={"blk.9.ffn_gate_exps.weight": (gate, None)})
    with pytest.raises(ValueError, match=r"1 surplus: blk\.9\.ffn_gate_exps\.weight"):
        specdec.load(path, device="cpu")


def pages_of(model: Any) -> ExpertPages:
    pages = model.decoder.layers[0].experts.pages
    assert pages is not None
    return pages


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No room for half of the experts, and a cache folder of one's own."""
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quantized, "LEAST", 0)
    monkeypatch.setattr(sys.modules["specdec.load"], "experts_in_free_memory", lambda *arguments: 30_000)


@pytest.mark.usefixtures("short")
@pytest.mark.parametrize("kind", [Type.Q4_0, Type.Q8_0])
def test_experts_that_stay_in_a_file_compute_the_same(kind: Type, tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", FAMILY, kind)
    mapped = specdec.load(path, drafter=None, device="cpu")
    pages = pages_of(mapped)
    assert [file.name for file in pages.file.path.parent.glob("*.packed")] == [pages.file.path.name]
    assert set(pages.file.names) == {n for n in expected_tensors(mapped.decoder.spec) if ".experts." in n}
    text, made = greedy(mapped), pages.file.path.stat().st_mtime_ns
    again = specdec.load(path, drafter="suffix", device="cpu")
    assert pages_of(again).file.path.stat().st_mtime_ns == made
    assert greedy(again) == text
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["specdec.load"], "experts_in_free_memory", lambda *arguments: None)
        whole = specdec.load(path, drafter=None, device="cpu")
    assert whole.decoder.layers[0].experts.pages is None
    assert greedy(whole) == text


@pytest.mark.usefixtures("short")
def test_experts_of_a_folder_stay_in_its_quantised_file(folder: Path) -> None:
    mapped = specdec.load(folder, drafter=None, quantize="int4", device="cpu")
    text = greedy(mapped)
    assert pages_of(mapped).limit == 30_000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys.modules["specdec.load"], "experts_in_free_memory", lambda *arguments: None)
        assert greedy(specdec.load(folder, drafter=None, quantize="int4", device="cpu")) == text


@pytest.mark.usefixtures("short")
def test_a_damaged_file_of_experts_is_made_again(tmp_path: Path) -> None:
    path = write_model(tmp_path / "m.gguf", FAMILY, Type.Q4_0)
    model = specdec.load(path, drafter=None, device="cpu")
    text, file = greedy(model), pages_of(model).file.path
    raw = bytearray(file.read_bytes())
    raw[1000] ^= 1
    file.unlink()  # the model that is loaded has the pages of the old one
    file.write_bytes(raw)
    with pytest.warns(UserWarning, match="damaged"):
        assert greedy(specdec.load(path, drafter=None, device="cpu")) == text
    assert greedy(model) == text


@pytest.mark.parametrize("seed", [None, 5], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("storage", "kept"), [("int4", torch.int8), ("mixed", torch.bfloat16)])
def test_drafts_and_other_texts_change_no_text_past_the_window(
    storage: str, kept: torch.dtype, seed: int | None
) -> None:
    decoder, prompts = of(FAMILY, kept, storage), [prompt(length, seed=length)[0] for length in (12, 70)]

    def texts(drafter: Drafter, length: int, together: int) -> dict[int, list[int]]:
        requests = [request(ids, 3 * WINDOW, seed) for ids in prompts]
        ends = decode(decoder, drafter, FixedLength(length), requests, max_batch=together)
        return {end.number: end.row.tolist() for end in ends}

    plain = texts(NoDraft(), 0, 1)
    assert [len(plain[i]) - len(ids) for i, ids in enumerate(prompts)] == [3 * WINDOW] * 2
    for length, together in ((4, 1), (4, 2)):
        assert texts(SuffixDrafter(), length, together) == plain


def test_a_trained_head_for_a_mixture_has_no_experts() -> None:
    spec = decoder_of(tiny_model(FAMILY)).spec
    head = head_spec(MTPHeadConfig.like(spec), spec)
    assert spec.experts is not None and head.text.experts is None
    assert not [name for name in expected_tensors(head.text) if "experts" in name or "router" in name]
