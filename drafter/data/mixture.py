"""One training set of prompts that the backbone answers and of texts that it reads as they are.

What: `Mixture` deals numbered items out to those who answer and to those who read; `answer_and_read` runs both. A text
is read when an answer has come: reading takes a fraction of the time of answering, and must not run ahead of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from itertools import islice

from torch import Tensor

from drafter.data.features import Features
from drafter.data.given import GivenText, GivenTexts
from drafter.data.patience import Patience

Item = Tensor | GivenText  # the ids [n] of a prompt, or a text
Read = Callable[[Iterator[tuple[int, GivenText]]], Iterator[tuple[int, Features]]]


def as_given(texts: Callable[[], Iterator[GivenText]]) -> GivenTexts:
    """Return `texts()`, always the same from the first on, as a set without prompts takes them."""

    def numbered(first: int, patience: Patience) -> Iterator[tuple[int, GivenText]]:
        for found in enumerate(islice(texts(), first, None), first):
            if patience.over():
                return
            yield found

    return numbered


class Mixture:
    """Deal out `items`, which are numbered from 0 on, beginning with number `first`.

    `asked_before`: how many of the items before `first` are prompts.
    """

    def __init__(self, items: Iterator[Item], first: int, patience: Patience) -> None:
        self.asked_before = sum(not isinstance(item, GivenText) for item in islice(items, first))
        self._items, self._patience = enumerate(items, first), patience
        self._texts: deque[tuple[int, GivenText]] = deque()
        self._asked: list[int] = []

    def prompts(self) -> Iterator[Tensor]:
        """Yield the prompts, and keep the texts between them for `texts`; end when the patience is over."""
        for number, item in self._items:
            if isinstance(item, GivenText):
                self._texts.append((number, item))
            else:
                self._asked.append(number)
                yield item
            if self._patience.over():
                return

    def number(self, prompt: int) -> int:
        """Return the number, among all items, of prompt number `prompt` among the prompts."""
        return self._asked[prompt - self.asked_before]

    def texts(self) -> Iterator[tuple[int, GivenText]]:
        """Yield the texts that were passed over so far, with their numbers; when the patience is over, only those that
        precede a prompt, without which the answer to it would be lost."""
        newest = max(self._asked, default=-1)
        while self._texts and (self._texts[0][0] < newest or not self._patience.over()):
            yield self._texts.popleft()


def answer_and_read(
    mixture: Mixture, answers: Iterator[tuple[int, Features]], read: Read
) -> Iterator[tuple[int, Features]]:
    """Yield (number of the item, its text) of the `answers`, (number of the prompt, its text), and of the texts between
    the prompts, which `read` reads."""
    for prompt, text in answers:
        yield mixture.number(prompt), text
        yield from read(mixture.texts())
    yield from read(mixture.texts())
