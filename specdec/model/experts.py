"""A mixture of experts beside a layer's MLP (Gemma 4 26B-A4B): each row uses a few of many gated MLPs.

What: a row's router scores choose its experts and their weights, and the row's result is the weighted sum of what these
experts make of it. A row's bits depend on the row alone: the router is float32 arithmetic of a row at a time, rows that
chose the same expert share products that are batch-invariant, and a row's experts are summed in the order of their
numbers. Source of the block: transformers' `modeling_gemma4.py`.
"""

from __future__ import annotations

import math
import threading
from bisect import bisect_left, insort
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from specdec import kernels
from specdec.kernels import BlockTensor, LowRank, pack_low_rank
from specdec.model.spec import DecoderSpec, ExpertsSpec
from specdec.weights.packed import ByteRange, PackedFile
from specdec.weights.tensors import DenseWeight, Weight, row_range, tensors_of

FOLIO = 2 << 20  # bytes: the largest folio of Linux's cache of files, which one fault maps as a whole


class ExpertPages:
    """Keep the experts of a model that are pages of a packed file within `limit` bytes of this process: those that were
    used longest ago make room. They stay in the system's cache of files as long as it has memory for them.

    A process that reads a page gets the pages around it that the system keeps together (up to `FOLIO` bytes of a file
    that was read or written in one go), even where they hold experts that nobody asked for. These pages leave before
    the next layer reads.
    """

    def __init__(self, file: PackedFile, limit: int) -> None:
        self.file, self.limit = file, limit
        self._lock = threading.Lock()
        self._held: OrderedDict[tuple[int, int], tuple[ByteRange, ...]] = OrderedDict()  # by layer and expert
        self._parts: list[ByteRange] = []  # all of `_held`, ascending
        self._bytes = 0
        self._last_read: list[ByteRange] = []  # what the layer before began to read
        file.map_small_pages()

    def use(self, layer: int, experts: Sequence[int], parts_of: Callable[[int], tuple[Tensor, ...]]) -> None:
        """Make room for the pages of `experts` of a layer, which a pass reads next, and begin to read them.
        `parts_of(expert)`: the tensors of one of them. A pass that uses more than the limit has them all."""
        with self._lock:
            try:
                self._use(layer, experts, parts_of)
            except BaseException:  # an interrupt comes between any two lines: what is held is not known any more
                self._held.clear()
                self._parts.clear()
                self._bytes, self._last_read = 0, []
                self.file.forget(ByteRange(0, self.file.nbytes))
                raise

    def _use(self, layer: int, experts: Sequence[int], parts_of: Callable[[int], tuple[Tensor, ...]]) -> None:
        fresh: list[ByteRange] = []
        for expert in experts:
            if (layer, expert) in self._held:
                self._held.move_to_end((layer, expert))
            else:
                parts = self._held[layer, expert] = tuple(map(self.file.byte_range, parts_of(expert)))
                fresh += parts
        for part in fresh:
            insort(self._parts, part)
        self._bytes += _size(fresh)
        unused: list[ByteRange] = []
        while self._bytes > self.limit and len(self._held) > len(experts):
            _, parts = self._held.popitem(last=False)
            self._bytes -= _size(parts)
            unused += parts
        for part in unused:
            del self._parts[bisect_left(self._parts, part)]
        for area in _areas(unused + self._last_read, self.file.nbytes):
            for gap in self._gaps(area):
                self.file.forget(gap)
        for part in fresh:
            self.file.fetch(part)
        self._last_read = fresh

    def _gaps(self, area: ByteRange) -> Iterator[ByteRange]:
        """Yield what lies between the held parts within `area`."""
        begin = area.begin
        for i in range(max(0, bisect_left(self._parts, ByteRange(begin, 0)) - 1), len(self._parts)):
            part = self._parts[i]
            if part.begin >= area.end:
                break
            if begin < part.begin:
                yield ByteRange(begin, part.begin)
            begin = max(begin, part.end)
        if begin < area.end:
            yield ByteRange(begin, area.end)


