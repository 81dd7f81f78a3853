"""States: what a pass computes of its rows, the last state and the outputs of other layers that somebody wants."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class States:
    """Hold the states of some rows: `last` after the final norm, and `aux`, the outputs of the aux layers asked for.

    Every tensor is [rows, hidden]; `aux` has one for each of those layers, in the order in which they were asked for.
    vLLM calls `aux` "auxiliary hidden states"; they are the features that EAGLE-3 (arXiv 2503.01840) fuses.
    `states[a:b]` are views of some of the rows, and `states[i]` is one row, whose tensors are [hidden].
    """

    last: Tensor
    aux: tuple[Tensor, ...] = ()

    def __len__(self) -> int:
        return len(self.last)

    def __getitem__(self, rows: int | slice | Tensor | None) -> States:
        return self.map(lambda each: each[rows])

    def map(self, change: Callable[[Tensor], Tensor]) -> States:
        """Return the results of `change` for each tensor."""
        return States(change(self.last), tuple(map(change, self.aux)))

    def split(self, counts: Sequence[int]) -> list[States]:
        """Return views of the first counts[0] rows, of the next counts[1] rows, and so on."""
        sizes = list(counts)
        aux = zip(*(torch.split(each, sizes) for each in self.aux), strict=True) if self.aux else [()] * len(sizes)
        return [States(last, of) for last, of in zip(torch.split(self.last, sizes), aux, strict=True)]

    @classmethod
    def cat(cls, parts: Sequence[States]) -> States:
        """Return the rows of all `parts`, which have states of the same layers, one part after the other."""
        return cls(
            torch.cat([part.last for part in parts]),
            tuple(torch.cat(of) for of in zip(*(part.aux for part in parts), strict=True)),
        )
