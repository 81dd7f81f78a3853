"""Low-rank parts: the native op against the reference, to the bit, and both against the plain products."""

from __future__ import annotations

import pytest
import torch

from specdec import kernels
from specdec.kernels import LowRank, pack_low_rank
from specdec.kernels.low_rank import low_rank as defined
from tests.support.native.kernel_paths import path, threads
from tests.support.native.needs_native import needs_library

__all__ = ["path", "threads"]

SHAPES = [(1, 64, 48, 4), (5, 100, 37, 7), (64, 96, 64, 16), (3, 1000, 300, 16), (9, 20, 5, 1)]
TYPES = [torch.float32, torch.bfloat16]


def made(inputs: int, outputs: int, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, LowRank]:
    down, up = torch.randn(rank, inputs).to(dtype).float(), torch.randn(outputs, rank).to(dtype).float()
    return down, up, pack_low_rank(down, up, 0.7)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_is_that_of_the_plain_matrices(
    shape: tuple[int, int, int, int], dtype: torch.dtype, seeded: None
) -> None:
    rows, inputs, outputs, rank = shape
    down, up, part = made(inputs, outputs, rank, dtype)
    assert part.down.dtype is dtype and part.rank % 4 == 0
    plain_down, plain_up = part.matrices
    assert torch.equal(plain_down[:rank].float(), down) and torch.equal(plain_up[:, :rank].float(), up)
    x = torch.randn(rows, inputs)
    expected = 0.7 * (x.double() @ down.double().t()) @ up.double().t()
    for found in (kernels.low_rank(x, part), defined(x, part)):
        assert found.shape == (rows, outputs)
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


@needs_library
@pytest.mark.parametrize("threads", [1, 3], indirect=True)
def test_every_path_has_the_bits_of_the_reference(path: str, threads: int, seeded: None) -> None:
    for rows, inputs, outputs, rank in SHAPES:
        for dtype in TYPES:
            _, _, part = made(inputs, outputs, rank, dtype)
            x = torch.randn(rows, inputs)
            expected = defined(x, part)
            assert torch.equal(kernels.low_rank(x, part), expected)
            for row in range(rows):
                assert torch.equal(kernels.low_rank(x[row : row + 1], part)[0], expected[row]), f"row {row} alone"


def test_activations_of_another_type_come_back_in_it(seeded: None) -> None:
    _, _, part = made(64, 32, 8, torch.float32)
    x = torch.randn(3, 64)
    found = kernels.low_rank(x.bfloat16(), part)
    assert found.dtype is torch.bfloat16
    assert torch.equal(found, kernels.low_rank(x.bfloat16().float(), part).bfloat16())


def test_other_devices_take_plain_products(seeded: None) -> None:
    down, up, part = made(64, 33, 6, torch.bfloat16)
    x = torch.randn(3, 64, dtype=torch.bfloat16)
    moved = part.to("meta")
    found = kernels.low_rank(x.to("meta"), moved)  # the shapes alone: no such device is here
    assert found.shape == (3, 33) and found.dtype is torch.bfloat16 and found.device.type == "meta"
    assert moved.matrices[0] is moved.matrices[0], "they are laid out once"
    assert torch.equal(part.matrices[1] @ part.matrices[0], up.bfloat16() @ down.bfloat16())


def test_a_part_says_what_does_not_belong_together() -> None:
    _, _, part = made(64, 32, 8, torch.float32)
    with pytest.raises(ValueError, match="x must be"):
        kernels.low_rank(torch.zeros(1, 63, dtype=torch.float32), part)
    with pytest.raises(ValueError, match="a low-rank part is"):
        LowRank(part.down, part.up, 1.0, 64, 64)
    with pytest.raises(ValueError, match="float32 or bfloat16"):
        LowRank(part.down.half(), part.up.half(), 1.0, 32, 64)
