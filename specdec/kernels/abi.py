"""The library's interface, as ctypes sees it: each record and each function, and the checks when a library is opened.

A record has the name, the fields and the order of its twin in `csrc/abi.h`. A library that was built from other sources
would read records wrongly, and only a crash or wrong numbers would tell. A library therefore says from which sources it
was built and how large it takes each record to be, and `open_library` compares. Where a package comes without its C++
sources, the sizes alone are compared.

Left out: filling records in. `records.py`, `layers.py` and `draft.py` do that.
"""

from __future__ import annotations

import ctypes
from ctypes import CDLL, CFUNCTYPE, POINTER, Structure, c_char_p, c_double, c_float, c_int, c_int64, c_uint64, c_void_p
from enum import IntEnum
from pathlib import Path

from specdec.kernels.sources import sources_hash

ACTIVATIONS = ("silu", "gelu_tanh")  # `Activation` of abi.h


class Work(IntEnum):
    """Say what a call does of its layers, as `Work` of abi.h: all, K and V of the rows, or the rest."""

    ALL, KEYS, REST = range(3)


class Weights(Structure):
    """Point at a `BlockTensor`: its parts, and how many blocks a row has."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "scale", "minimum", "sub", "table")),
        *((name, c_int64) for name in ("blocks", "bits")),
        ("unit", c_double),
    )


class Matrix(Structure):
    """Point at a matrix with its bias (null: none); `outputs`: rows without padding."""

    _fields_ = (("w", Weights), ("bias", c_void_p), ("outputs", c_int64))


class LowRank(Structure):
    """Point at a low-rank part of a matrix, `specdec.kernels.LowRank`. `rank` 0: there is none; `wide`: float32, else
    bfloat16."""

    _fields_ = (
        *((name, c_void_p) for name in ("down", "up")),
        *((name, c_int64) for name in ("rank", "wide")),
        ("scale", c_float),
    )


class LayerAdapter(Structure):
    """Point at the low-rank parts of one layer's matrices, by the names of `Layer`."""

    _fields_ = tuple(
        (name, LowRank) for name in ("q", "k", "v", "o", "gate", "up", "down", "ple_gate", "ple_projection")
    )


class Plane(Structure):
    """Point at the keys or the values of a store. `head`, `slot`: strides in elements."""

    _fields_ = (("data", c_void_p), ("scale", c_void_p), ("head", c_int64), ("slot", c_int64))


class KV(Structure):
    """Point at a layer's store, a `KVView`. `type`: `StoreType` of abi.h; `pairs`: those that a made key's rotation
    turns."""

    _fields_ = (
        *((name, Plane) for name in ("keys", "values")),
        *((name, c_void_p) for name in ("weight", "cos", "sin")),
        *((name, c_int64) for name in ("type", "slots", "width", "value_width", "pairs")),
    )


UseExperts = CFUNCTYPE(None, c_int64, POINTER(c_int64), c_int64)  # layer, the numbers of the experts, how many


class Mixture(Structure):
    """Point at the mixture of experts of one decoder layer; a field has the meaning that it has in abi.h."""

    _fields_ = (
        *((name, Weights) for name in ("gate_up", "down")),
        ("router", LowRank),
        *((name, c_void_p) for name in ("router_scale", "expert_scale", "dense_norm", "pre_norm", "post_norm")),
        *((name, c_int64) for name in ("count", "used", "width", "layer")),
        ("use", UseExperts),
    )


class Layer(Structure):
    """Point at one decoder layer, by the names of `specdec.kernels.LayerWeights`."""

    _fields_ = (
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down", "ple_gate", "ple_projection")),
        *((name, c_void_p) for name in ("input_norm", "q_norm", "k_norm", "attention_post_norm")),
        *((name, c_void_p) for name in ("mlp_norm", "mlp_post_norm", "ple_norm", "scalar")),
        *((name, c_int64) for name in ("heads", "kv_heads", "head_dim", "kind", "store", "activation", "norm_values")),
        ("eps", c_float),
        ("scale", c_float),
        ("experts", POINTER(Mixture)),
    )


class Span(Structure):
    """Point at a pass's rotations [T, head_dim] and row bounds [T], for the layers of one kind."""

    _fields_ = tuple((name, c_void_p) for name in ("cos", "sin", "first", "end"))


class Drafter(Structure):
    """Point at the matrices of a draft head besides its layers. `aux`: how many layers' states the head fuses."""

    _fields_ = (
        *((name, Matrix) for name in ("pre", "post", "head", "fuse")),
        ("embedding", Weights),
        ("tokens", c_int64),
        ("ids", c_void_p),
        ("embed_scale", c_float),
        ("eps", c_float),
        ("aux", c_int64),
    )


