"""`AssistantDrafter`: a Gemma 4 assistant as a `Drafter`.

It keeps no cache: it reads the backbone's, committed positions only, so nothing has to be rolled back when a
draft is rejected. It proposes its own argmax. Left out: stopping a draft early on low confidence (the
draft-length controller decides), and drafts for several texts at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from drafter.head import Assistant
from specdec.cache import KVCache
from specdec.drafting import Draft
from specdec.kernels import FusedDraft
from specdec.model.decoder import Decoder


class AssistantDrafter:
    """Drafts with the assistant that `build(backbone)` makes; `build` raises ValueError on a misfit."""

    name = "mtp"
    max_draft = 8  # published assistants are used with 2 to 6 tokens

    def __init__(self, build: Callable[[Decoder], Assistant]) -> None:
        self._build = build
        self._assistant: Assistant | None = None
        self._fused: FusedDraft | None = None
        self._backbone: Decoder | None = None
        self._cache: KVCache | None = None

    def bind(self, backbone: Decoder) -> None:
        """Build the assistant for `backbone`, in its dtype and on its device.

        Raises:
            ValueError: it was made for another backbone, or its checkpoint is damaged.
        """
        before = self._backbone
        # `speculative` wraps a model anew in every call: the same kind of backbone needs no second reading.
        if before is None or _kind(before) != _kind(backbone):
            self._assistant = self._build(backbone)
        assert self._assistant is not None
        if before is not backbone:
            self._fused = self._assistant.fused(backbone)
        self._backbone, self._cache = backbone, None

    def start(self, cache: KVCache) -> None:
        # A pass of `max_rows` rows, one of them kept, would overwrite the oldest key of the drafter's window.
        assert cache.max_rows > self.max_draft + 1
        self._cache = cache

    @torch.inference_mode()
    def propose(self, tokens: Sequence[int], hidden: Tensor, k: int) -> Draft:
        """Up to `k` tokens, at most `max_draft`; none while nothing is committed.

        The pending token's position is `cache.length`, for every step of the round.
        """
        assistant, backbone, cache = self._assistant, self._backbone, self._cache
        assert assistant is not None, "bind() comes first"
        assert backbone is not None, "bind() comes first"
        assert cache is not None, "start() comes first"
        k = min(k, self.max_draft)
        if k <= 0 or cache.length == 0:
            return Draft()
        spans = assistant.spans(cache.length)
        if self._fused is not None and self._fused.usable:
            return Draft.by(self.name, self._fused(hidden, tokens[-1], k, spans, cache.views))
        token = torch.tensor(tokens[-1:], dtype=torch.int64, device=backbone.device)  # [1]
        state = hidden[None]  # [1, backbone hidden]
        drafted = []
        for _ in range(k):
            x, state = assistant.step(backbone.embed(token), state, spans, cache)
            token = assistant.head.best(x, token)
            drafted.append(token)  # stays on the device: one wait for a GPU per round, not one per token
        return Draft.by(self.name, torch.cat(drafted).tolist())


def _kind(backbone: Decoder) -> tuple[object, ...]:
    """What a built assistant depends on."""
    return backbone.spec, backbone.dtype, backbone.device
