"""The cases that `eval.kernels` times: one `Case` per public function of `specdec.kernels` and shape.

What: shapes are those of SmolLM2 135M, Gemma 3 270M and Gemma 4 12B. Weights, and the K and V of attention, come out of
memory as in a model: each call takes the next of many copies, which together exceed the last-level cache several times.
The outputs of the layer before (activations) stay in the cache, as in a model. Left out: `dense_linear`, which is
torch's own, and `fuse`, which the passes of a whole model time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from eval.kernels.bandwidth import last_level_cache
from eval.synthetic.random_weights import copies, random_blocks
from specdec import kernels

DECODE = tuple(range(1, 17))  # rows of passes that verify drafts
ROWS = (*DECODE, 64, 512)  # and of prefill
QUICK_ROWS = (1, 2, 4, 8, 16)
OUT_OF_CACHE = 256 << 20  # bytes of all copies together, at the least
EPS = 1e-6


@dataclass(frozen=True)
class Case:
    """Describe one kernel on one shape.

    `call(rows)` returns the call that is timed. `bytes_read`: of weights, or of K and V, that a call reads out of
    memory whatever the number of rows; 0 where everything is in the cache.
    """

    kernel: str
    what: str
    rows: tuple[int, ...]
    bytes_read: int
    call: Callable[[int], Callable[[], object]]


MATRICES = ((15360, 3840), (3840, 15360), (4096, 3840), (2048, 640), (1536, 576), (576, 1536))
QUICK_MATRICES = ((15360, 3840), (1536, 576))
# bits, minimum, table, factors for 16 inputs
FORMATS: dict[str, tuple[int, bool, str | None, bool]] = {
    "4 bit": (4, False, None, False),
    "4 bit, minimum": (4, True, None, False),
    "5 bit": (5, False, None, False),
    "8 bit": (8, False, None, False),
    "4 bit, table": (4, False, "iq4", False),
    "6 bit by 16": (6, False, None, True),
    "4 bit by 16, table": (4, False, "fp4", True),
    "3 bit by 16": (3, False, None, True),
    "3 bit by 16, table": (3, False, "iq2", True),
    "2 bit by 16, minimum": (2, True, None, True),
}
USUAL = ("4 bit", "4 bit, minimum", "5 bit", "8 bit")  # which a quick run times on every shape
# query heads, key heads, head_dim, positions; of each type that a store may have
ATTENTIONS = ((9, 3, 64, 256), (16, 8, 256, 1024), (16, 1, 512, 1024), (16, 1, 512, 16384))
STORES = (torch.float32, torch.bfloat16, torch.int8)
VALUES_ALONE = 512  # head_dim of the layers that keep no keys: Gemma 4's full layers
NAMES = ("block_linear", "attention", "rms_norm", "rope", "gated", "block_rows")


def cases(quick: bool = False, only: frozenset[str] = frozenset(NAMES)) -> Iterator[Case]:
    """Yield the cases of the kernels named in `only`, one at a time: each case frees its copies before the next makes
    its own."""
    rows = QUICK_ROWS if quick else ROWS
    if "block_linear" in only:
        for size in QUICK_MATRICES if quick else MATRICES:
            for name in FORMATS:
                if not quick or name in USUAL or size == QUICK_MATRICES[0]:
                    yield _block_linear(size, name, rows)
    if "attention" in only:
        for shape in ATTENTIONS[:1] if quick else ATTENTIONS:
            for dtype in STORES[:1] if quick else STORES:
                yield _attention(shape, dtype, rows)
    if "rms_norm" in only:
        for width in (576, 3840):
            yield _rms_norm(width, rows)
    if "rope" in only:
        for heads, head_dim in ((9, 64), (16, 256)):
            yield _rope(heads, head_dim, rows)
    if "gated" in only:
        for width, activation in ((1536, "silu"), (15360, "gelu_tanh")):
            yield _gated(width, activation, rows)
    if "block_rows" in only:
        yield _block_rows(49152, 576, rows)


def _block_linear(size: tuple[int, int], name: str, rows: tuple[int, ...]) -> Case:
    bits, minimum, table, sub = FORMATS[name]
    first = random_blocks(*size, bits, minimum, table=table, sub=sub)
    rotation = itertools.cycle(copies(first, _out_of_cache()))

    def call(t: int) -> Callable[[], object]:
        x = _random(t, size[1])
        return lambda: kernels.block_linear(x, next(rotation))

    return Case("block_linear", f"{size[0]}x{size[1]} {name}", rows, first.nbytes, call)


def _attention(shape: tuple[int, int, int, int], dtype: torch.dtype, rows: tuple[int, ...]) -> Case:
    """Make a case in which row t of T sees positions 0 .. context - T + t, as in the last pass of a text of `context`
    positions."""
    heads, kv_heads, width, context = shape
    alone = width == VALUES_ALONE
    wide = _random(kv_heads, context, width)
    stored, scale = kernels.quantise_store(wide) if dtype is torch.int8 else (wide.to(dtype), None)
    angles = _random(context, width // 8)
    made = kernels.KeyFromValue(torch.ones(width, dtype=torch.float32), angles.cos(), angles.sin()) if alone else None
    bytes_stored = (1 if alone else 2) * stored.nbytes

    def copy() -> kernels.KVView:
        keys = None if alone else stored.clone()
        return kernels.KVView(keys, stored.clone(), None if alone else scale, scale, made)

    rotation = itertools.cycle([copy() for _ in range(max(2, -(-_out_of_cache() // bytes_stored)))])

    def call(t: int) -> Callable[[], object]:
        q = _random(t, heads, width)
        lo, hi = [0] * t, [context - t + i + 1 for i in range(t)]
        return lambda: kernels.attention(q, next(rotation), lo, hi, width**-0.5)

    kind = f"{str(dtype).removeprefix('torch.')}{', values alone' if alone else ''}"
    what = f"{heads} heads, {kv_heads} of K/V x {width}, {context} positions, {kind}"
    return Case("attention", what, tuple(t for t in rows if t <= context), bytes_stored, call)


def _rms_norm(width: int, rows: tuple[int, ...]) -> Case:
    weight = _random(width)

    def call(t: int) -> Callable[[], object]:
        x = _random(t, width)
        return lambda: kernels.rms_norm(x, weight, EPS)

    return Case("rms_norm", str(width), rows, 0, call)


def _rope(heads: int, head_dim: int, rows: tuple[int, ...]) -> Case:
    def call(t: int) -> Callable[[], object]:
        x, angles = _random(t, heads, head_dim), _random(t, head_dim)
        cos, sin = angles.cos(), angles.sin()
        return lambda: kernels.rope(x, cos, sin)

    return Case("rope", f"{heads} heads x {head_dim}", rows, 0, call)


def _gated(width: int, activation: str, rows: tuple[int, ...]) -> Case:
    def call(t: int) -> Callable[[], object]:
        gate, up = _random(t, width), _random(t, width)
        return lambda: kernels.gated(gate, up, activation)

    return Case("gated", f"{width} {activation}", rows, 0, call)


def _block_rows(vocabulary: int, width: int, rows: tuple[int, ...]) -> Case:
    """Make a case that looks up other tokens each time; a few rows of a large matrix say nothing about bandwidth, so
    none is reported."""
    w = random_blocks(vocabulary, width, 8)
    tokens = torch.randint(0, vocabulary, (4096,), generator=torch.Generator().manual_seed(0))
    starts = itertools.cycle(range(0, 4096 - 512, 61))

    def call(t: int) -> Callable[[], object]:
        def look_up() -> object:
            start = next(starts)
            return kernels.block_rows(tokens[start : start + t], w, torch.float32)

        return look_up

    return Case("block_rows", f"{vocabulary}x{width} 8 bit", rows, 0, call)


def _out_of_cache() -> int:
    return max(OUT_OF_CACHE, 8 * last_level_cache())


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float32)
