"""Keep torch.autocast from the arithmetic of a model: its roundings would change the text, and would stay in caches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch


@contextmanager
def no_autocast(device: torch.device) -> Iterator[None]:
    """Switch autocast off while the block runs: for `device`, and for the CPU, where parts of the loop run."""
    with ExitStack() as stack:
        for kind in {device.type, "cpu"}:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


def refuse_autocast(device: torch.device, dtype: torch.dtype) -> None:
    """Raise a ValueError where autocast on `device` would make a model of `dtype` compute in another dtype."""
    if torch.is_autocast_enabled(device.type) and torch.get_autocast_dtype(device.type) != dtype:
        other = torch.get_autocast_dtype(device.type)
        raise ValueError(
            f"torch.autocast asks for {other}, and custom_generate=specdec.speculative computes in the {dtype} of the "
            f"weights: call generate() outside of autocast, convert the model with model.to({other}), or leave "
            "custom_generate out"
        )
