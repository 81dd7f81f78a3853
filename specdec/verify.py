"""Acceptance: which drafted tokens are what the backbone would have chosen. Pure; knows no model and no cache.

One rule covers greedy and sampled decoding. The choice at a position is a function of the processed logits there and
of noise keyed by (seed, position, token); a drafted token is accepted exactly when it equals the choice, and the first
choice that differs is emitted in its place. This is Gumbel-max sampling with accept-if-equal (drafter-invariant
speculative sampling, arXiv 2408.07978): the text depends on prompt, settings and seed, never on the draft.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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


def verify(draft: Sequence[int], logits: Tensor, text: Tensor, choose: Callable[[Tensor, Tensor], Choice]) -> Verdict:
    """Walk down the rows of a pass until a draft differs from the backbone's choice.

    `logits`: [len(draft) + 1, vocab] float32; row i was computed from all tokens before draft[i].
    `text`: [n + len(draft)] int64, the tokens before draft[0] and then the draft.
    `choose(row, tokens_before_it)` is called once for every emitted token, in order, and for no other: stateful
    logits processors see exactly the text that is emitted.
    """
    assert logits.shape[0] == len(draft) + 1
    before = text.shape[0] - len(draft)
    choices: list[Choice] = []
    for row in range(len(draft) + 1):
        choices.append(choose(logits[row], text[: before + row]))
        if row == len(draft) or choices[row].token != draft[row]:
            break
    return Verdict(tuple(choices))


def cut(verdict: Verdict, text: Tensor, stop: Callable[[Tensor, Choice], bool]) -> tuple[Verdict, bool]:
    """Shorten `verdict` to end with the first token after which `stop` says so; also whether it did.

    `text`: [n] int64, what was emitted so far, the verdict's tokens at its end. `stop(tokens, choice)` is asked once
    for every emitted token, in order; `tokens` ends with that token.
    """
    before = text.shape[0] - len(verdict.choices)
    for i, choice in enumerate(verdict.choices):
        if stop(text[: before + i + 1], choice):
            return Verdict(verdict.choices[: i + 1]), True
    return verdict, False
