"""Acceptance: the drafted tokens that equal the backbone's choices. This module knows no model and no cache.

One rule covers greedy and sampled decoding. The choice at a position is a function of the processed logits there and of
noise keyed by (seed, position, token). A drafted token is accepted exactly when it equals the choice, and the first
choice that differs is emitted in its place. This is Gumbel-max sampling with accept-if-equal (drafter-invariant
speculative sampling, arXiv 2408.07978): the text depends on prompt, settings and seed, never on the draft.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """Hold the token chosen from one row. `process` computes the row's scores when they are wanted."""

    token: int
    process: Callable[[], Tensor]

    @cached_property
    def scores(self) -> Tensor:
        """Return the row after the logits processors, [vocab] float32. Read it in `stop`: the first reading computes
        it, from logits and settings that may change later."""
        return self.process()


@dataclass(frozen=True)
class Verdict:
    """Hold the choices that a round emits: the accepted tokens of the draft, then one choice of the backbone's own.

    `ended`: whether the text ends with the last of these tokens, which may then be a drafted one too.
    """

    choices: tuple[Choice, ...]
    ended: bool = False

    @property
    def tokens(self) -> tuple[int, ...]:
        """Return the emitted token ids."""
        return tuple(choice.token for choice in self.choices)

    @property
    def accepted(self) -> int:
        """Return how many drafted tokens were accepted: all choices but the last, the backbone's own."""
        return len(self.choices) - 1


def verify(
    draft: Sequence[int],
    logits: Tensor,
    text: Tensor,
    choose: Callable[[Tensor, Tensor], Choice],
    stop: Callable[[Tensor, Choice], bool] = lambda tokens, choice: False,
) -> Verdict:
    """Compare a draft with the backbone's choices, row by row, until one differs or the text ends; return the verdict.

    `logits`: [len(draft) + 1, vocab] float32; row i was computed from all tokens before draft[i]. `text`: [n +
    len(draft) + 1] int64: the tokens before draft[0], the draft, and a slot. The choice that replaces a drafted token,
    or follows all of them, is written into `text`.

    `choose(row, tokens_before_it)` and then `stop(tokens, choice)`, `tokens` ending with that choice, are called once
    for every emitted token, in order, and for no other. So logits processors and stopping criteria that count or
    remember meet exactly the text that is emitted.
    """
    assert logits.shape[0] == len(draft) + 1
    before = text.shape[0] - len(draft) - 1
    choices: list[Choice] = []
    for row in range(len(draft) + 1):
        choice = choose(logits[row], text[: before + row])
        choices.append(choice)
        differs = row == len(draft) or choice.token != draft[row]
        if differs:
            text[before + row] = choice.token
        if stop(text[: before + row + 1], choice):
            return Verdict(tuple(choices), ended=True)
        if differs:
            break
    return Verdict(tuple(choices))
