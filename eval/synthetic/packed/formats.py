"""Matrices in the formats of other programs, by the formulas that these publish.

What: `FORMATS` names ways to store a matrix of floats [N, K]. Each gives the tensors that a file holds in the place of
`X.weight`, by the end of their names, and the floats [N, K] that the format says these stand for. Rounding is the
plainest: it is the layouts that matter here. Written apart from the readers in `specdec/weights/formats/`, and from
their authors' libraries.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Parts = dict[str, Tensor]
_NF4 = (  # quantiles of a normal distribution, from the paper (arXiv 2305.14314, appendix E)
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip

_FP4 = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)  # bitsandbytes', before they are divided by the largest
_LEVELS = {"nf4": _NF4, "fp4": tuple(sign * number / 12 for sign in (1, -1) for number in _FP4)}
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Format:
    """Describe a way to store a matrix: what it needs of K, how it is stored, and what config.json says of it."""

    multiple: int
    store: Callable[[Tensor], tuple[Parts, Tensor]]
    config: dict[str, Any]


def bit_stream(values: Tensor, bits: int) -> Tensor:
    """Pack integers [R, X] below 2 ** bits into int32 words [R, X * bits / 32], low bits first."""
    places = torch.arange(bits, dtype=torch.int64)
    flat = (values.long()[..., None] >> places & 1).flatten(1)  # [R, X * bits]
    words = (flat.view(len(flat), -1, 32) << torch.arange(32, dtype=torch.int64)).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def _rounded(w: Tensor, group: int, bits: int, symmetric: bool, kind: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Round [N, K] in groups: integers [N, K] from 0, scale [N, G] as `kind` has it, zero [N, G]; float32."""
    groups = w.float().view(len(w), -1, group)
    top = (1 << bits) - 1
    if symmetric:
        scale, zero = (
            groups.abs().amax(-1) / (top // 2),
            torch.full(groups.shape[:2], float(1 << (bits - 1)), dtype=torch.float32),
        )
    else:
        low, high = groups.amin(-1).clamp(max=0), groups.amax(-1).clamp(min=0)
        scale = (high - low) / top
        zero = (-low / scale).round().clamp(0, top)
    scale = scale.to(kind).float()
    values = (groups / scale[..., None] + zero[..., None]).round().clamp(0, top)
    return values.view(w.shape), scale, zero


def _floats(values: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    groups = values.view(*scale.shape, -1)
    return ((groups - zero[..., None]) * scale[..., None]).view(values.shape)


def _compressed_tensors(group: int | None, bits: int = 4, symmetric: bool = True) -> Format:
    def store(w: Tensor) -> tuple[Parts, Tensor]:
        values, scale, zero = _rounded(w, group or w.shape[1], bits, symmetric, torch.bfloat16)
        parts = {
            "weight_packed": bit_stream(values, bits),
            "weight_scale": scale.bfloat16(),
            "weight_shape": torch.tensor(w.shape, dtype=torch.int64),
        }
        if not symmetric:
            parts["weight_zero_point"] = bit_stream(zero.t(), bits).t().contiguous()
        return parts, _floats(values, scale, zero)

    weights = {"num_bits": bits, "type": "int", "symmetric": symmetric, "group_size": group}
    config = {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": ["lm_head"],
    }
    return Format(group or 32, store, {"quantization_config": config})


def _int8_rows() -> Format:
    def store(w: Tensor) -> tuple[Parts, Tensor]:
        scale = (w.float().abs().amax(1, keepdim=True) / 127).bfloat16()
        values = (w.float() / scale.float()).round().clamp(-128, 127)
        return {"weight": values.to(torch.int8), "weight_scale": scale}, values * scale.float()

    return Format(32, store, {"quantization_config": {"quant_method": "compressed-tensors", "format": "int-quantized"}})


def _mlx(bits: int, group: int) -> Format:
    def store(w: Tensor) -> tuple[Parts, Tensor]:
        groups = w.float().view(len(w), -1, group)
        low, high = groups.amin(-1), groups.amax(-1)
        scale, bias = ((high - low) / ((1 << bits) - 1)).bfloat16().float(), low.bfloat16().float()
        values = ((groups - bias[..., None]) / scale[..., None]).round().clamp(0, (1 << bits) - 1)
        parts = {
            "weight": bit_stream(values.view(w.shape), bits).view(torch.uint32),
            "scales": scale.bfloat16(),
            "biases": bias.bfloat16(),
        }
        return parts, (values * scale[..., None] + bias[..., None]).view(w.shape)

    said = {"group_size": group, "bits": bits, "mode": "affine"}
    return Format(group, store, {"quantization": said, "quantization_config": said})


def _awq(group: int) -> Format:
    columns = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7], dtype=torch.int64)

    def packed(values: Tensor) -> Tensor:  # [X, N] -> [X, N / 8]
        return bit_stream(values.view(len(values), -1, 8)[..., columns].flatten(1), 4)

    def store(w: Tensor) -> tuple[Parts, Tensor]:
        values, scale, zero = _rounded(w, group, 4, False, torch.float16)
        parts = {"qweight": packed(values.t()), "qzeros": packed(zero.t()), "scales": scale.t().half().contiguous()}
        return parts, _floats(values, scale, zero)

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm", "zero_point": True}
    return Format(group, store, {"quantization_config": config})


