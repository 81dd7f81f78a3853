"""`DraftModel`: any model of the backbone's vocabulary, as a `Drafter`.

The model reads the text as the backbone does, in a cache of its own that lies beside the backbone's cache
(`draft_cache.py`): a kept conversation keeps both. Nothing is read before a draft is wanted. The few tokens that a
round leaves unread, the last one of a draft that was wholly right say, join the pending one in one pass. More of them,
a prompt or what suffix matches have drafted, are read in chunks beforehand (`catch_up`), and the draft length decides
when, because they may cost more than a draft wins. Where tokens are sampled, the model's choice has the text's own
noise and temperature, so that a model that agrees with the backbone drafts what the backbone chooses.

Left out: drafts of several texts in one pass; pictures and sound, whose soft tokens are read as tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from specdec import kernels
from specdec.cache import MAX_ROWS, KVCache
from specdec.drafting.draft_model.draft_cache import DraftCache
from specdec.drafting.draft_model.vocabulary import check_vocabulary
from specdec.drafting.protocol import Draft
from specdec.engine.sampling import Noise
from specdec.model.decoder import Decoder
from specdec.model.spec import DecoderSpec
from specdec.model.states import States


class _Owner:
    """Own the caches that one build of the model keeps beside others: they go when it goes."""


class DraftModel:
    """Draft with the model of `spec` in `path`, which `build(backbone)` loads for a backbone when it is bound."""

    name = "model"
    max_draft = 8
    aux_layers: tuple[int, ...] = ()

    def __init__(self, path: Path, spec: DecoderSpec, build: Callable[[Decoder], Decoder]) -> None:
        self.path, self.spec, self._build = path, spec, build
        self._decoder: Decoder | None = None
        self._kind: tuple[object, ...] | None = None  # of the backbone that the model was loaded for
        self._checked: tuple[object, ...] | None = None  # the backbone whose vocabulary is the model's own
        self._owner = _Owner()
        self._vocabulary = spec.vocab_size  # ids that both models have

    @property
    def decoder(self) -> Decoder:
        """Return the model, once it is bound."""
        assert self._decoder is not None, "bind() comes first"
        return self._decoder

    def bind(self, backbone: Decoder) -> None:
        """Load the model for `backbone`: on its device, in its dtype, with caches of its type.

        Raises:
            ValueError: the model has another vocabulary, or its checkpoint is damaged.
        """
        asked = (backbone.path, backbone.spec.vocab_size)
        if self._checked != asked:
            check_vocabulary(backbone, self.path, self.spec.vocab_size)
            self._checked, self._vocabulary = asked, min(self.spec.vocab_size, backbone.spec.vocab_size)
        quantised = backbone.layers[0].q.weight.packed is not None
        kind = (backbone.dtype, backbone.kv_dtype, backbone.device, quantised)
        if self._decoder is None or self._kind != kind:
            self._decoder, self._kind, self._owner = self._build(backbone), kind, _Owner()

    def start(self, cache: KVCache, noise: Noise | None = None) -> DraftModelProposer:
        """Return the proposer of one text, which goes on from what the model kept beside `cache`."""
        kept = cast("DraftCache | None", cache.companion(self._owner))
        if kept is None:
            kept = DraftCache(self.decoder.new_cache)
            cache.accompany(self._owner, kept)
        kept.begin()
        return DraftModelProposer(self.decoder, self._vocabulary, kept, noise)


class DraftModelProposer:
    """Draft for one text: the proposer of a `DraftModel`."""

    name, max_draft = DraftModel.name, DraftModel.max_draft

    def __init__(self, decoder: Decoder, vocabulary: int, cache: DraftCache, noise: Noise | None) -> None:
        self._decoder, self._vocabulary, self._cache, self._noise = decoder, vocabulary, cache, noise

    def behind(self, tokens: Sequence[int]) -> int:
        """Return how many of `tokens` the model has not read; the pending one always is among them. 0: the text is
        longer than what the model can read."""
        return self._cache.agree(tokens) if len(tokens) < self._decoder.context else 0

    def catch_up(self, tokens: Sequence[int]) -> int:
        """Read the next chunk of `tokens`, without the pending one; return how many rows that took."""
        left = self._cache.agree(tokens) - 1
        rows = min(left, MAX_ROWS)
        if rows > 0:
            at = len(tokens) - 1 - left
            self._cache.mark(left, rows, len(tokens))
            self._cache.read(self._decoder, tokens[at : at + rows])
        return rows

    def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
        """Return a draft of `k` tokens, at most `max_draft`, and no more than the model has positions for."""
        return self.propose_while(tokens, states, k, ())

    @torch.inference_mode()
    def propose_while(self, tokens: Sequence[int], states: States, k: int, floors: Sequence[float]) -> Draft:
        """Return a draft as `propose` does, with the model's probability of each token. It ends after the first token i
        where the product of the probabilities so far is below floors[i]; (): never."""
        decoder, cache = self._decoder, self._cache
        k = min(k, self.max_draft, decoder.context - len(tokens) + 1)
        if k <= 0:
            return Draft()
        while cache.agree(tokens) > MAX_ROWS:
            self.catch_up(tokens)
        keys = [None] * k if self._noise is None else self._noise.keys(len(tokens), k)
        rows, made, chances = list(tokens[cache.length :]), list[int](), list[float]()
        for step, key in enumerate(keys):
            read = cache.read(decoder, rows)
            token, chance = self._choice(decoder.logits(read.last[-1:])[0, : self._vocabulary], key)
            made.append(token)
            chances.append(chance)
            rows = [token]
            if floors and prod(chances) < floors[step]:
                break
        return Draft.by(self.name, made, chances)

    def _choice(self, logits: Tensor, key: int | None) -> tuple[int, float]:
        """Return the token for `logits` [vocabulary], with the noise of `key` where the text is sampled, and how likely
        it is right by them."""
        noise = self._noise
        if noise is None or key is None:
            top, token = kernels.best(logits)
            return token, 1 / float((logits - top).exp().sum())
        token = noise.winner(logits / noise.warping.temperature, key)
        return token, noise.chance(float(logits.softmax(dim=0)[token]), key, token)
