"""The tensors that a spec needs, and their names in checkpoints.

Canonical names are those of transformers' text models without a prefix ("layers.0.self_attn.q_proj.weight"). GGUF's are
listed in gguf-py's constants; llama.cpp's converter permutes rows of Llama's q and k (its rope pairs neighbours) and
adds Gemma 3's "1 +" to the norms.
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable
from dataclasses import replace

from specdec.model.embedder.spec import media_names, present_parts
from specdec.model.spec import DecoderSpec

_GGUF_TOP = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
    "per_layer_model_projection.weight": "per_layer_model_proj.weight",
    "per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
}
_GGUF_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
    "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "post_feedforward_layernorm_2": "post_ffw_norm_2",
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
    "router.proj": "ffn_gate_inp",
}
_GGUF_WHOLE = {  # names without "weight" or "bias" at their end
    "layer_scalar": "layer_output_scale.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
}
PER_LAYER_TABLE = "embed_tokens_per_layer.weight"
HF_PREFIXES = ("model.language_model.", "language_model.model.", "model.", "language_model.", "")
# Parts of a multimodal checkpoint that a text decoder does not use, and buffers that old exports carry.
_NOT_TEXT = re.compile(r"(^|\.)(vision|visual|audio|embed_vision|embed_audio|multi_modal|vision_tower|audio_tower)")
# Encoders inside of Ollama's files of Gemma 4, under the names that llama.cpp gives them in a file beside the model.
_ENCODERS = re.compile(r"^(v|a|mm)\.")
_UNUSED_KV = re.compile(
    r"(?:layers|blk)\.(\d+)\.(?:self_attn\.(?:k_proj|v_proj|k_norm|v_norm)|attn_k|attn_v|attn_k_norm)\."
)
_DERIVED = re.compile(r"rotary_emb\.inv_freq$|masked_bias$|^rope_freqs\.weight$")


def expected_tensors(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Return the shape of every tensor that `spec` needs, by canonical name."""
    hidden = spec.hidden_size
    shapes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (spec.vocab_size, hidden),
        "norm.weight": (hidden,),
    }
    if not spec.tied_head:
        shapes["lm_head.weight"] = (spec.vocab_size, hidden)
    if width := spec.per_layer_input:
        shapes[PER_LAYER_TABLE] = (spec.per_layer_vocab, len(spec.layers) * width)
        shapes["per_layer_model_projection.weight"] = (len(spec.layers) * width, hidden)
        shapes["per_layer_projection_norm.weight"] = (width,)
    for i in range(len(spec.layers)):
        shapes.update({f"layers.{i}.{name}": shape for name, shape in layer_tensors(spec, i)})
    return shapes | ({} if spec.media is None else spec.media.tensors())


def layer_tensors(spec: DecoderSpec, index: int) -> Iterable[tuple[str, tuple[int, ...]]]:
    """Yield (name within the layer, shape) of every tensor of layer `index`."""
    layer, hidden = spec.layers[index], spec.hidden_size
    q, kv = layer.heads * layer.head_dim, layer.kv_heads * layer.head_dim
    own_kv = layer.kv_layer is None

    projections = [("self_attn.q_proj", (q, hidden), spec.qkv_bias)]
    if own_kv:
        projections.append(("self_attn.k_proj", (kv, hidden), spec.qkv_bias))
        if not layer.values_from_keys:
            projections.append(("self_attn.v_proj", (kv, hidden), spec.qkv_bias))
    projections.append(("self_attn.o_proj", (hidden, q), spec.output_bias))
    for name in ("mlp.gate_proj", "mlp.up_proj"):
        projections.append((name, (layer.intermediate_size, hidden), spec.mlp_bias))
    projections.append(("mlp.down_proj", (hidden, layer.intermediate_size), spec.mlp_bias))
    if spec.per_layer_input:
        projections.append(("per_layer_input_gate", (spec.per_layer_input, hidden), False))
        projections.append(("per_layer_projection", (hidden, spec.per_layer_input), False))
        yield "post_per_layer_input_norm.weight", (hidden,)
    for name, shape, bias in projections:
        yield f"{name}.weight", shape
        if bias:
            yield f"{name}.bias", shape[:1]

    yield "input_layernorm.weight", (hidden,)
    yield "post_attention_layernorm.weight", (hidden,)
    if spec.sandwich_norms:
        yield "pre_feedforward_layernorm.weight", (hidden,)
        yield "post_feedforward_layernorm.weight", (hidden,)
    if spec.qk_norm:
        yield "self_attn.q_norm.weight", (layer.head_dim,)
        if own_kv:
            yield "self_attn.k_norm.weight", (layer.head_dim,)
    if spec.layer_scalar:
        yield "layer_scalar", (1,)
    if (experts := spec.experts) is not None:
        yield "router.proj.weight", (experts.count, hidden)
        yield "router.scale", (hidden,)
        yield "router.per_expert_scale", (experts.count,)
        yield "experts.gate_up_proj", (experts.count, 2 * experts.width, hidden)
        yield "experts.down_proj", (experts.count, hidden, experts.width)
        for name in ("post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"):
            yield f"{name}.weight", (hidden,)


