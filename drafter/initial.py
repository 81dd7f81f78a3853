"""Where a head begins: as a copy of its backbone's last layers.

Its layers are the backbone's own last ones of the same kinds, its candidates' rows are the backbone's head, its norm
is the backbone's last: what it has to learn is how to get from [embedding ; state] to the residual stream that those
expect (`pre_projection`, which begins as an average of the two, each at unit size), and how to do without the layers
between. Parts whose sizes differ from the backbone's begin random.
"""

from __future__ import annotations

from collections import Counter

import torch
from torch import Tensor

from drafter.network import head_tensors
from drafter.spec import AssistantSpec
from specdec.model.decoder import Decoder
from specdec.model.stack import Layer, Linear

_MATRICES = {
    "self_attn.q_proj": "q",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}


def initial_tensors(spec: AssistantSpec, backbone: Decoder, ids: Tensor, seed: int = 0) -> dict[str, Tensor]:
    """A float32 tensor for every name of `head_tensors(spec)`. `ids` [candidates]: the tokens of its head."""
    generator = torch.Generator().manual_seed(seed)
    made = {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        for name, shape in head_tensors(spec).items()
    }
    copies = {"norm.weight": backbone.norm, "embed_tokens.weight": backbone.head.rows(ids, torch.float32)}
    for i, layer in enumerate(_sources(spec, backbone)):
        copies |= {f"layers.{i}.{name}": tensor for name, tensor in _copies(spec, layer).items()}
    for name, tensor in copies.items():
        if made[name].shape == tensor.shape:
            made[name] = tensor.detach().float().clone()
    if spec.text.hidden_size == spec.backbone_hidden_size:
        unit = torch.eye(spec.text.hidden_size) / 2
        size = backbone.embed(ids).float().square().mean().sqrt()
        made["pre_projection.weight"] = torch.cat((unit / size, unit / _state_size(backbone)), dim=1)
        made["post_projection.weight"] = torch.eye(spec.text.hidden_size)
    if spec.bigram:
        made["bigram.left.weight"].zero_()  # says nothing at first
    return made


def _sources(spec: AssistantSpec, backbone: Decoder) -> list[Layer]:
    """For each layer of the head, the backbone's from the end that is of its kind."""
    of_kind = {kind: [layer for layer in backbone.layers if layer.spec.kind == kind] for kind in spec.text.ropes}
    wanted = Counter(layer.kind for layer in spec.text.layers)
    sources = []
    for layer in spec.text.layers:
        have = of_kind[layer.kind]
        sources.append(have[max(-wanted[layer.kind], -len(have))])
        wanted[layer.kind] -= 1
    return sources


def _copies(spec: AssistantSpec, layer: Layer) -> dict[str, Tensor]:
    found: dict[str, Tensor | None] = {
        "input_layernorm.weight": layer.input_norm,
        "self_attn.q_norm.weight": layer.q_norm,
    }
    after = "post_attention_layernorm.weight"
    if spec.text.sandwich_norms:
        found |= {after: layer.attention_post_norm, "pre_feedforward_layernorm.weight": layer.mlp_norm}
        found["post_feedforward_layernorm.weight"] = layer.mlp_post_norm
    else:
        found[after] = layer.mlp_norm
    if spec.text.layer_scalar:
        found["layer_scalar"] = layer.scalar
    for name, field in _MATRICES.items():
        linear: Linear = getattr(layer, field)
        found |= {f"{name}.weight": linear.weight.dequantize(), f"{name}.bias": linear.bias}
    return {name: tensor for name, tensor in found.items() if tensor is not None}


def _state_size(backbone: Decoder) -> Tensor:
    """The root mean square of a state after the final norm, to a good guess: that of the norm's weights."""
    return backbone.norm.float().square().mean().sqrt()