class DraftSampling(Structure):
    """Say how drafted tokens are sampled, as `specdec.kernels.DraftSampling` does; `keys`: one for each step."""

    _fields_ = (
        ("keys", c_void_p),
        ("sharpness", c_float),
        ("top_k", c_int64),
        ("top_p", c_double),
        ("min_p", c_double),
    )


class DraftChances(Structure):
    """Say where the probabilities of drafted tokens go, and below which the draft ends, [steps] float32 each."""

    _fields_ = (("shares", c_void_p), ("floors", c_void_p), ("sharpness", c_float))


RECORDS = (
    Weights, Matrix, LowRank, LayerAdapter, Plane, KV, Mixture, Layer, Span, Drafter, DraftSampling, DraftChances,
)  # fmt: skip

_ARGUMENTS = {
    "specdec_block_linear": [c_void_p] * 3 + [c_int64] * 2 + [c_int],
    "specdec_block_rows": [c_void_p] * 3 + [c_int64] * 2,
    "specdec_low_rank": [c_void_p] * 3 + [c_int64] * 3 + [c_int],
    "specdec_best": [c_void_p, c_int64, c_void_p],
    "specdec_gumbel_candidates": [c_void_p, c_void_p, c_int64, c_float, c_double, c_uint64, c_void_p],
    "specdec_sampled_token": [c_void_p, c_int64, c_float, c_int64, c_double, c_double, c_uint64],
    "specdec_attention": [c_void_p] * 4 + [c_float, c_void_p] + [c_int64] * 3 + [c_int],
    "specdec_layers": [c_void_p, c_int64] * 2
    + [c_void_p] * 6
    + [c_int64] * 2
    + [c_void_p, c_int64, c_void_p]
    + [c_int] * 2,
    "specdec_draft": [c_void_p] * 2
    + [c_int64]
    + [c_void_p] * 4
    + [c_int64, c_void_p, c_void_p, c_int64, c_int64]
    + [c_void_p] * 4
    + [c_int],
    "specdec_rms_norm": [c_void_p, c_void_p, c_float, c_void_p, c_int64, c_int64, c_int],
    "specdec_rope": [c_void_p] * 4 + [c_int64] * 3 + [c_int],
    "specdec_gated": [c_void_p, c_void_p, c_int, c_void_p, c_int64, c_int64, c_int],
    "specdec_set_name": [c_int],
    "specdec_use_set": [c_char_p],
    "specdec_has_threads": [],
    "specdec_record_size": [c_char_p],
    "specdec_sources_hash": [],
}
_RESULTS = {  # the others return an int: a code, 0 where all is well, or what they were asked for
    "specdec_best": c_int64,
    "specdec_gumbel_candidates": c_int64,
    "specdec_sampled_token": c_int64,
    "specdec_record_size": c_int64,
    "specdec_set_name": c_char_p,
    "specdec_sources_hash": c_char_p,
}


class UnusableLibraryError(Exception):
    """Say in words for a user why a library must not be called."""


def open_library(path: Path, sources: Path) -> CDLL:
    """Load the library at `path` and declare its functions.

    `sources`: the folder of the C++ sources that it must have been built from; a folder without any is no obstacle.

    Raises:
        UnusableLibraryError: `path` is of another platform or damaged, of an older version, built from other sources,
            or takes a record to have another size.
    """
    try:
        library = CDLL(str(path))
    except OSError as error:
        raise UnusableLibraryError(
            f"the native library does not load: it was built for another platform, or it is damaged ({error})"
        ) from error
    for name, arguments in _ARGUMENTS.items():
        try:
            function = getattr(library, name)
        except AttributeError:
            raise UnusableLibraryError(
                f"the native library is of another version of specdec: it has no {name}"
            ) from None
        function.argtypes, function.restype = arguments, _RESULTS.get(name, c_int)
    wanted, built = sources_hash(sources), library.specdec_sources_hash().decode()
    if wanted not in ("", built):
        raise UnusableLibraryError(
            f"the native library is stale: it was built from other C++ sources than those that are in {sources} now"
        )
    for record in RECORDS:
        size = library.specdec_record_size(record.__name__.encode())
        if size != ctypes.sizeof(record):
            raise UnusableLibraryError(
                f"the native library is of another version of specdec: its record {record.__name__} has {size} bytes, "
                f"not {ctypes.sizeof(record)}"
            )
    return library
