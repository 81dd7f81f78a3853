"""Random blocks of llama.cpp's types: what the `gguf` package reads, and cannot always write."""

from __future__ import annotations

from collections.abc import Callable

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Type
from gguf import quants

HALVES = {  # where float16 numbers lie in a block, besides at its beginning
    **dict.fromkeys((Type.Q4_1, Type.Q5_1, Type.Q4_K, Type.Q5_K), (0, 2)),
    Type.Q2_K: (80, 82), Type.Q3_K: (108,), Type.Q6_K: (208,), Type.TQ1_0: (52,), Type.TQ2_0: (64,),
    Type.MXFP4: (), Type.NVFP4: (), Type.IQ1_M: (), Type.Q8_K: (),
}  # fmt: skip


def floats(raw: np.ndarray, kind: Type) -> np.ndarray:
    """What rows of bytes [R, bytes] mean, float32 [R, K]: by the `gguf` package, or where it has no reader by the C
    structs of ggml (`block_q8_K`, `block_q1_0`), field by field."""
    if kind is Type.Q8_K:
        made = np.frombuffer(raw.tobytes(), np.dtype([("d", "<f4"), ("qs", "i1", 256), ("bsums", "<i2", 16)]))
        return (made["d"][:, None] * made["qs"].astype(np.float32)).reshape(len(raw), -1)
    if kind is Type.Q1_0:
        made = np.frombuffer(raw.tobytes(), np.dtype([("d", "<f2"), ("qs", "u1", 16)]))
        bits = np.unpackbits(made["qs"], axis=1, bitorder="little")
        return (made["d"].astype(np.float32)[:, None] * (2.0 * bits - 1).astype(np.float32)).reshape(len(raw), -1)
    return quants.dequantize(raw, kind)


def random_blocks(kind: Type, rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Every bit pattern of the integers, with scales of either sign and many magnitudes: [rows, bytes of a row]."""
    rng = np.random.default_rng(seed)

    def halves(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape) * 10.0 ** rng.uniform(-3, 0, shape)

    # 2^-31 .. 2^8 for MXFP4: what float16 holds, times 128
    return _blocks(kind, rows, columns, rng, halves, (96, 136), (0, 256))


def blocks_of_a_model(kind: Type, rows: int, columns: int, seed: int, size: float) -> np.ndarray:
    """Random integers with scales that make weights about as large as `size`; of NVFP4 with a scale of the tensor of
    `size` beside them."""
    near = int(np.log2(size)) + 125  # what a byte of MXFP4 means by such a size; NVFP4's are about 1

    def made(half: float) -> np.ndarray:
        rng = np.random.default_rng(seed)
        ranges = (near, near + 2), (0x20, 0x30)
        return _blocks(kind, rows, columns, rng, lambda *shape: np.full(shape, half), *ranges)

    return made(size / float(floats(made(1.0), kind).std()))


def _blocks(
    kind: Type,
    rows: int,
    columns: int,
    rng: np.random.Generator,
    halves: Callable[..., np.ndarray],
    exponents: tuple[int, int],
    scales: tuple[int, int],
) -> np.ndarray:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    shape = (rows, columns // block)
    raw = rng.integers(0, 256, (*shape, size), dtype=np.uint8)
    for offset in HALVES.get(kind, (0,)):
        raw[..., offset : offset + 2] = halves(*shape, 1).astype(np.float16).view(np.uint8)
    if kind is Type.Q8_K:
        raw[..., :4] = halves(*shape, 1).astype(np.float32).view(np.uint8)
    if kind is Type.MXFP4:
        raw[..., 0] = rng.integers(*exponents, shape, dtype=np.uint8)
    if kind is Type.NVFP4:
        raw[..., :4] = rng.integers(*scales, (*shape, 4), dtype=np.uint8)
    if kind is Type.IQ1_M:  # four bits of the scale on top of each of four numbers
        numbers, bits = raw[..., 48:56].view(np.uint16), halves(*shape, 1).astype(np.float16).view(np.uint16)
        numbers &= 0x0FFF
        numbers |= bits << np.array([12, 8, 4, 0], np.uint16) & np.uint16(0xF000)
    return raw.reshape(rows, -1)
