"""The experts of folders that other programs quantised: a matrix for each of them, or MLX's stacks."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import specdec
from eval.synthetic.packed.folders import WEIGHTS, write_packed
from specdec.memory.plan import loaded_bytes
from specdec.open import open_checkpoint
from tests.support.tiny import WINDOW, prompt, tiny_model

pytestmark = pytest.mark.filterwarnings("ignore:.*bits a weight in memory")
FAMILY = "gemma4-moe-wide"
ONES = ["ct-g32", "ct-w8", "awq", "gptq", "nf4", "ct-nvfp4", "fp8-row"]
STACKS = ["mlx-4", "mlx-8", "mlx-mxfp4", "mlx-nvfp4"]
CASES = [*(("ones", format) for format in ONES), *(("stacks", format) for format in STACKS)]
EXPERTS = re.compile(r"^(.*\.experts\.)(gate_up|down)_proj$")


def split(name: str, tensor: Tensor, how: str) -> dict[str, Tensor]:
    """A tensor of transformers under the names that other programs have for its parts."""
    found = EXPERTS.match(name)
    if found is None:
        return {name: tensor}
    gate, up = tensor.chunk(2, dim=1)
    matrices = {"gate": gate, "up": up} if found[2] == "gate_up" else {"down": tensor}
    if how == "stacks":
        return {f"{found[1]}switch_glu.{kind}_proj.weight": each.contiguous() for kind, each in matrices.items()}
    return {
        f"{found[1]}{i}.{kind}_proj.weight": one.contiguous()
        for kind, each in matrices.items()
        for i, one in enumerate(each)
    }


def save_tiny(folder: Path, how: str) -> Path:
    """The tiny mixture with its experts stored `how`."""
    tiny_model(FAMILY).save_pretrained(folder)
    stored = load_file(folder / WEIGHTS)
    save_file(
        {part: each for name, tensor in stored.items() for part, each in split(name, tensor, how).items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    return folder


def gather(floats: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    """Transformers' tensors of the floats that `write_packed` returns."""
    found: dict[str, Tensor] = {}
    for name, tensor in tiny_model(FAMILY).state_dict().items():
        parts = [floats[part] for part in split(name, tensor, how) if part in floats]
        if EXPERTS.match(name) is None:
            found |= {name: parts[0]} if parts else {}
            continue
        columns = torch.stack(parts).view(-1, *tensor.shape[:1], *parts[0].shape[-2:])  # [gate and up, E, width, K]
        found[name] = columns.transpose(0, 1).reshape(tensor.shape)
    return found


@pytest.mark.parametrize(("how", "format"), CASES)
def test_logits_are_those_of_transformers_with_the_same_numbers(how: str, format: str, tmp_path: Path) -> None:
    floats = write_packed(save_tiny(tmp_path / "floats", how), tmp_path / "packed", format)
    theirs = copy.deepcopy(tiny_model(FAMILY))
    changed = gather(floats, how)
    assert not theirs.load_state_dict(changed, strict=False).unexpected_keys
    first = "model.layers.0.experts.gate_up_proj"
    assert not torch.equal(changed[first], tiny_model(FAMILY).state_dict()[first]), "the experts are quantised"
    ours = specdec.load(tmp_path / "packed", drafter=None, quantize="none", device="cpu")
    ids = prompt(3 * WINDOW)
    with torch.inference_mode():
        expected, logits = theirs(ids).logits, ours(ids).logits
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize(("how", "format"), [("ones", "ct-g32"), ("stacks", "mlx-4"), ("ones", "nf4")])
def test_experts_stay_in_blocks_are_counted_and_drafts_change_no_token(how: str, format: str, tmp_path: Path) -> None:
    write_packed(save_tiny(tmp_path / "floats", how), tmp_path / "packed", format)
    model = specdec.load(tmp_path / "packed", drafter=str(tmp_path / "packed"), device="cpu")  # it drafts for itself
    experts = model.decoder.layers[0].experts
    assert experts.gate_up.packed is not None and experts.down.packed is not None
    spec, source, *_ = open_checkpoint(tmp_path / "packed")
    assert loaded_bytes(spec, source, None, torch.float32) == model.decoder.nbytes
    ids = prompt(WINDOW)
    for sampled in ({"do_sample": False}, {"do_sample": True, "temperature": 0.7, "seed": 3}):
        plain, drafted = (
            model.generate(ids, max_new_tokens=2 * WINDOW, draft_length=3, speculation=speculation, **sampled)
            for speculation in (False, True)
        )
        assert torch.equal(plain, drafted)
        assert model.last_stats.drafted > 0


