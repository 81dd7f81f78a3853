"""`MTPDrafter`: a Gemma 4 assistant, or a head of our own format, as a `Drafter`.

The drafter keeps no cache: it reads the committed positions of the backbone's cache, so a rejected draft leaves nothing
to roll back. The drafter proposes the argmax of the head or, where tokens are sampled, the token that wins with the
noise of the choice, with the probability that the head gives it: a draft ends where the draft length says that these
are too low. Left out: drafts for several texts at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import astuple
from typing import TYPE_CHECKING

import torch

from drafter.inference import SHARPNESS, MTPHead, best, sharpness
from specdec import kernels
from specdec.cache import KVCache
from specdec.drafting.protocol import Draft, tokens_until
from specdec.engine.sampling import Noise
from specdec.kernels import DraftSampling, FusedDraft
from specdec.model.decoder import Decoder
from specdec.model.states import States

if TYPE_CHECKING:
    from specdec.kernels.triton.passes.draft import DeviceDraft


class MTPDrafter:
    """Keep the head that `build(backbone)` makes, and draft with that head; `build` raises ValueError on a misfit."""

    name = "mtp"
    max_draft = 8  # published assistants are used with 2 to 6 tokens

    def __init__(self, build: Callable[[Decoder], MTPHead]) -> None:
        self._build = build
        self._assistant: MTPHead | None = None
        self._fused: FusedDraft | DeviceDraft | None = None
        self._backbone: Decoder | None = None

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """Return the backbone's layers whose outputs `propose` wants besides the last state; none before `bind`."""
        return () if self._assistant is None else self._assistant.spec.aux_layers

    def bind(self, backbone: Decoder) -> None:
        """Build the head for `backbone`, in the backbone's dtype and on its device.

        Raises:
            ValueError: the head was made for another backbone, or its checkpoint is damaged.
        """
        before = self._backbone
        # `speculative` wraps a model anew in every call: the same kind of backbone needs no second reading.
        if before is None or _kind(before) != _kind(backbone):
            self._assistant = self._build(backbone)
        assert self._assistant is not None
        if before is not backbone:
            self._fused = self._assistant.fused(backbone)
        self._backbone = backbone

    def start(self, cache: KVCache, noise: Noise | None = None) -> MTPProposer:
        """Return the proposer of one text, whose K and V are in `cache`. `noise`: that of the text's choices; None:
        greedy."""
        # A pass of `max_rows` rows, one of them kept, would overwrite the oldest key of the drafter's window.
        assert cache.max_rows > self.max_draft + 1
        assert self._assistant is not None, "bind() comes first"
        assert self._backbone is not None, "bind() comes first"
        return MTPProposer(self._assistant, self._fused, self._backbone, cache, noise)


class MTPProposer:
    """Draft for one text: the proposer of an `MTPDrafter`."""

    name, max_draft = MTPDrafter.name, MTPDrafter.max_draft

    def __init__(
        self,
        assistant: MTPHead,
        fused: FusedDraft | DeviceDraft | None,
        backbone: Decoder,
        cache: KVCache,
        noise: Noise | None,
    ) -> None:
        self._assistant, self._fused, self._backbone = assistant, fused, backbone
        self._cache, self._noise = cache, noise

    def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
        """Return a draft of up to `k` tokens, at most `max_draft`; no tokens while nothing is committed."""
        return self.propose_while(tokens, states, k, ())

    @torch.inference_mode()
    def propose_while(self, tokens: Sequence[int], states: States, k: int, floors: Sequence[float]) -> Draft:
        """Return a draft as `propose` does, with the head's probability of each token. It ends after the first token i
        where the product of the probabilities so far is below floors[i]; (): never.

        Every step of the round has the position of the pending token, `cache.length`.
        """
        assistant, backbone, cache, noise = self._assistant, self._backbone, self._cache, self._noise
        k = min(k, self.max_draft)
        if k <= 0 or cache.length == 0:
            return Draft()
        spans = assistant.spans(cache.length)
        keys = [] if noise is None else noise.keys(len(tokens), k)
        sampling = None if noise is None else DraftSampling(keys, sharpness(noise), *astuple(noise.warping)[1:])
        if self._fused is not None and self._fused.usable(cache.views, sampling):
            made, shares = self._fused(
                states.last, states.aux, tokens[-1], k, spans, cache.views, sampling, SHARPNESS, floors[:k]
            )
            return self._until(made, shares, keys, floors)
        kernels.count_uncaptured(states.last.device, "draft step-by-step")
        token = torch.tensor(tokens[-1:], dtype=torch.int64, device=backbone.device)  # [1]
        state = assistant.first(states[None])  # [1, backbone hidden]
        drafted, said, reach = [], [], 1.0
        ends_early = bool(floors) and backbone.device.type == "cpu"  # elsewhere it would wait for the device
        for step, key in enumerate(keys or [0] * k):
            x, state = assistant.step(backbone.embed(token), state, spans, cache)
            token, share = best(assistant.head, x, token, noise, key)
            drafted.append(token)  # without noise it stays on the device: one wait for a GPU per round
            said.append(share)
            if ends_early:
                reach *= float(share) if noise is None else noise.chance(float(share), key, int(token))
                if reach < floors[step]:
                    break
        return self._until(torch.cat(drafted).tolist(), torch.cat(said).tolist(), keys, floors)

    def _until(
        self, tokens: Sequence[int], shares: Sequence[float], keys: Sequence[int], floors: Sequence[float]
    ) -> Draft:
        """Return the draft of `tokens`, to which the head gives `shares` of its probability, up to where it ends."""
        noise = self._noise
        chances = shares if noise is None else list(map(noise.chance, shares, keys, tokens))
        until = tokens_until(chances, floors)
        return Draft.by(self.name, tokens[:until], chances[:until])


def _kind(backbone: Decoder) -> tuple[object, ...]:
    """Return the properties of `backbone` that a built head depends on."""
    return backbone.spec, backbone.dtype, backbone.device
