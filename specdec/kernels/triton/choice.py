"""Choose the tokens of several rows on the device: the largest score, or the largest sum of score and keyed noise.

The noise is that of `specdec/engine/sampling.py`: a hash of key and token id, as float64. Float64 is slow on most GPUs,
and who wins is mostly plain: sums in float32 name the blocks of scores where the winner can be, and only those are
added in float64. A logarithm may round otherwise here than on the CPU. Where the best two sums are too close for that,
`sure` is false, and only the CPU knows its choice. A captured draft takes what is chosen here: a near-tie may change a
draft, and no text.

Four kernels, each of which reads what the one before found of all blocks of its row: no two programs write to one
place.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from specdec.kernels.triton.launch import jit, launch, tiles

_BLOCK = 1024  # scores of a program
_REACH = 54 * math.log(2) + math.log(54 * math.log(2))  # the range of the noise (specdec/engine/sampling.py)
_NEAR = 0.01  # sums in float32 are closer to those in float64, by far
_CLOSE = 1e-12  # so are sums in float64 with logarithms of two libraries, relative to their size


class Chosen(NamedTuple):
    """Hold what was chosen of each row: the index of its winner, int64 [T], and its largest score, float32 [T].

    Where the largest score is no finite number, the winner is the first that has it. `sure` bool [T]: whether the CPU
    would choose so too; where not, it has to choose (`gumbel_argmax`).
    """

    winner: Tensor
    top: Tensor
    sure: Tensor


def best(x: Tensor) -> Chosen:
    """Find the largest of each row of x float32 [T, N] and the first index that has it; a NaN wins, wherever it is."""
    return choose(x, None)


def choose(scores: Tensor, keys: Tensor | None, ids: Tensor | None = None, noisy: Tensor | None = None) -> Chosen:
    """Choose from each row of scores float32 [T, N], the temperature applied, by the largest sum of score and noise.

    `keys` int64 [T]: of each row's noise, as 64 bits; None: no row has noise. `ids` int64 [N]: the tokens' ids, None
    where those are the indices. `noisy` bool [T]: which rows have noise, None: all.
    """
    scores = scores.contiguous()
    rows, count = scores.shape
    blocks = tiles(count, _BLOCK)
    device = scores.device

    def of_blocks(dtype: torch.dtype) -> Tensor:
        return torch.empty(rows, blocks, dtype=dtype, device=device)

    tops, firsts = of_blocks(torch.float32), of_blocks(torch.int32)
    shape = {"BLOCK": _BLOCK, "BLOCKS": 1 << (blocks - 1).bit_length(), "num_warps": 4}
    launch(_tops, (rows, blocks), scores, tops, firsts, count, blocks, BLOCK=_BLOCK, num_warps=4)
    likely = sums = seconds = winners = None
    if keys is not None:
        likely, winners = of_blocks(torch.float32), of_blocks(torch.int32)
        sums, seconds = of_blocks(torch.float64), of_blocks(torch.float64)
        noise = (keys, ids, noisy)
        launch(_likely, (rows, blocks), scores, *noise, tops, likely, count, blocks, REACH=_REACH, **shape)
        launch(
            _exact, (rows, blocks), scores, *noise, tops, likely, sums, seconds, winners, count, blocks,
            REACH=_REACH, NEAR=_NEAR, **shape,
        )  # fmt: skip
    index = torch.empty(rows, dtype=torch.int64, device=device)
    top = torch.empty(rows, dtype=torch.float32, device=device)
    sure = torch.empty(rows, dtype=torch.bool, device=device)
    launch(
        _decide, (rows,), noisy, tops, firsts, sums, seconds, winners, index, top, sure, blocks,
        BLOCKS=shape["BLOCKS"], CLOSE=_CLOSE, num_warps=4,
    )  # fmt: skip
    return Chosen(index, top, sure)


@jit
def _largest(x, there):
    """Return the largest of x [N] and which have it; where there is a NaN, NaN and which are none."""
    bad = there & (x != x)
    any_bad = tl.max(bad.to(tl.int32), axis=0) > 0
    top = tl.max(tl.where(there & (x == x), x, -float("inf")), axis=0)
    return tl.where(any_bad, float("nan"), top), tl.where(any_bad, bad, there & (x == top))


@jit
def _noise_bits(key, ids):
    """Return SplitMix64 of key + id * golden ratio, without its lowest 11 bits: uint64 [N]."""
    value = ids.to(tl.uint64) * 0x9E3779B97F4A7C15 + key.to(tl.uint64, bitcast=True)
    value = (value ^ (value >> 30)) * 0xBF58476D1CE4E5B9
    value = (value ^ (value >> 27)) * 0x94D049BB133111EB
    return (value ^ (value >> 31)) >> 11


@jit
def _tops(scores, tops, firsts, count, blocks, BLOCK: tl.constexpr):
    """Store the largest score of a block, and the first index that has it."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    index = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(scores + row * count + index, mask=index < count, other=-float("inf"))
    top, wanted = _largest(x, index < count)
    tl.store(tops + row * blocks + block, top)
    tl.store(firsts + row * blocks + block, tl.min(tl.where(wanted, index, 0x7FFFFFFF), axis=0))


