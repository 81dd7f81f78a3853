"""Captures as CUDA graphs, without CUDA: on which device and stream, in what memory, what is left after an error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec.kernels.triton.passes.graphs import CUDACapture


def one() -> tuple[Tensor, ...]:
    return (torch.ones(1, dtype=torch.float32),)


class Graph:
    """A graph that does nothing."""

    def replay(self) -> None:
        """Do nothing."""


class Device:
    """What `CUDACapture` asks of CUDA: devices with streams, of which each thing that is done is told."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, fail: bool = False) -> None:
        self.number, self.fail, self.streams, self.captured = 0, fail, {0: "first", 1: "second"}, list[Any]()
        for name in ("graph", "stream"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))
        made = iter(range(100))
        monkeypatch.setattr(torch.cuda, "current_device", lambda: self.number)
        monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: f"pool {next(made)}")
        monkeypatch.setattr(torch.cuda, "Stream", lambda device: f"stream {next(made)} of {device}")
        monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
        streams = self.streams
        monkeypatch.setattr(
            torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=hash(streams[device.index]))
        )

    @contextmanager
    def stream(self, stream: str) -> Iterator[None]:
        before, self.streams[self.number] = self.streams[self.number], stream
        try:
            yield
        finally:
            self.streams[self.number] = before

    @contextmanager
    def graph(self, graph: object, pool: str, stream: str, capture_error_mode: str) -> Iterator[None]:
        self.streams[self.number] = stream  # as torch: after an error it is left there
        self.captured.append((self.number, pool, stream))
        assert capture_error_mode == "thread_local"
        yield
        if self.fail:
            raise RuntimeError("operation not permitted when stream is capturing")


def test_a_graph_is_captured_on_a_stream_of_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device, capture = Device(monkeypatch), CUDACapture()
    kept = []  # what replays a graph has it
    for device.number in (0, 1, 0):
        kept.append(capture(one))
        assert torch.equal(kept[-1][1][0], one()[0])
    first, second, again = device.captured
    assert first == again and first[2].endswith("of 0") and second[2].endswith("of 1")
    assert first[1] != second[1], "memory is one device's"
    device.streams[0] = "another of the caller's"
    capture(one)
    assert device.captured[3][0] == 0 and device.captured[3][1] != first[1], "two streams may replay at once"


def test_memory_of_which_all_graphs_are_gone_is_not_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    device, capture = Device(monkeypatch), CUDACapture()
    first, second = capture(one), capture(one)
    del first
    third = capture(one)
    del second, third
    capture(one)
    pools = [pool for _, pool, _ in device.captured]
    assert pools[0] == pools[1] == pools[2] != pools[3]
    assert len({stream for *_, stream in device.captured}) == 1


def test_after_a_capture_that_failed_the_callers_stream_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device(monkeypatch, fail=True)
    with pytest.raises(RuntimeError, match="not permitted"):
        CUDACapture()(one)
    assert device.streams == {0: "first", 1: "second"} and len(device.captured) == 1
