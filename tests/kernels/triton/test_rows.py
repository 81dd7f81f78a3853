"""Rows of packed embeddings, rotations, gated activations and low-rank parts."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from specdec.kernels import pack_low_rank, reference
from specdec.kernels.low_rank import low_rank as low_rank_reference
from tests.support.native.kernel_paths import Kind, partitions
from tests.support.triton.here import DEVICE, FLOATS, READ, blocks, low_rank, normal, product, rows, same, spread

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("kind", READ, ids=str)
@pytest.mark.parametrize("columns", [32, 96, 1056])
def test_block_rows_have_the_references_bits(kind: Kind, columns: int) -> None:
    w, there = blocks(37, columns, kind)
    ids = torch.tensor([36, 0, 17, 17, 5], dtype=torch.int64)
    for dtype in FLOATS:
        assert same(rows.block_rows(ids.to(DEVICE), there, dtype), reference.block_rows(ids, w, dtype)), dtype
    assert rows.block_rows(ids[:0].to(DEVICE), there, torch.float32).shape == (0, columns)


def test_an_id_that_is_no_row_gives_nan_and_reads_nothing_else() -> None:
    w, there = blocks(20, 64, Kind(4))  # in memory there are 32 rows
    found = rows.block_rows(torch.tensor([20, -1, 3, 1 << 40], dtype=torch.int64).to(DEVICE), there, torch.float32)
    assert found[[0, 1, 3]].isnan().all()
    assert same(found[2:3], reference.block_rows(torch.tensor([3], dtype=torch.int64), w, torch.float32))


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("heads", "width"), [(1, 2), (5, 24), (3, 256), (20, 64)])
def test_rope_has_the_references_bits(heads: int, width: int, dtype: torch.dtype) -> None:
    x, cos, sin = spread(7, heads, width, dtype=dtype), normal(7, width), normal(7, width)
    whole = reference.rope(x, cos, sin)
    for count in (1, 5, 7):
        found = rows.rope(*(part[-count:].to(DEVICE) for part in (x, cos, sin)))
        assert same(found, whole[-count:]), count


@pytest.mark.parametrize("activation", product.ACTIVATIONS)
def test_gated_is_near_the_reference_and_its_rows_do_not_see_each_other(activation: str) -> None:
    gate, up = normal(33, 50) * 4, normal(33, 50)
    gate[0, :6] = torch.tensor([torch.nan, torch.inf, -200.0, 200.0, -1e-8, 0.0], dtype=torch.float32)
    here = gate.to(DEVICE), up.to(DEVICE)
    whole = rows.gated(*here, activation)
    wide = F.silu(gate.double()) if activation == "silu" else F.gelu(gate.double(), approximate="tanh")
    torch.testing.assert_close(whole.cpu().double(), wide * up, rtol=1e-5, atol=1e-9, equal_nan=True)
    wanted = reference.gated(gate, up, activation)
    torch.testing.assert_close(whole.cpu(), wanted, rtol=3e-6, atol=2e-6, equal_nan=True)
    for cut in partitions(33):
        parts = torch.cat([rows.gated(here[0][part], here[1][part], activation) for part in cut])
        assert torch.equal(parts.nan_to_num(), whole.nan_to_num())
    half = [part.bfloat16() for part in here]
    assert same(rows.gated(*half, activation), rows.gated(*map(torch.Tensor.float, half), activation).cpu().bfloat16())


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("rank", "inputs", "outputs"), [(3, 7, 5), (8, 96, 77), (16, 64, 130)])
def test_low_rank_parts_have_the_references_bits(rank: int, inputs: int, outputs: int, dtype: torch.dtype) -> None:
    for stored in (torch.float32, torch.bfloat16):
        down, up = (normal(*shape, dtype=stored) for shape in ((rank, inputs), (outputs, rank)))
        part = pack_low_rank(down, up, 0.7)
        assert part.down.dtype is stored
        x = normal(9, inputs, dtype=dtype)
        whole = low_rank_reference(x, part)
        for count in (1, 9):
            assert same(low_rank(x[-count:].to(DEVICE), part.to(DEVICE)), whole[-count:]), count
