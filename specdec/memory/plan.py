"""The memory that a model takes at a length of context, known before any of it is loaded.

What: `needs` adds up weights, drafter, caches, workspace and the program itself; `longest` turns it around. The cache's
part is exact: it comes from the rules by which `specdec.cache` allocates. Weights are the bytes of their storage. The
workspace is what a pass over the longest chunk needs: attention's scores, logits, rotations. Media are the pixels of a
prompt, and what a pass over a whole picture needs besides. Left out: sound, 2,560 bytes a token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace

import torch

from specdec import kernels
from specdec.cache import MAX_ROWS, Conversations
from specdec.cache.stores import slots_for, store_bytes
from specdec.memory.system import available_bytes, resident_bytes
from specdec.memory.video import CUDA_CONTEXT, video_memory
from specdec.model.build import Quantize, Source, check_tensors, storage_of
from specdec.model.decoder import Decoder, MemoryLimits
from specdec.model.names import expected_tensors, is_expert_matrix
from specdec.model.spec import DecoderSpec
from specdec.model.stack import ROPE_BLOCK, ROPE_BLOCKS
from specdec.weights.tensors import stored_bytes

KV_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "int8": torch.int8,
}
LEAST = 512  # positions that a budget must leave room for
_UNITS = ("", "K", "M", "G", "T")
_FEWEST = 1024  # bytes: a smaller number is one of gigabytes, whose unit was forgotten
LOGIT_ROWS = 27  # of the vocabulary, float32: a pass over nine rows, and two copies that processors and sampling make
PAIRS = 128  # of a row and an expert, whose outputs the native kernels hold at a time (csrc/mixture.h)
KEPT_SHARE = 8  # one part in so many of the free memory is for the caches of former conversations
FRAME_TOKENS = 70  # of a frame of video, padding included
LARGEST_PICTURE = 1120  # soft tokens: the largest budget of Gemma 4's processor
PROGRAM = "Python with its libraries"
LATER = 22_000_000  # parts of libraries that a generation is the first to need; measured with eval.memory


@dataclass(frozen=True)
class Needs:
    """Hold the bytes of each part, for `positions` of context in stores of `kv_dtype`. `experts`: the part of a
    mixture's experts that is in memory, apart from `weights`."""

    positions: int
    kv_dtype: str
    weights: int
    drafter: int
    cache: int
    workspace: int
    program: int
    media: int = 0
    experts: int = 0
    draft_cache: int = 0  # of a model that drafts
    adapters: int = 0

    @property
    def total(self) -> int:
        """Return the bytes of all parts."""
        of_model, of_drafter = self.weights + self.experts + self.adapters, self.drafter + self.draft_cache
        return of_model + of_drafter + self.cache + self.workspace + self.program + self.media

    def to_dict(self) -> dict[str, int | str]:
        """Return the parts and their total in JSON types."""
        return {**asdict(self), "total": self.total}


