"""The multi-token-prediction head, as it drafts: a few layers that attend to the backbone's K/V.

For a Gemma 4 backbone the head is the backbone's "assistant", the network of transformers'
`modeling_gemma4_assistant.py` and `modeling_gemma4_unified_assistant.py`; for other backbones the head is the same
network with layers of their own kind. One query row:

    x = pre_projection([embedding of the newest token ; h])     [1, 2 * backbone hidden] -> [1, hidden]
    x = norm(stack(x))                                           queries only; K/V are the backbone's
    next token = argmax head(x), with noise or without;  next h = post_projection(x)

Sliding layers read the K/V of the backbone's last sliding layer that stores K/V, full layers those of the last full
layer that does. Every step of a round has the position p of the pending token and sees committed keys only: j <= p - 1.
The first h is the backbone's state after its final norm. Heads of our own format can add to this state the outputs of
other layers at the same position, h + fuse([rmsnorm(low) ; rmsnorm(middle) ; ...]) (`MTPHeadSpec.aux_layers`).

Left out: more than one query row; training (`drafter/train/model.py`). The head has no soft-capping, unlike the
backbone's.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from drafter.config import MTPHeadSpec
from specdec import kernels
from specdec.cache import KVCache
from specdec.engine.sampling import Noise
from specdec.kernels import Span
from specdec.model.decoder import Decoder
from specdec.model.stack import Linear, Rotations, SequenceRows, Stack
from specdec.model.states import States
from specdec.weights.tensors import Weight

if TYPE_CHECKING:
    from specdec.kernels.triton.passes.draft import DeviceDraft


@dataclass(frozen=True)
class DenseHead:
    """Score the whole vocabulary."""

    weight: Weight  # [vocab, hidden]

    def score(self, x: Tensor, newest: Tensor) -> tuple[Tensor, None]:
        """Return the logits [1, vocab] for x [1, hidden], in x's dtype, and None: column i is token i."""
        return self.weight.linear(x), None


@dataclass(frozen=True)
class Bigram:
    """Give the logits a bias of low rank that depends on the newest token alone (DSpark, 2026).

    `left` [candidates + 1, rank] float, a row for each token that can be drafted and one for all others; `slots`
    [backbone's vocab] int64: each token's row. `right` [candidates, rank].
    """

    left: Tensor
    slots: Tensor
    right: Weight

    def bias(self, newest: Tensor) -> Tensor:
        """Return the bias [1, candidates] after token `newest` [1]."""
        return self.right.linear(self.left[self.slots[newest]])


