"""Acceptance: which drafted tokens are what the backbone would have chosen. Pure; knows no model and no cache.

One rule covers greedy and sampled decoding. The choice at a position is a function of the processed logits there and
of noise keyed by (seed, position, token); a drafted token is accepted exactly when it equals the choice, and the first
choice that differs is emitted in its place. This is Gumbel-max sampling with accept-if-equal (drafter-invariant
speculative sampling, arXiv 2408.07978): the text depends on prompt, settings and seed, never on the draft.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Choice:
    """The token chosen from one row, and the row after the logits processors, [vocab] in float32."""

    token: int
    scores: Tensor


@dataclass(frozen=True)
class Verdict:
    """What a round emits: the accepted drafts, then one choice of the backbone's own."""

    choices: tuple[Choice, ...]

    @property
    def tokens(self) -> tuple[int, ...]:
        return tuple(choice.token for choice in self.choices)

    @property
    def accepted(self) -> int:
        return len(self.choices) - 1


def verify(draft: Sequence[int], logits: Tensor, tokens: Tensor, choose: Callable[[Tensor, Tensor], Choice]) -> Verdict:
    """Walk down the rows of a pass until a draft differs from the backbone's choice.

    `logits`: [len(draft) + 1, vocab] float32; row i was computed from all tokens before draft[i].
    `tokens`: [n] int64, the tokens before draft[0].
    `choose(row, tokens_before_it)` is called once for every emitted token, in order, and for no other: stateful
    logits processors see exactly the text that is emitted.
    """
    assert logits.shape[0] == len(draft) + 1
    extended = torch.cat((tokens, tokens.new_tensor(draft)))  # [n + k]: every draft before the row in hand was accepted
    choices: list[Choice] = []
    for row in range(len(draft) + 1):
        choices.append(choose(logits[row], extended[: tokens.shape[0] + row]))
        if row == len(draft) or choices[row].token != draft[row]:
            break
    return Verdict(tuple(choices))


def cut(verdict: Verdict, tokens: Tensor, stop: Callable[[Tensor, Choice], bool]) -> tuple[Verdict, bool]:
    """Shorten `verdict` to end with the first token after which `stop` says so; also whether it did.

    `stop(tokens, choice)` is asked once for every emitted token, in order; `tokens` [n] ends with that token.
    """
    extended = torch.cat((tokens, tokens.new_tensor(verdict.tokens)))  # [n + emitted]
    for i, choice in enumerate(verdict.choices):
        if stop(extended[: tokens.shape[0] + i + 1], choice):
            return Verdict(verdict.choices[: i + 1]), True
    return verdict, False
