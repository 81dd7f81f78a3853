"""Drafters that know the answer, and use it to be right, wrong, or right up to a point."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from specdec.cache import KVCache
from specdec.drafting.protocol import Draft
from specdec.engine.sampling import Noise
from specdec.model.decoder import Decoder
from specdec.model.states import States

Script = Callable[[int], int]
"""Round number -> how many of its drafts are right."""


class ScriptedDrafter:
    """Drafts the tokens of `answer` (prompt included), wrong from the `right(round)`-th on."""

    name = "scripted"
    max_draft = 63
    aux_layers: tuple[int, ...] = ()

    def __init__(self, answer: Sequence[int], right: Script, vocabulary: int) -> None:
        self.answer, self.right, self.vocabulary = list(answer), right, vocabulary
        self.rounds = 0
        self.cache: KVCache | None = None

    def bind(self, backbone: Decoder) -> None:
        pass

    def start(self, cache: KVCache, noise: Noise | None = None) -> ScriptedDrafter:
        self.cache = cache
        return self

    def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
        assert self.cache is not None
        assert self.cache.length == len(tokens) - 1, "between rounds the pending token alone is not in the cache"
        assert list(tokens) == self.answer[: len(tokens)], "the text so far is not the plain run's"
        right, self.rounds = self.right(self.rounds), self.rounds + 1
        follow = self.answer[len(tokens) : len(tokens) + k]
        return Draft.by(self.name, [t if i < right else (t + 1) % self.vocabulary for i, t in enumerate(follow)])


SCRIPTS: dict[str, Script] = {
    "all right": lambda _: 99,
    "all wrong": lambda _: 0,
    "half right": lambda _: 2,
    "in turn": lambda turn: turn % 7,
}