@dataclass(frozen=True)
class Planner:
    """Hold the figures that do not depend on the length: the model's spec, bytes of weights, drafter, program and
    adapters, and the media that a prompt may have: a picture of so many soft tokens, so many frames of video.
    `experts`: the bytes of `weights` that are a mixture's experts, which may stay in a file where memory is short.
    `draft`: of the model that drafts, where one does."""

    spec: DecoderSpec
    weights: int
    drafter: int = 0
    program: int = 0
    dtype: torch.dtype = torch.float32  # of activations
    picture: int = 0
    frames: int = 0
    experts: int = 0
    draft: DecoderSpec | None = None
    adapters: int = 0
    of_program: str = PROGRAM  # what `program` is of

    def needs(self, positions: int, kv_dtype: str = "float32", budget: int | None = None) -> Needs:
        """Return the memory needs of a context of `positions`, where experts take what they may of `budget` bytes;
        without one all of them are in memory. Raises ValueError for an unknown `kv_dtype`."""
        found = self._whole(positions, kv_dtype)
        return found if budget is None else replace(found, experts=self.experts_within(budget, kv_dtype))

    def experts_within(self, budget: int, kv_dtype: str = "float32") -> int:
        """Return the bytes of experts that are in memory with a budget of `budget` bytes: what the longest context that
        fits beside the least share of them leaves."""
        if not self.experts:
            return 0
        rest = self._whole(self.longest(budget, kv_dtype), kv_dtype)
        return min(self.experts, max(self._least(budget, kv_dtype), budget - rest.total + self.experts))

    def _least(self, budget: int, kv_dtype: str) -> int:
        """Return the least bytes of experts in memory: half of what all else leaves, and those of two layers, because a
        pass of many rows needs all of a layer's."""
        rest = self._whole(min(LEAST, self.spec.max_positions), kv_dtype).total - self.experts
        return min(self.experts, max(2 * self.experts // len(self.spec.layers), (budget - rest) // 2))

    def _whole(self, positions: int, kv_dtype: str) -> Needs:
        if kv_dtype not in KV_DTYPES:
            raise ValueError(f"there is no cache of {kv_dtype!r}; choose one of {', '.join(KV_DTYPES)}")
        kept, draft_cache = KV_DTYPES[kv_dtype], 0
        cache = cache_bytes(self.spec, positions, kept)
        workspace = workspace_bytes(self.spec, positions, self.dtype)
        if self.draft is not None:  # its passes and the backbone's take turns, but both keep their rotations
            draft_cache = text_bytes(self.spec, positions, kept, self.draft) - cache
            read = min(positions, self.draft.max_positions)
            workspace = max(workspace, workspace_bytes(self.draft, read, self.dtype))
            workspace += rotation_bytes(self.draft, read, self.dtype)
        return Needs(
            positions,
            kv_dtype,
            self.weights - self.experts,
            self.drafter,
            cache,
            workspace,
            self.program,
            media_bytes(self.spec, positions, kept, self.dtype, self.picture, self.frames),
            self.experts,
            draft_cache,
            self.adapters,
        )

    def longest(self, budget: int, kv_dtype: str = "float32") -> int:
        """Return the longest context whose total is within `budget` bytes; 0 where not even the weights are."""
        low, high = 0, self.spec.max_positions
        spared = self.experts - self._least(budget, kv_dtype) if self.experts else 0
        while low < high:
            middle = (low + high + 1) // 2
            fits = self._whole(middle, kv_dtype).total - spared <= budget
            low, high = (middle, high) if fits else (low, middle - 1)
        return low

    def room(self, budget: int, kv_dtype: str) -> MemoryLimits:
        """Return the memory limits that `budget` bytes leave for texts. Raises ValueError, and says how many bytes
        would do, when they are less than LEAST positions."""
        if (positions := self.longest(budget, kv_dtype)) >= min(LEAST, self.spec.max_positions):
            found = self.needs(positions, kv_dtype, budget)
            limit = found.experts if found.experts < self.experts else None
            return MemoryLimits(positions, found.cache + found.draft_cache + budget - found.total, limit)
        least = self.needs(min(LEAST, self.spec.max_positions), kv_dtype, budget)
        experts = f" the least share of its experts {least.experts / 1e9:.2f}," if least.experts else ""
        media = f", a picture {least.media / 1e9:.2f}" if least.media else ""
        media += f", the drafter's cache {least.draft_cache / 1e9:.2f}" if least.draft_cache else ""
        media += f", adapters {least.adapters / 1e9:.2f}" if least.adapters else ""
        raise ValueError(
            f"a memory budget of {budget / 1e9:.2f} GB is too small: weights {least.weights / 1e9:.2f},{experts} "
            f"drafter {least.drafter / 1e9:.2f}, {least.positions} positions of context {least.cache / 1e9:.2f}, "
            f"workspace {least.workspace / 1e9:.2f}{media} and {self.of_program} {least.program / 1e9:.2f} "
            f"make {least.total / 1e9:.2f} GB; allow as much, or quantise (quantize='int4', kv_dtype='int8')"
        )


def weight_bytes(shapes: Mapping[str, tuple[int, ...]], quantize: Quantize, dtype: torch.dtype) -> int:
    """Return the bytes of float tensors of these canonical names and shapes once they are loaded with `quantize`."""
    return sum(stored_bytes(shape, storage_of(name, quantize), dtype) for name, shape in shapes.items())


def loaded_bytes(spec: DecoderSpec, source: Source, quantize: Quantize, dtype: torch.dtype) -> int:
    """Return the bytes of the weights of the decoder that `build_decoder` makes of `source`.

    Raises ValueError, which lists them, when tensors are missing, surplus or misshapen.
    """
    check_tensors(spec, source)
    names = [name for name in expected_tensors(spec) if not source.stays_in_file(name)]
    return sum(source.checkpoint.loaded_bytes(source.names[n], dtype, storage_of(n, quantize)) for n in names)


def expert_bytes(spec: DecoderSpec, source: Source, quantize: Quantize, dtype: torch.dtype) -> int:
    """Return the bytes of `loaded_bytes` that are the matrices of experts."""
    names = [name for name in expected_tensors(spec) if is_expert_matrix(name)]
    return sum(source.checkpoint.loaded_bytes(source.names[n], dtype, storage_of(n, quantize)) for n in names)


def experts_in_free_memory(spec: DecoderSpec, source: Source, quantize: Quantize, dtype: torch.dtype) -> int | None:
    """Return the bytes of experts for which there is room in the memory that is free now; None: for all of them.

    Raises ValueError when the tensors of a mixture are not those of `spec`.
    """
    if spec.experts is None:
        return None
    check_tensors(spec, source)
    experts = expert_bytes(spec, source, quantize, dtype)
    program, weights = program_bytes(), loaded_bytes(spec, source, quantize, dtype)
    found = Planner(spec, weights, 0, program, dtype, experts=experts).experts_within(available_bytes() + program)
    return found if found < experts else None


def cache_bytes(spec: DecoderSpec, positions: int, kept: torch.dtype, max_rows: int = MAX_ROWS) -> int:
    """Return the bytes that `Decoder.new_cache` has allocated once it holds `positions`, a pass of `max_rows` rows
    included."""
    total = 0
    for layer in spec.layers:
        if layer.kv_layer is None:
            slots = slots_for(positions) if layer.window is None else layer.window - 1 + max_rows
            total += store_bytes(layer.kv_heads, layer.head_dim, slots, kept, spec.keeps_values_alone(layer))
    return total


def text_bytes(spec: DecoderSpec, positions: int, kept: torch.dtype, draft: DecoderSpec | None = None) -> int:
    """Return the bytes of the caches of one text: the model's own, and that of the model `draft` that drafts for it, in
    stores of the same type."""
    beside = 0 if draft is None else cache_bytes(draft, min(positions, draft.max_positions), kept)
    return cache_bytes(spec, positions, kept) + beside


def workspace_bytes(spec: DecoderSpec, positions: int, dtype: torch.dtype, max_rows: int = MAX_ROWS) -> int:
    """Return the bytes of the workspace of a pass of `max_rows` rows at the end of `positions`."""
    scores = max(
        layer.heads * max_rows * min(positions, positions if layer.window is None else layer.window + max_rows)
        for layer in spec.layers
    )
    widest = max(2 * layer.intermediate_size + 4 * layer.heads * layer.head_dim for layer in spec.layers)
    rows = max_rows * (widest + 6 * spec.hidden_size)
    if (experts := spec.experts) is not None:  # csrc/mixture.h: rows for the router and the experts, and some pairs
        pairs = min(max_rows * experts.used, max(max_rows, PAIRS))
        rows += max_rows * (3 * spec.hidden_size + experts.count) + 2 * pairs * (spec.hidden_size + experts.width)
    return 4 * (scores + rows + LOGIT_ROWS * spec.vocab_size) + rotation_bytes(spec, positions, dtype)


def rotation_bytes(spec: DecoderSpec, positions: int, dtype: torch.dtype) -> int:
    """Return the bytes of the rotations that a model keeps for texts of `positions`."""
    turned = 0
    for kind in {layer.kind for layer in spec.layers}:
        pairs = spec.ropes[kind].frequencies
        blocks = min(ROPE_BLOCKS, -(-positions // ROPE_BLOCK))
        turned += blocks * ROPE_BLOCK * 2 * (2 * len(pairs)) * dtype.itemsize
        if any(layer.kind == kind and spec.keeps_values_alone(layer) for layer in spec.layers):
            turned += slots_for(positions) * 2 * spec.ropes[kind].rotating_pairs * 4
    return turned


def media_bytes(
    spec: DecoderSpec, positions: int, kept: torch.dtype, dtype: torch.dtype, picture: int, frames: int
) -> int:
    """Return the bytes that media take in a context of `positions`: a picture of `picture` soft tokens, a video of
    `frames` frames.

    Pixels are the caller's, in float32. Embedding is over before the layers begin, and takes less than they do.
    """
    vision = None if spec.media is None else spec.media.vision
    largest = max(picture, FRAME_TOKENS if frames else 0)
    if vision is None or not largest:
        return 0
    pixels = 4 * vision.patch * (picture + FRAME_TOKENS * frames)
    longer = max(MAX_ROWS, min(largest, 3 * MAX_ROWS // 2))  # rows of the pieces that a long pass is cut into
    workspace = workspace_bytes(spec, positions, dtype, longer) - workspace_bytes(spec, positions, dtype)
    return pixels + workspace + picture_bytes(spec, min(largest, positions), kept, dtype)


def picture_bytes(spec: DecoderSpec, rows: int, kept: torch.dtype, dtype: torch.dtype) -> int:
    """Return the bytes that a pass over a picture of `rows` rows takes besides those of a pass over text.

    Rings have room for all of its rows, and four tensors of all rows are held at a time: the picture's own rows, the
    residual stream and its norm, and what one of them is made from.
    """
    rings = sum(
        store_bytes(layer.kv_heads, layer.head_dim, max(0, rows - MAX_ROWS), kept, False)
        for layer in spec.layers
        if layer.kv_layer is None and layer.window is not None
    )
    turned = sum(2 * 2 * len(rope.frequencies) for rope in spec.ropes.values())
    return rings + rows * (4 * spec.hidden_size + turned) * dtype.itemsize


def conversations_of(decoder: Decoder, draft: DecoderSpec | None = None) -> Conversations:
    """Make the `Conversations` of `decoder`: within its memory budget, or in a share of the memory that is free.
    `draft`: of the model that drafts, which keeps a cache beside each.

    Where torch computes on a GPU nothing is kept: a row's bits may depend on the pass that it came with.
    """
    if not kernels.invariant(decoder.device):
        return Conversations(decoder.new_cache)
    if decoder.room is None:
        return Conversations(decoder.new_cache, free_bytes(decoder.device) // KEPT_SHARE)
    return Conversations(
        decoder.new_cache, decoder.room.cache, lambda n: text_bytes(decoder.spec, n, decoder.kv_dtype, draft)
    )


def program_bytes(device: torch.device | None = None) -> int:
    """Return the resident bytes of this process before a model is in it, and those that a first generation adds. On a
    GPU, the bytes of its memory that a process takes before a model is there."""
    return resident_bytes() + LATER if device is None or device.type != "cuda" else CUDA_CONTEXT


def free_bytes(device: torch.device) -> int:
    """Return the bytes that this process can take more of the memory that `device` computes in."""
    video = video_memory(device)
    return available_bytes() if video is None else video.free


def parse_bytes(amount: int | str) -> int:
    """Return the bytes of "16GB", "9.5 G", "16GiB" or a number; G is 10^9, Gi 2^30. Raises ValueError for anything
    else, and for a text without a unit that names too few bytes to be meant."""
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(?:([KMGT])(i?))?B?\s*", str(amount), re.IGNORECASE)
    if found is None:
        raise ValueError(f"{amount!r} is not an amount of memory; write it like '16GB'")
    number, unit, binary = float(found[1]), (found[2] or "").upper(), bool(found[3])
    if isinstance(amount, str) and "B" not in amount.upper() and not unit and 0 < number < _FEWEST:
        raise ValueError(f"{amount!r} is {number:g} bytes; write it with a unit, like '{number:g}GB'")
    return int(number * (1024 ** _UNITS.index(unit) if binary else 1000 ** _UNITS.index(unit)))
