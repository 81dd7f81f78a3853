"""Models in several files: read as one, from any part; parts that are missing, renamed or of another model."""

from __future__ import annotations

import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from specdec.weights import GGUFCheckpoint
from specdec.weights.gguf.split import first_part, part_names
from specdec.weights.hub.paths import model_path

TENSORS = {f"w{i}": np.full((2, 32), i, np.float32) for i in range(5)}


def split(folder: Path, name: str = "m", count: int = 3, **changes: int) -> list[Path]:
    """A model of `count` parts, the first of which has metadata alone."""
    files = []
    for i in range(count):
        files.append(folder / f"{name}-{i + 1:05d}-of-{count:05d}.gguf")
        writer = gguf.GGUFWriter(files[-1], "llama")
        if i == 0:
            writer.add_uint32("llama.block_count", 7)
        writer.add_uint16("split.no", i)
        writer.add_uint16("split.count", changes.get("count", count))
        writer.add_int32("split.tensors.count", changes.get("tensors", len(TENSORS)))
        if i:
            for tensor in list(TENSORS)[i - 1 :: count - 1]:
                writer.add_tensor(tensor, TENSORS[tensor])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return files


def test_any_part_names_the_model(tmp_path: Path) -> None:
    files = split(tmp_path)
    for file in files:
        assert first_part(file) == model_path(file) == files[0]
        checkpoint = GGUFCheckpoint(file)
        assert checkpoint.header.metadata["llama.block_count"] == 7
        assert {*checkpoint.shapes()} == {*TENSORS}
        for name, array in TENSORS.items():
            assert torch.equal(checkpoint.tensor(name), torch.from_numpy(array))


def test_parts_by_name() -> None:
    assert part_names("a-b-00001-of-00002.gguf") == ["a-b-00001-of-00002.gguf", "a-b-00002-of-00002.gguf"]
    for other in ("m.gguf", "m-00003-of-00002.gguf", "m-00000-of-00002.gguf", "m-1-of-2.gguf"):
        assert part_names(other) == []


def refusal(path: Path) -> str:
    began = time.perf_counter()
    with pytest.raises(ValueError, match=r".") as raised:
        GGUFCheckpoint(path)
    assert time.perf_counter() - began < 1
    return str(raised.value)


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    files = split(tmp_path)
    files[2].rename(tmp_path / "kept")
    assert "m-00003-of-00003.gguf must lie beside it: fetch them too" in refusal(files[0])
    (tmp_path / "kept").rename(files[2])
    whole = files[1].read_bytes()
    files[1].write_bytes(whole[:-8])
    assert f"{files[1]}: the download is incomplete" in refusal(files[0])
    files[1].write_bytes(files[2].read_bytes())
    assert "says that it is part 3 of 3, and is called part 2 of 3" in refusal(files[0])
    files[1].write_bytes(whole)
    assert "5 tensors where 6 are due" in refusal(split(tmp_path, "n", tensors=6)[0])
