"""Whole drafts on a GPU: a head's layers, the matrices around them and each token's choice, as one captured pass.

The host waits once for a draft, for its tokens. The choice of a sampled draft is the host's but for near-ties, where
logarithms of two libraries could differ: a draft may then be another, and never a text. Left out: choices among the
likeliest tokens alone (top-k, top-p, min-p), which go step by step.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from specdec.kernels.draft import DraftParts
from specdec.kernels.layers import Span, StoreRows, Views
from specdec.kernels.records import DraftSampling, Matrix
from specdec.kernels.triton.choice import choose
from specdec.kernels.triton.norm import rms_norm
from specdec.kernels.triton.passes.layers import DeviceLayers
from specdec.kernels.triton.passes.places import Places, from_tensors, to_tensors
from specdec.kernels.triton.product import block_linear
from specdec.kernels.triton.rows import block_rows


class DeviceDraft:
    """Draft with a head on a GPU, with the face of `FusedDraft`. `specdec.kernels.fuse_draft` makes the objects."""

    def __init__(self, layers: DeviceLayers, parts: DraftParts) -> None:
        """Take the `parts` of the head, all of them in blocks that the kernels read."""
        assert parts.embedding is not None
        self._layers, self._parts, self._embedding = layers, parts, parts.embedding
        # transformers rounds Gemma's scale to the dtype before it multiplies.
        norm, scale = layers.norm, parts.embed_scale
        self._scale = None if scale == 1.0 else torch.tensor(scale, dtype=norm.dtype, device=norm.device)

    def usable(self, views: Views, sampling: DraftSampling | None = None) -> bool:
        """Return whether this object can make a draft that reads the stores `views`, and samples with `sampling`."""
        if sampling is not None and (sampling.top_k > 0 or sampling.top_p < 1 or sampling.min_p > 0):
            return False
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
        """Draft `steps` tokens after `newest`; return them and the head's probability of each. Arguments as of
        `FusedDraft`. No draft ends early: asking the host after each step would cost more."""
        layers, of_aux = self._layers, len(aux)
        keys = [] if sampling is None else [key - (1 << 64) if key >> 63 else key for key in sampling.keys[:steps]]
        numbers = torch.tensor([newest, *keys], dtype=torch.int64)
        factors = torch.tensor([sharpness, 1.0 if sampling is None else sampling.sharpness], dtype=torch.float32)
        if state.is_cuda:
            numbers, factors = numbers.pin_memory(), factors.pin_memory()
        spans = {kind: spans[kind] for kind in layers.kinds}

        def launches(inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            numbers, factors, state, *rest = inputs
            places = from_tensors(layers.kinds, [(1, views)], rest[of_aux:])
            return self._tokens(self._first(state, rest[:of_aux]), numbers, factors, steps, places)

        inputs = (numbers, factors, state, *aux, *to_tensors(spans, [StoreRows(1, views, 0)], state.device))
        reads = [self, *(view for view in views if view is not None)]
        tokens, probabilities = layers.graphs.run("draft", steps, reads, inputs, launches, layers.capturable)
        return tokens.tolist(), probabilities.tolist()

    def _first(self, state: Tensor, aux: Sequence[Tensor]) -> Tensor:
        """Return the state [1, backbone hidden] that a draft begins with."""
        if self._parts.fuse is None:
            return state[None]
        normed = rms_norm(torch.stack(tuple(aux)), None, self._parts.eps)  # [aux layers, backbone hidden]
        return state[None] + _times(normed.reshape(1, -1), self._parts.fuse)

    def _tokens(
        self, hidden: Tensor, numbers: Tensor, factors: Tensor, steps: int, places: Places
    ) -> tuple[Tensor, Tensor]:
        """Return `steps` tokens int64 [steps], and the head's probability of each, float32 [steps]. `numbers`: the
        newest token and, of a sampled draft, the key of each one's noise; `factors` [2] multiply the logits that
        probabilities are of, and those that the noise is added to."""
        token, made, probabilities = numbers[:1], [], []
        sampled = len(numbers) > 1
        for step in range(steps):
            embedded = block_rows(token, self._embedding, hidden.dtype)  # [1, backbone hidden]
            embedded = embedded if self._scale is None else embedded * self._scale
            x, _ = self._layers.run(_times(torch.cat((embedded, hidden), dim=-1), self._parts.pre), places)
            logits = _times(x, self._parts.head)  # [1, candidates]
            logits = logits.float()
            if sampled:
                index = choose(logits * factors[1], numbers[1 + step : 2 + step], self._parts.ids).winner  # [1]
            else:
                index = logits.argmax(dim=-1)
            probabilities.append((logits * factors[0]).softmax(dim=-1)[0, index])  # [1]
            token = index if self._parts.ids is None else self._parts.ids[index]
            made.append(token)
            if step + 1 < steps:
                hidden = _times(x, self._parts.post)
        return torch.cat(made), torch.cat(probabilities)


def _times(x: Tensor, matrix: Matrix) -> Tensor:
    assert matrix.blocks is not None
    y = block_linear(x, matrix.blocks)
    return y if matrix.bias is None else y + matrix.bias
