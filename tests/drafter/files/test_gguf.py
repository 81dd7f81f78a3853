"""Assistants as GGUF files: in every dialect and type the same drafts as the safetensors, and the plain text."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import quants
from safetensors.torch import load_file, save_file

import specdec
from drafter import load_drafter
from drafter.files.checkpoint import read_stored
from drafter.files.gguf import DIALECTS
from specdec.engine.sampling import Noise, Warping
from specdec.weights.gguf.header import read_header
from specdec.weights.tensors import BlockWeight
from tests.support.tiny import VOCAB, WINDOW, prompt, tiny_model
from tests.support.tiny_assistant import (
    CENTROIDS,
    backbone,
    bound,
    prefilled,
    proposed,
    save_assistant,
    write_gguf,
)

FAMILIES = ["gemma4_unified", "gemma4-e2b", "gemma4-e4b", "gemma4-moe"]


def drafts(path: Path, family: str, quantize: str | None = "none") -> list[list[int]]:
    """What the drafter at `path` proposes after texts of several lengths, past the window, greedy and with noise."""
    drafter = load_drafter(path, quantize)
    drafter.bind(backbone(family))
    found = []
    for length in (1, 5, WINDOW, 3 * WINDOW + 2):
        ids = prompt(length + 1, seed=length)[0]
        cache, states = prefilled(backbone(family), ids[:-1])
        for noise in (None, Noise(7, Warping(0.7))):
            found.append(list(proposed(drafter, cache, ids, states, 5, noise).tokens))
    return found


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("head", [{}, CENTROIDS], ids=["dense", "centroids"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_file_drafts_what_its_folder_does(dialect: str, head: dict[str, Any], family: str, tmp_path: Path) -> None:
    folder = save_assistant(tmp_path / "folder", family, **head)
    path = write_gguf(tmp_path / "sha256-mtp", folder, family, dialect=dialect, centroids=True)
    ours, theirs = (read_stored(found).spec(backbone(family)) for found in (path, folder))
    assert (ours.centroids, ours.top_centroids) == (theirs.centroids, theirs.top_centroids)
    assert ours.text.layers == theirs.text.layers and ours.text.ropes == theirs.text.ropes
    expected = drafts(folder, family)
    assert len({*map(tuple, expected)}) > 4
    assert drafts(path, family) == expected
    names = {*read_header(path).tensors}
    assert {DIALECTS[dialect].tensors[name] for name in ("pre_projection.weight",)} <= names
    assert ("rope_freqs.weight" in names) == (dialect != "gemma4_mtp")


@pytest.mark.parametrize("kind", [Type.BF16, Type.F16, Type.Q8_0, Type.Q4_0], ids=lambda kind: kind.name)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_types_of_matrices(dialect: str, kind: Type, tmp_path: Path) -> None:
    family = "gemma4_unified"
    folder = save_assistant(tmp_path / "folder", family)
    path = write_gguf(tmp_path / "m.gguf", folder, family, kind, dialect=dialect)
    rounded = {}
    for name, tensor in load_file(folder / "model.safetensors").items():
        matrix = tensor.dim() == 2
        array = quants.dequantize(quants.quantize(tensor.numpy(), kind), kind) if matrix else tensor.numpy()
        rounded[name] = torch.from_numpy(np.array(array)).view(tensor.shape)
    save_file(rounded, folder / "model.safetensors")
    assert drafts(path, family) == drafts(folder, family)
    _, head = bound(path, backbone(family))
    blocks = kind in (Type.Q8_0, Type.Q4_0)
    assert isinstance(head.head.weight, BlockWeight) == blocks
    text = specdec.SpecdecForCausalLM(
        backbone(family), tiny_model(family).config, tiny_model(family).generation_config, load_drafter(path)
    )
    plain = text.generate(prompt(7), speculation=False, max_new_tokens=4 * WINDOW)
    assert torch.equal(text.generate(prompt(7), draft_length=3, max_new_tokens=4 * WINDOW), plain)
    assert text.last_stats.drafted > 0


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q6_K], ids=lambda kind: kind.name)
def test_k_types(kind: Type, tmp_path: Path) -> None:
    """Files of others: a head of 256, whose matrices are random blocks."""
    family = "gemma4_unified"
    folder = save_assistant(tmp_path / "folder", family, text={"hidden_size": 256, "intermediate_size": 256})
    whole = write_gguf(tmp_path / "whole.gguf", folder, family)
    header, reader = read_header(whole), gguf.GGUFReader(whole)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "gemma4-assistant")
    for key, value in header.metadata.items():
        if key != "general.architecture":
            add = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
            writer.add_array(key, value) if isinstance(value, list) else add[type(value)](key, value)
    rng, tensors = np.random.default_rng(0), load_file(folder / "model.safetensors")
    count = 0
    for entry in reader.tensors:
        shape = header.tensors[entry.name].shape
        if len(shape) == 2 and shape[1] % 256 == 0:
            size = gguf.GGML_QUANT_SIZES[kind][1]
            raw = rng.integers(0, 256, (shape[0], shape[1] // 256, size), dtype=np.uint8)
            for at in (0, 2) if kind is Type.Q4_K else (208,):
                raw[..., at : at + 2] = np.array([2.0**-11], np.float16).view(np.uint8)
            raw = raw.reshape(shape[0], -1)
            writer.add_tensor(entry.name, raw, raw_dtype=kind)
            values = torch.from_numpy(quants.dequantize(raw, kind))
            same = [name for name, tensor in tensors.items() if torch.equal(tensor, torch.tensor(entry.data))]
            tensors[same[0]] = values
            count += 1
        else:
            writer.add_tensor(entry.name, np.array(entry.data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    save_file(tensors, folder / "model.safetensors")
    assert count == 3 * 4 + 2  # q, gate, up, down; the vocabulary, the projection back
    assert drafts(tmp_path / "m.gguf", family) == drafts(folder, family)
    assert len(drafts(tmp_path / "m.gguf", family, None)) == 8  # and in blocks


def test_without_all_of_its_centroids_a_head_is_dense(tmp_path: Path) -> None:
    family = "gemma4-e2b"
    folder = save_assistant(tmp_path / "folder", family, **CENTROIDS)
    dense = save_assistant(tmp_path / "dense", family)
    tensors = load_file(folder / "model.safetensors")
    own = {name: tensor for name, tensor in tensors.items() if not name.startswith("masked_embedding.")}
    save_file(own, dense / "model.safetensors")
    path = write_gguf(tmp_path / "m.gguf", folder, family)  # as llama.cpp's converter does
    assert not any("centroid" in name or "ordering" in name for name in read_header(path).tensors)
    assert read_stored(path).spec(backbone(family)).centroids == 0
    assert drafts(path, family) == drafts(dense, family)
    keyless = write_gguf(tmp_path / "n.gguf", folder, family, centroids=True)
    keyless.write_bytes(keyless.read_bytes().replace(b"centroid_top_k", b"centroid_top_x"))
    assert read_stored(keyless).spec(backbone(family)).centroids == 0
    assert drafts(keyless, family) == drafts(dense, family)


def test_both_tables_of_tokens_are_told_apart(tmp_path: Path) -> None:
    """The table of one dialect, in a file of another: what it holds decides."""
    family = "gemma4-e2b"
    folder = save_assistant(tmp_path / "folder", family, **CENTROIDS)
    inverse = write_gguf(tmp_path / "m.gguf", folder, family, dialect="gemma4_mtp", centroids=True)
    listed = write_gguf(tmp_path / "n.gguf", folder, family, dialect="gemma4_assistant", centroids=True)
    tables = []
    for path, name in ((inverse, "mtp_token_ordering.weight"), (listed, "mtp.token_ordering.weight")):
        info = read_header(path).tensors[name]
        assert info.type == Type.I32
        tables.append(np.frombuffer(path.read_bytes()[info.offset :][: info.nbytes], np.int32))
    assert tables[0].max() == CENTROIDS["num_centroids"] - 1 and sorted(tables[1]) == list(range(VOCAB))
    raw, info = inverse.read_bytes(), read_header(inverse).tensors["mtp_token_ordering.weight"]
    swapped = tmp_path / "swapped.gguf"
    swapped.write_bytes(raw[: info.offset] + tables[1].tobytes() + raw[info.offset + info.nbytes :])
    assert drafts(swapped, family) == drafts(inverse, family) == drafts(folder, family)
    wrong = tables[0].copy()
    wrong[0] += 1
    swapped.write_bytes(raw[: info.offset] + wrong.tobytes() + raw[info.offset + info.nbytes :])
    with pytest.raises(ValueError, match=r"swapped\.gguf: its table of tokens neither lists every token once"):
        bound(swapped, backbone(family))


def refusal(path: Path, family: str = "gemma4_unified") -> str:
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r".") as raised:
        bound(path, backbone(family))
    assert time.perf_counter() - began < 1
    return str(raised.value)


def test_files_that_are_no_drafter_of_this_model(tmp_path: Path) -> None:
    family = "gemma4_unified"
    folder = save_assistant(tmp_path / "folder", family)
    path = write_gguf(tmp_path / "m.gguf", folder, family)
    whole = path.read_bytes()
    assert "m.gguf: this assistant was made for another backbone" in refusal(path, "gemma4-e2b")

    def changed(old: bytes, new: bytes) -> str:
        assert old in whole
        path.write_bytes(whole.replace(old, new))
        return refusal(path)

    assert "a GGUF file of 'gemma4-assistent' is not a drafter" in changed(b"gemma4-assistant", b"gemma4-assistent")
    assert "1 missing" in changed(b"blk.1.ffn_up", b"blk.1.ffn_yp")
    assert "1 surplus: blk.1.ffn_yp.weight" in changed(b"blk.1.ffn_up", b"blk.1.ffn_yp")
    assert "no projection of the backbone's state" in changed(b"nextn.pre_proj", b"nextn.per_proj")
    assert "there is no 'gemma4-assistant.attention.head_count'" in changed(
        b"attention.head_count\4", b"attention.heat_count\4"
    )
    path.write_bytes(whole[:-3000])
    assert "the download is incomplete" in refusal(path)
    info = read_header(write_gguf(path, folder, family)).tensors["rope_freqs.weight"]
    path.write_bytes(whole[: info.offset] + np.ones(16, np.float32).tobytes() + whole[info.offset + info.nbytes :])
    assert "the rope of its full_attention is not that of the backbone" in refusal(path)
