"""From tensors to the records of `abi.py` that hold their addresses, and which tensors a record can point at.

A record is valid as long as the tensors that it was made of live; its owner has to keep them.
"""

from __future__ import annotations

import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from ctypes import Array, addressof, c_void_p, sizeof
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from specdec.kernels import abi
from specdec.kernels.blocks import BlockTensor
from specdec.kernels.forms import BLOCK, TABLES
from specdec.kernels.low_rank import LowRank
from specdec.kernels.store import KVView

AdapterRecords = Array[abi.LayerAdapter]
STORE_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}  # `StoreType` of abi.h


@dataclass(frozen=True)
class Matrix:
    """Hold packed weights [out, in] (None: they are stored otherwise) and an optional bias [out]."""

    blocks: BlockTensor | None
    bias: Tensor | None = None


class ExpertsShape(Protocol):
    """Give the sizes of a mixture of experts."""

    @property
    def count(self) -> int:
        """Return the number of experts."""

    @property
    def used(self) -> int:
        """Return how many experts a row uses."""

    @property
    def width(self) -> int:
        """Return the inner width of an expert."""


@dataclass(frozen=True, kw_only=True)
class MixtureWeights(ABC):
    """Hold the mixture of experts beside a layer's MLP: the router, the experts and the norms around them.

    `router`: a low-rank part [E, hidden] whose outputs are the scores: its `down` has the router's rows, and its `up`
    is the identity. `router_scale` [hidden] is the weight of the norm before the router, `expert_scale` [E] multiplies
    the weight that an expert gets. Norms are weights [hidden]: `dense_norm` of the output of the MLP beside the
    experts, `pre_norm` and `post_norm` before and after the experts. `layer`: the layer's number, which the library
    hands to the record's callback.
    """

    spec: ExpertsShape
    router: LowRank
    router_scale: Tensor
    expert_scale: Tensor
    dense_norm: Tensor
    pre_norm: Tensor
    post_norm: Tensor
    layer: int = 0

    @property
    @abstractmethod
    def packed(self) -> tuple[BlockTensor | None, BlockTensor | None]:
        """Return gate and up of all experts [E * 2 * width, hidden], an expert's gate before its up, and down
        [E * hidden, width]; None where a matrix is not in blocks."""

    @property
    @abstractmethod
    def use(self) -> Callable[[Sequence[int]], None] | None:
        """Return what is called with the ascending experts that a pass reads next; None: nobody wants to know."""

    @property
    def vectors(self) -> dict[str, Tensor]:
        """Return the vectors by the names of the native record."""
        names = ("router_scale", "expert_scale", "dense_norm", "pre_norm", "post_norm")
        return {name: getattr(self, name) for name in names}

    @property
    def readable(self) -> bool:
        """Return whether the library can read all of it where it is."""
        packed = all(part is not None and part.q.is_cpu for part in self.packed)
        return packed and all(map(plain, self.vectors.values()))


class CallbackErrors(threading.local):
    """Hold what Python raises while the library calls it, of each thread its own: nothing is raised through the
    library."""

    def __init__(self) -> None:
        self.found: list[BaseException] = []

    @contextmanager
    def raised(self) -> Iterator[None]:
        """Run a native call, and raise the first of what was raised meanwhile.

        A signal (Ctrl-C) comes while native code runs, and Python raises for it as soon as it is called: before the
        first line of the callback, where no `try` is. What ctypes then reports, instead of raising it, is taken here.
        """
        self.found.clear()
        if threading.current_thread() is not threading.main_thread():  # no signal is handled there
            yield
        else:
            report = sys.unraisablehook

            def take(reported: Any) -> None:
                here = threading.current_thread() is threading.main_thread()
                if here and "ctypes callback" in (reported.err_msg or "") and reported.exc_value is not None:
                    self.found.append(reported.exc_value)
                else:
                    report(reported)

            sys.unraisablehook = take
            try:
                yield
            finally:
                sys.unraisablehook = report
        if self.found:
            first = self.found[0]
            self.found.clear()  # an error holds the frames that it went through
            raise first


class DraftSampling(NamedTuple):
    """Say how the tokens of a draft are sampled.

    `keys`: of each token's noise. `sharpness` multiplies logits before the noise is added. `top_k`, `top_p`, `min_p`:
    which tokens may be sampled (`specdec.engine.sampling.Warping`).
    """

    keys: Sequence[int]
    sharpness: float
    top_k: int
    top_p: float
    min_p: float


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