def _size(parts: Iterable[ByteRange]) -> int:
    return sum(part.end - part.begin for part in parts)


def _areas(parts: Iterable[ByteRange], size: int) -> Iterator[ByteRange]:
    """Yield the areas, ascending, whose pages come with those of `parts` in a file of `size` bytes."""
    area: ByteRange | None = None
    for begin, end in sorted(parts):
        wide = ByteRange(begin // FOLIO * FOLIO, min(size, -(-end // FOLIO) * FOLIO))
        if area is None or area.end < wide.begin:
            if area is not None:
                yield area
            area = wide
        else:
            area = ByteRange(area.begin, max(area.end, wide.end))
    if area is not None:
        yield area


class Routes(NamedTuple):
    """Hold the experts of each row and their weights, [T][used] each."""

    ids: Sequence[Sequence[int]]
    weights: Sequence[Sequence[float]]


@dataclass(frozen=True, kw_only=True)
class Experts(kernels.MixtureWeights):
    """Hold the mixture of a layer, under the names that the kernels know too, and compute it op by op. `gate_up` [E * 2
    * width, hidden]: of each expert the rows of gate, then those of up. `down` [E * hidden, width]."""

    spec: ExpertsSpec
    activation: str
    eps: float
    gate_up: Weight
    down: Weight
    pages: ExpertPages | None = None  # what keeps the matrices within a part of the memory; None: they are all there

    @classmethod
    def read(
        cls,
        spec: DecoderSpec,
        experts: ExpertsSpec,
        layer: int,
        vector: Callable[[str], Tensor],
        matrix: Callable[[str], Weight],
        pages: ExpertPages | None,
    ) -> Experts:
        """Read the mixture of a layer by the canonical names of its tensors."""
        at = f"layers.{layer}."
        return cls(
            spec=experts,
            activation=spec.activation,
            eps=spec.norm_eps,
            router=_packed_router(vector(f"{at}router.proj.weight")),
            router_scale=vector(f"{at}router.scale"),
            expert_scale=vector(f"{at}router.per_expert_scale"),
            gate_up=matrix(f"{at}experts.gate_up_proj"),
            down=matrix(f"{at}experts.down_proj"),
            dense_norm=vector(f"{at}post_feedforward_layernorm_1.weight"),
            pre_norm=vector(f"{at}pre_feedforward_layernorm_2.weight"),
            post_norm=vector(f"{at}post_feedforward_layernorm_2.weight"),
            layer=layer,
            pages=pages,
        )

    def __call__(self, x: Tensor, dense: Tensor) -> Tensor:
        """Return the sum of the MLP's output `dense` and the experts' for rows x [T, hidden], both normed."""
        mixed = self.mix(kernels.rms_norm(x, self.pre_norm, self.eps), self.route(x))
        dense = kernels.rms_norm(dense, self.dense_norm, self.eps)
        return dense + kernels.rms_norm(mixed, self.post_norm, self.eps)

    def route(self, x: Tensor) -> Routes:
        """Choose the experts of rows x [T, hidden]: those with the best scores, the first of equals."""
        scores = kernels.low_rank(kernels.rms_norm(x, self.router_scale, self.eps), self.router).float()  # [T, E]
        best, ids = torch.sort(scores, dim=-1, descending=True, stable=True)
        scale = self._scales
        routes = Routes(ids[:, : self.spec.used].tolist(), [])
        return routes._replace(
            weights=[
                [share * scale[expert] for share, expert in zip(_softmax(row), chosen, strict=True)]
                for row, chosen in zip(best[:, : self.spec.used].tolist(), routes.ids, strict=True)
            ]
        )

    def mix(self, x: Tensor, routes: Routes) -> Tensor:
        """Return the weighted sums [T, hidden] of what the experts of each row of x [T, hidden] make of it."""
        users: dict[int, list[tuple[int, float]]] = {}
        for row, (experts, weights) in enumerate(zip(routes.ids, routes.weights, strict=True)):
            for expert, weight in zip(experts, weights, strict=True):
                users.setdefault(expert, []).append((row, weight))
        if self.use is not None:
            self.use(sorted(users))
        mixed = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
        for expert in sorted(users):
            rows = torch.tensor([row for row, _ in users[expert]], dtype=torch.int64, device=x.device)
            shares = torch.tensor([share for _, share in users[expert]], dtype=torch.float32, device=x.device)
            gate_up, down = self._parts[expert]
            y = gate_up.linear(x[rows]).view(len(rows), 2, -1)  # [n, 2, width]
            y = down.linear(kernels.gated(y[:, 0].contiguous(), y[:, 1].contiguous(), self.activation))  # [n, hidden]
            mixed.index_add_(0, rows, y.float() * shares[:, None])  # rows occur once: no order to choose
        return mixed.to(x.dtype)

    @property
    def parts(self) -> dict[str, Tensor | Weight]:
        """Return all tensors by their canonical names within the layer."""
        return {
            "router.proj.weight": self._router_matrix,
            "router.scale": self.router_scale,
            "router.per_expert_scale": self.expert_scale,
            "experts.gate_up_proj": self.gate_up,
            "experts.down_proj": self.down,
            "post_feedforward_layernorm_1.weight": self.dense_norm,
            "pre_feedforward_layernorm_2.weight": self.pre_norm,
            "post_feedforward_layernorm_2.weight": self.post_norm,
        }

    @property
    def packed(self) -> tuple[BlockTensor | None, BlockTensor | None]:
        """Return the blocks of `gate_up` and `down`."""
        return self.gate_up.packed, self.down.packed

    @property
    def use(self) -> Callable[[Sequence[int]], None] | None:
        """Return what makes room for the experts that a pass reads next; None: they are all there."""
        pages = self.pages
        return None if pages is None else lambda experts: pages.use(self.layer, experts, self._tensors)

    @property
    def matrices(self) -> tuple[Weight, ...]:
        """Return the matrices of all experts, and the router."""
        return self.gate_up, self.down, DenseWeight(self._router_matrix)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all parts."""
        return sum(part.nbytes for part in self.parts.values())

    def _tensors(self, expert: int) -> tuple[Tensor, ...]:
        """Return the tensors that hold the matrices of `expert`."""
        return tuple(part for weight in self._parts[expert] for part in tensors_of(weight))

    @property
    def _router_matrix(self) -> Tensor:
        """Return the router [E, hidden] in plain order: a copy, which is not kept."""
        rows = self.router.down.transpose(1, 2).reshape(self.router.rank, -1)  # [E and padding, hidden and padding]
        return rows[: self.spec.count, : self.router.inputs].to(self.router_scale.dtype)

    @cached_property
    def _scales(self) -> list[float]:
        scales: list[float] = self.expert_scale.float().tolist()
        return scales

    @cached_property
    def _parts(self) -> list[tuple[Weight, Weight]]:
        """Return each expert's matrices, in the memory of the whole."""
        wide, hidden = 2 * self.spec.width, self.gate_up.shape[1]
        return [
            (row_range(self.gate_up, e * wide, (e + 1) * wide), row_range(self.down, e * hidden, (e + 1) * hidden))
            for e in range(self.spec.count)
        ]


def _packed_router(router: Tensor) -> LowRank:
    """Lay out a router [E, hidden] as the kernels read it: a low-rank part that leaves its E sums as they are."""
    identity = torch.eye(router.shape[0], dtype=router.dtype, device=router.device)
    return pack_low_rank(router, identity, router.shape[1] ** -0.5)


def _softmax(scores: Sequence[float]) -> list[float]:
    """Return the softmax of a row's best scores, which is that of all scores divided by the sum over the best. The
    floats of Python, because a vectorised exponential would depend on where the row lies."""
    shares = [math.exp(score - scores[0]) for score in scores]
    total = 0.0
    for share in shares:  # one after the other, as the native kernels do; `sum` adds otherwise since Python 3.12
        total += share
    return [share / total for share in shares]
