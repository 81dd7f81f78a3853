"""The states of rows: parts of them, rows of several texts together, and changes to every tensor."""

from __future__ import annotations

import pytest
import torch

from specdec.model.states import States


def states(rows: int, aux: int, seed: int = 0) -> States:
    generator = torch.Generator().manual_seed(seed)
    last, *others = torch.randn(1 + aux, rows, 4, generator=generator).unbind()
    return States(last, tuple(others))


def tensors(of: States) -> tuple[torch.Tensor, ...]:
    return (of.last, *of.aux)


def same(first: States, second: States) -> bool:
    return all(torch.equal(a, b) for a, b in zip(tensors(first), tensors(second), strict=True))


@pytest.mark.parametrize("aux", [0, 1, 3])
def test_rows_are_taken_from_every_layer_without_a_copy(aux: int) -> None:
    whole = states(7, aux)
    assert len(whole) == 7 and len(whole.aux) == aux
    for part, place in ((whole[2:5], slice(2, 5)), (whole[-1], -1)):
        for mine, theirs in zip(tensors(part), tensors(whole), strict=True):
            assert torch.equal(mine, theirs[place]) and mine.data_ptr() == theirs[place].data_ptr()
    assert whole[-1].last.shape == (4,) and whole[-1][None].last.shape == (1, 4)
    picked = torch.tensor([6, 0])
    assert all(torch.equal(a, b[picked]) for a, b in zip(tensors(whole[picked]), tensors(whole), strict=True))


@pytest.mark.parametrize("aux", [0, 1, 3])
def test_parts_of_texts_make_the_whole_again(aux: int) -> None:
    whole = states(7, aux)
    parts = whole.split([1, 0, 4, 2])
    assert [len(part) for part in parts] == [1, 0, 4, 2] and all(len(part.aux) == aux for part in parts)
    assert same(parts[2], whole[1:5]) and parts[2].last.data_ptr() == whole.last[1:].data_ptr()
    assert same(States.cat(parts), whole)
    with pytest.raises(ValueError, match="zip"):
        States.cat([whole, states(2, aux + 1)])


def test_a_change_is_made_to_every_layer() -> None:
    whole = states(3, 2)
    assert same(whole.map(lambda each: 2 * each), States(2 * whole.last, tuple(2 * each for each in whole.aux)))
