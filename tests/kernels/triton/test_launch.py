"""Launches of kernels: on which device."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")


def test_a_kernel_is_launched_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    class There(Tensor):
        """A tensor that says that it is on a second GPU."""

        device = torch.device("cuda", 1)

    class Kernel:
        def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
            return lambda *arguments, **constants: told.append("launch")

    @contextmanager
    def on(device: torch.device) -> Iterator[None]:
        told.append(str(device))
        yield

    told: list[str] = []
    launch = import_module("specdec.kernels.triton.launch")
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "device", on)
    for current in (0, 1):
        monkeypatch.setattr(torch.cuda, "current_device", lambda current=current: current)
        launch.launch(Kernel(), (1,), torch.zeros(1, dtype=torch.float32).as_subclass(There))
    assert told == ["cuda:1", "launch", "launch"]
