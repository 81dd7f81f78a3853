"""A layer's keys and values, described for attention: the cache lays a store out, and the kernels read it.

A store is float32 or another float type as it is, int8 with a float32 scale per head and slot, or values alone, from
which attention makes the keys. Left out: writing, which belongs to the cache.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class KeyFromValue:
    """Make keys from values, rope(values * weight): Gemma 4's full layers have one projection for both.

    `weight` [D]: of the key norm. `cos`, `sin` [P, n]: rotations of positions 0 .. P - 1, for the first n pairs (i,
    i + D / 2) of a head; the other pairs stay as they are.
    """

    weight: Tensor
    cos: Tensor
    sin: Tensor

    def to(self, device: torch.device | str) -> KeyFromValue:
        """Return the same means on `device`."""
        return KeyFromValue(self.weight.to(device), self.cos.to(device), self.sin.to(device))


@dataclass(frozen=True)
class KVView:
    """Hold one layer's keys [Hkv, S, D] and values [Hkv, S, Dv]; position p lives in slot p % S.

    Where `keys` is None, `key_from_value` makes keys from `values`. `key_scale`, `value_scale` float32 [Hkv, S]: of an
    int8 store, whose numbers are value * scale.

    Raises ValueError when shapes or types do not belong together.
    """

    keys: Tensor | None
    values: Tensor
    key_scale: Tensor | None = None
    value_scale: Tensor | None = None
    key_from_value: KeyFromValue | None = None

    def __post_init__(self) -> None:
        keys = self.values if self.keys is None else self.keys
        if keys.shape[:2] != self.values.shape[:2] or keys.dtype != self.values.dtype:
            raise ValueError(
                "attention wants keys [Hkv, S, D] and values [Hkv, S, Dv] of one type, got "
                f"{tuple(keys.shape)} {keys.dtype} and {tuple(self.values.shape)} {self.values.dtype}"
            )
        if (self.keys is None) is (self.key_from_value is None):
            raise ValueError("a store has keys, or what makes a key from its value")
        scaled = (self.value_scale is not None) + (self.keys is not None and self.key_scale is not None)
        if scaled != (0 if keys.dtype != torch.int8 else 1 if self.keys is None else 2):
            raise ValueError("an int8 store has a float32 scale [Hkv, S] for everything it holds, others have none")

    @property
    def kv_heads(self) -> int:
        """Return Hkv."""
        return self.values.shape[0]

    @property
    def slots(self) -> int:
        """Return S, the positions that the store holds."""
        return self.values.shape[1]

    @property
    def key_width(self) -> int:
        """Return D, which is Dv where keys are made from values."""
        return (self.values if self.keys is None else self.keys).shape[2]

    @property
    def value_width(self) -> int:
        """Return Dv."""
        return self.values.shape[2]

    def tensors(self) -> tuple[Tensor | None, ...]:
        """Return keys, values and their scales; None for each that is not stored."""
        return self.keys, self.values, self.key_scale, self.value_scale

    def to(self, device: torch.device | str) -> KVView:
        """Return the same store on `device`."""
        keys, key_scale, value_scale = (
            None if part is None else part.to(device) for part in (self.keys, self.key_scale, self.value_scale)
        )
        made = None if self.key_from_value is None else self.key_from_value.to(device)
        return KVView(keys, self.values.to(device), key_scale, value_scale, made)
