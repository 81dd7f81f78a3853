"""The tensors of a model that is already in memory, as a checkpoint: shared, not copied."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from specdec.weights.checkpoint import check_request, find
from specdec.weights.tensors import DenseWeight, Storage, Weight, stored_bytes


class StateDictCheckpoint:
    """Read `state` (a module's `state_dict()`) as a `Checkpoint`; `owner` names it in errors.

    Raises:
        ValueError: tensors on several devices, without data, or in a dtype that is not a float's.
    """

    def __init__(self, state: Mapping[str, Tensor], owner: str) -> None:
        self.path = Path(owner)
        self._state = state
        if any(tensor.is_meta for tensor in state.values()) or len({tensor.device for tensor in state.values()}) > 1:
            raise ValueError(f"{owner} is spread over several devices or offloaded; load it on one device")
        odd = [name for name, tensor in state.items() if name.endswith(".weight") and not tensor.is_floating_point()]
        if odd:
            raise ValueError(
                f"{owner} was quantised by another library ({odd[0]} is {state[odd[0]].dtype}); load the original with "
                "specdec.load(..., quantize='int4')"
            )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Return every tensor's name and shape."""
        return {name: tuple(tensor.shape) for name, tensor in self._state.items()}

    def loaded_bytes(self, name: str, dtype: torch.dtype, quantize: Storage = None) -> int:
        """Return the bytes of the tensor in `dtype`."""
        return stored_bytes(tuple(find(name, self._state, self.path).shape), quantize, dtype)

    def tensor(self, name: str) -> Tensor:
        """Return the tensor as float32, without gradient; a float32 one is shared."""
        return find(name, self._state, self.path).detach().float()

    def weight(self, name: str, dtype: torch.dtype, quantize: Storage = None, rows: Tensor | None = None) -> Weight:
        """Return the matrix `name` in `dtype`, shared where it has that dtype already."""
        tensor = find(name, self._state, self.path).detach()
        check_request(name, tuple(tensor.shape), quantize, rows)
        assert quantize in (None, "none") and rows is None, "weights in memory are used as they are"
        return DenseWeight(tensor.flatten(0, -2).to(dtype))
