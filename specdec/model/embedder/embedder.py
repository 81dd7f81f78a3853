"""The arithmetic of an embedder: rows of pixels or samples in, rows of the hidden size out.

No row looks at another one, and every sum is float32, whatever the weights are kept in: a sum over 6,912 pixels leaves
float16's range. Products are those of `Weight.linear` and norms go row by row, so that a row has the same bits however
many rows there are. Rows go through in parts, so that a large picture takes no more memory than a small one.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from specdec import kernels
from specdec.model.embedder.spec import MediaSpec
from specdec.model.stack import Linear
from specdec.weights.tensors import Weight

ROWS = 256  # that go through at a time
_LAYER_NORM_EPS = 1e-5  # in transformers' modules; no config says another


@dataclass(frozen=True)
class LayerNorm:
    """Normalise the last dimension by mean and variance; weight and bias [D]."""

    weight: Tensor
    bias: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """Return x [n, D] float32, normed."""
        weight, bias = self.weight.float(), self.bias.float()
        return functional.layer_norm(x, weight.shape, weight, bias, _LAYER_NORM_EPS)


@dataclass(frozen=True)
class VisionEmbedder:
    """Embed patches of pictures; the names of the weights are transformers'."""

    patch_ln1: LayerNorm
    patch_dense: Linear  # [width, patch]
    patch_ln2: LayerNorm
    pos_embedding: Tensor  # [positions, 2, width]
    pos_norm: LayerNorm
    embedding_projection: Linear  # [hidden, width]
    eps: float

    def __call__(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Return rows [n, hidden] float32 of patches [n, patch] float32 at positions [n, 2] (x, y), int64."""
        x = self.patch_ln2(self.patch_dense(self.patch_ln1(patches)))  # [n, width]
        table = self.pos_embedding
        x = x + (table[positions[:, 0], 0].float() + table[positions[:, 1], 1].float())
        x = kernels.rms_norm(self.pos_norm(x), None, self.eps)
        return self.embedding_projection(x)


@dataclass(frozen=True)
class AudioEmbedder:
    """Embed frames of sound."""

    embedding_projection: Linear  # [hidden, frame]
    eps: float

    def __call__(self, frames: Tensor) -> Tensor:
        """Return rows [n, hidden] float32 of frames [n, samples] float32."""
        return self.embedding_projection(kernels.rms_norm(frames, None, self.eps))


class MediaEmbedder:
    """Embed what a processor made of pictures, frames and sound; `dtype` is that of the rows."""

    def __init__(
        self,
        spec: MediaSpec,
        vision: VisionEmbedder | None,
        audio: AudioEmbedder | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.spec, self.vision, self.audio = spec, vision, audio
        self.dtype, self.device = dtype, device

    def patches(self, patches: Tensor, positions: Tensor) -> Tensor:
        """Return the soft tokens [n, hidden] of a picture's patches [n, patch] at positions [n, 2] (x, y)."""
        vision = self.vision
        assert vision is not None, "media_blocks refuses pictures for such a model"
        where = positions.to(self.device, torch.int64)
        return self._in_parts(lambda part: vision(patches[part].to(self.device, torch.float32), where[part]), where)

    def frames(self, frames: Tensor) -> Tensor:
        """Return the soft tokens [n, hidden] of a clip's frames [n, samples]."""
        audio = self.audio
        assert audio is not None, "media_blocks refuses sound for such a model"
        return self._in_parts(lambda part: audio(frames[part].to(self.device, torch.float32)), frames)

    @torch.inference_mode()
    def _in_parts(self, embed: Callable[[slice], Tensor], like: Tensor) -> Tensor:
        out = torch.empty(len(like), self.spec.hidden, dtype=self.dtype, device=self.device)
        for start in range(0, len(like), ROWS):
            part = slice(start, start + ROWS)
            out[part] = embed(part).to(self.dtype)
        return out

    @property
    def nbytes(self) -> int:
        """Return the bytes of all weights as stored."""
        return sum(part.nbytes for _, part in self.parts())

    @cached_property
    def identity(self) -> str:
        """Return a hash of what a row's bits depend on besides pixels or samples: shapes, storage and some weights."""
        digest = hashlib.sha256(f"{self.spec} {self.dtype} {kernels.arithmetic(self.device)}".encode())
        for name, part in self.parts():
            if isinstance(part, Tensor):
                first = part.flatten()[:4096].float()
            else:
                blocks = part.packed
                digest.update(f"{name} {None if blocks is None else blocks.bits}".encode())
                first = part.rows(torch.zeros(1, dtype=torch.int64, device=self.device), torch.float32)
            digest.update(first.cpu().numpy().tobytes())
        return digest.hexdigest()

    def parts(self) -> Iterator[tuple[str, Tensor | Weight]]:
        """Yield each tensor by its canonical name."""
        for name in self.spec.tensors():
            yield name, self.part(name)

    def part(self, canonical: str) -> Any:
        """Return the matrix or vector of this canonical name."""
        owner, *path = canonical.split(".")
        return functools.reduce(getattr, path, self.audio if owner == "embed_audio" else self.vision)
