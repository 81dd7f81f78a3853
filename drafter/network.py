"""The multi-token-prediction head, as it is trained: many rows at a time, with gradients.

The same network as `head.py`, from the same `AssistantSpec` and under the same tensor names; that both compute the same
is a test. Row r of a pass does what the drafter does when the token at position p[r] is pending: it attends to the
backbone's keys j <= p[r] - 1 (of a sliding layer: from p[r] - 1 - window on), all steps of its draft at that one
position. Rows never see each other, so any rows of a text can be taken, and a draft of K steps is K passes over the
same rows ("training-time test", arXiv 2503.01840).

Left out: Gemma 4's centroids, which are trained as a dense head.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drafter.checkpoint import extra_tensors
from drafter.spec import AssistantSpec
from specdec.model.names import expected_tensors
from specdec.model.stack import Rotations

_HEAD = "embed_tokens.weight"


class Keys(NamedTuple):
    """What a backbone's layer keeps of texts: `k`, `v` [B, kv_heads, n, head_dim], keys rotated."""

    k: Tensor
    v: Tensor


class Sight(NamedTuple):
    """For layers of one kind: the rope of rows, cos and sin [B, R, head_dim], and what they see, [B, 1, R, n] bool."""

    cos: Tensor
    sin: Tensor
    mask: Tensor

    def rows(self, count: int) -> Sight:
        """The first rows."""
        return Sight(self.cos[:, :count], self.sin[:, :count], self.mask[:, :, :count])


class Network(nn.Module):
    """Parameters of the head that `spec` describes, by the names that its checkpoint has."""

    def __init__(self, spec: AssistantSpec, tensors: Mapping[str, Tensor]) -> None:
        """`tensors`: a float tensor of the right shape for every name of `head_tensors(spec)`; they are copied."""
        super().__init__()
        assert not spec.text.per_layer_input
        self.spec = spec
        for name, shape in head_tensors(spec).items():
            assert tuple(tensors[name].shape) == shape, f"{name}: {tuple(tensors[name].shape)}, needs {shape}"
            self.register_parameter(_key(name), nn.Parameter(tensors[name].detach().float().clone()))
        self._rotations = Rotations(spec.text.ropes, torch.float32, torch.device("cpu"))

    def tensors(self) -> dict[str, Tensor]:
        """The parameters by checkpoint name, detached."""
        return {name: self[name].detach() for name in head_tensors(self.spec)}

    def __getitem__(self, name: str) -> nn.Parameter:
        return self.get_parameter(_key(name))

    def sight(self, positions: Tensor, length: int) -> dict[str, Sight]:
        """What rows at `positions` [B, R] see of texts of `length` tokens, for each kind of layer."""
        keys = torch.arange(length, device=positions.device)
        behind = keys < positions[:, None, :, None]  # [B, 1, R, n]
        sights = {}
        for kind, window in {layer.kind: layer.window for layer in self.spec.text.layers}.items():
            cos, sin = self._rotations(kind, [(0, length)])  # [n, D]
            cos, sin = (table.to(positions.device)[positions] for table in (cos, sin))  # [B, R, D]
            near = keys >= positions[:, None, :, None] - 1 - (length if window is None else window)
            sights[kind] = Sight(cos, sin, behind & near)
        return sights

    def step(
        self, embedding: Tensor, hidden: Tensor, sights: Mapping[str, Sight], keys: Mapping[str, Keys]
    ) -> tuple[Tensor, Tensor]:
        """One draft step of every row.

        `embedding` [B, R, backbone hidden]: of the newest token, scaled as the backbone does. `hidden` [B, R, backbone
        hidden]: the backbone's state that chose it, or the second result of the step before. Returns what the head
        scores [B, R, hidden], and the next step's `hidden`.
        """
        x = F.linear(torch.cat((embedding, hidden), dim=-1), self["pre_projection.weight"])
        for i, layer in enumerate(self.spec.text.layers):
            x = self._layer(i, x, sights[layer.kind], keys[layer.kind])
        x = self._norm(x, "norm.weight")
        return x, F.linear(x, self["post_projection.weight"])

    def logits(self, x: Tensor, slots: Tensor | None = None) -> Tensor:
        """Scores of every candidate, [rows, candidates], for x [rows, hidden].

        `slots` [rows]: the newest token among the candidates (their count: none of them), for the bigram bias.
        """
        logits = F.linear(x, self[_HEAD])
        if self.spec.bigram:
            assert slots is not None
            logits = logits + F.linear(self["bigram.left.weight"][slots], self["bigram.right.weight"])
        return logits

    def _layer(self, index: int, x: Tensor, sight: Sight, keys: Keys) -> Tensor:
        text, at = self.spec.text, f"layers.{index}."
        after, sandwich = f"{at}post_attention_layernorm.weight", text.sandwich_norms
        y = self._attend(index, self._norm(x, f"{at}input_layernorm.weight"), sight, keys)
        x = x + (self._norm(y, after) if sandwich else y)
        y = self._norm(x, f"{at}pre_feedforward_layernorm.weight" if sandwich else after)
        gate = self._linear(y, f"{at}mlp.gate_proj")
        opened = F.silu(gate) if text.activation == "silu" else F.gelu(gate, approximate="tanh")
        y = self._linear(opened * self._linear(y, f"{at}mlp.up_proj"), f"{at}mlp.down_proj")
        x = x + (self._norm(y, f"{at}post_feedforward_layernorm.weight") if sandwich else y)
        return x * self[f"{at}layer_scalar"] if text.layer_scalar else x

    def _attend(self, index: int, x: Tensor, sight: Sight, keys: Keys) -> Tensor:
        text, at = self.spec.text, f"layers.{index}.self_attn."
        layer = text.layers[index]
        q = self._linear(x, f"{at}q_proj").view(*x.shape[:2], layer.heads, layer.head_dim)  # [B, R, H, D]
        if text.qk_norm:
            q = self._norm(q, f"{at}q_norm.weight")
        half = layer.head_dim // 2
        turned = torch.cat((-q[..., half:], q[..., :half]), dim=-1)
        q = q * sight.cos[:, :, None] + turned * sight.sin[:, :, None]  # cos: [B, R, 1, D]
        y = F.scaled_dot_product_attention(
            q.transpose(1, 2),  # [B, H, R, D]
            keys.k.to(q.dtype),
            keys.v.to(q.dtype),
            attn_mask=sight.mask,
            scale=text.attention_scale,
            enable_gqa=layer.heads != layer.kv_heads,
        )
        return self._linear(y.transpose(1, 2).flatten(2), f"{at}o_proj")  # [B, R, H * D] -> [B, R, hidden]

    def _linear(self, x: Tensor, name: str) -> Tensor:
        bias = self._parameters.get(_key(f"{name}.bias"))
        return F.linear(x, self[f"{name}.weight"], bias)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self[name], self.spec.text.norm_eps)


def head_tensors(spec: AssistantSpec) -> dict[str, tuple[int, ...]]:
    """Name -> shape of all that a head has; the head's own matrix is `embed_tokens.weight`."""
    assert spec.text.tied_head and not spec.centroids
    return {**expected_tensors(spec.text), **extra_tensors(spec)}


def _key(name: str) -> str:
    return name.replace(".", "__")  # torch's parameter names have no dots
