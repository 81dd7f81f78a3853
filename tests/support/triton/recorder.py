"""A capture that needs no GPU: launches over static tensors, made again at every replay.

As with a CUDA graph, what is not read from the inputs stays what it was at the capture, outputs hold nothing before the
first replay, and launches may not ask for a number on the host nor bring one from there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_WAIT = {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::lift_fresh", "aten::is_nonzero"}


class NoWaiting(TorchDispatchMode):
    """Refuse the operations that a capture refuses: they wait for the device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._schema.name in _WAIT:
            raise RuntimeError(f"{func._schema.name} in a captured pass")
        return func(*args, **(kwargs or {}))


class Recorder:
    """Capture by recording what has to be run again. `captures`: how often; `replays`: how often anything was run."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(self, run: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        self.captures += 1
        with NoWaiting():
            outputs = run()
        for out in outputs:
            out.fill_(float("nan") if out.is_floating_point() else -1)

        def replay() -> None:
            self.replays += 1
            with NoWaiting(), torch.inference_mode():  # as a CUDA graph, it writes in any mode
                for out, made in zip(outputs, run(), strict=True):
                    out.copy_(made)

        return replay, outputs


def refuse(run: Callable[[], tuple[Tensor, ...]]) -> Any:
    """Refuse to capture anything, as a device without memory does."""
    raise torch.OutOfMemoryError("no memory for a graph\nand more")
