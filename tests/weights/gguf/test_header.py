"""GGUF headers: what is read is what was written, and a damaged file is a clear error, quickly."""

from __future__ import annotations

import struct
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from specdec.weights.gguf.header import MAX_ARRAY, MAX_KEYS, MAX_TENSORS, read_header


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def number(key: str, value: int) -> bytes:
    return text(key) + struct.pack("<II", gguf.GGUFValueType.UINT32, value)


def tensor(name: str = "w", dims: tuple[int, ...] = (32,), kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


def write(
    path: Path,
    fields: list[bytes],
    tensors: list[bytes],
    data: int = 4096,
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> Path:
    """A file from raw entries, right or wrong; `counts` replaces the true (tensors, fields)."""
    head = b"GGUF" + struct.pack("<IQQ", version, *(counts or (len(tensors), len(fields))))
    body = head + b"".join(fields) + b"".join(tensors)
    path.write_bytes(body + bytes(-len(body) % 32) + bytes(data))
    return path


def sample(path: Path) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 2)
    writer.add_float32("llama.epsilon", 0.5)
    writer.add_bool("llama.flag", True)
    writer.add_string("general.name", "naïve 模型")
    writer.add_int64("llama.negative", -5)
    writer.add_array("llama.pattern", [True, False, True])
    writer.add_array("tokenizer.ggml.tokens", ["<s>", "", "▁é"])
    writer.add_array("tokenizer.ggml.scores", [0.0, -1.5, -2.0])
    writer.add_array("tokenizer.ggml.token_type", [3, 1, 1])
    writer.add_tensor("norm", np.arange(5, dtype=np.float32))
    writer.add_tensor("matrix", np.arange(24, dtype=np.float16).reshape(4, 6))
    blocks = gguf.quants.quantize(np.ones((3, 64), np.float32), gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blocks", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_values_are_plain_python(tmp_path: Path) -> None:
    metadata = read_header(sample(tmp_path / "a.gguf")).metadata
    assert metadata == {
        "general.architecture": "llama",
        "llama.block_count": 2,
        "llama.epsilon": 0.5,
        "llama.flag": True,
        "general.name": "naïve 模型",
        "llama.negative": -5,
        "llama.pattern": [True, False, True],
        "tokenizer.ggml.tokens": ["<s>", "", "▁é"],
        "tokenizer.ggml.scores": [0.0, -1.5, -2.0],
        "tokenizer.ggml.token_type": [3, 1, 1],
    }
    assert type(metadata["llama.flag"]) is bool
    assert type(metadata["tokenizer.ggml.scores"][0]) is float
    assert type(metadata["tokenizer.ggml.token_type"][0]) is int


def test_tensors_are_where_the_package_finds_them(tmp_path: Path) -> None:
    path = sample(tmp_path / "a.gguf")
    tensors = read_header(path).tensors
    stock = {entry.name: entry for entry in gguf.GGUFReader(path).tensors}
    assert list(tensors) == list(stock)
    for name, info in tensors.items():
        assert (info.offset, info.nbytes) == (stock[name].data_offset, stock[name].n_bytes)
        assert info.type == stock[name].tensor_type
    assert tensors["matrix"].shape == (4, 6)
    assert tensors["blocks"].shape == (3, 64)
    raw = path.read_bytes()[tensors["matrix"].offset :][: tensors["matrix"].nbytes]
    assert np.array_equal(np.frombuffer(raw, np.float16), np.arange(24))


def test_metadata_agrees_with_the_package(tmp_path: Path) -> None:
    path = sample(tmp_path / "a.gguf")
    fields = gguf.GGUFReader(path).fields
    for key, value in read_header(path).metadata.items():
        assert fields[key].contents() == value


def test_cut_at_every_byte(tmp_path: Path) -> None:
    whole = sample(tmp_path / "a.gguf")
    content = whole.read_bytes()
    end = max(info.offset + info.nbytes for info in read_header(whole).tensors.values())
    cut = tmp_path / "cut.gguf"
    for length in range(end):
        cut.write_bytes(content[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf: .*(is incomplete|damaged).*fetch it again"):
            read_header(cut)
    cut.write_bytes(content[:end])
    found = read_header(cut).tensors
    assert {name: replace(info, file=whole) for name, info in found.items()} == read_header(whole).tensors


def test_says_how_much_is_missing(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", [], [tensor(dims=(64, 64))], data=100)
    size = path.stat().st_size
    with pytest.raises(ValueError, match=f"incomplete: {size} bytes, expected at least {size - 100 + 16384};"):
        read_header(path)


ARRAY = text("a") + struct.pack("<I", gguf.GGUFValueType.ARRAY)

HUGE = "larger than any disk"
DAMAGED: dict[str, tuple[dict[str, Any], str]] = {
    "2^60 tensors": (dict(fields=[], tensors=[tensor()], counts=(1 << 60, 0)), HUGE),
    "2^60 fields": (dict(fields=[number("a", 1)], tensors=[], counts=(0, 1 << 60)), HUGE),
    "more tensors than there are": (dict(fields=[], tensors=[tensor()], counts=(9, 0)), "damaged"),
    "2^60 numbers": (dict(fields=[ARRAY + struct.pack("<IQ", 4, 1 << 60)], tensors=[]), HUGE),
    "2^60 strings": (dict(fields=[ARRAY + struct.pack("<IQ", 8, 1 << 60)], tensors=[]), HUGE),
    "2^64-1 bools": (dict(fields=[ARRAY + struct.pack("<IQ", 7, (1 << 64) - 1)], tensors=[]), HUGE),
    "a string beyond the end": (dict(fields=[text("a") + struct.pack("<IQ", 8, 10000)], tensors=[]), "incomplete"),
    "a listed string beyond the end": (dict(fields=[ARRAY + struct.pack("<IQQ", 8, 1, 1 << 63)], tensors=[]), HUGE),
    "a key beyond the end": (dict(fields=[struct.pack("<Q", 1 << 40)], tensors=[]), "incomplete"),
    "an array of arrays": (dict(fields=[ARRAY + struct.pack("<IQ", 9, 1)], tensors=[]), "array of ARRAY"),
    "an unknown value type": (dict(fields=[text("a") + struct.pack("<II", 77, 0)], tensors=[]), "77"),
    "an unknown type in an array": (dict(fields=[ARRAY + struct.pack("<IQ", 77, 1)], tensors=[]), "77"),
    "a key that is not UTF-8": (dict(fields=[struct.pack("<QBII", 1, 0xFF, 4, 1)], tensors=[]), "utf-8"),
    "the same key twice": (dict(fields=[number("a", 1)] * 2, tensors=[]), "Duplicate a"),
    "the same tensor twice": (dict(fields=[], tensors=[tensor()] * 2), "two tensors are called 'w'"),
    "five dimensions": (dict(fields=[], tensors=[tensor(dims=(1,) * 5)]), "5 dimensions"),
    "2^31 dimensions": (
        dict(fields=[], tensors=[text("w") + struct.pack("<IQQQ", 1 << 31, 1, 1, 1)]),
        "2147483648 dimensions",
    ),
    "a row of half a block": (dict(fields=[], tensors=[tensor(dims=(48,), kind=8)]), "blocks of 32"),
    "a dimension of nothing": (dict(fields=[], tensors=[tensor(dims=(0, 4))]), "cannot be F32"),
    "2^63 x 2^63": (dict(fields=[], tensors=[tensor(dims=(1 << 63, 1 << 63))]), HUGE),
    "an offset beyond the end": (dict(fields=[], tensors=[tensor(offset=1 << 20)]), "incomplete"),
    "an offset of 2^63": (dict(fields=[], tensors=[tensor(offset=1 << 63)]), HUGE),
    "an offset off the grid": (dict(fields=[], tensors=[tensor(offset=4)]), "not aligned to 32 bytes"),
    "a grid of 3": (dict(fields=[number("general.alignment", 3)], tensors=[tensor()]), "power of two"),
    "a grid of 0": (dict(fields=[number("general.alignment", 0)], tensors=[tensor()]), "power of two"),
    "a grid of 2^31": (dict(fields=[number("general.alignment", 1 << 31)], tensors=[tensor()]), "incomplete"),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_is_a_clear_error_at_once(tmp_path: Path, case: str) -> None:
    arguments, message = DAMAGED[case]
    path = write(tmp_path / "bad.gguf", **arguments)
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=r"bad\.gguf: ") as caught:
        read_header(path)
    assert time.perf_counter() - begin < 1
    assert message in str(caught.value)
    assert "fetch it again" in str(caught.value)


@pytest.mark.parametrize("kind", [999, 4])
def test_a_type_that_the_package_does_not_know_is_a_number(tmp_path: Path, kind: int) -> None:
    path = write(tmp_path / "a.gguf", [], [tensor(dims=(48,), kind=kind)], data=100)
    info = read_header(path).tensors["w"]
    assert (info.type, info.shape, info.nbytes) == (kind, (48,), 0)


def test_a_long_list_that_fits_the_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.gguf"
    field = ARRAY + struct.pack("<IQ", gguf.GGUFValueType.STRING, MAX_ARRAY + 1)
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + field)
    with path.open("r+b") as stream:
        stream.truncate(9 * MAX_ARRAY)  # sparse: empty strings as far as one can see
    begin = time.perf_counter()
    with pytest.raises(ValueError, match=f"an array of {MAX_ARRAY + 1} entries"):
        read_header(path)
    assert time.perf_counter() - begin < 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the download is incomplete: 0 bytes"),
        (b"GG", "the download is incomplete: 2 bytes"),
        (b"PK\x03\x04 a wheel", "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1 is not supported"),
        (b"GGUF" + struct.pack("<IQQ", 4, 0, 0), "version 4 is not supported"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    ],
)
def test_files_of_another_kind(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"bad\.gguf: .*{message}"):
        read_header(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.gguf: there is no such file"):
        read_header(tmp_path / "none.gguf")
    with pytest.raises(ValueError, match="there is no such file"):
        read_header(tmp_path)


def test_version_2_and_its_own_alignment(tmp_path: Path) -> None:
    path = write(tmp_path / "a.gguf", [number("general.alignment", 64)], [tensor()], version=2)
    info = read_header(path).tensors["w"]
    assert info.offset % 64 == 0
    assert info.nbytes == 128


def test_a_large_vocabulary_is_read_quickly(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    tokens = [f"piece{index}" for index in range(262144)]
    strings = ARRAY + struct.pack("<IQ", 8, len(tokens)) + b"".join(map(text, tokens))
    scores = np.arange(len(tokens), dtype=np.float32)
    floats = text("s") + struct.pack("<IIQ", 9, 6, len(tokens)) + scores.tobytes()
    write(path, [strings, floats], [tensor()])
    begin = time.perf_counter()
    metadata = read_header(path).metadata
    assert time.perf_counter() - begin < 2  # 0.15 s on an idle machine; the package alone needs more than 2
    assert metadata["a"] == tokens
    assert metadata["s"] == scores.tolist()


@pytest.mark.parametrize(("tensors", "keys"), [(MAX_TENSORS + 1, 0), (0, MAX_KEYS + 1)])
def test_counts_that_fit_the_file_and_no_model_are_refused(tensors: int, keys: int, tmp_path: Path) -> None:
    path = tmp_path / "many.gguf"
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, tensors, keys) + bytes(24 * (tensors + keys)))
    with pytest.raises(ValueError, match=f"{keys} keys and {tensors} tensors"):
        read_header(path)
