"""Embedders from disk: safetensors, GGUF with an mmproj file beside it, and models without one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file
from torch import Tensor

import specdec
from specdec.hf import decoder_of
from specdec.memory.plan import loaded_bytes
from specdec.model import quantized
from specdec.model.decoder import Decoder
from specdec.open import open_checkpoint
from specdec.weights.hub.paths import model_path
from tests.support.media.tiny_media import FRAME, PATCH, SPELLED, TOKENS, tiny_media_model, write_mmproj
from tests.support.tiny import VOCAB
from tests.support.tiny_gguf import write_model

VOCABULARY = [SPELLED.get(i, f"word{i}") for i in range(VOCAB)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("media")
    tiny_media_model().save_pretrained(path)
    return path


def rows(decoder: Decoder) -> tuple[Tensor, Tensor]:
    """Soft tokens of one picture and one clip."""
    assert decoder.media is not None
    generator = torch.Generator().manual_seed(2)
    patches, frames = torch.rand(12, PATCH, generator=generator), torch.randn(5, FRAME, generator=generator)
    at = torch.stack((torch.arange(12) % 4, torch.arange(12) // 4), dim=1)
    return decoder.media.patches(patches, at), decoder.media.frames(frames)


def error(decoder: Decoder) -> float:
    """The largest relative squared error of the rows, against the model in memory."""
    pairs = zip(rows(decoder), rows(decoder_of(tiny_media_model())), strict=True)
    return max(float((ours - theirs).square().sum() / theirs.square().sum()) for ours, theirs in pairs)


@pytest.mark.parametrize(
    ("quantize", "most"), [(None, 0.0), ("none", 0.0), ("int8", 2e-4), ("int4", 2e-4), ("int4-all", 2e-4)]
)
def test_a_folder_has_its_embedder(folder: Path, quantize: specdec.load.Quantize, most: float) -> None:
    model = specdec.load(folder, drafter=None, quantize=quantize, device="cpu")
    assert error(model.decoder) <= most
    spec, source, *_ = open_checkpoint(folder)
    assert loaded_bytes(spec, source, quantize, torch.float32) == model.decoder.nbytes
    text = sum(tensor.nbytes for tensor in tiny_media_model().model.language_model.state_dict().values())
    assert quantize in ("int8", "int4", "int4-all") or model.decoder.nbytes > text + 4 * PATCH * 32


def test_bfloat16_weights_are_summed_in_float32(folder: Path) -> None:
    decoder = specdec.load(folder, drafter=None, dtype="bfloat16", device="cpu").decoder
    assert rows(decoder)[0].dtype == torch.bfloat16
    assert decoder.media is not None and decoder.media.vision is not None
    assert decoder.media.vision.patch_dense.weight.nbytes == 2 * PATCH * 32
    assert error(decoder) < 3e-5


def test_a_model_that_is_kept_quantised_has_its_embedder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = rows(specdec.load(folder, drafter=None, quantize="int4", device="cpu").decoder)
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path))
    monkeypatch.setattr(quantized, "LEAST", 0)
    for _ in range(2):  # written, then mapped
        found = rows(specdec.load(folder, drafter=None, quantize="int4", device="cpu").decoder)
        assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
    assert len(list(tmp_path.rglob("*.packed"))) == 1


def test_parameters_of_the_embedder_have_their_published_names(folder: Path) -> None:
    model, stored = specdec.load(folder, drafter=None, device="cpu"), load_file(folder / "model.safetensors")
    found = {name: value for name, value in model.named_parameters() if "vision" in name or "audio" in name}
    assert found.keys() == {name for name in stored if "vision" in name or "audio" in name}
    assert all(torch.equal(value, stored[name]) for name, value in found.items())
    assert model.num_parameters() == sum(p.numel() for p in tiny_media_model().parameters())


def without(folder: Path, to: Path, part: str) -> Path:
    """The folder without tensors that have `part` in their names."""
    to.mkdir(exist_ok=True)
    tensors = load_file(folder / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if part not in name}
    assert len(kept) < len(tensors)
    save_file(kept, to / "model.safetensors", metadata={"format": "pt"})
    (to / "config.json").write_bytes((folder / "config.json").read_bytes())
    return to


def test_a_folder_without_an_embedder_reads_text(folder: Path, tmp_path: Path) -> None:
    vision = open_checkpoint(without(folder, tmp_path / "no sound", "embed_audio"))[0].media
    assert vision is not None and vision.audio is None and vision.vision is not None
    bare = without(tmp_path / "no sound", tmp_path / "bare", "vision")
    assert specdec.load(bare, drafter=None, device="cpu").decoder.media is None


def test_a_part_of_an_embedder_is_missing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1 missing: model\.vision_embedder\.pos_embedding \[1120, 2, 32\]"):
        specdec.load(without(folder, tmp_path, "pos_embedding"), drafter=None, device="cpu")


@pytest.mark.parametrize(
    ("kind", "patches", "most", "bits"),
    [
        (Type.F32, Type.F32, 0.0, None),
        (Type.F16, Type.F16, 1e-6, torch.float16),
        (Type.BF16, Type.F32, 3e-5, torch.bfloat16),
        (Type.Q8_0, Type.F32, 2e-4, None),
        (Type.Q8_0, Type.Q8_0, 2e-4, None),
    ],
)
def test_a_gguf_file_has_the_embedder_beside_it(
    kind: Type, patches: Type, most: float, bits: torch.dtype | None, tmp_path: Path
) -> None:
    write_model(tmp_path / "model.gguf", "gemma4_unified", Type.F32, VOCABULARY)
    write_mmproj(tmp_path / "other.gguf", kind, patches)
    assert model_path(tmp_path) == tmp_path / "model.gguf"
    model = specdec.load(tmp_path, drafter=None, device="cpu")
    assert error(model.decoder) <= most
    assert model.config.model_type == "gemma4_unified"
    assert {name: getattr(model.config, name) for name in TOKENS} == TOKENS
    spec, source, *_ = open_checkpoint(tmp_path / "model.gguf")
    assert loaded_bytes(spec, source, None, torch.float32) == model.decoder.nbytes
    media = model.decoder.media
    assert media is not None and media.vision is not None
    if bits is not None:  # floats are not blown up
        assert media.vision.embedding_projection.weight.nbytes == 64 * 32 * 2


def test_the_projectors_tell_an_mmproj_file(tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf", "gemma4_unified", Type.F32, VOCABULARY)
    write_mmproj(tmp_path / "mmproj-a.gguf", Type.F16, **{"clip.vision.projector_type": "gemma3"})
    media = specdec.load(tmp_path, drafter=None, device="cpu").decoder.media
    assert media is not None and media.spec.vision is None and media.spec.audio is not None
    write_mmproj(tmp_path / "mmproj-a.gguf", Type.F16, **{"clip.has_audio_encoder": False})
    media = specdec.load(tmp_path, drafter=None, device="cpu").decoder.media
    assert media is not None and media.spec.vision is not None and media.spec.audio is None
    write_model(tmp_path / "model.gguf", "gemma4_unified", Type.F32)  # a vocabulary without media tokens
    assert specdec.load(tmp_path, drafter=None, device="cpu").decoder.media is None
    (tmp_path / "mmproj-a.gguf").unlink()
    assert specdec.load(tmp_path, drafter=None, device="cpu").decoder.media is None


def test_an_mmproj_file_of_another_size_is_no_part_of_the_model(tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf", "gemma3", Type.F32)
    write_mmproj(tmp_path / "mmproj.gguf", Type.F16)
    assert specdec.load(tmp_path, drafter=None, device="cpu").decoder.media is None


def test_a_damaged_mmproj_file_is_named(tmp_path: Path) -> None:
    write_model(tmp_path / "model.gguf", "gemma4_unified", Type.F32, VOCABULARY)
    file = write_mmproj(tmp_path / "mmproj.gguf", Type.F16)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"mmproj\.gguf: the download is incomplete"):
        specdec.load(tmp_path, drafter=None, device="cpu")
