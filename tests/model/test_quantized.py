"""Quantised checkpoints on disk: the same model, whoever made the file; and what happens to it is noticed."""

from __future__ import annotations

import json
import signal
import subprocess
from pathlib import Path

import pytest
import torch

import specdec
from eval.synthetic.command import write_model
from eval.synthetic.full_size import full_size_config
from specdec.model import quantized
from specdec.weights.packed import ALIGNMENT, PackedFile, packing
from specdec.weights.tensors import BlockWeight, DenseWeight, quantize, stored_bytes
from tests.support.native.kernel_paths import KINDS
from tests.support.native.kernel_paths import packed as packed_blocks
from tests.support.processes.forked import python
from tests.support.tiny import prompt, tiny_model

ABOUT = {"what": "a test"}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(quantized, "LEAST", 0)
    tiny_model("gemma4_unified").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def packed(folder: Path) -> list[Path]:
    return sorted((folder.parent / "cache" / "quantized").glob("*.packed"))


def text(folder: Path, storage: str = "int4") -> list[int]:
    model = specdec.load(folder, drafter=None, quantize=storage, device="cpu")
    return model.generate(prompt(20), max_new_tokens=30, do_sample=False)[0].tolist()


def written(path: Path) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(40, 64, generator=generator) for name in ("int4", "int8", "none")}
    with packing(path, ABOUT) as writer:
        writer.weight("int4", quantize(tensors["int4"], "int4"))
        writer.weight("int8", quantize(tensors["int8"], "int8"))
        writer.weight("none", DenseWeight(tensors["none"].bfloat16()))
        writer.vector("norm", tensors["none"][0])
    return tensors


def test_a_packed_file_gives_back_what_it_was_given(tmp_path: Path) -> None:
    tensors = written(tmp_path / "x.packed")
    file = PackedFile(tmp_path / "x.packed", ABOUT)
    file.verify()
    for storage in ("int4", "int8"):
        weight, expected = file.weight(storage), quantize(tensors[storage], storage)
        assert isinstance(weight, BlockWeight) and weight.blocks.q.data_ptr() % ALIGNMENT == 0
        assert torch.equal(weight.dequantize(), expected.dequantize())
        assert weight.nbytes == expected.nbytes == stored_bytes((40, 64), storage, torch.float32)
    assert torch.equal(file.weight("none").dequantize(), tensors["none"].bfloat16().float())
    assert torch.equal(file.vector("norm"), tensors["none"][0])
    with pytest.raises(ValueError, match="made from something else"):
        PackedFile(tmp_path / "x.packed", {"what": "another"})


def test_every_form_of_blocks_is_kept(tmp_path: Path) -> None:
    blocks = {str(kind): packed_blocks(40, 64, kind) for kind in KINDS}
    with packing(tmp_path / "x.packed", ABOUT) as writer:
        for name, each in blocks.items():
            writer.weight(name, BlockWeight(each))
    file = PackedFile(tmp_path / "x.packed", ABOUT)
    file.verify()
    for name, each in blocks.items():
        found = file.weight(name).packed
        assert found is not None and found.form == each.form and found.table == each.table
        assert torch.equal(BlockWeight(found).dequantize(), BlockWeight(each).dequantize())


@pytest.mark.parametrize("damage", ["cut", "empty", "index", "content"])
def test_damage_is_noticed(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "x.packed"
    written(path)
    raw = bytearray(path.read_bytes())
    if damage in ("cut", "empty"):
        path.write_bytes(raw[:-100] if damage == "cut" else b"")
    else:
        raw[-90 if damage == "index" else 500] ^= 1
        path.write_bytes(raw)
    with pytest.raises(ValueError, match="damaged"):
        PackedFile(path, ABOUT).verify()


def test_an_error_while_writing_leaves_nothing(tmp_path: Path) -> None:
    def fill(path: Path) -> None:
        with packing(path, ABOUT) as writer:
            writer.vector("norm", torch.ones(5))
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="disk"):
        fill(tmp_path / "x.packed")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("storage", ["int4", "int8"])
def test_the_kept_model_is_the_one_that_is_quantised_in_memory(
    storage: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = text(folder, storage)
    (file,) = packed(folder)
    made = file.stat().st_mtime_ns
    assert text(folder, storage) == first
    assert file.stat().st_mtime_ns == made
    monkeypatch.setattr(quantized, "LEAST", 1 << 40)
    assert text(folder, storage) == first


@pytest.mark.filterwarnings("error")
def test_another_storage_has_its_own_file_and_a_changed_checkpoint_takes_the_old_one_s_place(folder: Path) -> None:
    first = text(folder, "int4")
    text(folder, "int8")
    assert len(packed(folder)) == 2
    tiny_model("gemma4_unified", seed=1).save_pretrained(folder)
    other = text(folder, "int4")
    assert len(packed(folder)) == 2 and other != first
    assert other == text(folder, "int4")
    assert len(packed(folder)) == 2


@pytest.mark.filterwarnings("error")
def test_files_that_the_config_reads_otherwise_are_not_called_damaged(folder: Path) -> None:
    """The same files of weights, and a config that says first that the model sees and hears, and then does not."""
    seeing = folder.parent / "seeing"
    write_model(full_size_config("gemma-4-tiny"), None, seeing)
    assert specdec.load(seeing, drafter=None, quantize="int4", device="cpu").decoder.media is not None
    config = json.loads((seeing / "config.json").read_text())
    (seeing / "config.json").write_text(json.dumps(config | {"vision_config": None, "audio_config": None}))
    for _ in range(2):
        assert specdec.load(seeing, drafter=None, quantize="int4", device="cpu").decoder.media is None
    assert len(packed(folder)) == 1


def test_a_damaged_file_is_made_again(folder: Path) -> None:
    first = text(folder)
    (file,) = packed(folder)
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.warns(UserWarning, match="cut short"):
        assert text(folder) == first
    assert text(folder) == first


def test_without_room_the_model_is_quantised_in_memory(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = text(folder)
    for file in packed(folder):
        file.unlink()
    monkeypatch.setattr(quantized.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 10})())
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert text(folder) == expected
    assert packed(folder) == []


def test_a_process_that_was_killed_leaves_a_clean_start(folder: Path) -> None:
    program = (
        "import sys, time; from specdec.model import quantized; import specdec; quantized.LEAST = 0\n"
        "from specdec.weights.packed import PackedWriter\n"
        "def slow(self, name, weight): print('writing', flush=True); time.sleep(60)\n"
        "PackedWriter.weight = slow\n"
        f"specdec.load({str(folder)!r}, drafter=None, quantize='int4', device='cpu')"
    )
    process = subprocess.Popen([*python(), "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    assert process.communicate() == ("", None)  # to the end of the output, which is that of the fork
    left = [path.name for path in (folder.parent / "cache" / "quantized").iterdir()]
    assert any(name.startswith(".") for name in left)
    first = text(folder)
    assert text(folder) == first
    assert not any(path.name.startswith(".") for path in (folder.parent / "cache" / "quantized").iterdir())


def test_two_processes_make_one_file(folder: Path) -> None:
    program = (
        "import torch; from specdec.model import quantized; from tests.model.test_quantized import Path, text\n"
        "quantized.LEAST = 0; torch.set_num_threads(1)\n"
        f"print(text(Path({str(folder)!r})))"
    )
    words = [*python(), "-c", program]
    both = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    texts = [process.communicate(timeout=120)[0] for process in both]
    assert texts[0] == texts[1] == f"{text(folder)}\n"
    assert len(packed(folder)) == 1
