"""What a head learns from: texts with the backbone's own states, as `Features`.

`read` runs texts of any origin through the backbone; `answering.py` lets the backbone write its own texts. Either way
the labels are the backbone's own choices, which a drafter has to guess.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from specdec import kernels
from specdec.cache import KVCache
from specdec.model.decoder import Decoder
from specdec.model.states import States

_ROWS = 64  # of logits at once


class AttentionStates(NamedTuple):
    """Keep the K and V that a layer of the backbone stores of a text: `k`, `v` [kv_heads, n, head_dim], keys
    rotated."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Features:
    """Keep one text of n tokens with the backbone's states.

    `tokens` [n] int64. `hidden` [n, hidden]: the state after the final norm at each token, which chose the next token.
    `best` [n] int64: that choice, the likeliest next token. `keys`: K and V, [kv_heads, n, head_dim] each, by the layer
    of the backbone that stores them. `answer`: where the words behind the prompt begin. `aux` [n, hidden]: the
    outputs of other layers of the backbone, by layer.
    """

    tokens: Tensor
    hidden: Tensor
    best: Tensor
    keys: Mapping[int, AttentionStates]
    answer: int
    aux: Mapping[int, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.tokens)

    def states(self, aux_layers: Sequence[int]) -> States:
        """Return the states of all tokens, with the outputs of `aux_layers`: some of the layers in `aux`, in any
        order."""
        return States(self.hidden, tuple(self.aux[layer] for layer in aux_layers))


def read(
    backbone: Decoder,
    texts: Iterable[Tensor],
    layers: Sequence[int],
    dtype: torch.dtype = torch.bfloat16,
    aux_layers: Sequence[int] = (),
) -> Iterator[Features]:
    """Yield the features of `texts` ([n] int64), whose tokens are given; run each text through the backbone.

    Each text is cut where the shortest ring of its cache ends.
    """
    for text in texts:
        text = text[: longest_text(backbone, layers)].to(backbone.device)
        cache, parts = backbone.new_cache(), list[States]()
        for part in torch.split(text, cache.max_rows):
            parts.append(backbone.forward(part, cache, aux_layers))
            cache.commit(len(part))
        states = States.cat(parts)
        best = best_of(backbone, states.last)  # [n]
        stored = states.map(lambda each: each.to(dtype))
        aux = dict(zip(aux_layers, stored.aux, strict=True))
        yield Features(text, stored.last, best, kept_keys(cache, layers, dtype), len(text), aux)


def kept_keys(cache: KVCache, layers: Sequence[int], dtype: torch.dtype) -> dict[int, AttentionStates]:
    """Return the K and V of `layers` for all positions of `cache`, which the rings of `layers` must still hold."""
    keys = {}
    for layer in layers:
        store = cache.stores[layer]
        assert store is not None and cache.length <= store.slots, "the text has outgrown the ring"
        keys[layer] = AttentionStates(
            *(part.to(dtype, copy=True) for part in kernels.read_kv(store.view, 0, cache.length))
        )
    return keys


def best_of(backbone: Decoder, hidden: Tensor) -> Tensor:
    """Return the likeliest next token, [n] int64, after each of hidden [n, hidden]."""
    if not len(hidden):
        return torch.empty(0, dtype=torch.int64, device=hidden.device)
    return hidden.new_tensor(
        [i for rows in torch.split(hidden, _ROWS) for i in likeliest(backbone.logits(rows))], dtype=torch.int64
    )


def likeliest(logits: Tensor) -> list[int]:
    """Return the likeliest token of each row of logits [n, vocab]; torch's argmax takes five times as long."""
    return [kernels.best(row)[1] for row in logits]


def longest_text(backbone: Decoder, layers: Sequence[int]) -> int:
    """Return how many tokens a text can have for the shortest ring of `layers` to reach from its end to its
    beginning."""
    windows = [backbone.spec.layers[i].window for i in layers]
    return min([backbone.context, *(window for window in windows if window is not None)])