def _gptq(group: int, bits: int = 4, symmetric: bool = True, version: str = "gptq") -> Format:
    def store(w: Tensor) -> tuple[Parts, Tensor]:
        values, scale, zero = _rounded(w, group, bits, symmetric, torch.float16)
        zero = zero.clamp(min=1)  # the first version stores one less
        stored = zero - int(version == "gptq")
        parts = {
            "qweight": bit_stream(values, bits).t().contiguous(),
            "qzeros": bit_stream(stored.t(), bits),
            "scales": scale.t().half().contiguous(),
            "g_idx": torch.arange(w.shape[1], dtype=torch.int32) // group,
        }
        return parts, _floats(values, scale, zero)

    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": False}
    return Format(group, store, {"quantization_config": config | {"checkpoint_format": version}})


def _bitsandbytes(kind: str, double: bool = False) -> Format:
    def store(w: Tensor) -> tuple[Parts, Tensor]:
        table, blocks = torch.tensor(_LEVELS[kind], dtype=torch.float32), w.float().reshape(-1, 64)
        absmax = blocks.abs().amax(1)
        codes = (blocks / absmax[:, None]).unsqueeze(-1).sub(table).abs().argmin(-1)
        about: dict[str, Any] = {"quant_type": kind, "blocksize": 64, "dtype": "bfloat16", "shape": list(w.shape)}
        parts: Parts = {}
        if double:
            offset, codebook = float(absmax.mean()), torch.linspace(-1, 1, 256, dtype=torch.float32)
            shifted = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
            nested = shifted.abs().amax(1)
            bytes_ = (shifted / nested[:, None]).unsqueeze(-1).sub(codebook).abs().argmin(-1)
            absmax_bytes = bytes_.flatten()[: len(absmax)].to(torch.uint8)
            absmax = (codebook[bytes_] * nested[:, None]).flatten()[: len(absmax)] + offset
            parts = {"weight.nested_absmax": nested, "weight.nested_quant_map": codebook}
            about |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
        flat = codes.view(-1, 2)
        raw = torch.tensor(list(json.dumps(about).encode()), dtype=torch.uint8)
        parts |= {
            "weight": (flat[:, 0] << 4 | flat[:, 1]).to(torch.uint8)[:, None],
            "weight.absmax": absmax_bytes if double else absmax,
            "weight.quant_map": table,
            f"weight.quant_state.bitsandbytes__{kind}": raw,
        }
        return parts, (table[codes] * absmax[:, None]).view(w.shape)

    config = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_use_double_quant": double}
    return Format(64, store, {"quantization_config": config})


def _small_floats(w: Tensor, mode: str, whole: float) -> tuple[Tensor, Tensor, Tensor]:
    """Round [N, K] to floats of 4 or 8 bits: codes uint8 [N, K], bytes of scales [N, groups], floats [N, K]. `whole`:
    what every weight is multiplied by besides."""
    groups = w.float().view(len(w), -1, 16 if mode == "nvfp4" else 32) / whole
    largest = 448.0 if mode == "mxfp8" else 6.0
    wanted = groups.abs().amax(-1) / largest
    if mode == "nvfp4":
        bytes_ = wanted.to(torch.float8_e4m3fn).view(torch.uint8)
        scale = bytes_.view(torch.float8_e4m3fn).float()
    else:
        exponents = torch.ceil(torch.log2(wanted))
        bytes_, scale = (exponents + 127).to(torch.uint8), torch.exp2(exponents)
    scaled = groups / scale[..., None].clamp(min=2**-9 if mode == "nvfp4" else 0)
    if mode == "mxfp8":
        stored = scaled.to(torch.float8_e4m3fn)
        codes, numbers = stored.view(torch.uint8), stored.float()
    else:
        levels = torch.tensor(_E2M1, dtype=torch.float32)
        places = (scaled.abs()[..., None] - levels).abs().argmin(-1)
        codes, numbers = (places + 8 * (scaled < 0)).to(torch.uint8), levels[places] * scaled.sign()
    return codes.view(w.shape), bytes_, (numbers * (scale * whole)[..., None]).view(w.shape)


