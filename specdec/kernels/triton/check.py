"""Compare the kernels with the reference on random numbers, on the device that they will run on.

A kernel may fail to compile there, or compute something else than under the interpreter: then torch's operations run in
its place. Where the arithmetic has one result, the bits must be the reference's; where sums or exponentials of floats
may differ, the results must be near, and the bits of a row must not depend on the rows beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from specdec.kernels import reference
from specdec.kernels.blocks import BlockTensor, pack_blocks
from specdec.kernels.forms import BLOCK, VALUES, BlockForm
from specdec.kernels.low_rank import low_rank as low_rank_reference
from specdec.kernels.low_rank import pack_low_rank
from specdec.kernels.triton import norm, product, quantise, rows
from specdec.kernels.triton.low_rank import low_rank
from specdec.util.text import describe_error

# Numbers of rows that take another tile of a product each, and types.
_ROWS = ((1, torch.bfloat16), (11, torch.float32), (40, torch.bfloat16))
_NEAR = 2e-6  # of the largest number, in float32


class _Random:
    """Draw the same numbers in every check, and leave torch's own generator as it is."""

    def __init__(self) -> None:
        self._generator = torch.Generator().manual_seed(0)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return normal numbers, each row with another magnitude."""
        x = torch.randn(shape, generator=self._generator, dtype=torch.float32)
        return (x * torch.logspace(-3, 3, shape[0], dtype=torch.float32).view(-1, *[1] * (len(shape) - 1))).to(dtype)

    def blocks(self, form: BlockForm, outputs: int, inputs: int) -> BlockTensor:
        """Return a matrix [outputs, inputs] in blocks of `form`."""
        low, high = VALUES[form.bits]
        shape = (outputs, inputs // BLOCK)
        values = torch.randint(low, high + 1, (outputs, inputs), generator=self._generator, dtype=torch.int16)
        scale = torch.rand(shape, generator=self._generator, dtype=torch.float32) * 0.02 + 0.001
        minimum = scale * -7.3 if form.minimum else None
        return pack_blocks(values, scale, minimum, form.bits, table="iq4" if form.table else None)


def failure(check: Callable[[torch.device], None], device: torch.device) -> str:
    """Run `check` on `device`, and say in words what went wrong; "" where nothing did."""
    try:
        with torch.no_grad():
            check(device)
    except DifferentError as error:
        return str(error)
    except Exception as error:  # a compiler raises errors of many types
        return describe_error(error)
    return ""


class DifferentError(Exception):
    """Say in one line what differs from the reference."""


def same(what: str, found: Tensor, wanted: Tensor) -> None:
    """Check that `found`, on the device, has the dtype and the bits of `wanted`. Raises DifferentError."""
    if found.dtype is not wanted.dtype or not torch.equal(found.cpu(), wanted):
        raise DifferentError(f"{what} has other bits than the reference")


def near(what: str, found: Tensor, wanted: Tensor, tolerance: float = _NEAR) -> None:
    """Check that `found` is within `tolerance`, of the largest number, of `wanted`. Raises DifferentError."""
    error = (found.cpu().double() - wanted.double()).abs().max()
    if not error <= tolerance * wanted.double().abs().max():  # NaN is not near
        raise DifferentError(f"{what} is {float(error):.1e} away from the reference")


def _alone(what: str, op: Callable[[Tensor], Tensor], x: Tensor) -> None:
    """Check that some rows of op(x) have the bits that they have where each is computed alone."""
    whole = op(x)
    for row in (0, x.shape[0] // 2, x.shape[0] - 1):
        if not torch.equal(op(x[row : row + 1]), whole[row : row + 1]):
            raise DifferentError(f"{what}: a row has other bits beside other rows")


def check_form(form: BlockForm, device: torch.device) -> None:
    """Check all that reads blocks of `form`: products, products with an activation, rows."""
    draw = _Random()
    w, up = draw.blocks(form, 40, 128), draw.blocks(form, 40, 128)
    there, up_there = w.to(device), up.to(device)
    for count, dtype in _ROWS:
        x = draw.normal(count, 128, dtype=dtype)
        wanted = reference.block_linear(x, w)
        same("a product", product.block_linear(x.to(device), there), wanted)
        both = product.gated_product(quantise.quantise(x.to(device)), there, up_there, "silu", dtype)
        apart = rows.gated(wanted.to(device), reference.block_linear(x, up).to(device), "silu")
        same("a product with an activation", both, apart.cpu())
    ids = torch.tensor([39, 0, 16, 16], dtype=torch.int64)
    for dtype in (torch.float32, torch.bfloat16):
        same("a row", rows.block_rows(ids.to(device), there, dtype), reference.block_rows(ids, w, dtype))


def check_norm(device: torch.device) -> None:
    """Check norms, alone, with what quantises their output, and after an addition."""
    draw = _Random()
    for width in (64, 576):
        for dtype in (torch.float32, torch.bfloat16):
            x, weight, post = (draw.normal(5, width, dtype=dtype) for _ in range(3))
            weight, post = weight[2], post[2]
            here = [part.to(device) for part in (x, weight, post)]
            wanted = reference.rms_norm(x, weight, 1e-6)
            same("a norm", norm.rms_norm(here[0], here[1], 1e-6), wanted)
            same("a norm without weight", norm.rms_norm(here[0], None, 1e-6), reference.rms_norm(x, None, 1e-6))
            _same_blocks(norm.norm_quantise(here[0], here[1], 1e-6), wanted)
            residual = draw.normal(5, width, dtype=dtype)
            added, blocks = norm.add_norm_quantise(residual.to(device), here[0], here[2], here[1], 1e-6)
            whole = residual + reference.rms_norm(x, post, 1e-6)
            same("a sum", added, whole)
            _same_blocks(blocks, reference.rms_norm(whole, weight, 1e-6))


def _same_blocks(found: quantise.Quantised, wanted: Tensor) -> None:
    """Compare quantised activations with those of `wanted` [T, K]."""
    values, scale, sums = reference.quantise_rows(wanted.float())
    whole = values.reshape(wanted.shape).to(torch.int8), scale, sums.int()
    for what, part, other in zip(("values", "scales", "sums"), found, whole, strict=True):
        same(f"one of the {what} of quantised activations", part, other)


def check_rope(device: torch.device) -> None:
    """Check rotations."""
    draw = _Random()
    for dtype in (torch.float32, torch.bfloat16):
        x, cos, sin = draw.normal(3, 5, 24, dtype=dtype), draw.normal(3, 24), draw.normal(3, 24)
        same("a rotation", rows.rope(*(part.to(device) for part in (x, cos, sin))), reference.rope(x, cos, sin))


def check_gated(device: torch.device) -> None:
    """Check both activations."""
    draw = _Random()
    gate, up = draw.normal(7, 300), draw.normal(7, 300)
    for activation in product.ACTIVATIONS:
        found = rows.gated(gate.to(device), up.to(device), activation)
        near(activation, found, reference.gated(gate, up, activation))


def check_dense(device: torch.device) -> None:
    """Check products of plain matrices, and that their rows do not see each other."""
    draw = _Random()
    for dtype, tolerance in ((torch.float32, _NEAR), (torch.bfloat16, 1e-2)):
        x, w, bias = draw.normal(35, 100).to(dtype), draw.normal(1, 70, 100)[0].to(dtype), draw.normal(1, 70)[0]
        here = [part.to(device, dtype) for part in (x, w, bias)]
        wanted = reference.dense_linear(x.float(), w.float(), bias.to(dtype).float())
        near("a product", product.dense_linear(*here), wanted, tolerance)
        _alone("a product", partial(product.dense_linear, w=here[1], bias=here[2]), here[0])


def check_low_rank(device: torch.device) -> None:
    """Check low-rank parts."""
    draw = _Random()
    part = pack_low_rank(draw.normal(5, 100), draw.normal(70, 5), 0.7)
    for dtype in (torch.float32, torch.bfloat16):
        x = draw.normal(9, 100, dtype=dtype)
        same("a product", low_rank(x.to(device), part.to(device)), low_rank_reference(x, part))
