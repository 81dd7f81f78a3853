"""What llama.cpp's blocks become: for each type a reader of its bytes, into blocks of ours.

What: `BLOCKS` has the types whose integers fit our blocks, with the reader of each; `REFITTED` has those that are
expanded to floats and quantised again. Why the `gguf` package reads the look-up tables (IQ3_XXS, IQ3_S, IQ2_XXS,
IQ1_S): with a block's scale set to one, what it returns is the integers times the scale of 32 weights, which the block
says in four bits; the quotient is exact. Left out: layouts of our own for what 8 bits make larger than the file is.
Source of the bit layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType as Type
from gguf.quants import dequantize
from torch import Tensor

from specdec.kernels import BLOCK
from specdec.weights.fit import Natural

Bytes = npt.NDArray[np.uint8]


class Blocks(NamedTuple):
    """Say what the blocks of a type become. `bits`: of our blocks. `nbytes`: of one of llama.cpp's blocks. `read`:
    bytes [R, B, nbytes] to blocks in plain order. `exact`: no scale or minimum is rounded. `minimum`: ours have one."""

    bits: int
    nbytes: int
    read: Callable[[Tensor], Natural]
    exact: bool
    minimum: bool = False


def expand(data: Bytes, kind: Type) -> Tensor:
    """Return rows of bytes [R, bytes] of any type that the `gguf` package reads as float32 [R, K]."""
    return torch.from_numpy(dequantize(np.array(data), kind))


def _q4_0(raw: Tensor) -> Natural:
    return _nibbles(raw[..., 2:]).flatten(1), _float16(raw[..., 0:2]), None


def _q4_1(raw: Tensor) -> Natural:
    return _nibbles(raw[..., 4:]).flatten(1), _float16(raw[..., 0:2]), _float16(raw[..., 2:4])


def _q5_0(raw: Tensor) -> Natural:
    return _fives(raw[..., 2:]).flatten(1), _float16(raw[..., 0:2]), None


def _q5_1(raw: Tensor) -> Natural:
    return _fives(raw[..., 4:]).flatten(1), _float16(raw[..., 0:2]), _float16(raw[..., 2:4])


def _q8_0(raw: Tensor) -> Natural:
    return raw[..., 2:].view(torch.int8).flatten(1), _float16(raw[..., 0:2]), None


def _q4_k(raw: Tensor) -> Natural:
    # 256 weights: 16 bytes of scales and minima, 128 bytes of nibbles.
    return _super_nibbles(raw[..., 16:]).flatten(1), *_super_scales(raw)


def _q5_k(raw: Tensor) -> Natural:
    # 256 weights: 16 bytes of scales and minima, 32 bytes of fifth bits, 128 bytes of nibbles.
    # Bit s of byte j is the fifth bit of value 32s + j.
    fifth = raw[..., None, 16:48] >> _EIGHT[:, None] & 1  # [R, B, 8, 32]
    values = _super_nibbles(raw[..., 48:]) | fifth.flatten(2) << 4
    return values.flatten(1), *_super_scales(raw)


def _q3_k(raw: Tensor) -> Natural:
    # 256 weights: 32 bytes of third bits, 64 bytes of two bits, 12 bytes of 16 scales of six bits, the float16 scale.
    # Weight = d * (s - 32) * q with q in -4..3. The product of the integers is in -124..128, its negative fits a byte.
    low = raw[..., 32:96].reshape(*raw.shape[:2], 2, 1, 32) >> _EIGHT[0:8:2, None] & 3  # [R, B, 2, 4, 32]
    third = raw[..., None, :32] >> _EIGHT[:, None] & 1  # [R, B, 8, 32]
    q = low.flatten(2, 3).to(torch.int16) - 4 * (1 - third.to(torch.int16))  # [R, B, 8, 32]
    four = torch.cat([raw[..., 96:104] & 15, raw[..., 96:104] >> 4], dim=-1)  # [R, B, 16]
    two = raw[..., None, 104:108] >> _EIGHT[0:8:2, None] & 3  # [R, B, 4, 4]
    scales = (four | two.flatten(2) << 4).to(torch.int16) - 32  # [R, B, 16]
    products = q.view(*q.shape[:2], 16, 16) * scales[..., None]  # [R, B, 16, 16]
    d = -_float16(raw[..., 108:110])  # [R, B]
    return (-products).to(torch.int8).flatten(1), _for_each_block(d), None


def _iq4_nl(raw: Tensor) -> Natural:
    return _IQ4[_nibbles(raw[..., 2:]).long()].flatten(1), _float16(raw[..., 0:2]), None


def _iq4_xs(raw: Tensor) -> Natural:
    # 256 weights: the float16 scale, two bits of eight scales, four bits of eight scales, 128 bytes of nibbles.
    top = raw[..., 2:4].contiguous().view(torch.int16)[..., 0:1] >> _EIGHT.to(torch.int16) * 2 & 3  # [R, B, 8]
    low = torch.stack([raw[..., 4:8] & 15, raw[..., 4:8] >> 4], dim=-1).flatten(2)  # [R, B, 8]
    steps = (low.to(torch.int16) | top << 4) - 32
    values = _IQ4[_super_nibbles_32(raw[..., 8:]).long()]
    return values.flatten(1), _scaled(raw, steps.float()), None


def _iq3_xxs(raw: Tensor) -> Natural:
    steps = (_words(raw[..., 66:98]) >> 28 & 15).float() * 0.5 + 0.25  # [R, B, 8]
    return _integers(raw, Type.IQ3_XXS, steps * 2), _scaled(raw, steps * 2), None  # halves of even integers


def _iq2_xxs(raw: Tensor) -> Natural:
    steps = (_words(raw[..., 2:66])[..., 1::2] >> 28 & 15).float() * 0.25 + 0.125  # [R, B, 8]
    return _integers(raw, Type.IQ2_XXS, steps), _scaled(raw, steps), None


def _iq3_s(raw: Tensor) -> Natural:
    packed = raw[..., 106:110]
    steps = 1 + 2 * torch.stack([packed & 15, packed >> 4], dim=-1).flatten(2).float()  # [R, B, 8]
    odd = _integers(raw, Type.IQ3_S, steps)  # -15, -13 .. 15
    return (odd + 15).to(torch.uint8) >> 1, _scaled(raw, 2 * steps), _scaled(raw, -15 * steps)


def _iq1_s(raw: Tensor) -> Natural:
    about = raw[..., 34:50].contiguous().view(torch.int16).to(torch.int32)  # [R, B, 8]
    steps = 1 + 2 * (about >> 12 & 7).float()
    shift = torch.where(about < 0, -0.125, 0.125)  # of all 32 weights, in steps
    whole = _unit(raw, Type.IQ1_S) / steps[..., None] - shift[..., None]  # -1, 0, 1
    return (whole + 1).to(torch.uint8).flatten(1), _scaled(raw, steps), _scaled(raw, steps * (shift - 1))


def _mxfp4(raw: Tensor) -> Natural:
    values = _FP4[_nibbles(raw[..., 1:]).long()] + 16
    return values.to(torch.uint8).flatten(1), _POWERS[raw[..., 0].long()].half(), None


def _ternary(kind: Type) -> Callable[[Tensor], Natural]:
    def read(raw: Tensor) -> Natural:
        q = _unit(raw, kind, raw.shape[-1] - 2) + 8  # -1, 0, 1, and 2 where the code of TQ2_0 is not used
        return q.to(torch.uint8).flatten(1), _for_each_block(_float16(raw[..., -2:])), None

    return read


def _unit(raw: Tensor, kind: Type, at: int = 0) -> Tensor:
    """Return the weights of blocks [R, B, bytes] of 256 in units of their scale, the float16 number at byte `at`:
    [R, B, 8, 32]."""
    ones = raw.clone()
    ones[..., at : at + 2] = torch.tensor([1.0], dtype=torch.float16).view(torch.uint8)
    return expand(ones.flatten(1).numpy(), kind).view(*raw.shape[:2], 8, BLOCK)


def _integers(raw: Tensor, kind: Type, steps: Tensor) -> Tensor:
    """Return the integers of blocks [R, B, bytes] of 256, whose groups of 32 have the scales `steps` [R, B, 8] in units
    of the block's: int8 [R, K]."""
    return (_unit(raw, kind) / steps[..., None]).to(torch.int8).flatten(1)


