"""The multi-token-prediction head, as it is trained: many rows at a time, with gradients.

The network is that of `inference.py`, from the same `MTPHeadSpec` and under the same tensor names; a test proves that
both compute the same. Row r of a pass does what the drafter does when the token at position p[r] is pending: the row
attends to the backbone's keys j <= p[r] - 1 (of a sliding layer: from p[r] - 1 - window on), and all steps of its draft
have that one position. Rows never see each other, so any rows of a text can be taken, and a draft of K steps is K
passes over the same rows ("training-time test", arXiv 2503.01840).

Left out: Gemma 4's centroids; their head is trained as a dense head.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from drafter.config import HEAD, MTPHeadSpec, head_tensors
from drafter.data.features import AttentionStates
from drafter.train.attention import attend
from specdec.model.stack import Rotations
from specdec.model.states import States


class TextView(NamedTuple):
    """Keep what the rows of one text see: `masks` [rows, n] bool for each kind of layer, and `keys` of n positions by
    the layer of the backbone that stored them."""

    rows: int
    masks: Mapping[str, Tensor]
    keys: Mapping[int, AttentionStates]


class Sight(NamedTuple):
    """Keep what all rows of a pass see: their `ropes`, cos and sin [R, head_dim] for each kind of layer, and their
    texts."""

    ropes: Mapping[str, tuple[Tensor, Tensor]]
    texts: Sequence[TextView]


class Network(nn.Module):
    """Keep the parameters of the head that `spec` describes, by the names in its checkpoint."""

    def __init__(self, spec: MTPHeadSpec, tensors: Mapping[str, Tensor]) -> None:
        """Copy `tensors` into the parameters: a float tensor of the right shape for every name of
        `head_tensors(spec)`."""
        super().__init__()
        assert not spec.text.per_layer_input
        self.spec = spec
        for name, shape in head_tensors(spec).items():
            assert tuple(tensors[name].shape) == shape, f"{name}: {tuple(tensors[name].shape)}, needs {shape}"
            self.register_parameter(_key(name), nn.Parameter(tensors[name].detach().float().clone()))
        self._rotations = Rotations(spec.text.ropes, torch.float32, torch.device("cpu"))

    def by_name(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters with their checkpoint names."""
        return ((name, self[name]) for name in head_tensors(self.spec))

    def tensors(self) -> dict[str, Tensor]:
        """Return the parameters by checkpoint name, detached."""
        return {name: parameter.detach() for name, parameter in self.by_name()}

    def __getitem__(self, name: str) -> nn.Parameter:
        return self.get_parameter(_key(name))

    def sight(self, texts: Sequence[tuple[Tensor, Mapping[int, AttentionStates]]]) -> Sight:
        """Return what the rows of `texts` see, text after text.

        Each text is (positions of its rows [rows], K and V by the layer of the backbone that stored them).
        """
        positions = torch.cat([rows for rows, _ in texts])  # [R]
        ropes, views = {}, []
        for kind in self.spec.text.ropes:
            cos, sin = self._rotations(kind, [(0, int(positions.max()) + 1)])  # [p, D]
            ropes[kind] = (cos.to(positions.device)[positions], sin.to(positions.device)[positions])
        windows = {layer.kind: layer.window for layer in self.spec.text.layers}
        for rows, keys in texts:
            at = rows[:, None]
            masks = {}
            key = torch.arange(keys[self.spec.reads[0]].k.shape[1], dtype=torch.int64, device=rows.device)  # [n]
            for kind, window in windows.items():
                masks[kind] = key < at if window is None else (key < at) & (key >= at - 1 - window)
            views.append(TextView(len(rows), masks, keys))
        return Sight(ropes, views)

    def first(self, states: States) -> Tensor:
        """Return the states [R, backbone hidden] that drafts begin with.

        `states`: of the R rows that chose the newest tokens, with the outputs of `spec.aux_layers`.
        """
        if not self.spec.aux_layers:
            return states.last
        eps = self.spec.text.norm_eps
        normed = [F.rms_norm(each, each.shape[-1:], eps=eps) for each in states.aux]  # [R, H] each
        return states.last + F.linear(torch.cat(normed, dim=-1), self["fuse.weight"])  # [R, layers * H] -> [R, H]

    def step(self, embedding: Tensor, hidden: Tensor, sight: Sight) -> tuple[Tensor, Tensor]:
        """Compute one draft step of every row; return the input of the head [R, hidden], and the next step's `hidden`.

        `embedding` [R, backbone hidden]: of the newest token, scaled as the backbone does. `hidden` [R, backbone
        hidden]: the result of `first` for the state that chose the newest token, or the second result of the step
        before.
        """
        x = F.linear(torch.cat((embedding, hidden), dim=-1), self["pre_projection.weight"])
        for i in range(len(self.spec.text.layers)):
            x = self._layer(i, x, sight)
        x = self._norm(x, "norm.weight")
        return x, F.linear(x, self["post_projection.weight"])

    def logits(self, x: Tensor, slots: Tensor | None = None) -> Tensor:
        """Return the logits of every candidate, [rows, candidates], for x [rows, hidden].

        `slots` [rows]: the place of the newest token among the candidates (their count: it is none of them), for the
        bigram bias.
        """
        return F.linear(*self.logit_factors(x, slots))

    def logit_factors(self, x: Tensor, slots: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the two factors of `logits`, [rows, D] and [candidates, D].

        The bigram bias, left @ right^T, adds columns to both factors.
        """
        if not self.spec.bigram:
            return x, self[HEAD]
        assert slots is not None
        left = self["bigram.left.weight"][slots].to(x.dtype)  # [rows, rank]
        return torch.cat((x, left), dim=1), torch.cat((self[HEAD], self["bigram.right.weight"]), dim=1)

    def _layer(self, index: int, x: Tensor, sight: Sight) -> Tensor:
        text, at = self.spec.text, f"layers.{index}."
        after, sandwich = f"{at}post_attention_layernorm.weight", text.sandwich_norms
        y = self._attend(index, self._norm(x, f"{at}input_layernorm.weight"), sight)
        x = x + (self._norm(y, after) if sandwich else y)
        y = self._norm(x, f"{at}pre_feedforward_layernorm.weight" if sandwich else after)
        gate = self._linear(y, f"{at}mlp.gate_proj")
        opened = F.silu(gate) if text.activation == "silu" else F.gelu(gate, approximate="tanh")
        y = self._linear(opened * self._linear(y, f"{at}mlp.up_proj"), f"{at}mlp.down_proj")
        x = x + (self._norm(y, f"{at}post_feedforward_layernorm.weight") if sandwich else y)
        return x * self[f"{at}layer_scalar"] if text.layer_scalar else x

    def _attend(self, index: int, x: Tensor, sight: Sight) -> Tensor:
        text, at = self.spec.text, f"layers.{index}.self_attn."
        layer = text.layers[index]
        q = self._linear(x, f"{at}q_proj").view(-1, layer.heads, layer.head_dim)  # [R, H, D]
        if text.qk_norm:
            q = self._norm(q, f"{at}q_norm.weight")
        half = layer.head_dim // 2
        turned = torch.cat((-q[..., half:], q[..., :half]), dim=-1)
        cos, sin = sight.ropes[layer.kind]
        q = q * cos[:, None] + turned * sin[:, None]  # cos: [R, 1, D]
        seen = []
        for part, view in zip(torch.split(q, [view.rows for view in sight.texts]), sight.texts, strict=True):
            assert layer.kv_layer is not None
            keys = view.keys[layer.kv_layer]
            seen.append(attend(part, keys.k, keys.v, view.masks[layer.kind], text.attention_scale))  # [rows, H * D]
        return self._linear(torch.cat(seen), f"{at}o_proj")

    def _linear(self, x: Tensor, name: str) -> Tensor:
        bias = self._parameters.get(_key(f"{name}.bias"))
        return F.linear(x, self[f"{name}.weight"], bias)

    def _norm(self, x: Tensor, name: str) -> Tensor:
        return F.rms_norm(x, (x.shape[-1],), self[name].to(x.dtype), self.spec.text.norm_eps)


def _key(name: str) -> str:
    return name.replace(".", "__")  # torch's parameter names have no dots
