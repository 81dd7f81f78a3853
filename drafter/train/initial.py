"""Where a head begins: as a copy of its backbone's last layers.

The head's layers are copies of the backbone's last layers of the same kinds, its candidates' rows are copies of the
backbone's head, and its norm is a copy of the backbone's last norm. The head has to learn how to get from [embedding ;
state] to the residual stream that these layers expect (`pre_projection`), and how to do without the layers between.
`fitted_projections` solves the first part by least squares over a few thousand tokens, before any training. Parts whose
sizes differ from the backbone's begin random.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from drafter.config import BIGRAM_LEFT, BIGRAM_RIGHT, HEAD, MTPHeadSpec, head_tensors
from drafter.data.features import Features
from specdec.model.decoder import Decoder
from specdec.model.stack import Layer, Linear

FITTED_TOKENS = 12_000  # rows for 2 * hidden unknowns; three times as many are no better on SmolLM2

_MATRICES = {
    "self_attn.q_proj": "q",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
}


def initial_tensors(
    spec: MTPHeadSpec, backbone: Decoder, ids: Tensor, texts: Iterable[Features] = (), seed: int = 0
) -> dict[str, Tensor]:
    """Return a float32 tensor for every name of `head_tensors(spec)`: the weights that training begins with.

    `ids` [candidates]: the tokens that the head scores. `texts`: what `pre_projection` is fitted to; without texts it
    begins as an average of embedding and state, each at unit size.
    """
    generator = torch.Generator().manual_seed(seed)
    made = {
        name: torch.ones(shape, dtype=torch.float32)
        if len(shape) == 1
        else torch.randn(shape, generator=generator, dtype=torch.float32) * shape[-1] ** -0.5
        for name, shape in head_tensors(spec).items()
    }
    copies = {"norm.weight": backbone.norm, HEAD: backbone.head.rows(ids, torch.float32)}
    for i, layer in enumerate(_sources(spec, backbone)):
        copies |= {f"layers.{i}.{name}": tensor for name, tensor in _copies(spec, layer).items()}
    for name, tensor in copies.items():
        if made[name].shape == tensor.shape:
            made[name] = tensor.detach().float().clone()
    if spec.aux_layers:
        made["fuse.weight"].zero_()  # adds nothing at first
    if spec.text.hidden_size == spec.backbone_hidden_size:
        unit = torch.eye(spec.text.hidden_size, dtype=torch.float32) / 2
        size = backbone.embed(ids).float().square().mean().sqrt()
        made["pre_projection.weight"] = torch.cat((unit / size, unit / _state_size(backbone)), dim=1)
        made["post_projection.weight"] = torch.eye(spec.text.hidden_size, dtype=torch.float32)
        made |= fitted_projections(spec, backbone, texts)
    if spec.bigram:
        made["bigram.left.weight"].zero_()  # no bias at first
    return made


def with_candidates(
    tensors: Mapping[str, Tensor], had: Tensor | None, ids: Tensor, backbone: Decoder
) -> dict[str, Tensor]:
    """Return the `tensors` of a head that scores the tokens `had` [candidates before], for one that scores `ids`.

    `had`: None for all tokens. `ids` [candidates]. Tokens of both keep what the head knows of them; the rows of new
    ones are copies of the backbone's head, and their bigram bias is zero.
    """
    vocab = backbone.spec.vocab_size
    had = torch.arange(vocab, dtype=torch.int64) if had is None else had
    slots = torch.full((vocab,), -1, dtype=torch.int64)
    slots[had] = torch.arange(len(had), dtype=torch.int64)
    place, known = slots[ids], slots[ids] >= 0  # [candidates]
    made = dict(tensors)
    rows = made[HEAD] = backbone.head.rows(ids, torch.float32).clone()
    rows[known] = tensors[HEAD][place[known]]
    for name in (BIGRAM_LEFT, BIGRAM_RIGHT):
        if (old := tensors.get(name)) is not None:
            bias = torch.zeros(len(ids) + len(old) - len(had), old.shape[1], dtype=torch.float32)
            bias[: len(ids)][known] = old[place[known]]
            bias[len(ids) :] = old[len(had) :]  # of the tokens that are no candidates
            made[name] = bias
    return made


def fitted_projections(
    spec: MTPHeadSpec, backbone: Decoder, texts: Iterable[Features], tokens: int = FITTED_TOKENS
) -> dict[str, Tensor]:
    """Fit the projections to about `tokens` tokens of `texts`; return them by name, none for no texts.

    `pre_projection` [hidden, 2 * backbone hidden]: the least-squares map from [embedding of x_p ; state p - 1] to the
    residual stream that enters, at row p, the backbone's layer that the head's first layer is a copy of. `fuse`, where
    the head has this matrix: the map from the states of the aux layers to the rest of the stream, by way of the state.
    Each row counts by its direction alone: a few rows are a thousand times larger than the others.
    """
    first = _sources(spec, backbone)[0]
    source = next(i for i, layer in enumerate(backbone.layers) if layer is first)
    width = backbone.spec.hidden_size
    size = (2 + len(spec.aux_layers)) * width
    gram = torch.zeros(size, size, dtype=torch.float64)
    right = torch.zeros(size, width, dtype=torch.float64)
    done = 0
    for text in texts:
        if done >= tokens or backbone.per_layer is not None:
            break
        for rows, stream in _streams(backbone, text.tokens, source):
            rows, stream = rows[rows > 0], stream[rows > 0]
            states = text.states(spec.aux_layers)[rows - 1].map(Tensor.double)
            normed = [F.rms_norm(each, (width,), eps=spec.text.norm_eps) for each in states.aux]
            x = torch.cat((backbone.embed(text.tokens[rows]).double(), states.last, *normed), dim=1)
            y = stream.double()
            weight = y.square().mean(dim=1, keepdim=True).rsqrt()
            x, y = x * weight, y * weight
            gram += x.t() @ x
            right += x.t() @ y
            done += len(rows)
    if not done:
        return {}
    own, more = slice(0, 2 * width), slice(2 * width, size)
    pre = _solved(gram[own, own], right[own])  # [2 * width, hidden]
    made = {"pre_projection.weight": pre}
    if spec.aux_layers:
        rest = _solved(gram[more, more], right[more] - gram[more, own] @ pre)  # [aux layers * width, hidden]
        by_state = pre[width:]  # [width, hidden]: rest = fuse @ by_state
        made["fuse.weight"] = _solved(by_state @ by_state.t(), by_state @ rest.t()).t()
    return {name: matrix.t().float().contiguous() for name, matrix in made.items()}


def _solved(gram: Tensor, right: Tensor) -> Tensor:
    """Return gram^-1 @ right, a little damped."""
    damped = gram + 1e-3 * gram.diagonal().mean() * torch.eye(len(gram), dtype=gram.dtype)
    solved: Tensor = torch.linalg.solve(damped, right)
    return solved


@torch.inference_mode()
def _streams(backbone: Decoder, tokens: Tensor, layer: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the residual stream that enters `layer` of the backbone, in pieces of (rows [r], stream [r, hidden]) of a
    text."""
    cache = backbone.new_cache()
    for part in torch.split(tokens, cache.max_rows):
        rows = torch.arange(cache.length, cache.length + len(part), dtype=torch.int64)
        if layer:
            (stream,) = backbone.forward(part, cache, [layer - 1]).aux
            cache.commit(len(part))
        else:
            stream = backbone.embed(part)
        yield rows, stream.clone()


def _sources(spec: MTPHeadSpec, backbone: Decoder) -> list[Layer]:
    """Return, for each layer of the head, the layer of the backbone to copy: of its kind, counted from the end."""
    of_kind = {kind: [layer for layer in backbone.layers if layer.spec.kind == kind] for kind in spec.text.ropes}
    wanted = Counter(layer.kind for layer in spec.text.layers)
    sources = []
    for layer in spec.text.layers:
        have = of_kind[layer.kind]
        sources.append(have[max(-wanted[layer.kind], -len(have))])
        wanted[layer.kind] -= 1
    return sources


def _copies(spec: MTPHeadSpec, layer: Layer) -> dict[str, Tensor]:
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
    """Return the root mean square of a state after the final norm; the guess is that of the norm's weights."""
    return backbone.norm.float().square().mean().sqrt()
