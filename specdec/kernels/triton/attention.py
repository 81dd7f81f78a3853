"""Attend to the filled slots of a store, a tile of queries and a chunk of positions to a program.

Queries that share a key head, of one row and of its neighbours, make a tile of QUERIES, so that a key is loaded once
for all of them. Positions are counted from the beginning of the text: CHUNK of them are added in their order, SPAN of
them chunk by chunk, and the spans of a row once more. The order depends on nothing but what the row sees: not on how
many rows there are, where a row stands, or how large the store is. Few queries have a program for each chunk, so that
all of a GPU is at work for one row too; many have one for each span. `_combine` adds the chunks of either.

Products are made of bfloat16 parts (floats.py): a store of bfloat16 or int8 is exact in one, queries and weights
have two, and so have keys that are made from values; a float32 store has three. Of such keys only the pairs that
rotate are made: where nothing rotates, the weight goes to the queries instead, and the values are the keys.

Heads go through a program in pieces of columns, the first half of a head and then the second: whole, a wide one needs
more registers than there are.

Left out: a NaN or an infinity in a value of a position that one row of a tile sees and another does not comes to both.
"""

from __future__ import annotations

import math

import torch
import triton.language as tl
from torch import Tensor

from specdec.kernels.store import KVView
from specdec.kernels.triton.floats import PART, add_product
from specdec.kernels.triton.launch import jit, launch, rounded, tiles

QUERIES = 16  # of a tile, as many as a matrix unit takes
CHUNK, SPAN = 128, 1024  # positions
_PROGRAMS = 128  # that keep a GPU at work
_PIECE = 128  # columns, at the most
_COLUMNS, _SPANS = 64, 16  # of a program that adds chunks

# Of a number of a store, by its type.
_PARTS = {torch.bfloat16: 1, torch.int8: 1, torch.float16: 2, torch.float32: 3}
STORE_TYPES = tuple(_PARTS)


def attention(q: Tensor, kv: KVView, first: Tensor, end: Tensor, scale: float) -> Tensor:
    """Attend with T query rows to a ring of key slots, by softmax: q [T, Hq, D] -> [T, Hq, Dv] in q.dtype.

    Row t sees positions first[t] .. end[t] - 1; what all rows see together has room in the store. `first`, `end`:
    integers [T] on the device. A row that sees nothing is zero.
    """
    rows, heads, width = q.shape
    group, columns, values, made = heads // kv.kv_heads, kv.value_width, kv.values, kv.key_from_value
    q, first, end = q.contiguous(), first.contiguous(), end.contiguous()
    out = torch.empty(rows, heads, columns, dtype=q.dtype, device=q.device)
    queries = tiles(rows * group, QUERIES)
    unit = SPAN if queries * kv.kv_heads * _units(kv.slots, SPAN) >= _PROGRAMS else CHUNK
    units = _units(kv.slots, unit)
    sums = torch.empty(rows * heads, units, columns, dtype=torch.float32, device=q.device)
    tops = torch.empty(2, rows * heads, units, dtype=torch.float32, device=q.device)
    turns = (None, None, None) if made is None else (made.weight, made.cos.contiguous(), made.sin.contiguous())
    parts = _PARTS[values.dtype]
    launch(
        _attend,
        (queries, kv.kv_heads, units),
        q, kv.keys, values, kv.value_scale if kv.keys is None else kv.key_scale, kv.value_scale, *turns,
        first, end, sums, tops, rows, heads, group, kv.slots, units, unit // CHUNK, scale * math.log2(math.e),
        *(0, 0) if kv.keys is None else kv.keys.stride()[:2], *values.stride()[:2],
        WIDTH=width, COLUMNS=columns, PAIRS=0 if made is None else made.cos.shape[1],
        QUERIES=QUERIES, CHUNK=CHUNK, TILE=_tile(kv), **_pieces("K", width), **_pieces("V", columns),
        PARTS=parts, PARTS_Q=max(parts, 1 if q.dtype is torch.bfloat16 and made is None else 2), PART=PART,
        num_warps=8 if width > 256 else 4, num_stages=2 if parts > 1 or width > 256 else 3,
    )  # fmt: skip
    launch(
        _combine,
        (rows * heads, tiles(columns, _COLUMNS)),
        sums, tops, first, end, out, rows, heads, units, unit // CHUNK, columns,
        CHUNK=CHUNK, SPAN=SPAN, SPANS=_SPANS, COLUMNS=_COLUMNS, num_warps=4,
    )  # fmt: skip
    return out


