"""Our decoder against transformers' own modules: every family, prefill and step by step, past the sliding window."""

from __future__ import annotations

import pytest
import torch

from specdec.hf import decoder_of
from specdec.model.families import decoder_spec, supported_families
from tests.support.tiny import FAMILIES, WINDOW, prompt, tiny_model

LENGTH = 6 * WINDOW  # past the window of 16 and past one pass of 64 rows
TOLERANCE = 1e-4


def relative(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


def parity(family: str) -> tuple[float, float]:
    """Largest relative error of the logits of `family`: prefill in passes, and one row at a time."""
    model, ids = tiny_model(family), prompt(LENGTH)[0]
    decoder = decoder_of(model)
    with torch.inference_mode():
        theirs = model(ids[None]).logits[0]

    def ours(rows: int) -> torch.Tensor:
        cache, logits = decoder.new_cache(), []
        for chunk in ids.split(rows):
            logits.append(decoder.logits(decoder.forward(chunk, cache).last))
            cache.commit(len(chunk))
        return torch.cat(logits)

    return relative(ours(64), theirs), relative(ours(1), theirs)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_agree_with_transformers(family: str) -> None:
    prefill, steps = parity(family)
    print(f"{family}: prefill {prefill:.1e}, step by step {steps:.1e}")
    assert prefill < TOLERANCE
    assert steps < TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_have_the_same_bits_in_every_pass(family: str) -> None:
    decoder, ids = decoder_of(tiny_model(family)), prompt(LENGTH, seed=1)[0]

    def logits(rows: int) -> torch.Tensor:
        cache, parts = decoder.new_cache(), []
        for chunk in ids.split(rows):
            parts.append(decoder.logits(decoder.forward(chunk, cache).last))
            cache.commit(len(chunk))
        return torch.cat(parts)

    one = logits(1)
    for rows in (2, 3, 5, 8, 17, 64):
        assert torch.equal(logits(rows), one), f"{rows} rows in a pass change bits"


@pytest.mark.parametrize("family", FAMILIES)
def test_rejected_rows_leave_no_trace(family: str) -> None:
    decoder, ids = decoder_of(tiny_model(family)), prompt(LENGTH, seed=2)[0]
    wrong = prompt(16, seed=3)[0]

    def logits(rejected: int) -> torch.Tensor:
        cache, parts = decoder.new_cache(), []
        for token in ids:
            rows = torch.cat((token[None], wrong[:rejected]))
            parts.append(decoder.logits(decoder.forward(rows, cache).last[:1]))
            cache.commit(1)
        return torch.cat(parts)

    assert torch.equal(logits(0), logits(7))


def test_every_supported_family_is_tested() -> None:
    assert {decoder_spec(tiny_model(family).config).model_type for family in FAMILIES} == set(supported_families())
