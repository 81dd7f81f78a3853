"""Constraints: which tokens a text may go on with, position by position.

A constraint is applied inside the choice, before processors and noise: the choice at a position is then a function of
logits, constraint, settings and seed, and drafts do not change it. `verify` chooses row by row, so that only emitted
tokens move a matcher on, and nothing has to be taken back after a rejected draft. Tokens that the constraint leaves no
choice about are drafts that cost nothing to make (`ForcedTokens`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from specdec.drafting.acceptance import FORCED
from specdec.drafting.protocol import Draft
from specdec.engine.sampling import Sampler
from specdec.engine.verify import Choice
from specdec.model.states import States


class Matcher(Protocol):
    """Follow one text from its first emitted token on."""

    @property
    def ended(self) -> bool:
        """Return whether the text ends here, because nothing may follow."""

    def allowed(self) -> Tensor | None:
        """Return which tokens may come next, [vocab] bool; None where all may. Raises ValueError when the constraint
        cannot tell."""

    def advance(self, token: int) -> None:
        """Take the text's next token, an allowed one."""

    def rewind(self, tokens: int) -> None:
        """Forget all but the first `tokens` tokens that were taken."""

    def forced(self) -> Sequence[int]:
        """Return the tokens that have to come next, as a tokenizer would write them; empty where there is a choice.

        Forced tokens become drafts. Another way to cut the same characters into tokens is allowed too.
        """

    def valid(self, tokens: Sequence[int]) -> int:
        """Return how many of `tokens`, from the first on, could follow one after the other."""


class Constraint(Protocol):
    """Say what a request's text must look like. One constraint may serve several texts at once."""

    def start(self) -> Matcher:
        """Return the matcher of a new text."""


class ForcedTokens:
    """Propose the tokens of one round in which a constraint leaves no choice."""

    name = FORCED

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens, self.max_draft = tokens, len(tokens)

    def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
        """Return the first `k` forced tokens."""
        return Draft.by(self.name, self._tokens[:k])


def constrained(
    matcher: Matcher, sampler: Sampler, stop: Callable[[Tensor, Choice], bool]
) -> tuple[Callable[[Tensor, Tensor], Choice], Callable[[Tensor, Choice], bool]]:
    """Return `choose` and `stop` for `verify`: `sampler` and `stop` with `matcher`, which takes each choice."""

    def choose(logits: Tensor, tokens: Tensor) -> Choice:
        allowed = matcher.allowed()
        if allowed is not None:
            logits = torch.where(allowed.to(logits.device), logits, -torch.inf)
        choice = sampler.choose(logits, tokens)
        matcher.advance(choice.token)
        return choice

    def ended(tokens: Tensor, choice: Choice) -> bool:
        return stop(tokens, choice) or matcher.ended

    return choose, ended
