"""A decoder's weights under the names, shapes and values of a transformers model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from specdec.model.decoder import Decoder
from specdec.model.embedder.spec import is_media
from specdec.model.names import expected_tensors
from specdec.model.stack import Linear
from specdec.weights.tensors import BlockWeight, DenseWeight, Weight

_LAYER = {
    "input_layernorm": "input_norm",
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "self_attn.q_norm": "q_norm",
    "self_attn.k_norm": "k_norm",
    "pre_feedforward_layernorm": "mlp_norm",
    "post_feedforward_layernorm": "mlp_post_norm",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
    "per_layer_input_gate": "ple_gate",
    "per_layer_projection": "ple_projection",
    "post_per_layer_input_norm": "ple_norm",
}
_BUFFERS = ("layer_scalar",)  # what transformers keeps as a buffer


def count_weights(decoder: Decoder, embeddings: bool = True) -> int:
    """Count the numbers in all weights, however many bits each is stored in; a tied head counts once."""
    return sum(
        torch.Size(shape).numel()
        for name, shape in expected_tensors(decoder.spec).items()
        if not name.endswith(_BUFFERS) and (embeddings or not name.startswith("embed_tokens"))
    )


def storage(decoder: Decoder) -> str:
    """Return the storage of the layers' matrices, such as "4-bit and 8-bit blocks" or "float32"."""
    weights = [linear.weight for layer in decoder.layers for linear in (layer.down, layer.o)]
    bits = sorted({weight.blocks.bits for weight in weights if isinstance(weight, BlockWeight)})
    return f"{' and '.join(f'{n}-bit' for n in bits)} blocks" if bits else str(decoder.dtype).removeprefix("torch.")


def named_weights(decoder: Decoder) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield every weight by the name that transformers gives it, as a parameter without gradient.

    Matrices that are stored in the model's dtype are shared; others are expanded to it while the iterator is at them.
    The last norm comes first, so that `next()` costs nothing.
    """
    names = sorted(expected_tensors(decoder.spec), key=lambda name: name != "norm.weight")
    for name in names:
        if not name.endswith(_BUFFERS):
            full = name if name.startswith("lm_head") else f"model.{name}"
            yield full, nn.Parameter(_tensor(decoder, name), requires_grad=False)


def _tensor(decoder: Decoder, name: str) -> Tensor:
    if is_media(name):
        assert decoder.media is not None
        found = decoder.media.part(name)
        return found if isinstance(found, Tensor) else _dense(found, decoder)
    if name.startswith("layers."):
        _, index, inner = name.split(".", 2)
        experts = decoder.layers[int(index)].experts
        if experts is not None and inner in experts.parts:
            part = experts.parts[inner]
            return (
                part if isinstance(part, Tensor) else _dense(part, decoder).view(experts.spec.count, -1, part.shape[1])
            )
    stem, kind = name.rsplit(".", 1)
    found = _find(decoder, stem)
    if isinstance(found, Linear):
        found = found.bias if kind == "bias" else found.weight
    if isinstance(found, Tensor):
        return found - decoder.spec.norm_offset if stem.endswith("norm") and decoder.spec.norm_offset else found
    return _dense(found, decoder)


def _dense(weight: Weight, decoder: Decoder) -> Tensor:
    return (weight.tensor if isinstance(weight, DenseWeight) else weight.dequantize()).to(decoder.dtype)


def _find(decoder: Decoder, stem: str) -> Any:
    if stem.startswith("layers."):
        _, index, inner = stem.split(".", 2)
        after = "attention_post_norm" if decoder.spec.sandwich_norms else "mlp_norm"
        return getattr(decoder.layers[int(index)], {**_LAYER, "post_attention_layernorm": after}[inner])
    top = {"embed_tokens": decoder.embedding, "norm": decoder.norm, "lm_head": decoder.head}
    if (extra := decoder.per_layer) is not None:
        top |= {
            "embed_tokens_per_layer": extra.embedding,
            "per_layer_model_projection": extra.projection,
            "per_layer_projection_norm": extra.norm,
        }
    return top[stem]


class TokenEmbedding(nn.Module):
    """Embed token ids [...] as a module does: [..., hidden], scaled as the family of the decoder has it.

    `weight` [vocab, hidden] is shared where it is stored in the model's dtype, and otherwise expanded to that dtype on
    each access.
    """

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder
        self.num_embeddings, self.embedding_dim = decoder.embedding.shape

    @property
    def weight(self) -> Tensor:
        """Return the matrix [vocab, hidden] in the model's dtype."""
        return _tensor(self.decoder, "embed_tokens.weight")

    def forward(self, ids: Tensor) -> Tensor:
        """Return the scaled embeddings [..., hidden] of token ids [...]."""
        embedded = self.decoder.embed(ids.to(self.decoder.device).flatten())  # [ids, hidden]
        return embedded.view(*ids.shape, self.embedding_dim)