@pytest.mark.parametrize("how", ["ones", "stacks"])
def test_experts_in_floats_are_those_of_transformers(how: str, tmp_path: Path) -> None:
    ids = prompt(40)
    with torch.inference_mode():
        logits = specdec.load(save_tiny(tmp_path / "floats", how), drafter=None, device="cpu")(ids).logits
        expected = tiny_model(FAMILY)(ids).logits
    assert float((logits - expected).abs().max() / expected.abs().max()) < 1e-4


@pytest.mark.parametrize("storage", ["int4", "int8"])
@pytest.mark.parametrize("trained", ["3.up", "3.down"])
def test_one_matrix_that_was_trained_for_4_bits_among_floats(trained: str, storage: str, tmp_path: Path) -> None:
    """Alone it would take blocks of another kind than the others."""
    folder = save_tiny(tmp_path / "floats", "ones")
    stored, name = load_file(folder / WEIGHTS), f"model.layers.1.experts.{trained}_proj.weight"
    generator = torch.Generator().manual_seed(3)
    stored[name] = torch.randint(-8, 8, stored[name].shape, generator=generator, dtype=torch.int64).float() * 0.01
    save_file(stored, folder / WEIGHTS, metadata={"format": "pt"})
    model = specdec.load(folder, drafter=None, quantize=storage, device="cpu")
    spec, source, *_ = open_checkpoint(folder)
    assert loaded_bytes(spec, source, storage, torch.float32) == model.decoder.nbytes
    experts = model.decoder.layers[1].experts
    gate, up = experts.gate_up.dequantize().view(8, 2, 64, 64)[3]
    found = {"3.up": up, "3.down": experts.down.dequantize().view(8, 64, 64)[3]}[trained]
    assert float((found - stored[name]).norm() / stored[name].norm()) < (0.1 if storage == "int4" else 0.01)
    own = stored["model.layers.1.experts.3.gate_proj.weight"]
    assert float((gate - own).norm() / own.norm()) < (0.1 if storage == "int4" else 0.01)


def test_a_small_folder_keeps_its_experts_in_a_file_too_where_memory_is_short(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    write_packed(save_tiny(tmp_path / "floats", "ones"), tmp_path / "packed", "ct-g32")
    texts = []
    for limit in (None, 0):
        monkeypatch.setattr(sys.modules["specdec.load"], "experts_in_free_memory", lambda *_, limit=limit: limit)
        model = specdec.load(tmp_path / "packed", drafter=None, device="cpu")
        pages = model.decoder.layers[0].experts.pages
        assert (None if pages is None else pages.limit) == limit
        texts.append(model.generate(prompt(20), max_new_tokens=WINDOW, do_sample=False))
    assert torch.equal(*texts)


def test_an_expert_that_is_missing_and_one_of_another_type_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    write_packed(save_tiny(tmp_path / "floats", "ones"), folder, "ct-g32")
    stored = load_file(folder / WEIGHTS)
    stem = "model.layers.1.experts.5.up_proj."
    up = tiny_model(FAMILY).state_dict()["model.layers.1.experts.gate_up_proj"][5].chunk(2)[1]
    left = {name: tensor for name, tensor in stored.items() if not name.startswith(stem)}
    save_file(left, folder / WEIGHTS)
    for budget in (None, "8GB"):
        with pytest.raises(ValueError, match=r"1 missing: model\.layers\.1\.experts\.gate_up_proj .* surplus"):
            specdec.load(folder, drafter=None, device="cpu", memory_budget=budget)
    save_file(left | {f"{stem}weight": up.flatten()}, folder / WEIGHTS)  # no matrix
    with pytest.raises(ValueError, match=r"1 missing: model\.layers\.1\.experts\.gate_up_proj"):
        specdec.load(folder, drafter=None, device="cpu")
    save_file(left | {f"{stem}weight": up.contiguous()}, folder / WEIGHTS)
    with pytest.raises(ValueError, match=r"layers\.1\.experts\.0\.gate_proj.*different types.*all experts in one"):
        specdec.load(folder, drafter=None, device="cpu")
