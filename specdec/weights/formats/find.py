"""The quantised matrices of a checkpoint, whatever format they are in, and the formats that are not read.

What: `packed_matrices` asks every format for its matrices; `refusal` says of a tensor that belongs to none what it is
and what would do. Why the tensors decide, and the config only where they leave something open: configs of unquantised
checkpoints tell of a quantisation too.
"""

from __future__ import annotations

from collections.abc import Mapping

from specdec.weights.formats.bitsandbytes import bitsandbytes_4bit
from specdec.weights.formats.compressed_tensors import int_quantized, packed_quantized
from specdec.weights.formats.float4 import float4
from specdec.weights.formats.float8 import float8
from specdec.weights.formats.matrix import PackedMatrix, Stored
from specdec.weights.formats.mlx import mlx_packed
from specdec.weights.formats.qweight import awq_and_gptq
from specdec.weights.formats.settings import Settings, Small
from specdec.weights.metadata import quote

_FORMATS = (packed_quantized, int_quantized, float4, mlx_packed, awq_and_gptq, bitsandbytes_4bit, float8)
# Last parts of names that quantising libraries add to those of a matrix.
_ADDED = (
    "qweight", "qzeros", "g_idx", "scales", "biases", "weight_packed", "weight_scale", "weight_scale_inv",
    "weight_scale_2", "weight_zero_point", "weight_shape", "weight_g_idx", "weight_global_scale", "weight_scales",
    "absmax", "quant_map", "nested_absmax", "nested_quant_map", "SCB", "weight_format", "W_q",
)  # fmt: skip
# Of activations and caches, which stay floats here.
_UNUSED = (
    "input_scale", "input_zero_point", "input_global_scale", "output_scale", "activation_scale", "k_scale", "v_scale",
    "q_scale", "prob_scale",
)  # fmt: skip
_METHODS = {
    "hqq": "HQQ", "eetq": "EETQ", "quanto": "quanto", "torchao": "torchao", "aqlm": "AQLM", "spqr": "SpQR",
    "vptq": "VPTQ", "higgs": "HIGGS", "bitnet": "BitNet", "fp_quant": "FP-Quant", "mxfp4": "MXFP4 of experts",
    "exl2": "EXL2", "exl3": "EXL3", "modelopt": "modelopt in another form than NVFP4", "sinq": "SINQ", "quip": "QuIP",
    "quark": "Quark",
}  # fmt: skip
READ = "compressed-tensors W4A16 or W8A16, MLX, AWQ, GPTQ, bitsandbytes NF4, NVFP4, MXFP4, fp8"


def packed_matrices(
    stored: Mapping[str, Stored], settings: Settings, small: Small
) -> tuple[dict[str, PackedMatrix], set[str]]:
    """Return the quantised matrices among the tensors `stored` by name, and the tensors that they take up.

    Raises ValueError for damaged ones, and for formats and kinds of formats that are not read.
    """
    if not any(is_part(name, entry) for name, entry in stored.items()):
        return {}, set()
    found = {name: matrix for format in _FORMATS for name, matrix in format(stored, settings, small)}
    taken = {part for matrix in found.values() for part in matrix.parts.values()}
    for name, matrix in found.items():
        if name in stored and matrix.parts.get("weight") != name:
            raise ValueError(f"{quote(name)} is stored twice, in floats and quantised; fetch the files again")
        stem = name.removesuffix("weight")
        taken |= {stem + word for word in (*_UNUSED, "g_idx") if stem + word in stored}
        if "qzeros" in matrix.parts and (bias := f"{stem}bias") in stored and not bool(small(bias).any()):
            taken.add(bias)  # of a model without biases, saved by a class with them
    taken |= {name for name in stored if found and name.rpartition(".")[2] in _UNUSED}
    return found, taken


def is_part(name: str, entry: Stored) -> bool:
    """Tell whether a tensor is, by its name or its type, a part of a quantised matrix."""
    floats_and_tables = ("F64", "F32", "F16", "BF16", "I64", "I32", "BOOL")
    added = name.rpartition(".")[2] in _ADDED or ".quant_state." in name
    return added or entry.dtype not in floats_and_tables


def refusal(left: Mapping[str, Stored], settings: Settings) -> tuple[str, str] | None:
    """Return the name of a tensor of `left` that is a part of a quantised matrix, and the sentence about it; None where
    there is none. `left`: the tensors that no format took."""
    names = [name for name, entry in left.items() if is_part(name, entry)]
    if not names:
        return None
    name = next((name for name in names if _by_name(name)), names[0])
    method = settings.method
    known = _METHODS.get(method) or _by_name(name) or (f"the method {quote(method)}" if method else None)
    told = f"is quantised by {known}, which is not read" if known else "cannot be read"
    return name, (
        f"tensor {name!r} ({left[name].dtype}) {told}: name the 16-bit checkpoint (F32, F16, BF16) of this model with "
        f"quantize='int4', a GGUF file, or one that is quantised as {READ}"
    )


def _by_name(name: str) -> str | None:
    return {
        "SCB": "bitsandbytes LLM.int8", "weight_format": "bitsandbytes LLM.int8", "W_q": "HQQ", "weight_scales": "EETQ",
    }.get(name.rpartition(".")[2])  # fmt: skip
