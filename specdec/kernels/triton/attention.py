"""Attend to the filled slots of a store, a tile of queries and a chunk of positions to a program.

Queries that share a key head, of one row and of its neighbours, make a tile of QUERIES, so that a key is loaded once
for all of them. Positions are counted from the beginning of the text: CHUNK of them are added in their order, SPAN of
them chunk by chunk, and the spans of a row once more. The order depends on nothing but what the row sees: not on how
many rows there are, where a row stands, or how large the store is. Few queries have a program for each chunk, so that
all of a GPU is at work for one row too; many have one for each span. `_merge` adds the chunks of either.

Products are made of bfloat16 parts (floats.py): a store of bfloat16 or int8 is exact in one, queries and weights
have two, and so have keys that are made from values; a float32 store has three.

Left out: a NaN or an infinity in a value of a position that one row of a tile sees and another does not comes to both.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from specdec.kernels.store import KVView
from specdec.kernels.triton.floats import PART, add_product, rounded
from specdec.kernels.triton.launch import launch, tiles

QUERIES = 16  # of a tile, as many as a matrix unit takes
CHUNK, SPAN = 128, 1024  # positions
_PROGRAMS = 128  # that keep a GPU at work
_COLUMNS, _SPANS = 64, 16  # of a program that adds chunks

_PARTS = {torch.bfloat16: 1, torch.int8: 1, torch.float16: 2, torch.float32: 3}


def attention(q: Tensor, kv: KVView, first: Tensor, end: Tensor, scale: float) -> Tensor:
    """Attend with T query rows to a ring of key slots, by softmax: q [T, Hq, D] -> [T, Hq, Dv] in q.dtype.

    Row t sees positions first[t] .. end[t] - 1; what all rows see together has room in the store. `first`, `end`:
    integers [T] on the device. A row that sees nothing is zero.
    """
    rows, heads, width = q.shape
    group, values = heads // kv.kv_heads, kv.values
    columns, halves = kv.value_width, _half(width)
    out = q.new_empty((rows, heads, columns))
    first, end = first.contiguous(), end.contiguous()
    queries = tiles(rows * group, QUERIES)
    wide = queries * kv.kv_heads * _units(kv.slots, SPAN) >= _PROGRAMS
    unit = SPAN if wide else CHUNK
    units = _units(kv.slots, unit)
    sums = torch.empty(rows * heads, units, columns, dtype=torch.float32, device=q.device)
    tops = torch.empty(2, rows * heads, units, dtype=torch.float32, device=q.device)
    made = kv.key_from_value
    keys = values if kv.keys is None else kv.keys
    exact = _PARTS[values.dtype]
    launch(
        _attend,
        (queries, kv.kv_heads, units),
        q.contiguous(), kv.keys, values, kv.key_scale, kv.value_scale,
        *((None, None, None) if made is None else (made.weight, made.cos.contiguous(), made.sin.contiguous())),
        first, end, sums, tops,
        rows, heads, group, kv.slots, units, unit // CHUNK, scale * math.log2(math.e),
        keys.stride(0), keys.stride(1), values.stride(0), values.stride(1), width, columns,
        0 if made is None else made.cos.shape[1],
        QUERIES=QUERIES, CHUNK=CHUNK, TILE=_tile(width), H=halves, HV=_half(columns),
        PARTS_Q=max(exact, 1 if q.dtype is torch.bfloat16 else 2), PARTS_K=exact if made is None else max(exact, 2),
        PARTS_P=max(exact, 2), PARTS_V=exact, PART=PART,
        num_warps=4,
    )  # fmt: skip
    launch(
        _combine,
        (rows * heads, tiles(columns, _COLUMNS)),
        sums, tops, first, end, out, rows, heads, units, unit // CHUNK, columns,
        CHUNK=CHUNK, SPAN=SPAN, SPANS=_SPANS, COLUMNS=_COLUMNS, TYPE=_TYPES[q.dtype],
        num_warps=4,
    )  # fmt: skip
    return out


_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def _half(width: int) -> int:
    """Return the columns of a tile of half a head, a power of two."""
    return max(16, 1 << (-(-width // 2) - 1).bit_length())


def _tile(width: int) -> int:
    """Return the positions of a tile, fewer where a head is wide: 16 kB of bfloat16 keys."""
    return max(16, min(64, 8192 // (2 * _half(width))))


def _units(slots: int, size: int) -> int:
    """Return how many units of `size` positions a row that sees `slots` positions can see, the first and the last of
    them in part."""
    return (slots + size - 2) // size + 1


@triton.jit
def _merge(top, total, sums, other_top, other_total, other_sums):
    """Add weighted sums [R, N] of other positions: each is of e^(score - top) with the weights' total, both [R]."""
    highest = tl.maximum(top, other_top)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    mine, other = tl.exp2(top - base), tl.exp2(other_top - base)
    return (
        highest,
        total * mine + other_total * other,
        sums * mine[:, None] + other_sums * other[:, None],
    )


