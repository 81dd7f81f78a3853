"""What the library reads of Python: a cache's stores, and how the tokens of a draft are sampled, as C structures."""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import Structure, c_double, c_float, c_int64, c_void_p
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.kernels.store import KVView

STORE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # `StoreType` of native.cpp


class _Plane(Structure):
    _fields_ = (("data", c_void_p), ("scale", c_void_p), ("head", c_int64), ("slot", c_int64))


class Store(Structure):
    """`KV` of native.cpp."""

    _fields_ = (
        *((name, _Plane) for name in ("keys", "values")),
        *((name, c_void_p) for name in ("weight", "cos", "sin")),
        *((name, c_int64) for name in ("type", "slots", "width", "value_width", "pairs")),
    )


def plain(vector: Tensor) -> bool:
    """Return whether the library can read `vector`, as float32, where it is."""
    return vector.dtype is torch.float32 and vector.is_cpu and vector.is_contiguous()


def plain_ids(ids: Tensor) -> bool:
    """Return whether the library can read `ids`, as int64, where they are."""
    return ids.dtype is torch.int64 and ids.is_cpu and ids.is_contiguous()


def readable(kv: KVView) -> bool:
    """Return whether the library can read the store `kv` where it is."""
    kept = (kv.values,) if kv.keys is None else (kv.keys, kv.values)
    return kv.values.dtype in STORE_TYPES and all(t.is_cpu and t.stride(2) == 1 for t in kept)


def store_of(kv: KVView) -> Store:
    """What the library reads `kv`, which is `readable`, through; valid as long as its tensors live."""
    assert readable(kv)
    store = Store(type=STORE_TYPES[kv.values.dtype], slots=kv.slots, width=kv.key_width, value_width=kv.value_width)
    store.values = _plane(kv.values, kv.value_scale)
    if kv.keys is not None:
        store.keys = _plane(kv.keys, kv.key_scale)
    elif kv.rebuild is not None:
        made = (kv.rebuild.weight, kv.rebuild.cos, kv.rebuild.sin)
        assert all(map(plain, made))
        store.weight, store.cos, store.sin = (t.data_ptr() for t in made)
        store.pairs = kv.rebuild.cos.shape[1]
    return store


def _plane(tensor: Tensor, scale: Tensor | None) -> _Plane:
    assert scale is None or plain(scale)
    return _Plane(tensor.data_ptr(), None if scale is None else scale.data_ptr(), tensor.stride(0), tensor.stride(1))


class Luck(NamedTuple):
    """How the tokens of a draft are sampled: the key of each one's noise, what logits are multiplied by before it is
    added, and which of them may be sampled (`specdec.engine.sampling.Warping`)."""

    keys: Sequence[int]
    sharpness: float
    top_k: int
    top_p: float
    min_p: float


class LuckRecord(Structure):
    _fields_ = (
        ("keys", c_void_p),
        ("sharpness", c_float),
        ("top_k", c_int64),
        ("top_p", c_double),
        ("min_p", c_double),
    )
