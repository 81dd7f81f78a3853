"""Attention of many rows to fixed keys and values, with its gradient by the queries alone.

The backbone's keys and values need no gradient, which leaves one product of three in the backward pass. With head sizes
of 64 and texts of a few hundred tokens plain products are two to three times as fast as torch's own kernel on CPUs.
Scores are float32; chances are rounded to the queries' dtype, as flash attention does, and kept.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ROWS = 128  # at once, so that early ones need not meet the keys that only late ones see


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return the attention [rows, heads * D] of q [rows, heads, D] to k, v [kv_heads, n, D], which have no gradients.

    `mask` [rows, n] bool: the keys that each row sees, at least one. Under autocast products are bfloat16.
    """
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    found = []
    with torch.autocast("cpu", enabled=False):
        for part, sees in zip(torch.split(q, _ROWS), torch.split(mask, _ROWS), strict=True):
            seen = sees.any(dim=0).nonzero()
            keys = slice(int(seen[0]), int(seen[-1]) + 1)
            found.append(_attention(part, k[:, keys], v[:, keys], sees[:, keys], scale))
    return torch.cat(found)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        rows, heads, size = q.shape
        kv_heads, n, _ = k.shape
        scores = torch.bmm(_gather(q, kv_heads).float().mul_(scale), k.float().transpose(1, 2))  # [kv, group * rows, n]
        hidden = torch.zeros(rows, n, dtype=torch.float32).masked_fill_(~mask, -torch.inf)
        scores.view(kv_heads, -1, rows, n).add_(hidden)
        chances = torch.softmax(scores, dim=-1).to(q.dtype)
        ctx.save_for_backward(chances, k, v)
        ctx.scale = scale
        return _scatter(torch.bmm(chances, v), rows).reshape(rows, heads * size)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        chances, k, v = ctx.saved_tensors
        (by_y,) = gradients
        rows, (kv_heads, _, size) = len(by_y), k.shape
        by_chances = torch.bmm(_gather(by_y.view(rows, -1, size), kv_heads), v.transpose(1, 2))
        by_scores = torch._softmax_backward_data(by_chances, chances, -1, chances.dtype)
        return _scatter(torch.bmm(by_scores, k).mul_(ctx.scale), rows), None, None, None, None


_attention: Callable[..., Tensor] = _Attention.apply


def _gather(x: Tensor, kv_heads: int) -> Tensor:
    """Reorder [rows, heads, D] into [kv_heads, heads of each * rows, D]."""
    rows, heads, size = x.shape
    return x.view(rows, kv_heads, heads // kv_heads, size).permute(1, 2, 0, 3).reshape(kv_heads, -1, size)


def _scatter(x: Tensor, rows: int) -> Tensor:
    """Undo `_gather`: reorder [kv_heads, heads of each * rows, D] into [rows, heads * D]."""
    kv_heads, _, size = x.shape
    return x.view(kv_heads, -1, rows, size).permute(2, 0, 1, 3).reshape(rows, -1, size)
