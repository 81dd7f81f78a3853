"""GGUF checkpoints against `gguf.quants.dequantize`, on files written here."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from gguf import quants

from specdec.kernels import unpack_blocks
from specdec.weights import BlockWeight, DenseWeight, GGUFCheckpoint
from specdec.weights import tensors as module

HALVES = {  # where a block's float16 numbers lie, for random bytes
    Type.Q4_0: (0,), Type.Q4_1: (0, 2), Type.Q5_0: (0,), Type.Q5_1: (0, 2), Type.Q8_0: (0,),
    Type.Q4_K: (0, 2), Type.Q5_K: (0, 2), Type.Q6_K: (208,),
}  # fmt: skip
BITS = {
    Type.Q4_0: 4, Type.Q4_1: 4, Type.Q5_0: 5, Type.Q5_1: 5, Type.Q8_0: 8,
    Type.Q4_K: 4, Type.Q5_K: 5, Type.Q6_K: 6,
}  # fmt: skip
EXACT = (Type.Q4_0, Type.Q4_1, Type.Q5_0, Type.Q5_1, Type.Q8_0, Type.Q6_K)
ROWS, COLUMNS = 37, 512


def random_bytes(kind: Type, rows: int = ROWS, columns: int = COLUMNS, seed: int = 0) -> np.ndarray:
    """Every bit pattern of the integers, with scales of either sign and many magnitudes."""
    rng = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = rng.integers(0, 256, (rows, columns // block, size), dtype=np.uint8)
    for offset in HALVES[kind]:
        numbers = rng.standard_normal((rows, columns // block, 1)) * 10.0 ** rng.uniform(-4, 0)
        raw[..., offset : offset + 2] = numbers.astype(np.float16).view(np.uint8)
    return raw.reshape(rows, -1)


def write(path: Path, tensors: dict[str, tuple[np.ndarray, Type | None]]) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    for name, (data, kind) in tensors.items():
        writer.add_tensor(name, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture
def one(tmp_path):
    """A checkpoint with one matrix `w`, and what gguf makes of it."""

    def make(kind: Type, seed: int = 0) -> tuple[GGUFCheckpoint, torch.Tensor]:
        raw = random_bytes(kind, seed=seed)
        path = write(tmp_path / "model.gguf", {"w": (raw, kind)})
        return GGUFCheckpoint(path), torch.from_numpy(quants.dequantize(raw, kind))

    return make


@pytest.mark.parametrize("kind", EXACT, ids=lambda kind: kind.name)
@pytest.mark.parametrize("asked", [None, "int4", "int8"])
def test_exact_types_keep_every_bit(one, kind, asked):
    checkpoint, expected = one(kind)
    weight = checkpoint.weight("w", torch.bfloat16, asked)
    assert isinstance(weight, BlockWeight)
    assert weight.blocks.bits == BITS[kind]
    assert weight.shape == (ROWS, COLUMNS) == checkpoint.shapes()["w"]
    assert torch.equal(weight.dequantize(), expected)


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q5_K], ids=lambda kind: kind.name)
def test_super_blocks_differ_by_float16_rounding_of_their_products(one, kind):
    checkpoint, expected = one(kind)
    weight = checkpoint.weight("w", torch.bfloat16)
    assert isinstance(weight, BlockWeight)
    assert weight.blocks.bits == BITS[kind]
    # |w| <= q * scale + |minimum|, and each of the two carries half a unit in the last of 11 bits.
    _, scale, minimum = unpack_blocks(weight.blocks)
    assert minimum is not None
    largest = (1 << BITS[kind]) - 1
    bound = (largest * scale.float().abs() + minimum.float().abs()).repeat_interleave(32, dim=1) * 2**-11 * 1.001
    error = (weight.dequantize() - expected).abs()
    assert (error <= bound + 1e-12).all()
    assert error.max() > 0  # the bound is about something


@pytest.mark.parametrize("kind", [Type.Q4_K, Type.Q5_K], ids=lambda kind: kind.name)
def test_super_blocks_with_products_that_float16_holds_are_exact(tmp_path, kind):
    raw = random_bytes(kind).reshape(ROWS, -1, gguf.GGML_QUANT_SIZES[kind][1])
    raw[..., 0:2] = np.array([2.0**-8], np.float16).view(np.uint8)
    raw[..., 2:4] = np.array([-(2.0**-6)], np.float16).view(np.uint8)
    raw = raw.reshape(ROWS, -1)
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", {"w": (raw, kind)}))
    expected = torch.from_numpy(quants.dequantize(raw, kind))
    assert torch.equal(checkpoint.weight("w", torch.float32).dequantize(), expected)


@pytest.mark.parametrize("kind", list(HALVES), ids=lambda kind: kind.name)
@pytest.mark.parametrize("asked", [None, "none"])
def test_rows_are_picked_before_packing_whatever_the_chunks(one, kind, asked, monkeypatch):
    checkpoint, _ = one(kind)
    whole = checkpoint.weight("w", torch.float32, asked).dequantize()
    monkeypatch.setattr(module, "_CHUNK", 1)
    order = torch.randperm(ROWS, generator=torch.Generator().manual_seed(0))
    assert torch.equal(checkpoint.weight("w", torch.float32, asked).dequantize(), whole)
    assert torch.equal(checkpoint.weight("w", torch.float32, asked, order).dequantize(), whole[order])
    some = checkpoint.weight("w", torch.float32, asked, order[:3])
    assert some.shape == (3, COLUMNS)
    assert torch.equal(some.dequantize(), whole[order[:3]])


@pytest.mark.parametrize("kind", list(HALVES), ids=lambda kind: kind.name)
def test_tensor_and_none_dequantise(one, kind):
    checkpoint, expected = one(kind)
    assert torch.equal(checkpoint.tensor("w"), expected)
    weight = checkpoint.weight("w", torch.bfloat16, "none")
    assert isinstance(weight, DenseWeight)
    assert torch.equal(weight.tensor, expected.bfloat16())


@pytest.mark.parametrize("kind", [Type.F32, Type.F16, Type.BF16], ids=lambda kind: kind.name)
def test_floats(tmp_path, kind):
    w = np.random.default_rng(0).standard_normal((24, 64)).astype(np.float32)
    odd = w[:, :40].copy()
    data = {name: (quants.quantize(part, kind), kind) for name, part in (("w", w), ("odd", odd))}
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", data))
    expected = torch.from_numpy(quants.dequantize(data["w"][0], kind)).view(24, 64)
    assert checkpoint.shapes() == {"w": (24, 64), "odd": (24, 40)}
    assert torch.equal(checkpoint.tensor("w"), expected)
    for asked in (None, "none"):
        dense = checkpoint.weight("w", torch.float32, asked)
        assert isinstance(dense, DenseWeight)
        assert torch.equal(dense.tensor, expected)
    order = torch.arange(23, -1, -1)
    assert torch.equal(checkpoint.weight("w", torch.float32, None, order).dequantize(), expected.flip(0))
    for asked, bits in (("int4", 4), ("int8", 8)):
        block = checkpoint.weight("w", torch.float32, asked)
        assert isinstance(block, BlockWeight)
        assert block.blocks.bits == bits
        assert (block.dequantize() - expected).abs().max() < (0.25 if bits == 4 else 0.02)
    assert isinstance(checkpoint.weight("odd", torch.float32, "int4"), DenseWeight)  # 40 is not 32 n


def test_vectors_are_tensors_and_a_stack_is_one_matrix_below_the_other(tmp_path):
    norm = np.linspace(0, 1, 64, dtype=np.float32)
    experts = random_bytes(Type.Q8_0, 6, 64).reshape(2, 3, -1)
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", {"norm": (norm, None), "experts": (experts, Type.Q8_0)}))
    assert torch.equal(checkpoint.tensor("norm"), torch.from_numpy(norm))
    expected = quants.dequantize(experts, Type.Q8_0)
    assert checkpoint.shapes()["experts"] == (2, 3, 64)
    assert torch.equal(checkpoint.tensor("experts"), torch.from_numpy(expected))
    stack = checkpoint.weight("experts", torch.float32)
    assert stack.shape == (6, 64)
    assert torch.equal(stack.dequantize(), torch.from_numpy(expected).view(6, 64))
    assert stack.nbytes == checkpoint.loaded_bytes("experts", torch.float32)
    with pytest.raises(ValueError, match=r"is not a matrix; read it with tensor\(\)"):
        checkpoint.weight("norm", torch.float32)


def test_tensors_outlive_the_file(tmp_path):
    path = write(tmp_path / "m.gguf", {"norm": (np.ones(8, np.float32), None)})
    norm = GGUFCheckpoint(path).tensor("norm")
    path.write_bytes(b"")
    assert torch.equal(norm, torch.ones(8, dtype=torch.float32))


@pytest.mark.parametrize("kind", [Type.F64, Type.I32, Type.I8], ids=lambda kind: kind.name)
def test_types_that_are_not_read_are_told_where_they_are_needed(tmp_path, kind):
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.zeros((2, 256 // block * size), dtype=np.uint8)
    floats = np.ones((2, 64), np.float32)
    path = write(tmp_path / "m.gguf", {"blk.0.ffn_up.weight": (raw, kind), "w": (floats, None)})
    checkpoint = GGUFCheckpoint(path)
    assert checkpoint.shapes() == {"blk.0.ffn_up.weight": (2, 256), "w": (2, 64)}
    # The other tensor is none of its business.
    assert torch.equal(checkpoint.tensor("w"), torch.ones(2, 64, dtype=torch.float32))
    for call in (
        lambda name: checkpoint.weight(name, torch.float32),
        lambda name: checkpoint.loaded_bytes(name, torch.float32),
    ):
        with pytest.raises(ValueError, match=rf"m\.gguf: .*blk\.0\.ffn_up\.weight.*{kind.name}.*Q4_0.*Q6_K"):
            call("blk.0.ffn_up.weight")


def test_nvfp4_is_multiplied_by_the_scale_beside_it(tmp_path):
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (32, 128 // 64, 36), dtype=np.uint8)
    raw[..., :4] = rng.integers(0x30, 0x38, (32, 2, 4), dtype=np.uint8)  # scales whose ratio the blocks keep
    raw = raw.reshape(32, -1)
    scale = np.array([0.75], np.float32)
    tensors = {"a.weight": (raw, Type.NVFP4), "a.scale": (scale, None), "b.weight": (raw, Type.NVFP4)}
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", tensors))
    assert list(checkpoint.shapes()) == ["a.weight", "b.weight"]
    alone = torch.from_numpy(quants.dequantize(raw, Type.NVFP4))
    assert torch.equal(checkpoint.weight("b.weight", torch.float32).dequantize(), alone)
    assert torch.equal(checkpoint.tensor("b.weight"), alone)
    for found in (
        checkpoint.weight("a.weight", torch.float32).dequantize(),
        checkpoint.weight("a.weight", torch.float32, "none").dequantize(),
        checkpoint.tensor("a.weight"),
    ):
        assert torch.equal(found, 0.75 * alone)
    experts = {"a.weight": (np.stack([raw] * 3), Type.NVFP4), "a.scale": (np.array([1, 2, 3], np.float32), None)}
    found = GGUFCheckpoint(write(tmp_path / "e.gguf", experts)).tensor("a.weight")
    assert torch.equal(found, torch.stack([alone, 2 * alone, 3 * alone]))
    wrong = {"a.weight": (raw, Type.NVFP4), "a.scale": (np.ones(2, np.float32), None)}
    with pytest.raises(ValueError, match=r"a\.scale.* is no scale of 'a\.weight'"):
        GGUFCheckpoint(write(tmp_path / "w.gguf", wrong)).weight("a.weight", torch.float32)


def test_a_type_that_no_version_knows_is_told_where_it_is_needed(tmp_path):
    path = write(
        tmp_path / "m.gguf", {"strange": (np.ones((2, 32), np.float32), None), "w": (np.ones(3, np.float32), None)}
    )
    raw = path.read_bytes()
    at = raw.index(b"strange") + len(b"strange") + 4 + 2 * 8  # after the number of dimensions and the dimensions
    path.write_bytes(raw[:at] + (77).to_bytes(4, "little") + raw[at + 4 :])
    checkpoint = GGUFCheckpoint(path)
    assert torch.equal(checkpoint.tensor("w"), torch.ones(3, dtype=torch.float32))
    for call in (checkpoint.tensor, lambda name: checkpoint.weight(name, torch.float32)):
        with pytest.raises(ValueError, match=r"m\.gguf: .*strange.*the unknown type 77"):
            call("strange")


def test_integers_are_tensors(tmp_path):
    table = np.array([5, 0, 261_143], np.int32)
    path = write(tmp_path / "m.gguf", {"order": (table, None), "large": (table + (1 << 24), None)})
    checkpoint = GGUFCheckpoint(path)
    assert checkpoint.tensor("order").tolist() == table.tolist()
    with pytest.raises(ValueError, match=r"large.*exact range of float32"):
        checkpoint.tensor("large")


@pytest.mark.parametrize("kind", list(HALVES), ids=lambda kind: kind.name)
@pytest.mark.parametrize("asked", [None, "none"])
def test_damaged_scales_name_the_tensor(tmp_path, kind, asked):
    raw = random_bytes(kind)
    offset = HALVES[kind][0]
    raw[5, offset : offset + 2] = np.array([np.nan], np.float16).view(np.uint8)
    checkpoint = GGUFCheckpoint(write(tmp_path / "m.gguf", {"blk.0.attn_q": (raw, kind)}))
    with pytest.raises(ValueError, match=r"blk\.0\.attn_q"):
        checkpoint.weight("blk.0.attn_q", torch.float32, asked)


def test_requests_that_cannot_be_met(one):
    checkpoint, _ = one(Type.Q8_0)
    with pytest.raises(ValueError, match=r"no tensor 'ww' among its 1; near it: w"):
        checkpoint.tensor("ww")
    with pytest.raises(ValueError, match="no tensor 'x'"):
        checkpoint.weight("x", torch.float32)
    with pytest.raises(ValueError, match="use 'int4', 'int4-all', 'int8'"):
        checkpoint.weight("w", torch.float32, "int2")
    with pytest.raises(ValueError, match=rf"rows 0..{ROWS} .* use 0..{ROWS - 1}"):
        checkpoint.weight("w", torch.float32, None, torch.tensor([0, ROWS]))
    with pytest.raises(ValueError, match="rows -1"):
        checkpoint.weight("w", torch.float32, None, torch.tensor([-1]))
    with pytest.raises(ValueError, match=r"vector of torch\.long"):
        checkpoint.weight("w", torch.float32, None, torch.tensor([0.0]))
    with pytest.raises(ValueError, match="non-empty"):
        checkpoint.weight("w", torch.float32, None, torch.tensor([], dtype=torch.long))


def test_a_file_cut_short_is_refused(tmp_path):
    path = write(tmp_path / "m.gguf", {"w": (random_bytes(Type.Q4_0), Type.Q4_0)})
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"m\.gguf: the download is incomplete"):
        GGUFCheckpoint(path)