def _scaled(raw: Tensor, steps: Tensor) -> Tensor:
    """Return `steps` [R, B, 8] times the float16 scale that blocks [R, B, bytes] begin with: [R, 8B]."""
    return (_float16(raw[..., 0:2]).float()[..., None] * steps).half().flatten(1)


def _for_each_block(scale: Tensor) -> Tensor:
    """Repeat the scale of 256 weights for each 32 of them: [R, B] to [R, 8B]."""
    return scale.repeat_interleave(8, dim=1)


def _words(raw: Tensor) -> Tensor:
    """View [..., 4n] bytes as [..., n] little-endian words, in int64."""
    return raw.contiguous().view(torch.int32).long() & 0xFFFFFFFF


def _super_scales(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Return scale and minimum of eight blocks that share float16 d and dmin: [R, B, 16 bytes and more] to [R, 8B]
    each."""
    d, dmin = _float16(raw[..., 0:2]).float(), _float16(raw[..., 2:4]).float()  # [R, B]
    first, second, mixed = raw[..., 4:8], raw[..., 8:12], raw[..., 12:16]  # [R, B, 4]
    # Six bits each. Blocks 0..3 have their own bytes; 4..7 have four bits in `mixed` and two on top of those bytes.
    scales = torch.cat([first & 63, mixed & 15 | first >> 2 & 48], dim=-1)  # [R, B, 8]
    minima = torch.cat([second & 63, mixed >> 4 | second >> 2 & 48], dim=-1)  # [R, B, 8]
    return (d[..., None] * scales).half().flatten(1), (-dmin[..., None] * minima).half().flatten(1)


def _super_nibbles(packed: Tensor) -> Tensor:
    """Unpack [R, B, 128] bytes to [R, B, 256] values 0..15: of 32 bytes the low nibbles, then the high ones."""
    return _nibbles(packed.view(*packed.shape[:2], 4, BLOCK)).flatten(2)


def _super_nibbles_32(packed: Tensor) -> Tensor:
    """Unpack [R, B, 128] bytes to [R, B, 256] values 0..15: of 16 bytes the low nibbles, then the high ones."""
    return _nibbles(packed.reshape(*packed.shape[:2], 8, BLOCK // 2)).flatten(2)


def _fives(packed: Tensor) -> Tensor:
    """Unpack [R, B, 20] bytes to [R, B, 32] values 0..31: fifth bits (bit i of byte j is value 8j + i's), then
    nibbles."""
    fifth = packed[..., :4, None] >> _EIGHT & 1  # [R, B, 4, 8]
    return _nibbles(packed[..., 4:]) | fifth.flatten(2) << 4


def _nibbles(packed: Tensor) -> Tensor:
    """Unpack [..., n] bytes to [..., 2n] values 0..15: the low nibbles, then the high ones."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)


def _float16(raw: Tensor) -> Tensor:
    """View [..., 2] bytes as [...] float16."""
    return raw.contiguous().view(torch.float16).squeeze(-1)


_EIGHT = torch.arange(8, dtype=torch.uint8)
_IQ4 = torch.tensor(
    [-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], dtype=torch.int8
)  # what the codes of IQ4_NL and IQ4_XS mean
_FP4 = torch.tensor([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], dtype=torch.int8)  # twice FP4's numbers
_POWERS = torch.tensor(
    [2.0 ** (e - 128) for e in range(256)], dtype=torch.float32
)  # half of what an FP4 byte scales by
FLOATS = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
INTEGERS = {Type.I8: torch.int8, Type.I16: torch.int16, Type.I32: torch.int32, Type.I64: torch.int64}
BLOCKS: dict[Type, Blocks] = {
    Type.Q4_0: Blocks(4, 18, _q4_0, True),
    Type.Q4_1: Blocks(4, 20, _q4_1, True, True),
    Type.Q5_0: Blocks(5, 22, _q5_0, True),
    Type.Q5_1: Blocks(5, 24, _q5_1, True, True),
    Type.Q8_0: Blocks(8, 34, _q8_0, True),
    Type.Q3_K: Blocks(8, 110, _q3_k, True),
    Type.Q4_K: Blocks(4, 144, _q4_k, False, True),
    Type.Q5_K: Blocks(5, 176, _q5_k, False, True),
    Type.IQ4_NL: Blocks(8, 18, _iq4_nl, True),
    Type.IQ4_XS: Blocks(8, 136, _iq4_xs, False),
    Type.IQ3_S: Blocks(4, 110, _iq3_s, False, True),
    Type.IQ3_XXS: Blocks(8, 98, _iq3_xxs, False),
    Type.IQ2_XXS: Blocks(8, 66, _iq2_xxs, False),
    Type.IQ1_S: Blocks(4, 50, _iq1_s, False, True),
    Type.MXFP4: Blocks(5, 17, _mxfp4, True),
    Type.TQ1_0: Blocks(4, 54, _ternary(Type.TQ1_0), True),
    Type.TQ2_0: Blocks(4, 66, _ternary(Type.TQ2_0), True),
}
REFITTED = (Type.Q2_K, Type.Q6_K, Type.IQ2_XS, Type.IQ2_S, Type.IQ1_M)
USUAL = (Type.Q4_K, Type.Q5_K, Type.Q6_K)  # whose rounding the documentation tells, for every mixed file has them
