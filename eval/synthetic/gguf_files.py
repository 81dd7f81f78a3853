"""GGUF files of random weights: a model, and the mmproj file of its embedder.

What: the layout and the names of llama.cpp's converter, tensor after tensor, so that a file of full size needs the
memory of its largest tensor. Rows are those of `random_tensor`: a few are quantised, and the others are the same blocks
with scales of their own. Left out: K-quants, and rows in llama.cpp's order for Llama's heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
from gguf import GGMLQuantizationType as Type
from gguf import quants

from eval.synthetic.random_weights import PRIME, random_rows, random_tensor
from specdec.kernels import BLOCK
from specdec.model.embedder.spec import MediaSpec
from specdec.model.families import decoder_spec
from specdec.model.names import expected_tensors, gguf_name, is_matrix
from specdec.model.spec import DecoderSpec
from specdec.weights.gguf.mmproj import ARCHITECTURE, NAMES, PROJECTORS

Advance = Callable[[int], None]
Array = npt.NDArray[Any]
Shapes = Mapping[str, tuple[int, ...]]
_SCALES_FIRST = (Type.Q4_0, Type.Q8_0)  # types whose blocks are a float16 scale, and integers that it multiplies


def write_gguf(
    path: Path,
    architecture: str,
    config: Any,
    add_tokenizer: Callable[[gguf.GGUFWriter], None],
    kind: Type = Type.Q8_0,
    advance: Advance = lambda done: None,
) -> None:
    """Write a model of the transformers config `config` to `path`, matrices as `kind`, the vocabulary as Q8_0.

    `advance(bytes)` is called as bytes are written.
    """
    spec = decoder_spec(config)
    text = config.get_text_config(decoder=True)
    writer = gguf.GGUFWriter(path, architecture)
    _add_sizes(writer, spec, text)
    add_tokenizer(writer)
    shapes, types = _stored(spec, kind)
    extra = {}
    if spec.v_norm:
        extra["rope_freqs.weight"] = _divisors(spec)
    _write(
        writer, {gguf_name(spec, name): (name, shape, types[name]) for name, shape in shapes.items()}, extra, advance
    )


def gguf_bytes(config: Any, kind: Type) -> int:
    """Return the bytes of the tensors that `write_gguf` writes."""
    shapes, types = _stored(decoder_spec(config), kind)
    return sum(_nbytes(shape, _type(name, shape, types[name])) for name, shape in shapes.items())


def _stored(spec: DecoderSpec, kind: Type) -> tuple[dict[str, tuple[int, ...]], dict[str, Type]]:
    """Return shapes and types of the tensors in the file of a model with matrices of `kind`."""
    own = None if spec.media is None else spec.media.tensors().keys()
    shapes = {name: shape for name, shape in expected_tensors(spec).items() if own is None or name not in own}
    return shapes, {name: Type.Q8_0 if name.startswith("embed_tokens") else kind for name in shapes}


def write_mmproj(path: Path, media: MediaSpec, kind: Type = Type.F16, advance: Advance = lambda done: None) -> None:
    """Write the embedder of `media` to `path`: projections as `kind`, everything else in float32."""
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    for part, there in (("vision", media.vision), ("audio", media.audio)):
        writer.add_bool(f"{ARCHITECTURE}.has_{part}_encoder", there is not None)
        if there is not None:
            writer.add_string(f"{ARCHITECTURE}.{part}.projector_type", PROJECTORS[part])
            writer.add_uint32(f"{ARCHITECTURE}.{part}.projection_dim", media.hidden)
            writer.add_float32(f"{ARCHITECTURE}.{part}.attention.layer_norm_epsilon", there.eps)
    if media.vision is not None:
        writer.add_uint32(f"{ARCHITECTURE}.vision.embedding_length", media.vision.width)
        writer.add_uint32(f"{ARCHITECTURE}.vision.patch_size", media.vision.side // 3)
    tensors = {}
    for name, shape in media.tensors().items():
        stored = (shape[1], shape[0], shape[2]) if len(shape) == 3 else shape  # positions: a table for each axis
        tensors[NAMES[name]] = (name, stored, kind if name.endswith("projection.weight") else Type.F32)
    _write(writer, tensors, {}, advance)


def _write(
    writer: gguf.GGUFWriter,
    tensors: Mapping[str, tuple[str, tuple[int, ...], Type]],
    extra: Mapping[str, Array],
    advance: Advance,
) -> None:
    """Write the file: random tensors, by the file's name (canonical name, shape, type), and those of `extra`."""
    for name, (canonical, shape, kind) in tensors.items():
        stored = _type(canonical, shape, kind)
        writer.add_tensor_info(name, shape, np.dtype(np.float32), _nbytes(shape, stored), raw_dtype=stored)
    for name, array in extra.items():
        writer.add_tensor_info(name, array.shape, array.dtype, array.nbytes)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for canonical, shape, kind in tensors.values():
        array = random_array(canonical, shape, _type(canonical, shape, kind))
        writer.write_tensor_data(array)
        advance(array.nbytes)
    for array in extra.values():
        writer.write_tensor_data(array)
    writer.close()