def _pieces(letter: str, width: int) -> dict[str, int]:
    """Return the columns of a piece of a head, a power of two, and the pieces of half a head."""
    half = -(-width // 2)
    columns = max(16, min(_PIECE if width <= 256 else _PIECE // 2, 1 << (half - 1).bit_length()))
    return {f"PIECE_{letter}": columns, f"PIECES_{letter}": tiles(half, columns)}


def _tile(kv: KVView) -> int:
    """Return the positions of a tile, a power of two: about 32 kB of keys and values, of which two fit in any GPU."""
    numbers = kv.value_width + (0 if kv.keys is None else kv.key_width)
    most = 32768 // (numbers * max(2, kv.values.itemsize))
    return max(16, min(64, 1 << max(0, most.bit_length() - 1)))


def _units(slots: int, size: int) -> int:
    """Return how many units of `size` positions a row that sees `slots` positions can see, the first and the last of
    them in part."""
    return (slots + size - 2) // size + 1


@jit
def _piece(rows, there, begin, count, PIECE: tl.constexpr):
    """Read columns begin .. begin + count - 1 of the rows that start at `rows` [R] -> [R, PIECE], with zeros."""
    column = tl.arange(0, PIECE)
    return tl.load(rows[:, None] + (begin + column)[None, :], mask=there[:, None] & (column < count)[None, :], other=0)


@jit
def _read(rows, there, WIDTH: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """Read the 2 * PIECES pieces [R, PIECE] of rows of WIDTH numbers."""
    parts = ()
    for i in tl.static_range(2 * PIECES):
        begin = i // PIECES * ((WIDTH + 1) // 2) + i % PIECES * PIECE
        parts += (_piece(rows, there, begin, (WIDTH + 1 - i // PIECES) // 2 - i % PIECES * PIECE, PIECE),)
    return parts


@jit
def _rescaled(top, other_top):
    """Return the higher of two tops [R], and the factors of what was summed below either of them (online softmax, as in
    FlashAttention, arXiv 2205.14135)."""
    highest = tl.maximum(top, other_top)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    return highest, tl.exp2(top - base), tl.exp2(other_top - base)


@jit
def _merged(total, sums, share, other_total, other_sums, other_share, PIECES: tl.constexpr):
    """Add totals [R] and pieces of weighted sums [R, PIECE] of two ranges of positions."""
    pieces = ()
    for i in tl.static_range(PIECES):
        pieces += (sums[i] * share[:, None] + other_sums[i] * other_share[:, None],)
    return total * share + other_total * other_share, pieces


@jit
def _zeros(ROWS: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    pieces = ()
    for _ in tl.static_range(PIECES):
        pieces += (tl.zeros([ROWS, PIECE], tl.float32),)
    return pieces


@jit
def _weighted(queries, weight, PAIRS: tl.constexpr, WIDTH: tl.constexpr, PIECE: tl.constexpr, PIECES: tl.constexpr):
    """Multiply the pieces of queries by the weight of the keys, where the keys do not rotate."""
    pieces = ()
    for i in tl.static_range(2 * PIECES):
        if i % PIECES * PIECE < PAIRS:
            pieces += (queries[i],)
        else:
            at = weight + i // PIECES * (WIDTH // 2) + i % PIECES * PIECE + tl.arange(0, 1)
            factors = _piece(at, tl.full([1], True, tl.int1), 0, WIDTH // 2 - i % PIECES * PIECE, PIECE)
            pieces += (queries[i].to(tl.float32) * factors.to(tl.float32),)
    return pieces


@jit
def _turned_scores(
    score, queries, values, weight, cos, sin, position, filled, PAIRS: tl.constexpr, WIDTH: tl.constexpr,
    PIECE: tl.constexpr, PIECES: tl.constexpr, PARTS: tl.constexpr, PARTS_Q: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Add to the scores what the pieces give whose keys rotate: keys are rope(values * weight)."""
    one = tl.full([1], True, tl.int1)
    for i in tl.static_range(PIECES):
        if i * PIECE < PAIRS:
            at = weight + i * PIECE + tl.arange(0, 1)
            low = values[i].to(tl.float32) * _piece(at, one, 0, WIDTH // 2 - i * PIECE, PIECE).to(tl.float32)
            at_high = at + WIDTH // 2
            high = values[PIECES + i].to(tl.float32)
            high = high * _piece(at_high, one, 0, WIDTH // 2 - i * PIECE, PIECE).to(tl.float32)
            column = i * PIECE + tl.arange(0, PIECE)
            turns = filled[:, None] & (column < PAIRS)[None, :]
            turn = position[:, None] * PAIRS + column[None, :]
            c, s = tl.load(cos + turn, mask=turns, other=1.0), tl.load(sin + turn, mask=turns, other=0.0)
            k_low, k_high = low * c - high * s, high * c + low * s
            score = add_product(score, queries[i], tl.trans(k_low), PARTS_Q, PARTS, PART)
            score = add_product(score, queries[PIECES + i], tl.trans(k_high), PARTS_Q, PARTS, PART)
    return score


@jit
def _attend(
    q, keys, values, key_scale, value_scale, weight, cos, sin, first, end, sums, tops,
    rows, heads, group, slots, units, chunks, scale, key_head, key_slot, value_head, value_slot,
    WIDTH: tl.constexpr, COLUMNS: tl.constexpr, PAIRS: tl.constexpr,
    QUERIES: tl.constexpr, CHUNK: tl.constexpr, TILE: tl.constexpr,
    PIECE_K: tl.constexpr, PIECES_K: tl.constexpr, PIECE_V: tl.constexpr, PIECES_V: tl.constexpr,
    PARTS: tl.constexpr, PARTS_Q: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Store the weighted sums of one tile of queries over units of `chunks` chunks, and their tops and totals."""
    query = tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)
    row, kv_head = query // group, tl.program_id(1).to(tl.int64)
    there = row < rows
    low = tl.load(first + row, mask=there, other=0).to(tl.int32)
    high = tl.load(end + row, mask=there, other=0).to(tl.int32)
    there = there & (low < high)
    lowest = tl.min(tl.where(there, low, 0x7FFFFFFF), axis=0)
    highest = tl.max(tl.where(there, high, 0), axis=0)
    place = (row * heads + query % group).to(tl.int64) + kv_head * group  # of [rows * heads]
    size = CHUNK * chunks

    values += kv_head * value_head
    queries = _read(q + place * WIDTH, there, WIDTH, PIECE_K, PIECES_K)
    if keys is not None:
        keys += kv_head * key_head
    else:
        queries = _weighted(queries, weight, PAIRS, WIDTH, PIECE_K, PIECES_K)
    if value_scale is not None:
        value_scale += kv_head * slots
        key_scale += kv_head * slots

    for unit in range(lowest // size + tl.program_id(2), tl.cdiv(highest, size), tl.num_programs(2)):
        unit_top = tl.full([QUERIES], -float("inf"), tl.float32)
        unit_total = tl.zeros([QUERIES], tl.float32)
        unit_sums = _zeros(QUERIES, PIECE_V, 2 * PIECES_V)
        last = tl.minimum(highest, unit * size + size)
        for chunk in range(tl.maximum(lowest, unit * size) // CHUNK, tl.cdiv(last, CHUNK)):
            top = tl.full([QUERIES], -float("inf"), tl.float32)
            total = tl.zeros([QUERIES], tl.float32)
            found = _zeros(QUERIES, PIECE_V, 2 * PIECES_V)
            begin = tl.maximum(chunk * CHUNK, lowest // TILE * TILE)
            for start in range(begin, tl.minimum(highest, chunk * CHUNK + CHUNK), TILE):
                position = start + tl.arange(0, TILE)
                filled = (position >= lowest) & (position < highest)
                slot = position % slots
                v = _read(values + slot * value_slot, filled, COLUMNS, PIECE_V, PIECES_V)
                score = tl.zeros([QUERIES, TILE], tl.float32)
                k = v
                if keys is not None:
                    k = _read(keys + slot * key_slot, filled, WIDTH, PIECE_K, PIECES_K)
                else:
                    score = _turned_scores(
                        score, queries, v, weight, cos, sin, position, filled, PAIRS, WIDTH,
                        PIECE_K, PIECES_K, max(PARTS, 2), 1 if q.dtype.element_ty == tl.bfloat16 else PARTS_Q, PART,
                    )  # fmt: skip
                for i in tl.static_range(2 * PIECES_K):
                    if i % PIECES_K * PIECE_K >= PAIRS:
                        score = add_product(score, queries[i], tl.trans(k[i]), PARTS_Q, PARTS, PART)
                if key_scale is not None:
                    score = score * tl.load(key_scale + slot, mask=filled, other=0.0)[None, :]
                seen = there[:, None] & (position[None, :] >= low[:, None]) & (position[None, :] < high[:, None])
                score = tl.where(seen, score * scale, -float("inf"))
                top, before, _ = _rescaled(top, tl.max(score, axis=1))
                weights = tl.exp2(score - tl.where(top == -float("inf"), 0.0, top)[:, None])
                total = total * before + tl.sum(weights, axis=1)
                if value_scale is not None:
                    weights = weights * tl.load(value_scale + slot, mask=filled, other=0.0)[None, :]
                more = ()
                for i in tl.static_range(2 * PIECES_V):
                    more += (add_product(found[i] * before[:, None], weights, v[i], max(PARTS, 2), PARTS, PART),)
                found = more
            unit_top, before, share = _rescaled(unit_top, top)
            unit_total, unit_sums = _merged(unit_total, unit_sums, before, total, found, share, 2 * PIECES_V)
        nth = unit - low // size  # of the row's own units
        keep = there & (nth >= 0) & (unit * size < high)
        at = place * units + nth
        tl.store(tops + at, unit_top, mask=keep)
        tl.store(tops + rows.to(tl.int64) * heads * units + at, unit_total, mask=keep)
        for i in tl.static_range(2 * PIECES_V):
            begin_v = i // PIECES_V * ((COLUMNS + 1) // 2) + i % PIECES_V * PIECE_V
            column = tl.arange(0, PIECE_V)
            count = (COLUMNS + 1 - i // PIECES_V) // 2 - i % PIECES_V * PIECE_V
            to = sums + at[:, None] * COLUMNS + (begin_v + column)[None, :]
            tl.store(to, unit_sums[i], mask=keep[:, None] & (column < count)[None, :])


@jit
def _combine(
    sums, tops, first, end, out, rows, heads, units, chunks, columns,
    CHUNK: tl.constexpr, SPAN: tl.constexpr, SPANS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Add what `_attend` stored of one query, some columns of it: chunks to spans, then the spans."""
    place = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    low = tl.load(first + place // heads).to(tl.int32)
    high = tl.load(end + place // heads).to(tl.int32)
    size = CHUNK * chunks
    of_span = SPAN // size
    # the units of each span that hold something: of one span alone, those that the row sees
    single = low // SPAN == (high - 1) // SPAN
    begin = tl.where(single, low // size % of_span, 0)
    stop = tl.where(single, (high - 1) // size % of_span + 1, of_span)
    top = tl.full([1], -float("inf"), tl.float32)
    total = tl.zeros([1], tl.float32)
    found = _zeros(1, COLUMNS, 1)
    if low < high:
        for start in range(low // SPAN, tl.cdiv(high, SPAN), SPANS):
            span = start + tl.arange(0, SPANS)
            span_top = tl.full([SPANS], -float("inf"), tl.float32)
            span_total = tl.zeros([SPANS], tl.float32)
            span_sums = _zeros(SPANS, COLUMNS, 1)
            for k in range(begin, stop):
                unit = span * of_span + k
                there = (unit >= low // size) & (unit * size < high)
                unit_at = place * units + unit - low // size
                unit_top = tl.load(tops + unit_at, mask=there, other=-float("inf"))
                unit_total = tl.load(tops + rows.to(tl.int64) * heads * units + unit_at, mask=there, other=0.0)
                sum_at = sums + unit_at[:, None] * columns + column[None, :]
                unit_sums = tl.load(sum_at, mask=there[:, None] & (column < columns)[None, :], other=0.0)
                span_top, before, share = _rescaled(span_top, unit_top)
                span_total, span_sums = _merged(span_total, span_sums, before, unit_total, (unit_sums,), share, 1)
            above = tl.max(span_top, axis=0)
            weights = tl.exp2(span_top - tl.where(above == -float("inf"), 0.0, above))
            more_total = tl.full([1], 0.0, tl.float32) + tl.sum(span_total * weights, axis=0)
            more = tl.sum(span_sums[0] * weights[:, None], axis=0)[None, :]
            top, before_all, share_all = _rescaled(top, tl.full([1], 0.0, tl.float32) + above)
            total, found = _merged(total, found, before_all, more_total, (more,), share_all, 1)
    # a sum of nothing or of zeros may be -0.0 after other tiles
    total = tl.where(low < high, total, 1.0)
    answer = tl.div_rn(found[0], total[:, None] + tl.zeros([1, COLUMNS], tl.float32)) + 0.0
    at = out + place * columns + column[None, :]
    tl.store(at, rounded(answer, out.dtype.element_ty), mask=(column < columns)[None, :])