def _mlx_floats(mode: str) -> Format:
    def store(w: Tensor) -> tuple[Parts, Tensor]:
        codes, scales, floats = _small_floats(w, mode, 1.0)
        words = bit_stream(codes, 8 if mode == "mxfp8" else 4)
        return {"weight": words.view(torch.uint32), "scales": scales}, floats

    said = {"group_size": 16 if mode == "nvfp4" else 32, "bits": 8 if mode == "mxfp8" else 4, "mode": mode}
    return Format(32, store, {"quantization": said, "quantization_config": said})


def _float4(mode: str, program: str) -> Format:
    ours = program == "modelopt"

    def store(w: Tensor) -> tuple[Parts, Tensor]:
        whole = float(w.float().abs().amax() / (6 * 448)) if mode == "nvfp4" else 1.0
        # Each program stores one of a number and its inverse, in float32.
        stored = torch.tensor(whole if ours else 1 / whole, dtype=torch.float32)
        codes, scales, floats = _small_floats(w, mode, float(stored) if ours else 1 / float(stored))
        parts = {
            "weight" if ours else "weight_packed": codes[:, ::2] | codes[:, 1::2] << 4,
            "weight_scale": scales.view(torch.float8_e4m3fn) if mode == "nvfp4" else scales,
        }
        if mode == "nvfp4":
            parts |= {"weight_scale_2": stored} if ours else {"weight_global_scale": stored[None]}
        return parts, floats

    said = {"quant_method": program}
    said |= {"quant_algo": "NVFP4"} if ours else {"format": f"{mode}-pack-quantized"}
    return Format(32, store, {"quantization_config": said})


def _fp8(how: str) -> Format:
    def store(w: Tensor) -> tuple[Parts, Tensor]:
        rows, columns = w.shape
        side = {"tensor": (rows, columns), "row": (1, columns), "block": (128, 128)}[how]
        down, across = math.ceil(rows / side[0]), math.ceil(columns / side[1])
        padded = torch.nn.functional.pad(w.float(), (0, across * side[1] - columns, 0, down * side[0] - rows))
        squares = padded.view(down, side[0], across, side[1])
        scale = squares.abs().amax((1, 3)) / 448
        stored = (squares / scale[:, None, :, None]).to(torch.float8_e4m3fn)
        back = (stored.float() * scale[:, None, :, None]).reshape(padded.shape)[:rows, :columns]
        whole = stored.reshape(padded.shape)[:rows, :columns].contiguous()
        if how == "block":
            return {"weight": whole, "weight_scale_inv": scale}, back
        return {"weight": whole, "weight_scale": scale if how == "row" else scale.view(())}, back

    method = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    other = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    return Format(32, store, {"quantization_config": method if how == "block" else other})


FORMATS: dict[str, Format] = {
    "ct-g32": _compressed_tensors(32),
    "ct-g64": _compressed_tensors(64),
    "ct-g128": _compressed_tensors(128),
    "ct-channel": _compressed_tensors(None),
    "ct-asymmetric": _compressed_tensors(32, symmetric=False),
    "ct-w8": _compressed_tensors(32, bits=8),
    "ct-w8a8": _int8_rows(),
    **{f"mlx-{bits}": _mlx(bits, 64 if bits in (4, 8) else 32) for bits in (2, 3, 4, 5, 6, 8)},
    "awq": _awq(64),
    "gptq": _gptq(64),
    "gptq-v2": _gptq(32, version="gptq_v2"),
    "gptq-asymmetric": _gptq(64, symmetric=False),
    "gptq-8": _gptq(64, bits=8),
    "nf4": _bitsandbytes("nf4"),
    "nf4-double": _bitsandbytes("nf4", double=True),
    "bnb-fp4": _bitsandbytes("fp4"),
    "mlx-mxfp4": _mlx_floats("mxfp4"),
    "mlx-nvfp4": _mlx_floats("nvfp4"),
    "mlx-mxfp8": _mlx_floats("mxfp8"),
    "ct-mxfp4": _float4("mxfp4", "compressed-tensors"),
    "ct-nvfp4": _float4("nvfp4", "compressed-tensors"),
    "modelopt-nvfp4": _float4("nvfp4", "modelopt"),
    "fp8-tensor": _fp8("tensor"),
    "fp8-row": _fp8("row"),
    "fp8-block": _fp8("block"),
}
