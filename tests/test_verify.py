"""Acceptance and cutting, on scripted choices."""

from __future__ import annotations

import pytest
import torch

from specdec.verify import Choice, Verdict, cut, verify

VOCAB = 10
TOKENS = (7, 7, 7)


def logits_for(*best: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(best), VOCAB).float()


def text(*more: int) -> torch.Tensor:
    return torch.tensor([*TOKENS, *more])


def greedy(row: torch.Tensor, tokens: torch.Tensor) -> Choice:
    return Choice(int(row.argmax()), row)


@pytest.mark.parametrize(
    ("draft", "best", "emitted"),
    [
        ((), (4,), (4,)),  # plain decoding
        ((1, 2, 3), (1, 2, 3, 4), (1, 2, 3, 4)),  # all accepted, and one more
        ((1, 2, 3), (5, 2, 3, 4), (5,)),  # none
        ((1, 2, 3), (1, 5, 3, 4), (1, 5)),  # some; what follows the first difference does not count
        ((1, 2, 3), (1, 2, 5, 4), (1, 2, 5)),
    ],
)
def test_accepts_the_prefix_that_equals_the_choices(
    draft: tuple[int, ...], best: tuple[int, ...], emitted: tuple[int, ...]
) -> None:
    verdict = verify(draft, logits_for(*best), text(*draft), greedy)
    assert verdict.tokens == emitted
    assert verdict.accepted == len(emitted) - 1


def test_each_row_sees_exactly_the_tokens_before_it_once() -> None:
    seen = []

    def choose(row: torch.Tensor, tokens: torch.Tensor) -> Choice:
        seen.append(tokens.tolist())
        return greedy(row, tokens)

    verify((1, 2, 3), logits_for(1, 2, 5, 4), text(1, 2, 3), choose)
    assert seen == [[7, 7, 7], [7, 7, 7, 1], [7, 7, 7, 1, 2]]


def verdict_of(*tokens: int) -> Verdict:
    return Verdict(tuple(Choice(token, torch.zeros(VOCAB)) for token in tokens))


def test_cut_ends_with_the_token_that_stops() -> None:
    shorter, done = cut(verdict_of(1, 2, 3, 4), text(1, 2, 3, 4), lambda tokens, choice: choice.token == 2)
    assert shorter.tokens == (1, 2)
    assert done


def test_cut_keeps_everything_when_nothing_stops() -> None:
    asked = []
    same, done = cut(verdict_of(1, 2), text(1, 2), lambda tokens, choice: bool(asked.append(tokens.tolist())))
    assert same.tokens == (1, 2)
    assert not done
    assert asked == [[7, 7, 7, 1], [7, 7, 7, 1, 2]]
