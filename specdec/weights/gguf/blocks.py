"""What llama.cpp's blocks become: for each type a reader of its bytes, into blocks of ours.

What: `BLOCKS` has the types that are read, with the reader of each. Why the `gguf` package reads the look-up tables of
IQ3, IQ2 and IQ1: with a block's scale set to one, what it returns is the integers times the scale of 16 or 32 weights,
which the block says in three or four bits; the quotient is exact. `expand` has rows of a type as floats.
Source of the bit layouts: https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor

from specdec.kernels import BLOCK, HALF, TABLES
from specdec.weights.fit import NaturalHalves, split_halves
from specdec.weights.gguf.floats import expand, float32, signs
from specdec.weights.tensors import table_scale


class Blocks(NamedTuple):
    """Say what the blocks of a type become. `bits`: of our blocks. `nbytes`: of one of llama.cpp's blocks. `read`:
    bytes [R, B, nbytes] to blocks in plain order. `exact`: no scale or minimum is rounded. `minimum`, `sub`: ours have
    them. `table`: of `specdec.kernels.TABLES`, what our codes mean."""

    bits: int
    nbytes: int
    read: Callable[[Tensor], NaturalHalves]
    exact: bool
    minimum: bool = False
    table: str | None = None
    sub: bool = False

    @property
    def in_words(self) -> str:
        """Say in words what the blocks become."""
        table = ", codes of a table" if self.table is not None else ""
        halves = ", 16 inputs to a scale" if self.sub else ""
        rounded = "exact" if self.exact else "scales rounded"
        return f"{self.bits} bits{', with a minimum' if self.minimum else ''}{table}{halves}; {rounded}"


def _q4_0(raw: Tensor) -> NaturalHalves:
    return _nibbles(raw[..., 2:]).flatten(1), _float16(raw[..., 0:2]), None


def _q4_1(raw: Tensor) -> NaturalHalves:
    return _nibbles(raw[..., 4:]).flatten(1), _float16(raw[..., 0:2]), _float16(raw[..., 2:4])


def _q5_0(raw: Tensor) -> NaturalHalves:
    return _fives(raw[..., 2:]).flatten(1), _float16(raw[..., 0:2]), None


def _q5_1(raw: Tensor) -> NaturalHalves:
    return _fives(raw[..., 4:]).flatten(1), _float16(raw[..., 0:2]), _float16(raw[..., 2:4])


def _q8_0(raw: Tensor) -> NaturalHalves:
    return raw[..., 2:].view(torch.int8).flatten(1), _float16(raw[..., 0:2]), None


def _q8_k(raw: Tensor) -> NaturalHalves:
    # 256 weights: a float32 scale, 256 bytes, and their sums, which only products need.
    return raw[..., 4:260].contiguous().view(torch.int8).flatten(1), _for_each_block(float32(raw[..., :4]).half()), None


def _q1_0(raw: Tensor) -> NaturalHalves:
    # 128 weights: the float16 scale, 16 bytes of signs; -d and d are -d and 2d more.
    d = _float16(raw[..., 0:2]).float().repeat_interleave(4, dim=1)
    return signs(raw[..., 2:]).flatten(1), 2 * d, -d, d.new_full((len(d), 2 * d.shape[1]), 0x11, dtype=torch.uint8)


def _q4_k(raw: Tensor) -> NaturalHalves:
    # 256 weights: 16 bytes of scales and minima, 128 bytes of nibbles.
    return _super_nibbles(raw[..., 16:]).flatten(1), *_super_scales(raw)


def _q5_k(raw: Tensor) -> NaturalHalves:
    # 256 weights: 16 bytes of scales and minima, 32 bytes of fifth bits, 128 bytes of nibbles.
    # Bit s of byte j is the fifth bit of value 32s + j.
    fifth = raw[..., None, 16:48] >> _EIGHT[:, None] & 1  # [R, B, 8, 32]
    values = _super_nibbles(raw[..., 48:]) | fifth.flatten(2) << 4
    return values.flatten(1), *_super_scales(raw)


def _q2_k(raw: Tensor) -> NaturalHalves:
    # 256 weights: 16 bytes, each the scale (low) and the minimum (high) of 16 weights, 64 bytes of two bits, d, dmin.
    low = raw[..., 16:80].reshape(*raw.shape[:2], 2, 1, 32) >> _EIGHT[0:8:2, None] & 3  # [R, B, 2, 4, 32]
    d, dmin = _float16(raw[..., 80:82]), _float16(raw[..., 82:84])
    return low.flatten(1), _for_each_block(d), _for_each_block(-dmin), raw[..., :16].flatten(1)


def _q3_k(raw: Tensor) -> NaturalHalves:
    # 256 weights: 32 bytes of third bits, 64 bytes of two bits, 12 bytes of 16 scales of six bits, the float16 scale.
    low = raw[..., 32:96].reshape(*raw.shape[:2], 2, 1, 32) >> _EIGHT[0:8:2, None] & 3  # [R, B, 2, 4, 32]
    third = raw[..., None, :32] >> _EIGHT[:, None] & 1  # [R, B, 8, 32]
    four = torch.cat([raw[..., 96:104] & 15, raw[..., 96:104] >> 4], dim=-1)  # [R, B, 16]
    two = raw[..., None, 104:108] >> _EIGHT[0:8:2, None] & 3  # [R, B, 4, 4]
    factors = (four | two.flatten(2) << 4).to(torch.int8) - 32  # [R, B, 16]
    codes = low.flatten(2, 3) | third << 2
    return codes.flatten(1), _for_each_block(_float16(raw[..., 108:110])), None, factors.flatten(1)


def _q6_k(raw: Tensor) -> NaturalHalves:
    # 256 weights: 128 bytes of nibbles, 64 bytes of two bits, 16 scales of eight bits, the float16 scale.
    # Of 128 weights: 64 bytes of nibbles, the low ones first; 32 bytes of two bits, those of 32 weights in a row.
    low = _nibbles(raw[..., :128].reshape(*raw.shape[:2], 2, 64))  # [R, B, 2, 128]
    two = raw[..., 128:192].reshape(*raw.shape[:2], 2, 1, 32) >> _EIGHT[0:8:2, None] & 3  # [R, B, 2, 4, 32]
    factors = raw[..., 192:208].contiguous().view(torch.int8)
    codes = low | two.flatten(3) << 4
    return codes.flatten(1), _for_each_block(_float16(raw[..., 208:210])), None, factors.flatten(1)


def _iq4_nl(raw: Tensor) -> NaturalHalves:
    return _nibbles(raw[..., 2:]).flatten(1), _float16(raw[..., 0:2]), None


def _iq4_xs(raw: Tensor) -> NaturalHalves:
    # 256 weights: the float16 scale, two bits of eight scales, four bits of eight scales, 128 bytes of nibbles.
    top = raw[..., 2:4].contiguous().view(torch.int16)[..., 0:1] >> _EIGHT.to(torch.int16) * 2 & 3  # [R, B, 8]
    low = torch.stack([raw[..., 4:8] & 15, raw[..., 4:8] >> 4], dim=-1).flatten(2)  # [R, B, 8]
    steps = (low.to(torch.int16) | top << 4) - 32
    return _super_nibbles_32(raw[..., 8:]).flatten(1), _scaled(raw, steps.float()), None


def _iq3_xxs(raw: Tensor) -> NaturalHalves:
    steps = (_words(raw[..., 66:98]) >> 28 & 15).float() * 2 + 1  # [R, B, 8], four times what gguf multiplies by
    numbers = _unit(raw, Type.IQ3_XXS) / (steps / 4)[..., None] / 2  # halves of even integers
    return _codes(numbers, "iq3_xxs"), _scaled(raw, steps), None


def _iq3_s(raw: Tensor) -> NaturalHalves:
    packed = raw[..., 106:110]
    steps = 1 + 2 * torch.stack([packed & 15, packed >> 4], dim=-1).flatten(2).float()  # [R, B, 8]
    return _codes(_unit(raw, Type.IQ3_S) / steps[..., None], "iq3_s"), _scaled(raw, steps), None


def _iq2_xxs(raw: Tensor) -> NaturalHalves:
    four = _words(raw[..., 2:66])[..., 1::2] >> 28 & 15  # [R, B, 8]
    return _of_sixteen(_unit(raw, Type.IQ2_XXS), _float16(raw[..., 0:2]), "iq2", four.repeat_interleave(2, dim=-1))


def _iq2_xs(raw: Tensor) -> NaturalHalves:
    packed = raw[..., 66:74]
    steps = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(2)
    return _of_sixteen(_unit(raw, Type.IQ2_XS), _float16(raw[..., 0:2]), "iq2", steps)


def _iq2_s(raw: Tensor) -> NaturalHalves:
    packed = raw[..., 74:82]
    steps = torch.stack([packed & 15, packed >> 4], dim=-1).flatten(2)
    return _of_sixteen(_unit(raw, Type.IQ2_S), _float16(raw[..., 0:2]), "iq2", steps)


def _iq1_s(raw: Tensor) -> NaturalHalves:
    about = raw[..., 34:50].contiguous().view(torch.int16).to(torch.int32)  # [R, B, 8]
    steps = (about >> 12 & 7).repeat_interleave(2, dim=-1)
    return _of_sixteen(_unit(raw, Type.IQ1_S), _float16(raw[..., 0:2]), "iq1", steps)


def _iq1_m(raw: Tensor) -> NaturalHalves:
    # Of each of four 16-bit numbers the lower twelve bits are four scales, the upper four bits a part of d.
    words = raw[..., 48:56].contiguous().view(torch.int16).to(torch.int32)  # [R, B, 4]
    three = words[..., None] >> 3 * torch.arange(4, dtype=torch.int32) & 7  # [R, B, 4, 4]
    bits = ((words >> 12 & 15) << 4 * torch.arange(4, dtype=torch.int32)).sum(-1)  # [R, B]
    d = bits.to(torch.int16).view(torch.float16)
    ones = raw.clone()
    ones[..., 49:56:2] = ones[..., 49:56:2] & 15 | torch.tensor([0, 0, 0xC0, 0x30], dtype=torch.uint8)  # 1.0
    unit = expand(ones.flatten(1).numpy(), Type.IQ1_M).view(*raw.shape[:2], 8, BLOCK)
    return _of_sixteen(unit, d, "iq1", three.flatten(2))


def _of_sixteen(unit: Tensor, scale: Tensor, table: str, steps: Tensor) -> NaturalHalves:
    """Return blocks of 256, whose groups of 16 have the scales 2 * `steps` + 1 [R, B, 16].

    `unit` [R, B, 8, 32]: the weights in units of the block's `scale` [R, B], eighths of whole numbers.
    """
    factors = (2 * steps + 1).to(torch.int8)
    numbers = 8 * unit.reshape(*factors.shape, HALF) / factors[..., None]  # [R, B, 16, 16]
    return _codes(numbers, table), _for_each_block(scale), None, factors.flatten(1)


def _mxfp4(raw: Tensor) -> NaturalHalves:
    scale = table_scale(_POWERS[raw[..., 0].long()], "fp4")
    return _nibbles(raw[..., 1:]).flatten(1), scale.half(), None


def _nvfp4(raw: Tensor) -> NaturalHalves:
    # 64 weights: four scales of eight bits, then 8 bytes of nibbles for each 16 weights.
    step, factors = split_halves(_UE4M3[raw[..., :4].long()].flatten(1))
    codes = _nibbles(raw[..., 4:].reshape(*raw.shape[:2], 4, 8))
    return codes.flatten(1), table_scale(step, "fp4"), None, factors


def _ternary(kind: Type) -> Callable[[Tensor], NaturalHalves]:
    def read(raw: Tensor) -> NaturalHalves:
        q = _unit(raw, kind, raw.shape[-1] - 2) + 8  # -1, 0, 1, and 2 where the code of TQ2_0 is not used
        return q.to(torch.uint8).flatten(1), _for_each_block(_float16(raw[..., -2:])), None

    return read


def _unit(raw: Tensor, kind: Type, at: int = 0) -> Tensor:
    """Return the weights of blocks [R, B, bytes] of 256 in units of their scale, the float16 number at byte `at`:
    [R, B, 8, 32]."""
    ones = raw.clone()
    ones[..., at : at + 2] = torch.tensor([1.0], dtype=torch.float16).view(torch.uint8)
    return expand(ones.flatten(1).numpy(), kind).view(*raw.shape[:2], 8, BLOCK)


def _codes(numbers: Tensor, table: str) -> Tensor:
    """Return the codes of whole numbers of a table, those of a row [R, ...]: uint8 [R, K]."""
    code = torch.zeros(256, dtype=torch.uint8)
    of = TABLES[table].numbers.long()
    for place in range(16):
        if place == 0 or of[place]:
            code[of[place] + 128] = place
    return code[numbers.long() + 128].flatten(1)


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
_POWERS = torch.tensor([2.0 ** (e - 127) for e in range(256)], dtype=torch.float32)  # what a byte of MXFP4 scales by
_UE4M3 = torch.tensor(  # and of NVFP4: a float of four and three bits; 127 is no number
    [0.0 if byte == 127 else ((byte & 7) + 8 * bool(byte & 120)) * 2.0 ** (max(byte >> 3 & 15, 1) - 10)
     for byte in range(256)],
    dtype=torch.float32,
)  # fmt: skip
FLOATS = {Type.F32: torch.float32, Type.F16: torch.float16, Type.BF16: torch.bfloat16}
INTEGERS = {Type.I8: torch.int8, Type.I16: torch.int16, Type.I32: torch.int32, Type.I64: torch.int64}
BLOCKS: dict[Type, Blocks] = {
    Type.Q4_0: Blocks(4, 18, _q4_0, True),
    Type.Q4_1: Blocks(4, 20, _q4_1, True, True),
    Type.Q5_0: Blocks(5, 22, _q5_0, True),
    Type.Q5_1: Blocks(5, 24, _q5_1, True, True),
    Type.Q8_0: Blocks(8, 34, _q8_0, True),
    Type.Q8_K: Blocks(8, 292, _q8_k, False),
    Type.Q1_0: Blocks(2, 18, _q1_0, True, True, sub=True),
    Type.Q2_K: Blocks(2, 84, _q2_k, True, True, sub=True),
    Type.Q3_K: Blocks(3, 110, _q3_k, True, sub=True),
    Type.Q4_K: Blocks(4, 144, _q4_k, False, True),
    Type.Q5_K: Blocks(5, 176, _q5_k, False, True),
    Type.Q6_K: Blocks(6, 210, _q6_k, True, sub=True),
    Type.IQ4_NL: Blocks(4, 18, _iq4_nl, True, table="iq4"),
    Type.IQ4_XS: Blocks(4, 136, _iq4_xs, False, table="iq4"),
    Type.IQ3_S: Blocks(4, 110, _iq3_s, False, table="iq3_s"),
    Type.IQ3_XXS: Blocks(4, 98, _iq3_xxs, False, table="iq3_xxs"),
    Type.IQ2_S: Blocks(3, 82, _iq2_s, True, table="iq2", sub=True),
    Type.IQ2_XS: Blocks(3, 74, _iq2_xs, True, table="iq2", sub=True),
    Type.IQ2_XXS: Blocks(3, 66, _iq2_xxs, True, table="iq2", sub=True),
    Type.IQ1_M: Blocks(3, 56, _iq1_m, True, table="iq1", sub=True),
    Type.IQ1_S: Blocks(3, 50, _iq1_s, True, table="iq1", sub=True),
    Type.MXFP4: Blocks(4, 17, _mxfp4, True, table="fp4"),
    Type.NVFP4: Blocks(4, 36, _nvfp4, False, table="fp4", sub=True),
    Type.TQ1_0: Blocks(4, 54, _ternary(Type.TQ1_0), True),
    Type.TQ2_0: Blocks(4, 66, _ternary(Type.TQ2_0), True),
}
USUAL = (Type.Q4_K, Type.Q5_K)  # whose rounding the documentation tells, for every mixed file has them