def store_record(kv: KVView) -> abi.KV:
    """Return the record of the store `kv`, which is `readable`."""
    assert readable(kv)
    store = abi.KV(type=STORE_TYPES[kv.values.dtype], slots=kv.slots, width=kv.key_width, value_width=kv.value_width)
    store.values = _plane(kv.values, kv.value_scale)
    if kv.keys is not None:
        store.keys = _plane(kv.keys, kv.key_scale)
    elif kv.key_from_value is not None:
        made = (kv.key_from_value.weight, kv.key_from_value.cos, kv.key_from_value.sin)
        assert all(map(plain, made))
        store.weight, store.cos, store.sin = (t.data_ptr() for t in made)
        store.pairs = kv.key_from_value.cos.shape[1]
    return store


def _plane(tensor: Tensor, scale: Tensor | None) -> abi.Plane:
    assert scale is None or plain(scale)
    return abi.Plane(tensor.data_ptr(), address(scale), tensor.stride(0), tensor.stride(1))


def weights_record(w: BlockTensor) -> abi.Weights:
    """Return the record of packed weights on the CPU."""
    assert w.q.is_cpu
    q, scale, minimum, sub = w.q.data_ptr(), w.scale.data_ptr(), address(w.minimum), address(w.sub)
    if w.table is None:
        return abi.Weights(q, scale, minimum, sub, None, w.columns // BLOCK, w.bits, 1.0)
    table = TABLES[w.table]
    return abi.Weights(q, scale, minimum, sub, table.numbers.data_ptr(), w.columns // BLOCK, w.bits, table.unit)


def matrix_record(matrix: Matrix) -> abi.Matrix:
    """Return the record of packed weights on the CPU with their bias, which is `plain`."""
    assert matrix.blocks is not None and (matrix.bias is None or plain(matrix.bias))
    return abi.Matrix(weights_record(matrix.blocks), address(matrix.bias), matrix.blocks.rows)


def mixture_record(mixture: MixtureWeights, errors: CallbackErrors) -> abi.Mixture:
    """Return the record of a mixture, which is `readable` and stays the caller's. What its `use` raises goes to
    `errors`, and the layers after it do not call theirs: their results are dropped."""
    gate_up, down = mixture.packed
    assert gate_up is not None and down is not None and mixture.readable
    spec, use = mixture.spec, mixture.use
    sizes = {"count": spec.count, "used": spec.used, "width": spec.width, "layer": mixture.layer}
    record = abi.Mixture(weights_record(gate_up), weights_record(down), low_rank_record(mixture.router), **sizes)
    for name, vector in mixture.vectors.items():
        setattr(record, name, address(vector))
    if use is not None:

        def call_use(_layer: int, experts: Any, count: int) -> None:
            try:
                if not errors.found:
                    use(experts[:count])
            except BaseException as error:  # an interrupt by the user, too
                errors.found.append(error)

        record.use = abi.UseExperts(call_use)
    return record


def low_rank_record(part: LowRank) -> abi.LowRank:
    """Return the record of a low-rank part on the CPU."""
    assert part.down.is_cpu
    wide = part.down.dtype is torch.float32
    return abi.LowRank(part.down.data_ptr(), part.up.data_ptr(), part.rank, wide, part.scale)


def adapter_records(layers: Sequence[Any]) -> AdapterRecords:
    """Return records that point at the low-rank parts of `layers` (`LayerWeights`), which the caller has to keep."""
    records = (abi.LayerAdapter * len(layers))()
    for record, layer in zip(records, layers, strict=True):
        for name, *_ in abi.LayerAdapter._fields_:
            if (linear := getattr(layer, name)) is not None and linear.low_rank is not None:
                setattr(record, name, low_rank_record(linear.low_rank))
    return records


def adapter_pointers(adapters: Sequence[AdapterRecords | None], number: int = 0) -> Array[c_void_p] | None:
    """Return where each text's low-rank parts of the layers from `number` on are; None where no text has any."""
    if all(each is None for each in adapters):
        return None
    skipped = number * sizeof(abi.LayerAdapter)
    return (c_void_p * len(adapters))(*(None if each is None else addressof(each) + skipped for each in adapters))


def address(tensor: Tensor | None) -> int | None:
    """Return the address of `tensor`'s first number; None, which is C's null, where there is no tensor."""
    return None if tensor is None else tensor.data_ptr()