@jit
def _likely(
    scores, keys, ids, noisy, tops, likely, count, blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, REACH: tl.constexpr,
):  # fmt: skip
    """Store the largest sum of a block in float32, less the row's largest score."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    each = tl.arange(0, BLOCKS)
    of_blocks = tl.load(tops + row * blocks + each, mask=each < blocks, other=-float("inf"))
    top, _ = _largest(of_blocks, each < blocks)
    sampled = tl.abs(top) < float("inf")
    if noisy is not None:
        sampled = sampled & (tl.load(noisy + row) != 0)
    found = -float("inf")
    if sampled and tl.load(tops + row * blocks + block) > top - REACH:
        index = block * BLOCK + tl.arange(0, BLOCK)
        there = index < count
        x = tl.load(scores + row * count + index, mask=there, other=-float("inf")) - top
        names = index if ids is None else tl.load(ids + index, mask=there, other=0)
        bits = _noise_bits(tl.load(keys + row), names).to(tl.int64)
        low = (bits.to(tl.float32) + 0.5) * 1.1102230246251565e-16  # u = (bits + 1/2) / 2^53
        rest = ((0x20000000000000 - bits).to(tl.float32) - 0.5) * 1.1102230246251565e-16  # 1 - u
        series = rest * (1.0 + rest * (0.5 + rest * (0.33333334 + rest * 0.25)))
        near_one = tl.where(rest < 0.00390625, series, -tl.log(1.0 - tl.minimum(rest, 0.5)))
        wait = tl.where(rest < 0.5, near_one, -tl.log(tl.minimum(low, 0.5)))  # -log u
        found = tl.max(tl.where(there, x - tl.log(wait), -float("inf")), axis=0)
    tl.store(likely + row * blocks + block, found)


@jit
def _exact(
    scores, keys, ids, noisy, tops, likely, sums, seconds, winners, count, blocks,
    BLOCK: tl.constexpr, BLOCKS: tl.constexpr, REACH: tl.constexpr, NEAR: tl.constexpr,
):  # fmt: skip
    """Store the largest two sums of a block where the winner can be, in float64, and the first index of the largest."""
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    each = tl.arange(0, BLOCKS)
    most = tl.max(tl.load(likely + row * blocks + each, mask=each < blocks, other=-float("inf")), axis=0)
    mine = tl.load(likely + row * blocks + block)
    at = row * blocks + block
    if (mine > -float("inf")) & (mine >= most - NEAR):
        index = block * BLOCK + tl.arange(0, BLOCK)
        there = index < count
        x = tl.load(scores + row * count + index, mask=there, other=-float("inf"))
        names = index if ids is None else tl.load(ids + index, mask=there, other=0)
        bits = _noise_bits(tl.load(keys + row), names).to(tl.int64)
        uniform = (bits.to(tl.float64) + 0.5) * 1.1102230246251565e-16
        added = tl.where(there, x.to(tl.float64) - tl.log(-tl.log(uniform)), -float("inf"))
        sum_of = tl.max(added, axis=0)
        winner = tl.min(tl.where(added == sum_of, index, 0x7FFFFFFF), axis=0)
        tl.store(sums + at, sum_of)
        tl.store(winners + at, winner)
        tl.store(seconds + at, tl.max(tl.where(index == winner, -float("inf"), added), axis=0))
    else:
        tl.store(sums + at, -float("inf"))
        tl.store(winners + at, 0x7FFFFFFF)
        tl.store(seconds + at, -float("inf"))


@jit
def _decide(
    noisy, tops, firsts, sums, seconds, winners, chosen, top_of, sure_of, blocks,
    BLOCKS: tl.constexpr, CLOSE: tl.constexpr,
):  # fmt: skip
    """Store the index of a row's winner, the largest score, and whether any other library would say so."""
    row = tl.program_id(0).to(tl.int64)
    each = tl.arange(0, BLOCKS)
    there = each < blocks
    at = row * blocks + each
    top, wanted = _largest(tl.load(tops + at, mask=there, other=-float("inf")), there)
    index = tl.min(tl.where(wanted, tl.load(firsts + at, mask=there, other=0x7FFFFFFF), 0x7FFFFFFF), axis=0)
    unsure = False
    if sums is not None:
        sampled = tl.abs(top) < float("inf")
        if noisy is not None:
            sampled = sampled & (tl.load(noisy + row) != 0)
        added = tl.load(sums + at, mask=there, other=-float("inf"))
        most = tl.max(added, axis=0)
        winner = tl.load(winners + at, mask=there, other=0x7FFFFFFF)
        winner = tl.min(tl.where(added == most, winner, 0x7FFFFFFF), axis=0)
        second = tl.load(seconds + at, mask=there, other=-float("inf"))
        others = tl.where(tl.load(winners + at, mask=there, other=0) == winner, second, added)
        most = tl.where(sampled, most, 0.0)
        close = most - tl.max(others, axis=0) <= CLOSE * (tl.abs(most) + 64.0)
        index = tl.where(sampled, winner, index)
        unsure = sampled & close
    tl.store(chosen + row, index.to(tl.int64))
    tl.store(top_of + row, top)
    tl.store(sure_of + row, tl.where(unsure, 0, 1).to(tl.int1))