@triton.jit(do_not_specialize=["rows", "slots", "units", "chunks"])
def _attend(
    q, keys, values, key_scale, value_scale, weight, cos, sin, first, end, sums, tops,
    rows, heads, group, slots, units, chunks, scale,
    key_head, key_slot, value_head, value_slot, width, columns, pairs,
    QUERIES: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
    PARTS_Q: tl.constexpr, PARTS_K: tl.constexpr, PARTS_P: tl.constexpr, PARTS_V: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Store the weighted sums of one tile of queries over units of `chunks` chunks, and their tops and totals."""
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    row, kv_head = query // group, tl.program_id(1)
    there = row < rows
    low = tl.load(first + row, mask=there, other=0).to(tl.int32)
    high = tl.load(end + row, mask=there, other=0).to(tl.int32)
    there = there & (low < high)
    lowest = tl.min(tl.where(there, low, 0x7FFFFFFF), axis=0)
    highest = tl.max(tl.where(there, high, 0), axis=0)
    place = row * heads + kv_head * group + query % group  # of [rows * heads]
    size = CHUNK * chunks

    half, column = (width + 1) // 2, tl.arange(0, H)
    queries = q + place.to(tl.int64)[:, None] * width + column[None, :]
    q_low = tl.load(queries, mask=there[:, None] & (column < half)[None, :], other=0.0).to(tl.float32)
    q_high = tl.load(queries + half, mask=there[:, None] & (column < width - half)[None, :], other=0.0).to(tl.float32)
    half_v, column_v = (columns + 1) // 2, tl.arange(0, HV)
    values += kv_head.to(tl.int64) * value_head
    if keys is not None:
        keys += kv_head.to(tl.int64) * key_head
    else:
        weight_low = tl.load(weight + column, mask=column < half, other=0.0).to(tl.float32)[None, :]
        weight_high = tl.load(weight + half + column, mask=column < half, other=0.0).to(tl.float32)[None, :]
    if value_scale is not None:
        value_scale += kv_head.to(tl.int64) * slots
    if key_scale is not None:
        key_scale += kv_head.to(tl.int64) * slots

    for unit in range(lowest // size + tl.program_id(2), tl.cdiv(highest, size), tl.num_programs(2)):
        unit_top = tl.full([QUERIES], -float("inf"), tl.float32)
        unit_total = tl.zeros([QUERIES], tl.float32)
        unit_low = tl.zeros([QUERIES, HV], tl.float32)
        unit_high = tl.zeros([QUERIES, HV], tl.float32)
        last = tl.minimum(highest, unit * size + size)
        for chunk in range(tl.maximum(lowest, unit * size) // CHUNK, tl.cdiv(last, CHUNK)):
            top = tl.full([QUERIES], -float("inf"), tl.float32)
            total = tl.zeros([QUERIES], tl.float32)
            sum_low = tl.zeros([QUERIES, HV], tl.float32)
            sum_high = tl.zeros([QUERIES, HV], tl.float32)
            begin = tl.maximum(chunk * CHUNK, lowest // TILE * TILE)
            for start in range(begin, tl.minimum(highest, chunk * CHUNK + CHUNK), TILE):
                position = start + tl.arange(0, TILE)
                filled = (position >= lowest) & (position < highest)
                slot = position % slots
                value = values + slot[:, None] * value_slot + column_v[None, :]
                v_low = tl.load(value, mask=filled[:, None] & (column_v < half_v)[None, :], other=0)
                v_high = tl.load(value + half_v, mask=filled[:, None] & (column_v < columns - half_v)[None, :], other=0)
                if value_scale is not None:
                    v_scale = tl.load(value_scale + slot, mask=filled, other=0.0)
                if keys is not None:
                    key = keys + slot[:, None] * key_slot + column[None, :]
                    k_low = tl.load(key, mask=filled[:, None] & (column < half)[None, :], other=0)
                    k_high = tl.load(key + half, mask=filled[:, None] & (column < width - half)[None, :], other=0)
                else:
                    k_low, k_high = v_low.to(tl.float32), v_high.to(tl.float32)
                    if value_scale is not None:
                        k_low, k_high = k_low * v_scale[:, None], k_high * v_scale[:, None]
                    k_low, k_high = k_low * weight_low, k_high * weight_high
                    turned = filled[:, None] & (column < pairs)[None, :]
                    turn = position[:, None] * pairs + column[None, :]
                    c = tl.load(cos + turn, mask=turned, other=1.0)
                    s = tl.load(sin + turn, mask=turned, other=0.0)
                    k_low, k_high = k_low * c - k_high * s, k_high * c + k_low * s
                if PARTS_K > 1:
                    k_low, k_high = k_low.to(tl.float32), k_high.to(tl.float32)
                score = tl.zeros([QUERIES, TILE], tl.float32)
                score = add_product(score, q_low, tl.trans(k_low), PARTS_Q, PARTS_K, PART)
                score = add_product(score, q_high, tl.trans(k_high), PARTS_Q, PARTS_K, PART)
                if key_scale is not None:
                    score = score * tl.load(key_scale + slot, mask=filled, other=0.0)[None, :]
                seen = there[:, None] & (position[None, :] >= low[:, None]) & (position[None, :] < high[:, None])
                score = tl.where(seen, score * scale, -float("inf"))
                above = tl.maximum(top, tl.max(score, axis=1))
                base = tl.where(above == -float("inf"), 0.0, above)
                share = tl.exp2(score - base[:, None])
                before = tl.exp2(top - base)
                total = total * before + tl.sum(share, axis=1)
                if value_scale is not None:
                    share = share * v_scale[None, :]
                if PARTS_V > 1:
                    v_low, v_high = v_low.to(tl.float32), v_high.to(tl.float32)
                sum_low = add_product(sum_low * before[:, None], share, v_low, PARTS_P, PARTS_V, PART)
                sum_high = add_product(sum_high * before[:, None], share, v_high, PARTS_P, PARTS_V, PART)
                top = above
            _, _, unit_low = _merge(unit_top, unit_total, unit_low, top, total, sum_low)
            unit_top, unit_total, unit_high = _merge(unit_top, unit_total, unit_high, top, total, sum_high)
        nth = unit - low // size  # of the row's own units
        keep = there & (unit >= low // size) & (unit * size < high)
        unit_at = place.to(tl.int64) * units + nth
        tl.store(tops + unit_at, unit_top, mask=keep)
        tl.store(tops + rows.to(tl.int64) * heads * units + unit_at, unit_total, mask=keep)
        sum_at = sums + unit_at[:, None] * columns + column_v[None, :]
        tl.store(sum_at, unit_low, mask=keep[:, None] & (column_v < half_v)[None, :])
        tl.store(sum_at + half_v, unit_high, mask=keep[:, None] & (column_v < columns - half_v)[None, :])


@triton.jit(do_not_specialize=["rows", "units", "chunks"])
def _combine(
    sums, tops, first, end, out, rows, heads, units, chunks, columns,
    CHUNK: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr, COLUMNS: tl.constexpr, TYPE: tl.constexpr,
):  # fmt: skip
    """Add what `_attend` stored of one query, some columns of it: chunks to spans, then the spans."""
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    low = tl.load(first + place // heads).to(tl.int32)
    high = tl.load(end + place // heads).to(tl.int32)
    size = CHUNK * chunks
    top = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    found = tl.zeros([1, COLUMNS], tl.float32)
    if low < high:
        for start in range(low // SPAN, tl.cdiv(high, SPAN), SPANS):
            span = start + tl.arange(0, SPANS)
            span_top = tl.full([SPANS], -float("inf"), tl.float32)
            span_total = tl.zeros([SPANS], tl.float32)
            span_sums = tl.zeros([SPANS, COLUMNS], tl.float32)
            for k in range(0, SPAN // size):
                unit = span * (SPAN // size) + k
                there = (unit >= low // size) & (unit * size < high)
                unit_at = place * units + unit - low // size
                unit_top = tl.load(tops + unit_at, mask=there, other=-float("inf"))
                unit_total = tl.load(tops + rows.to(tl.int64) * heads * units + unit_at, mask=there, other=0.0)
                sum_at = sums + unit_at[:, None] * columns + column[None, :]
                unit_sums = tl.load(sum_at, mask=there[:, None] & (column < columns)[None, :], other=0.0)
                span_top, span_total, span_sums = _merge(
                    span_top, span_total, span_sums, unit_top, unit_total, unit_sums
                )
            above = tl.max(span_top, axis=0)
            share = tl.exp2(span_top - tl.where(above == -float("inf"), 0.0, above))
            more = tl.sum(span_sums * share[:, None], axis=0)[None, :]
            top, total, found = _merge(
                top, total, found,
                tl.full([1], 0.0, tl.float32) + above, tl.zeros([1], tl.float32) + tl.sum(span_total * share, axis=0),
                more,
            )  # fmt: skip
    # a sum of nothing or of zeros may be -0.0 after other tiles
    total = tl.where(low < high, total, 1.0)
    answer = tl.div_rn(found, total[:, None] + tl.zeros([1, COLUMNS], tl.float32)) + 0.0
    at = out + place * columns + column[None, :]
    tl.store(at, rounded(answer, TYPE), mask=(column < columns)[None, :])
