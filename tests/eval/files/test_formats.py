"""What `run.py show` and `plan` say of folders that other programs quantised, and the check of recovered steps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from eval.files import lattice
from eval.synthetic.packed.folders import bfloat16_on_lattice, write_packed
from run import main
from tests.support.tiny import tiny_model


@pytest.fixture
def floats(tmp_path: Path) -> Path:
    tiny_model("gemma4_unified").save_pretrained(tmp_path / "floats")
    return tmp_path / "floats"


@pytest.mark.parametrize(
    ("format", "told", "becomes"),
    [
        ("ct-g32", "compressed-tensors, 4 bits in groups of 32", "4 bits; exact"),
        ("awq", "AWQ, 4 bits in groups of 64", "4 bits, with a minimum; minimum rounded"),
        ("fp8-row", "8-bit floats (e4m3), a scale for each row", "8 bits; quantised again"),
    ],
)
def test_show_names_the_format(
    floats: Path, tmp_path: Path, format: str, told: str, becomes: str, capsys: pytest.CaptureFixture[str]
) -> None:
    write_packed(floats, tmp_path / "packed", format)
    capsys.readouterr()
    assert main(["show", str(tmp_path / "packed"), "--json", "-"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["types"]
    assert (found["type"], found["becomes"]) == (told, becomes)
    assert found["tensors"] > 10 and found["bytes"] > 0


def test_show_names_weights_that_were_trained_for_4_bits(floats: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tensors = load_file(floats / "model.safetensors")
    trained = [name for name in tensors if name.endswith("gate_proj.weight")]
    tensors |= {name: bfloat16_on_lattice(*tensors[name].shape) for name in trained}
    save_file(tensors, floats / "model.safetensors")
    capsys.readouterr()
    assert main(["show", str(floats), "--json", "-"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["types"]
    assert found["type"] == "floats trained for 4 bits" and found["tensors"] == len(trained)


def test_the_plan_is_of_what_is_loaded(floats: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_packed(floats, tmp_path / "packed", "ct-g32")
    weights = {}
    for name in ("floats", "packed"):
        capsys.readouterr()
        main(["plan", "--model", str(tmp_path / name), "--context", "64", "--json", "-"])
        weights[name] = json.loads(capsys.readouterr().out)["weights"]
    assert weights["packed"] < weights["floats"] / 2


def test_recovered_steps_are_measured(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(lattice, "ROWS", 256)
    monkeypatch.setattr(lattice, "COLUMNS", 512)
    assert lattice.main(["--matrices", "2", "--json", "-"]) == 0
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert figures["recovered steps"]["same"] > 0.97 > 0.7 > figures["the rule of Q4_0"]["same"]
    assert figures["recovered steps"]["bits"] == 4.5 and figures["recovered steps"]["seconds"] > 0
    monkeypatch.setattr(lattice, "SHARE", 0.999)
    assert lattice.main(["--matrices", "1"]) == 1
