"""Whole drafts in one native call (csrc/tokens/draft.h): a head's layers, the matrices around them, and each token's
choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from specdec.kernels import abi
from specdec.kernels.blocks import BlockTensor
from specdec.kernels.layers import FusedLayers, Span, Views
from specdec.kernels.records import DraftSampling, Matrix, address, matrix_record, plain_ids, weights_record


@dataclass(frozen=True, kw_only=True)
class DraftParts:
    """Hold the parts of a draft head around its layers.

    `pre`, `post`: the projections into the head's layers and back; `head`: from the layers to the candidates;
    `embedding`: the backbone's, times `embed_scale`; `ids` int64 [candidates]: the backbone's tokens that the
    candidates are, None: all of them. `fuse`: what joins the states of other layers, normed with `eps`, to the last
    one; None where the head takes none.
    """

    pre: Matrix
    post: Matrix
    head: Matrix
    embedding: BlockTensor | None
    embed_scale: float
    ids: Tensor | None
    fuse: Matrix | None
    eps: float

    @property
    def blocks(self) -> list[BlockTensor | None]:
        """Return the blocks of all matrices; None for each that is stored otherwise."""
        matrices = (self.pre, self.post, self.head, *(() if self.fuse is None else (self.fuse,)))
        return [self.embedding, *(matrix.blocks for matrix in matrices)]


class FusedDraft:
    """Draft with a head in one native call (csrc/tokens/draft.h). `specdec.kernels.fuse_draft` makes the objects."""

    def __init__(self, layers: FusedLayers, parts: DraftParts) -> None:
        """Point a record at the `parts`, all of them in blocks, on the CPU."""
        embedding, ids, fuse = parts.embedding, parts.ids, parts.fuse
        assert embedding is not None
        assert embedding.q.is_cpu and (ids is None or plain_ids(ids))
        self._layers, self._parts = layers, parts  # the record points into these
        self._drafter = abi.Drafter(
            *map(matrix_record, (parts.pre, parts.post, parts.head)),
            fuse=abi.Matrix() if fuse is None else matrix_record(fuse),
            embedding=weights_record(embedding),
            tokens=embedding.rows,
            ids=address(ids),
            embed_scale=parts.embed_scale,
            eps=parts.eps,
            # `pre` takes two of the backbone's width
            aux=0 if fuse is None else 2 * _columns(fuse) // _columns(parts.pre),
        )

    def usable(self, views: Views, sampling: DraftSampling | None = None) -> bool:
        """Return whether this call can make a draft that reads the stores `views`, however it is sampled: see
        `FusedLayers.usable`."""
        return self._layers.usable([views])

    def __call__(
        self,
        state: Tensor,
        aux: Sequence[Tensor],
        newest: int,
        steps: int,
        spans: Mapping[str, Span],
        views: Views,
        sampling: DraftSampling | None = None,
        sharpness: float = 1.0,
        floors: Sequence[float] = (),
    ) -> tuple[list[int], list[float]]:
        """Draft up to `steps` tokens after `newest`; return them and the head's probability of each, of the logits
        times `sharpness`, without temperature and noise.

        `state` [backbone hidden] float32: the backbone's state that chose `newest`. `aux`: the outputs of the layers
        that the head fuses, of the same row and shape. `spans`: those of the one row, at its position. `views`: the
        stores of the backbone's cache. `sampling`: how the tokens are sampled; None: the largest logit wins. `floors`
        [steps]: the draft may end after the first token where the product of the chances so far, which are the
        probabilities, or with noise `Noise.chance` of them, is below; (): it never does.
        """
        layers = self._layers
        stores, (table, _kept) = layers.stores([views]), layers.spans(spans, 1)
        assert len(aux) == self._drafter.aux
        return layers.library.draft(
            self._drafter, layers.records, table, stores, layers.norm, state, aux, newest, steps, sampling, sharpness,
            floors,
        )  # fmt: skip


def _columns(matrix: Matrix) -> int:
    assert matrix.blocks is not None
    return matrix.blocks.columns