def random_array(name: str, shape: tuple[int, ...], kind: Type) -> Array:
    """Return a random tensor as a file of this type holds it: floats, or bytes [rows, bytes of a row]."""
    if len(shape) < 2 or kind not in _SCALES_FIRST:
        floats: Array = quants.quantize(random_tensor(name, shape).float().numpy(), kind)
        return floats
    count = math.prod(shape[:-1])
    pattern, scale = random_rows(name, count, shape[-1])
    rows = quants.quantize(pattern.numpy(), kind)  # [PRIME at most, bytes]
    block = gguf.GGML_QUANT_SIZES[kind][1]
    out = np.empty((count, rows.shape[1]), dtype=np.uint8)
    for start in range(0, count, PRIME):
        part = out[start : start + PRIME]
        part[:] = rows[: len(part)]
        scales = part.reshape(len(part), -1, block)[..., :2].view(np.float16)  # [rows, blocks, 1]
        scales *= scale[start : start + PRIME].numpy().astype(np.float16)[..., None]
    return out.reshape(*shape[:-1], rows.shape[1])


def _type(name: str, shape: tuple[int, ...], kind: Type) -> Type:
    """Return the type of a tensor in a file of matrices of `kind`: what has no whole blocks, and what is not
    multiplied by, stays in float32."""
    return kind if is_matrix(name, shape) and shape[-1] % BLOCK == 0 else Type.F32


def _nbytes(shape: tuple[int, ...], kind: Type) -> int:
    size, nbytes = gguf.GGML_QUANT_SIZES[kind]
    return int(math.prod(shape) // size * nbytes)


def _divisors(spec: DecoderSpec) -> Array:
    """Return Gemma 4's divisors of the full layers' frequencies: 1, and 1e30 for pairs that do not turn."""
    frequencies = spec.ropes["full_attention"].frequencies
    return np.array([1.0 if frequency else 1e30 for frequency in frequencies], dtype=np.float32)


def _add_sizes(writer: gguf.GGUFWriter, spec: DecoderSpec, config: Any) -> None:
    full = spec.layers[spec.shared_kv_layers["full_attention"]]
    writer.add_context_length(spec.max_positions)
    writer.add_embedding_length(spec.hidden_size)
    writer.add_block_count(len(spec.layers))
    writer.add_feed_forward_length(
        [layer.intermediate_size for layer in spec.layers] if spec.v_norm else full.intermediate_size
    )
    writer.add_head_count(full.heads)
    writer.add_head_count_kv([layer.kv_heads for layer in spec.layers] if spec.v_norm else full.kv_heads)
    writer.add_layer_norm_rms_eps(spec.norm_eps)
    writer.add_key_length(full.head_dim)
    writer.add_rope_freq_base(1e6 if spec.v_norm else 1e4)
    if spec.layers[0].window is not None:
        writer.add_sliding_window(spec.layers[0].window)
        writer.add_sliding_window_pattern([layer.window is not None for layer in spec.layers])
    if spec.final_softcap is not None:
        writer.add_final_logit_softcapping(spec.final_softcap)
    if spec.v_norm:
        writer.add_key_length_swa(spec.layers[0].head_dim)
        writer.add_shared_kv_layers(config.num_kv_shared_layers)
        writer.add_embedding_length_per_layer_input(spec.per_layer_input)
    if (experts := spec.experts) is not None:
        writer.add_expert_count(experts.count)
        writer.add_expert_used_count(experts.used)
        writer.add_expert_feed_forward_length(experts.width)
