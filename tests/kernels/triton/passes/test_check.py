"""The check of what a pass needs besides the ops: it holds here, and finds a kernel that is wrong."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton", reason="Triton is not installed")

from specdec.engine.sampling import gumbel_argmax
from specdec.kernels.triton.check import failure
from specdec.kernels.triton.passes import check
from tests.support.triton.here import DEVICE, choose

pytestmark = pytest.mark.gpu


def test_the_kernels_of_a_pass_hold_here(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(check.SMALL_STORES) == 6
    monkeypatch.setattr(check, "SMALL_STORES", check.SMALL_STORES[2:4])  # the others are of other types alone
    assert failure(check.check_attention, DEVICE) == ""
    assert failure(check.check_append, DEVICE) == ""
    assert failure(check.check_choice, DEVICE) == ""


@pytest.mark.parametrize(
    "form",
    [
        check.StoreForm(256, 256, torch.int8, torch.float32),
        check.StoreForm(512, 512, torch.bfloat16, torch.bfloat16, 64),
    ],
    ids=str,
)
def test_stores_of_wide_heads_hold_here(form: check.StoreForm) -> None:
    assert failure(partial(check.check_store, form), DEVICE) == ""
    assert check.StoreForm.of(form.view(3), form.rows) == form
    others = {check.StoreForm.of(store.view(3), store.rows) for store in check.SMALL_STORES}
    assert others == {*check.SMALL_STORES} and form not in others


def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(q: Tensor, *_: Any) -> Tensor:
        return q * 0

    monkeypatch.setattr(check, "attention", wrong)
    assert "away from the reference" in failure(check.check_attention, DEVICE)
    monkeypatch.setattr(check, "norm_rope_append", lambda *_, q, **others: q)
    assert failure(check.check_append, DEVICE).startswith("a rotated query beside")
    monkeypatch.setattr(check, "choose", lambda scores, keys: choose(scores[:, :2400], keys))
    assert failure(check.check_choice, DEVICE).startswith("a largest score has other bits")
    monkeypatch.setattr(check, "choose", lambda scores, keys: choose(scores, None if keys is None else keys + 1))
    assert failure(check.check_choice, DEVICE).startswith("a choice with noise has other bits")


def test_the_winners_with_noise_are_the_samplers() -> None:
    flat = torch.zeros(2500, dtype=torch.float32)
    for key, winner in check.NOISE_WINNERS.items():
        assert gumbel_argmax(flat, 0.0, key % (1 << 64)) == winner
