"""Muon with shortcuts is torch's."""

from __future__ import annotations

import pytest
import torch

from drafter.train.optimizer import Muon, _symmetric


@pytest.mark.parametrize("products", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(5, 7), (64, 64), (300, 170), (200, 450)])
def test_it_moves_weights_as_torchs_does(shape: tuple[int, int], products: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    mine, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    a = Muon([mine], lr=0.1, weight_decay=0.1, products=products)
    b = torch.optim.Muon([theirs], lr=0.1, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        gradient = torch.randn(shape, generator=generator)
        mine.grad, theirs.grad = gradient, gradient.clone()
        a.step()
        b.step()
    moved = (theirs - start).norm()
    assert (mine - theirs).norm() < 0.02 * moved
    assert torch.equal(a.state[mine]["momentum_buffer"], b.state[theirs]["momentum_buffer"])


@pytest.mark.parametrize("m", [1, 63, 65, 193, 576])
def test_a_symmetric_product_is_the_whole_one(m: int) -> None:
    x = torch.randn(m, 40)
    torch.testing.assert_close(_symmetric(x), x @ x.t(), rtol=1e-5, atol=1e-4)
