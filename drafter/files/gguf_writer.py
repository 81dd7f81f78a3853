"""Gemma 4's assistants to GGUF files, as llama.cpp reads them with `--spec-type draft-mtp`, and in the older dialects.

Tensors are read, quantised and written one at a time. Matrices get the asked type, vectors stay in float32. llama.cpp's
converter leaves the centroids of E2B's and E4B's assistants out, and so does `write_assistant` unless it is asked.
Left out: K types, which the `gguf` package does not write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Type
from gguf import quants
from torch import Tensor

from drafter.config import TOKEN_ORDERING, Config, MTPHeadSpec, extra_tensors
from drafter.files.gguf import BACKBONE, DIALECTS, ROPE_FREQS
from specdec.model.names import expected_tensors, gguf_name
from specdec.model.spec import DecoderSpec, LayerSpec
from specdec.util.atomic import replacing

TYPES = {kind.name.lower(): kind for kind in (Type.Q8_0, Type.Q4_0, Type.BF16, Type.F16, Type.F32)}
"""The types of matrices that are written, by the words of the command line."""
_ROWS = 4096  # quantised at a time
_NOT_ROTATED = 1e30  # llama.cpp's divisor of a frequency that is to be zero
Array = npt.NDArray[Any]


def write_assistant(
    path: Path,
    config: Config,
    spec: MTPHeadSpec,
    read: Callable[[str], Tensor],
    kind: Type,
    tokenizer: Mapping[str, Any],
    *,
    meant: tuple[str, str] | None = None,
    dialect: str = "gemma4-assistant",
    centroids: bool = False,
) -> None:
    """Write the assistant of transformers' `config` and of `spec` to `path`, all or nothing.

    `read`: returns a tensor by its canonical name, float32. `kind`: of the matrices, one of `TYPES`. `tokenizer`: the
    backbone's `tokenizer.*` keys (`specdec.weights.gguf.vocabulary`). `meant`: fingerprint and name of the backbone,
    where they are known. `centroids`: write the table of clusters too, where the head has one.

    Raises:
        ValueError: the head is none of Gemma 4's; `read` raises it.
    """
    if not spec.text.layer_scalar or spec.pruned:
        raise ValueError("only heads of Gemma 4 models have a format of llama.cpp's")
    names = {name: gguf_name(spec.text, name) for name in expected_tensors(spec.text)}
    own = DIALECTS[dialect]
    shapes = {**expected_tensors(spec.text), **extra_tensors(spec)}
    names |= {name: own.tensors[name] for name in extra_tensors(spec) if centroids or name in _PROJECTIONS}
    stored = {name: _stored_type(name, shapes[name], kind) for name in names}
    divisors = None if dialect == "gemma4_mtp" else _divisors(config, spec.text)
    with replacing(path) as temporary:
        writer = gguf.GGUFWriter(temporary, dialect)
        writer.add_type(gguf.GGUFType.MODEL)
        _add_sizes(writer, config, spec)
        if spec.centroids and centroids:
            writer.add_uint32(f"{dialect}.{own.centroids}", spec.centroids)
            writer.add_uint32(f"{dialect}.centroid_top_k", spec.top_centroids)
            writer.add_bool(f"{dialect}.use_ordered_embeddings", True)
        if meant is not None:
            writer.add_string(f"{BACKBONE}fingerprint", meant[0])
            writer.add_string(f"{BACKBONE}name", meant[1])
        for key, value in tokenizer.items():
            _add(writer, key, value)
        for name, theirs in names.items():
            nbytes = math.prod(shapes[name]) // gguf.GGML_QUANT_SIZES[stored[name]][0]
            nbytes *= gguf.GGML_QUANT_SIZES[stored[name]][1]
            writer.add_tensor_info(theirs, shapes[name], np.dtype(np.float32), nbytes, raw_dtype=stored[name])
        if divisors is not None:
            writer.add_tensor_info(ROPE_FREQS, divisors.shape, divisors.dtype, divisors.nbytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in names:
            tensor = read(name)
            if name == TOKEN_ORDERING:
                tensor = _centroid_of_each(tensor, spec.centroids) if dialect == "gemma4_mtp" else tensor
                writer.write_tensor_data(tensor.int().numpy())
            else:
                writer.write_tensor_data(_quantized(tensor.float().view(shapes[name]), stored[name]))
        if divisors is not None:
            writer.write_tensor_data(divisors)
        writer.close()


_PROJECTIONS = ("pre_projection.weight", "post_projection.weight")


def _stored_type(name: str, shape: tuple[int, ...], kind: Type) -> Type:
    if name == TOKEN_ORDERING:
        return Type.I32
    return kind if len(shape) == 2 and shape[1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else Type.F32


def _quantized(tensor: Tensor, kind: Type) -> Array:
    if tensor.dim() < 2:
        return tensor.numpy()
    parts = (tensor[start : start + _ROWS] for start in range(0, len(tensor), _ROWS))
    return np.concatenate([quants.quantize(part.contiguous().numpy(), kind) for part in parts])


def _centroid_of_each(ordering: Tensor, count: int) -> Tensor:
    """Return for each token the cluster that lists it: ik_llama.cpp's table, of transformers' [vocab]."""
    ids = ordering.long()
    out = torch.empty_like(ids)
    out[ids] = torch.arange(count, dtype=torch.int64).repeat_interleave(len(ids) // count)
    return out


def _divisors(config: Config, text: DecoderSpec) -> Array:
    """Return what llama.cpp divides the frequencies of full layers by [head_dim / 2]; 1e30 for pairs that do not
    turn."""
    frequencies = torch.tensor(text.ropes["full_attention"].frequencies, dtype=torch.float64)
    steps = torch.arange(len(frequencies), dtype=torch.float64) / len(frequencies)
    plain = _theta(config, "full_attention") ** -steps
    divisors = torch.where(frequencies > 0, (plain / frequencies).float(), _NOT_ROTATED)
    return divisors.where((divisors - 1).abs() > 1e-5, 1.0).float().numpy()  # both were rounded to float32


def _theta(config: Config, kind: str) -> float:
    return float(config.text_config.rope_parameters[kind]["rope_theta"])


def _add_sizes(writer: gguf.GGUFWriter, config: Config, spec: MTPHeadSpec) -> None:
    text, arch = spec.text, writer.arch
    kinds = {layer.kind: layer for layer in text.layers}
    full = kinds.get("full_attention", text.layers[-1])
    sliding = kinds.get("sliding_attention", full)
    heads = [layer.kv_heads for layer in text.layers]
    numbers: dict[str, Any] = {
        "block_count": len(text.layers),
        "context_length": text.max_positions,
        "embedding_length": text.hidden_size,
        DIALECTS[arch].backbone_hidden: spec.backbone_hidden_size,
        "feed_forward_length": full.intermediate_size,
        "embedding_length_per_layer_input": 0,
        "attention.head_count": full.heads,
        **_per_layer("attention.head_count_kv", heads),
        **_lengths(full, ""),
        **_lengths(sliding, "_swa"),
        "attention.shared_kv_layers": len(text.layers),
        "attention.sliding_window": sliding.window or text.max_positions,
        "attention.sliding_window_pattern": [layer.kind == "sliding_attention" for layer in text.layers],
        "attention.layer_norm_rms_epsilon": float(text.norm_eps),
        "rope.freq_base": _theta(config, "full_attention"),
        "rope.freq_base_swa": _theta(config, "sliding_attention"),
    }
    if arch == "gemma4-assistant":
        numbers["nextn_predict_layers"] = len(text.layers)
    else:
        numbers["requires_target_arch"] = "gemma4"
    for name, value in numbers.items():
        _add(writer, f"{arch}.{name}", value)


def _lengths(layer: LayerSpec, suffix: str) -> dict[str, int]:
    names = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    return {f"{name}{suffix}": layer.head_dim for name in names}


def _per_layer(name: str, values: list[int]) -> dict[str, int | list[int]]:
    """Return a number, or one for each layer where they differ."""
    return {name: values[0] if len({*values}) == 1 else values}


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    """Add a key of whatever kind its value is."""
    if isinstance(value, (list, tuple)):
        writer.add_array(key, value)
    elif type(value) is int:
        (writer.add_uint32 if value >= 0 else writer.add_int32)(key, value)
    else:
        {bool: writer.add_bool, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)
