"""The names of devices: those that are here, and what is said of the others."""

from __future__ import annotations

import pytest
import torch

from specdec.util.device import named_device, resolve_device


def here(monkeypatch: pytest.MonkeyPatch, cuda: int, built: str | None = "13.0") -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: cuda)
    monkeypatch.setattr(torch.version, "cuda", built)


def test_a_gpu_is_taken_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, 1)
    assert resolve_device(None) == torch.device("cuda")
    assert resolve_device("cuda:0") == torch.device("cuda", 0)
    assert resolve_device(torch.device("cpu")) == torch.device("cpu")
    with pytest.raises(ValueError, match="device 'cuda:1': there is no such device here; choose cuda or"):
        resolve_device("cuda:1")
    here(monkeypatch, 2)
    assert resolve_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"choose cuda:0 to cuda:1 or"):
        resolve_device("cuda:2")


def test_without_a_gpu_the_reason_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, 0)
    assert resolve_device(None) == torch.device("cpu")
    with pytest.raises(ValueError, match=r"choose (mps or )?cpu \(torch finds no GPU of NVIDIA's"):
        resolve_device("cuda")
    here(monkeypatch, 0, built=None)
    with pytest.raises(ValueError, match=r"choose (mps or )?cpu \(this torch was built without CUDA"):
        resolve_device("cuda")


@pytest.mark.parametrize(
    ("name", "meant"),
    [("abacus", ""), ("cuda:x", "cuda"), ("meta", ""), ("", ""), ("gpu", "cuda"), ("CUDA", "cuda"), ("metal:0", "mps")],
)
def test_what_is_no_devices_name_is_refused(name: str, meant: str) -> None:
    with pytest.raises(ValueError, match=f"device '{name}' is no name of one; write cpu, cuda") as error:
        resolve_device(name)
    assert ("Did you mean" in str(error.value)) == bool(meant)
    assert str(error.value).endswith(f" Did you mean {meant}?" if meant else "mps.")


def test_a_number_is_that_of_a_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    here(monkeypatch, 2)
    assert resolve_device(1) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match="device 'cuda:2': there is no such device here"):
        resolve_device(2)
    for wrapped in (-1, 128, 300, "cuda:300"):
        with pytest.raises(ValueError, match="is no name of one"):
            resolve_device(wrapped)
    here(monkeypatch, 0)
    assert named_device(0) == torch.device("cuda", 0), "which need not be here"
