"""Whole drafts in one native call (draft.h): a head's layers, what is around them, and the choice of each token."""

from __future__ import annotations

from collections.abc import Mapping
from ctypes import Structure, c_float, c_int64, c_void_p

from torch import Tensor

from specdec.kernels.blocks import BlockTensor
from specdec.kernels.layers import FusedLayers, Matrix, MatrixRecord, Span, TextRows, Views, matrix_record
from specdec.kernels.records import Luck, plain_ids


class _Drafter(Structure):
    _fields_ = (
        *((name, MatrixRecord) for name in ("pre", "post", "head", "fuse")),
        *((name, c_void_p) for name in ("q", "scale", "minimum")),
        *((name, c_int64) for name in ("blocks", "bits", "tokens")),
        ("ids", c_void_p),
        ("embed_scale", c_float),
        ("eps", c_float),
        ("aux", c_int64),
    )


class FusedDraft:
    """A head whose drafts are made in one call (draft.h). Made by `specdec.kernels.fuse_draft`."""

    def __init__(
        self,
        layers: FusedLayers,
        pre: Matrix,
        post: Matrix,
        head: Matrix,
        embedding: BlockTensor,
        embed_scale: float,
        ids: Tensor | None,
        fuse: Matrix | None,
        eps: float,
    ) -> None:
        assert embedding.q.is_cpu and (ids is None or plain_ids(ids))
        self._layers, self._parts = layers, (pre, post, head, embedding, ids, fuse)  # the structure points into these
        self._drafter = _Drafter(
            *map(matrix_record, (pre, post, head)),
            fuse=MatrixRecord() if fuse is None else matrix_record(fuse),
            eps=eps,
            aux=0 if fuse is None else 2 * _columns(fuse) // _columns(pre),  # `pre` takes two of the backbone's width
            q=embedding.q.data_ptr(),
            scale=embedding.scale.data_ptr(),
            minimum=None if embedding.minimum is None else embedding.minimum.data_ptr(),
            blocks=embedding.columns // 32,
            bits=embedding.bits,
            tokens=embedding.rows,
            ids=None if ids is None else ids.data_ptr(),
            embed_scale=embed_scale,
        )

    def usable(self, views: Views) -> bool:
        """Return whether this call can make a draft that reads the stores `views`: see `FusedLayers.usable`."""
        return self._layers.usable([views])

    def __call__(
        self,
        state: Tensor,
        newest: int,
        steps: int,
        spans: Mapping[str, Span],
        views: Views,
        luck: Luck | None = None,
    ) -> list[int]:
        """`steps` tokens after `newest`.

        `state` [backbone hidden] float32: what chose `newest`, followed by those of the layers that it fuses. `spans`:
        of the one row, at its position. `views`: the stores of the backbone's cache. `luck`: how its tokens are
        sampled; None: the largest logit wins.
        """
        layers = self._layers
        stores, (table, _kept) = layers.stores([TextRows(1, views)]), layers.spans(spans, 1)
        state = state.contiguous()
        return layers.library.draft(
            self._drafter, layers.records, table, stores, layers.norm, state, newest, steps, luck
        )


def _columns(matrix: Matrix) -> int:
    assert matrix.blocks is not None
    return matrix.blocks.columns