@dataclass(frozen=True)
class PrunedHead:
    """Score a part of the vocabulary: a draft step of a small model reads little besides the head's matrix.

    `ids` [candidates] int64, ascending: the backbone's ids of the rows of `weight` [candidates, hidden].
    """

    weight: Weight
    ids: Tensor
    bigram: Bigram | None = None

    def score(self, x: Tensor, newest: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [1, candidates] for x [1, hidden] after token `newest` [1], in x's dtype, and `ids`."""
        logits = self.weight.linear(x)
        return logits if self.bigram is None else logits + self.bigram.bias(newest), self.ids


@dataclass(frozen=True)
class CentroidHead:
    """Score the tokens of the best few clusters only (`use_ordered_embeddings`: drafters of small models).

    `clusters` [centroids, vocab / centroids] int64: the token ids of each cluster. `top`: clusters to score.
    """

    weight: Weight  # [vocab, hidden]
    centroids: Weight  # [centroids, hidden]
    clusters: Tensor
    top: int

    def score(self, x: Tensor, newest: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits [1, C] of the best clusters' tokens for x [1, hidden], in x's dtype, and their ids [C]
        int64."""
        picked = self.centroids.linear(x).topk(self.top, dim=-1).indices[0]  # [top]
        ids = self.clusters[picked].flatten()  # [top, vocab / centroids] -> [C]
        return kernels.dense_linear(x, self.weight.rows(ids, x.dtype)), ids


Head = DenseHead | PrunedHead | CentroidHead


# A head's probabilities are those of many texts that look alike to it, flatter than the backbone's of each: where the
# shipped head gives its greedy token .15, .35, .55, .75, it is right in .23, .45, .66, .84 of the cases. First
# drafts accepted, SmolLM2's head on foreign prompts, at temperature 0.7 and 1.0: .448 and .380 at 1, .450 and .388 at
# 1.25, .444 and .371 at 1.5; the head's argmax without noise .382 and .228.
SHARPNESS = 1.25


def sharpness(noise: Noise) -> float:
    """Return the factor that a head's logits are multiplied by before the noise is added."""
    return SHARPNESS / noise.warping.temperature


def best(head: Head, x: Tensor, newest: Tensor, noise: Noise | None = None, key: int = 0) -> tuple[Tensor, Tensor]:
    """Return the token, int64 [1], that `head` proposes for x [1, hidden] after token `newest` [1], and the head's
    probability of it, float32 [1], of the logits times `SHARPNESS`, without temperature and noise.

    With `noise`, the token wins with the noise of `key`. A logit that is NaN wins, wherever it is.
    """
    logits, ids = head.score(x, newest)  # [1, candidates]
    scores = logits[0].float()  # [candidates]
    if noise is None:
        index = logits.argmax(dim=-1)  # [1]
    else:
        winner = noise.winner(scores * sharpness(noise), key, ids)
        index = torch.tensor([winner], dtype=torch.int64, device=x.device)
    share = (scores * SHARPNESS).softmax(dim=0)[index]
    return index if ids is None else ids[index], share


@dataclass(frozen=True)
class MTPHead:
    """Keep the network of an MTP head, ready to run on the device and in the dtype of its backbone."""

    spec: MTPHeadSpec
    pre: Linear  # [hidden, 2 * backbone hidden]
    stack: Stack
    post: Linear  # [backbone hidden, hidden]
    head: Head
    rotations: Rotations
    fuse: Linear | None = None  # [backbone hidden, aux layers * backbone hidden]

    def fused(self, backbone: Decoder) -> kernels.FusedDraft | DeviceDraft | None:
        """Return all steps of a draft for `backbone` as one call, which gives the same bits.

        Return None where the steps have to run one by one: without kernels that make one call, with matrices that are
        not in blocks, with a bigram bias, or with clusters.
        """
        head = self.head
        if isinstance(head, CentroidHead) or (isinstance(head, PrunedHead) and head.bigram is not None):
            return None
        parts = kernels.DraftParts(
            pre=self.pre.matrix,
            post=self.post.matrix,
            head=kernels.Matrix(head.weight.packed),
            embedding=backbone.embedding.packed,
            embed_scale=backbone.spec.embed_scale,
            ids=head.ids if isinstance(head, PrunedHead) else None,
            fuse=None if self.fuse is None else self.fuse.matrix,
            eps=self.spec.text.norm_eps,
        )
        return kernels.fuse_draft(self.stack.fused, parts)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all matrices as stored; the tied head counts once."""
        parts: list[object] = [self.pre, self.post, self.head, self.fuse]
        parts += [getattr(layer, f.name) for layer in self.stack.layers for f in fields(layer)]
        weights = [getattr(part, name, None) for part in parts for name in ("weight", "centroids")]
        return sum(weight.nbytes for weight in weights if weight is not None)

    def spans(self, position: int) -> dict[str, Span]:
        """Return what one query row at `position` sees, by layer kind: committed keys only.

        transformers counts the window from the newest key and includes both ends, so the oldest key is `position - 1 -
        window`: two positions further back than the backbone's own row there would see.
        """
        spans = {}
        for kind, window in {layer.spec.kind: layer.spec.window for layer in self.stack.layers}.items():
            first = 0 if window is None else max(0, position - 1 - window)
            spans[kind] = Span(*self.rotations(kind, [(position, 1)]), [first], [position])
        return spans

    def first(self, states: States) -> Tensor:
        """Return the state [1, backbone hidden] that a draft begins with, from the backbone's `states` of one row."""
        if self.fuse is None:
            return states.last
        aux = kernels.rms_norm(torch.cat(states.aux), None, self.spec.text.norm_eps)  # [aux layers, backbone hidden]
        return states.last + self.fuse(aux.reshape(1, -1))  # [1, aux layers * backbone hidden] -> [1, backbone hidden]

    def step(self, embedding: Tensor, hidden: Tensor, spans: dict[str, Span], cache: KVCache) -> tuple[Tensor, Tensor]:
        """Compute one draft step; return the input of the head [1, hidden] and the next step's `hidden`.

        `embedding` [1, backbone hidden]: the newest token's, scaled as the backbone does. `hidden` [1, backbone
        hidden]: the backbone's state that chose the newest token, or the second result of the step before.
        """
        x = self.pre(torch.cat((embedding, hidden), dim=-1))  # [1, 2 * backbone hidden] -> [1, hidden]
        x = self.stack(x, spans, [SequenceRows(cache, cache.length, 1)]).last
        return x, self.post(x)
