"""Acceptance and endings, on scripted choices."""

from __future__ import annotations

import pytest
import torch

from specdec.engine.verify import Choice, verify

VOCAB = 10
TOKENS = (7, 7, 7)


def logits_for(*best: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(best), VOCAB).float()


def text(*more: int) -> torch.Tensor:
    return torch.tensor([*TOKENS, *more, 0])  # and the slot after a draft


def greedy(row: torch.Tensor, tokens: torch.Tensor) -> Choice:
    return Choice(int(row.argmax()), lambda: row)


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


def test_a_text_ends_with_the_token_that_stops_it_and_nobody_is_asked_for_more() -> None:
    asked = []

    def choose(row: torch.Tensor, tokens: torch.Tensor) -> Choice:
        asked.append(len(tokens))
        return greedy(row, tokens)

    verdict = verify((1, 2, 3), logits_for(1, 2, 3, 4), text(1, 2, 3), choose, lambda tokens, choice: choice.token == 2)
    assert verdict.tokens == (1, 2)
    assert verdict.ended
    assert asked == [3, 4]


def test_stop_sees_every_emitted_token_once_and_in_order() -> None:
    asked, given = [], text(1, 2)

    def stop(tokens: torch.Tensor, choice: Choice) -> bool:
        asked.append(tokens.tolist())
        return False

    verdict = verify((1, 2), logits_for(1, 5, 3), given, greedy, stop)
    assert verdict.tokens == (1, 5)
    assert not verdict.ended
    assert asked == [[7, 7, 7, 1], [7, 7, 7, 1, 5]]
    assert given.tolist() == [7, 7, 7, 1, 5, 0], "the choice stands where the wrong draft stood"