def gguf_name(spec: DecoderSpec, canonical: str) -> str:
    """Return the name of the tensor `canonical` in a GGUF file."""
    if canonical in _GGUF_TOP:
        return _GGUF_TOP[canonical]
    _, index, name = canonical.split(".", 2)
    if name in _GGUF_WHOLE:
        return f"blk.{index}.{_GGUF_WHOLE[name]}"
    stem, kind = name.rsplit(".", 1)
    if stem == "post_attention_layernorm":
        # transformers uses one name for two things: Llama's norm before the MLP, Gemma's norm after attention.
        return f"blk.{index}.{'post_attention_norm' if spec.sandwich_norms else 'ffn_norm'}.{kind}"
    return f"blk.{index}.{_GGUF_LAYER[stem]}.{kind}"


def is_expert_matrix(canonical: str) -> bool:
    """Return whether the tensor `canonical` [experts, N, K] holds a matrix for each expert."""
    return ".experts." in canonical


def flat_shape(canonical: str, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape in which the tensor `canonical` is kept: matrices of experts one below the other."""
    return (shape[0] * shape[1], shape[2]) if is_expert_matrix(canonical) else shape


def is_matrix(canonical: str, shape: tuple[int, ...]) -> bool:
    """Return whether the tensor `canonical` is multiplied by, and quantised in a quantised model."""
    return is_expert_matrix(canonical) or (len(shape) == 2 and not canonical.endswith("router.proj.weight"))


def hf_names(spec: DecoderSpec, names: Iterable[str]) -> dict[str, str]:
    """Return, by canonical name, the names in a transformers checkpoint that holds `names`, whatever prefix it uses."""
    present = set(names)
    prefix = next((p for p in HF_PREFIXES if f"{p}embed_tokens.weight" in present), "model.")
    mapped = {canonical: prefix + canonical for canonical in expected_tensors(spec)}
    if not spec.tied_head:
        heads = ("lm_head.weight", "language_model.lm_head.weight")
        mapped["lm_head.weight"] = next((head for head in heads if head in present), heads[0])
    return mapped if spec.media is None else mapped | media_names(spec.media, present)


def with_present_media(spec: DecoderSpec, names: Container[str]) -> DecoderSpec:
    """Return `spec` with those parts of its embedder of which a checkpoint that holds `names` has tensors.

    A config may describe parts that a conversion to a text model left out.
    """
    return spec if spec.media is None else replace(spec, media=present_parts(spec.media, names))


def ignorable(spec: DecoderSpec, name: str) -> bool:
    """Return whether a checkpoint may hold the tensor `name`, which the spec does not need."""
    if _NOT_TEXT.search(name) or _DERIVED.search(name) or _ENCODERS.search(name):
        return True
    if spec.tied_head and name.endswith("lm_head.weight"):
        return True  # the embedding, saved twice
    # Layers that read another layer's K/V are saved with projections that nothing uses (transformers ignores them).
    match = _UNUSED_KV.search(name)
    return bool(match and int(match[1]) < len(spec.layers) and spec.layers[int(match[1])].kv_layer is not None)
