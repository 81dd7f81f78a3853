"""Compare with the reference what reads stores and writes to them, and choices of tokens.

The other ops are compared in `specdec/kernels/triton/check.py`, by the same rules, on the same device.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.store import KeyFromValue, KVView
from specdec.kernels.triton.append import norm_rope_append
from specdec.kernels.triton.attention import attention
from specdec.kernels.triton.check import DifferentError, near, same
from specdec.kernels.triton.choice import choose

_NEAR = 2e-5  # of the largest number, in float32
_KV_HEADS, _HEADS, _WIDTH, _ROWS = 2, 6, 64, 3
_SLOTS, _POSITIONS = 300, 421  # a ring that has wrapped


def _views() -> Iterator[tuple[str, KVView]]:
    """Yield stores of every kind with random numbers: rings of keys and values, and values alone."""
    draw = torch.Generator().manual_seed(0)
    shape = _KV_HEADS, _SLOTS, _WIDTH
    keys, values = (torch.randn(shape, generator=draw, dtype=torch.float32) for _ in range(2))
    angles = torch.randn(_SLOTS, _WIDTH // 8, generator=draw, dtype=torch.float32)
    weight = torch.randn(_WIDTH, generator=draw, dtype=torch.float32)
    made = KeyFromValue(weight, angles.cos(), angles.sin())
    for dtype in (torch.float32, torch.bfloat16):
        yield f"{dtype} store", KVView(keys.to(dtype), values.to(dtype))
        yield f"{dtype} store of values", KVView(None, values.to(dtype), key_from_value=made)
    (whole_keys, key_scale), (whole, scale) = map(reference.quantise_store, (keys, values))
    yield "int8 store", KVView(whole_keys, whole, key_scale, scale)
    yield "int8 store of values", KVView(None, whole, None, scale, made)


def check_attention(device: torch.device) -> None:
    """Check attention over each kind of store, and that a row has the same bits alone."""
    q = torch.randn(_ROWS, _HEADS, _WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    for what, view in _views():
        last = _POSITIONS if view.keys is not None else _SLOTS  # where keys are made, slots are positions
        end = [last - _ROWS + i + 1 for i in range(_ROWS)]
        first = [max(0, one - _SLOTS + _ROWS) for one in end]
        there, here = view.to(device), q.to(device)
        low, high = (torch.tensor(bound, dtype=torch.int64, device=device) for bound in (first, end))
        found = attention(here, there, low, high, 0.125)
        wanted = reference.attention(q, view, first, end, 0.125)
        near(f"attention over a {what}", found, wanted, _NEAR)
        alone = slice(1, 2)
        if not torch.equal(attention(here[alone], there, low[alone], high[alone], 0.125), found[alone]):
            raise DifferentError(f"attention over a {what}: a row has other bits beside other rows")


def check_append(device: torch.device) -> None:
    """Check norms and rotations of heads, and what is written to each kind of store."""
    draw = torch.Generator().manual_seed(2)
    start = 299  # so that the rows wrap around the end of a ring
    for what, view in _views():
        at = start if view.keys is not None else start - _ROWS
        q, k, v = (
            torch.randn(_ROWS, heads, _WIDTH, generator=draw, dtype=torch.float32)
            for heads in (_HEADS, _KV_HEADS, _KV_HEADS)
        )
        q_norm, k_norm = (torch.randn(_WIDTH, generator=draw, dtype=torch.float32) for _ in range(2))
        cos, sin = (torch.randn(_ROWS, _WIDTH, generator=draw, dtype=torch.float32) for _ in range(2))
        there = view.to(device)
        moved = {"q": q, "k": k, "v": v, "q_norm": q_norm, "k_norm": k_norm, "cos": cos, "sin": sin}
        here: dict[str, Any] = {name: part.to(device) for name, part in moved.items()}
        position = torch.tensor([at], dtype=torch.int64, device=device)
        found = norm_rope_append(there, position, eps=1e-6, norm_values=True, **here)
        same(f"a rotated query beside a {what}", found, _norm_and_rotate(q, q_norm, cos, sin))
        rows = (_norm_and_rotate(k, k_norm, cos, sin), reference.rms_norm(v, None, 1e-6))
        slots = torch.tensor([(at + row) % _SLOTS for row in range(_ROWS)], dtype=torch.int64)
        for written, scale, wanted in zip(there.tensors()[:2], there.tensors()[2:], rows, strict=True):
            if written is None:
                continue
            kept = wanted.transpose(0, 1)  # [Hkv, T, D]
            if scale is not None:
                kept, steps = reference.quantise_store(kept)
                same(f"a scale of a {what}", scale.cpu()[:, slots], steps)
            same(f"a row of a {what}", written.cpu()[:, slots], kept.to(written.dtype))


def check_choice(device: torch.device) -> None:
    """Check the choice of a draft's tokens: the largest score, and with noise the one that no noise can hide."""
    scores = torch.randn(2, 2500, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
    scores[0, 7] = scores[0, 2100] = 9.0  # the first of equal ones
    scores[1, 1500] = 99.0
    keys = torch.tensor([-5, 3], dtype=torch.int64)
    plain, noisy = choose(scores.to(device), None), choose(scores.to(device), keys.to(device))
    wanted = [reference.best(row) for row in scores]
    same("a largest score", plain.top, torch.tensor([top for top, _ in wanted], dtype=torch.float32))
    same("the place of a largest score", plain.winner, torch.tensor([at for _, at in wanted], dtype=torch.int64))
    same("a choice with noise", noisy.winner[1:], plain.winner[1:].cpu())


def _norm_and_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return reference.rope(reference.rms_norm(x, weight, 1e-6), cos, sin)
