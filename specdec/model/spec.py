"""A decoder as data: every family differs from the others only in the values of these records.

`families.py` makes a `DecoderSpec` of a transformers config, and `decoder.py` looks at nothing else. Left out on
purpose: vision and audio towers with attention.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from specdec.model.embedder.spec import MediaSpec

SLIDING = "sliding_attention"  # the kind of layers whose rows see all of the picture that they are in
Activation = Literal["silu", "gelu_tanh"]


@dataclass(frozen=True)
class RopeSpec:
    """Describe the rotary embedding of one layer kind: `angle[p, i] = p * frequencies[i]`, rotate-half convention.

    `frequencies` holds head_dim / 2 values, zero for dimensions that do not rotate (Gemma 4's "proportional" rope).
    `factor` multiplies cos and sin (YaRN's attention factor).
    """

    frequencies: tuple[float, ...]
    factor: float = 1.0

    @property
    def rotating_pairs(self) -> int:
        """Return how many pairs turn, where those are the first ones; else the number of all pairs."""
        count = sum(f != 0 for f in self.frequencies)
        return count if all(self.frequencies[:count]) else len(self.frequencies)


@dataclass(frozen=True)
class LayerSpec:
    """Describe one decoder layer. `window` is None for full attention; a query then sees all earlier positions and
    itself."""

    kind: str  # name of the rope this layer uses: a transformers layer type
    heads: int
    kv_heads: int
    head_dim: int
    intermediate_size: int
    window: int | None = None
    values_from_keys: bool = False  # Gemma 4 full layers: V = rmsnorm(k_proj(x)), there is no v_proj
    kv_layer: int | None = None  # reads the K/V that this earlier layer stored, and has no k_proj of its own


@dataclass(frozen=True)
class ExpertsSpec:
    """Describe the experts beside the MLP of every layer: `count` gated MLPs of `width`, of which each row uses
    `used`."""

    count: int
    used: int
    width: int


@dataclass(frozen=True)
class DecoderSpec:
    """Describe a whole decoder. Sizes are counts of elements; `attention_scale` multiplies q @ k."""

    model_type: str
    vocab_size: int
    hidden_size: int
    layers: tuple[LayerSpec, ...]
    ropes: dict[str, RopeSpec] = field(hash=False)
    attention_scale: float
    activation: Activation
    norm_eps: float
    max_positions: int
    embed_scale: float = 1.0
    norm_offset: float = 0.0  # Gemma 3 stores w - 1; folded into the weight while loading
    sandwich_norms: bool = False  # a norm after attention and after the MLP as well as before
    qk_norm: bool = False
    v_norm: bool = False  # weightless, over head_dim
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    layer_scalar: bool = False
    final_softcap: float | None = None
    tied_head: bool = True
    per_layer_input: int = 0  # Gemma 4 E2B/E4B: width of the extra embedding fed to every layer
    per_layer_vocab: int = 0
    experts: ExpertsSpec | None = None  # Gemma 4 26B-A4B: a mixture of experts beside each layer's MLP
    media: MediaSpec | None = None  # the embedder of pictures and sound; None: it reads text alone
    media_ids: frozenset[int] = frozenset()  # tokens around and inside of pictures and sound, which a prompt alone has
    reads_backbone: bool = False  # a drafter without K/V of its own: `kv_layer` counts the layers of its backbone

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Return the window of each layer, in positions; None for a layer that sees all of them."""
        return tuple(layer.window for layer in self.layers)

    def keeps_values_alone(self, layer: LayerSpec) -> bool:
        """Return whether K of `layer` can be made from V: both come from one projection, and a slot is a position."""
        return layer.values_from_keys and self.v_norm and self.qk_norm and layer.window is None

    @property
    def shared_kv_layers(self) -> dict[str, int]:
        """Return, by layer kind, the index of the last layer of that kind that stores K/V: an MTP drafter attends to
        it."""
        return {layer.kind: i for i, layer in enumerate(self.layers) if layer.kv_layer is None}

    def __post_init__(self) -> None:
        for i, layer in enumerate(self.layers):
            assert layer.heads % layer.kv_heads == 0, f"layer {i}: {layer.heads} heads over {layer.kv_heads} kv heads"
            assert layer.kind in self.ropes, f"layer {i}: no rope for {layer.kind}"
            assert len(self.ropes[layer.kind].frequencies) * 2 == layer.head_dim
            if layer.kv_layer is not None and not self.reads_backbone:
                assert self.layers[layer.kv_layer].kv_layer is None and layer.kv_layer < i
