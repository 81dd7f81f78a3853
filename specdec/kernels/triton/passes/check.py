"""Compare with the reference what reads stores and writes to them, and choices of tokens.

The other ops are compared in `specdec/kernels/triton/check.py`, by the same rules, on the same device.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.store import KeyFromValue, KVView
from specdec.kernels.triton.append import norm_rope_append
from specdec.kernels.triton.attention import attention
from specdec.kernels.triton.check import DifferentError, near, same
from specdec.kernels.triton.choice import choose

_NEAR, _ROUNDED = 2e-5, 2.0**-7  # of the largest number, in float32 and in 16 bits
_KV_HEADS, _HEADS, _ROWS = 2, 6, 3
_WRAPPED = 121  # positions beyond the slots of a ring
_SCORES = 2500
# Of that many equal scores, the one that noise of a key chooses (specdec/engine/sampling.py), in every block of them.
NOISE_WINNERS = {
    -999992081: 1623, 31676: 1467, -999928729: 1681, 126704: 2451, -999802025: 2047, 285084: 888, -999611969: 1254,
}  # fmt: skip


class StoreForm(NamedTuple):
    """Name what tells stores apart for a compiler: the columns of keys and values, the type, the type of the rows that
    read and write them, and the pairs that rotate in keys that are made from values (None: keys are stored)."""

    key_width: int
    value_width: int
    dtype: torch.dtype
    rows: torch.dtype
    pairs: int | None = None

    @classmethod
    def of(cls, view: KVView, rows: torch.dtype) -> StoreForm:
        """Return the form of `view` for a model whose rows are of the type `rows`."""
        made = view.key_from_value
        pairs = None if made is None else made.cos.shape[1]
        return cls(view.key_width, view.value_width, view.values.dtype, rows, pairs)

    def __str__(self) -> str:
        """Describe the form: "int8 stores of 512 columns, of values alone (64 pairs rotate) for bfloat16 rows"."""
        width = f"{self.value_width}" if self.key_width == self.value_width else f"{self.key_width}+{self.value_width}"
        alone = "" if self.pairs is None else f", of values alone ({self.pairs} pairs rotate)"
        kept, rows = (str(one).removeprefix("torch.") for one in (self.dtype, self.rows))
        return f"{kept} stores of {width} columns{alone} for {rows} rows"

    def view(self, slots: int) -> KVView:
        """Return a store of this form with random numbers, and room for `slots` positions."""
        draw = torch.Generator().manual_seed(0)
        keys, values = (
            torch.randn(_KV_HEADS, slots, width, generator=draw, dtype=torch.float32)
            for width in (self.key_width, self.value_width)
        )
        made = None
        if self.pairs is not None:
            angles = torch.randn(slots, self.pairs, generator=draw, dtype=torch.float32)
            weight = torch.randn(self.key_width, generator=draw, dtype=torch.float32)
            made = KeyFromValue(weight, angles.cos(), angles.sin())
        if self.dtype is torch.int8:
            (keys, key_scale), (values, scale) = map(reference.quantise_store, (keys, values))
            return KVView(keys, values, key_scale, scale) if made is None else KVView(None, values, None, scale, made)
        return KVView(None if made is not None else keys.to(self.dtype), values.to(self.dtype), key_from_value=made)


# Each is compiled apart, which takes seconds. The type of the rows is what a model with such a store mostly has.
_TYPES = ((torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16), (torch.int8, torch.bfloat16))
SMALL_STORES = [StoreForm(64, 64, dtype, rows, pairs) for dtype, rows in _TYPES for pairs in (None, 8)]


def check_attention(device: torch.device) -> None:
    """Check attention over stores of small heads of each kind, several chunks long."""
    for form in SMALL_STORES:
        check_reading(form, 300, device)


def check_append(device: torch.device) -> None:
    """Check norms and rotations of heads, and what is written to stores of small heads of each kind."""
    for form in SMALL_STORES:
        check_writing(form, 300, device)


def check_store(form: StoreForm, device: torch.device) -> None:
    """Check all that reads and writes stores of `form`: wide heads take other tiles than small ones, and more
    shared memory than some GPUs have."""
    check_reading(form, 40, device)
    check_writing(form, 40, device)


def check_reading(form: StoreForm, slots: int, device: torch.device) -> None:
    """Check attention over a store of `form`, and that a row has the same bits alone."""
    view = form.view(slots)
    q = torch.randn(_ROWS, _HEADS, form.key_width, generator=torch.Generator().manual_seed(1), dtype=torch.float32)
    q = q.to(form.rows)
    last = slots if form.pairs is not None else slots + _WRAPPED  # where keys are made, slots are positions
    end = [last - _ROWS + i + 1 for i in range(_ROWS)]
    first = [max(0, one - slots + _ROWS) for one in end]
    there, here = view.to(device), q.to(device)
    low, high = (torch.tensor(bound, dtype=torch.int64, device=device) for bound in (first, end))
    found = attention(here, there, low, high, 0.125)
    wanted = reference.attention(q, view, first, end, 0.125)
    near(f"attention over {form}", found, wanted, _NEAR if form.rows is torch.float32 else _ROUNDED)
    alone = slice(1, 2)
    if not torch.equal(attention(here[alone], there, low[alone], high[alone], 0.125), found[alone]):
        raise DifferentError(f"attention over {form}: a row has other bits beside other rows")


def check_writing(form: StoreForm, slots: int, device: torch.device) -> None:
    """Check norms and rotations of heads, and what is written to a store of `form`."""
    view, draw = form.view(slots), torch.Generator().manual_seed(2)
    at = slots - 1 if form.pairs is None else slots - 1 - _ROWS  # keys that are stored: around a ring's end
    key, value = form.key_width, form.value_width
    q, k, v = (
        torch.randn(_ROWS, heads, width, generator=draw, dtype=torch.float32).to(form.rows)
        for heads, width in ((_HEADS, key), (_KV_HEADS, key), (_KV_HEADS, value))
    )
    q_norm, k_norm = (torch.randn(key, generator=draw, dtype=torch.float32).to(form.rows) for _ in range(2))
    cos, sin = (torch.randn(_ROWS, key, generator=draw, dtype=torch.float32).to(form.rows) for _ in range(2))
    there = view.to(device)
    moved = {"q": q, "k": k, "v": v, "q_norm": q_norm, "k_norm": k_norm, "cos": cos, "sin": sin}
    here: dict[str, Any] = {name: part.to(device) for name, part in moved.items()}
    position = torch.tensor([at], dtype=torch.int64, device=device)
    found = norm_rope_append(there, position, eps=1e-6, norm_values=True, **here)
    same(f"a rotated query beside {form}", found, _norm_and_rotate(q, q_norm, cos, sin))
    rows = (_norm_and_rotate(k, k_norm, cos, sin), reference.rms_norm(v, None, 1e-6))
    places = torch.tensor([(at + row) % slots for row in range(_ROWS)], dtype=torch.int64)
    for written, scale, wanted in zip(there.tensors()[:2], there.tensors()[2:], rows, strict=True):
        if written is None:
            continue
        kept = wanted.transpose(0, 1)  # [Hkv, T, D]
        if scale is not None:
            kept, steps = reference.quantise_store(kept)
            same(f"a scale of {form}", scale.cpu()[:, places], steps)
        same(f"a row of {form}", written.cpu()[:, places], kept.to(written.dtype))


def check_choice(device: torch.device) -> None:
    """Check the choice of a draft's tokens: the first of the largest scores, and with noise what a CPU chooses."""
    scores = torch.randn(3, _SCORES, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
    scores[0, 7] = scores[0, 2100] = 9.0  # the first of equal ones
    scores[1, 1500] = scores[2, _SCORES - 1] = 99.0
    plain, wanted = choose(scores.to(device), None), [reference.best(row) for row in scores]
    same("a largest score", plain.top, torch.tensor([top for top, _ in wanted], dtype=torch.float32))
    same("the place of a largest score", plain.winner, torch.tensor([at for _, at in wanted], dtype=torch.int64))
    flat = torch.zeros(len(NOISE_WINNERS), _SCORES, dtype=torch.float32)
    keys, winners = (torch.tensor(one, dtype=torch.int64) for one in zip(*NOISE_WINNERS.items(), strict=True))
    same("a choice with noise", choose(flat.to(device), keys.to(device)).winner, winners)


def _norm_and_rotate(x: Tensor, weight: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    return reference.rope(reference.rms_norm(x, weight, 1e-6), cos, sin)
