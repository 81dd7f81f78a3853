"""Passes of more rows than an ordinary one: layer by layer in pieces, to the bits of passes of few rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from specdec.cache import MAX_ROWS
from specdec.model.decoder import Decoder
from specdec.model.stack import SequenceRows, pieces_of
from specdec.model.states import States
from tests.support.media.prompts import media_prompt, picture, read, sound
from tests.support.native.kernel_paths import path, threads  # noqa: F401
from tests.support.tiny import FAMILIES, prompt
from tests.support.tiny_decoder import quantised

LONG = 3 * MAX_ROWS + 5


def fresh(family: str, fused: bool) -> Decoder:
    """A decoder whose layers are fused by the kernels that are in use now, or are not."""
    made = quantised(family, "mixed")
    decoder = Decoder(made.spec, made.embedding, made.layers, made.norm, made.head, made.per_layer)
    if not fused:
        decoder.stack._fused = None
    return decoder


def one_pass(decoder: Decoder, ids: Tensor, aux_layers: Sequence[int] = ()) -> States:
    """The states of ids [n] in one pass, behind some rows that are there before."""
    cache = decoder.new_cache()
    decoder.forward(ids[:7], cache)
    cache.commit(7)
    return decoder.forward(ids[7:], cache, aux_layers)


def chunks(decoder: Decoder, ids: Tensor, rows: int, aux_layers: Sequence[int] = ()) -> States:
    cache, parts = decoder.new_cache(), []
    for chunk in ids.split(rows):
        parts.append(decoder.forward(chunk, cache, aux_layers))
        cache.commit(len(chunk))
    return States.cat(parts)[7:]


@pytest.mark.parametrize("fused", [True, False], ids=["native", "op by op"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_long_pass_has_the_bits_of_short_ones(family: str, fused: bool) -> None:
    """In every family: layers that share K and V, and inputs of their own, too."""
    decoder, ids = fresh(family, fused), prompt(LONG, seed=4)[0]
    found, expected = one_pass(decoder, ids, (1, 0)), chunks(decoder, ids, 9, (1, 0))
    assert torch.equal(found.last, expected.last)
    assert all(map(torch.equal, found.aux, expected.aux))


def test_every_instruction_set_and_number_of_threads(path: str, threads: int) -> None:  # noqa: F811
    decoder = fresh("gemma4_unified", fused=path != "reference")
    given = media_prompt(20, picture(150), 9, sound(40), 3, picture(70, 1), 6)
    found, expected = (read(decoder, given, most).last for most in (200, 13))
    assert torch.equal(found, expected)
    if path.startswith("native"):
        decoder.stack._fused = None
        assert torch.equal(read(decoder, given, 64).last, expected)


def test_pieces_hold_every_row_once() -> None:
    cache = quantised("llama", "mixed").new_cache()
    for lengths in ([1], [64], [1, 64, 64], [65], [74], [280], [3, 280, 1], [1120, 2], [97, 97, 97]):
        texts = [SequenceRows(cache, 10 * i, rows) for i, rows in enumerate(lengths)]
        pieces = pieces_of(texts)
        found = [(text.start + row) for piece in pieces for text in piece.texts for row in range(text.rows)]
        assert found == [text.start + row for text in texts for row in range(text.rows)]
        assert [piece.rows.stop - piece.rows.start for piece in pieces] == [
            sum(text.rows for text in piece.texts) for piece in pieces
        ]
        assert pieces[0].rows.start == 0
        assert all(before.rows.stop == after.rows.start for before, after in pairwise(pieces))
        assert len(pieces) == 1 or max(len(range(*piece.rows.indices(9999))) for piece in pieces) <= 1.5 * MAX_ROWS
        assert len(pieces) == 1 or max(lengths) > MAX_ROWS
    assert len(pieces_of([SequenceRows(cache, 0, 74)])) == 1, "a frame with its time is one piece"
    assert [piece.rows.stop for piece in pieces_of([SequenceRows(cache, 0, 280)])] == [72, 144, 216, 280]
