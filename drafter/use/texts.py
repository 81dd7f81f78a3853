"""From a log to a training set: which texts are held out, which are learned from, and general prompts among them.

What: `UseSplit` divides the texts, and gives those to learn from with general prompts among them, which the backbone
answers. Why general ones: a head that sees one person's texts alone, over and over, unlearns the others, and that
person's next kind of question is one of the others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from drafter.data.given import EncodedPrompt, GivenText
from drafter.use.log import UseText, write_private
from specdec.weights.metadata import LARGEST, Values, naming, read_object

LEAST_TEXTS, LEAST_TOKENS = 20, 2000  # of conversations, and of the tokens of their last answers
HELD_OUT = 0.1  # of the conversations, at least LEAST_HELD_OUT and at most MOST_HELD_OUT
LEAST_HELD_OUT, MOST_HELD_OUT = 4, 24
LONGEST = 2048  # tokens of a text that are learned from: attention of a training step grows with their square
OWN = 3  # texts of use before each general prompt


class UseSplit(NamedTuple):
    """Keep the texts of a log that a head is judged by, and those that it learns from."""

    held_out: list[GivenText]
    texts: list[GivenText]

    @classmethod
    def of(cls, texts: Sequence[UseText], longest: int) -> UseSplit:
        """Divide `texts`, each cut to `longest` tokens at most.

        A conversation keeps its id as it grows, and those with the smallest are held out: the next run, with more
        texts, holds out nearly the same ones.
        """
        by_id = sorted(texts, key=lambda text: text.id)
        count = min(MOST_HELD_OUT, max(LEAST_HELD_OUT, round(HELD_OUT * len(by_id))))
        cut = [shorten(torch.tensor(text.tokens, dtype=torch.int64), text.answer, longest) for text in by_id]
        return cls(cut[:count], cut[count:])

    @classmethod
    def read(cls, path: Path) -> UseSplit:
        """Read what `write` wrote. Raises ValueError: the file is missing or damaged."""
        values = Values(read_object(path))
        with naming(path):
            parts = [[_given(Values(one)) for one in values.sequence(name)] for name in cls._fields]
        return cls(*parts)

    def write(self, path: Path) -> None:
        """Write the texts to `path`, for their owner alone: a run that goes on has to find the same ones."""
        parts = {
            name: [{"tokens": text.tokens.tolist(), "answer": text.answer} for text in getattr(self, name)]
            for name in self._fields
        }
        write_private(path, json.dumps(parts))

    def prompts(self, most: int) -> Iterator[Tensor]:
        """Yield the prompts [n] of the texts that are held out, n at most `most`."""
        for text in self.held_out:
            yield shorten(text.tokens[: text.answer], text.answer, most).tokens

    def mixed(self, general: Iterator[EncodedPrompt]) -> Iterator[EncodedPrompt | GivenText]:
        """Yield the texts to learn from, a prompt of `general` before the first and after every `OWN` of them."""
        for number, text in enumerate(self.texts):
            if number % OWN == 0 and (prompt := next(general, None)) is not None:
                yield prompt
            yield text


def _given(values: Values) -> GivenText:
    tokens = values.wholes("tokens", 0, LARGEST - 1)
    return GivenText(torch.tensor(tokens, dtype=torch.int64), values.whole("answer", 0, len(tokens)))


def shorten(tokens: Tensor, answer: int, longest: int) -> GivenText:
    """Return a text of tokens [n], or, where n is more than `longest`, its first token and its end: models need the
    token that begins a text, and the newest answer is at the end."""
    if (surplus := len(tokens) - longest) <= 0:
        return GivenText(tokens, answer)
    return GivenText(torch.cat((tokens[:1], tokens[surplus + 1 :])), max(1, answer - surplus))


def check_enough(texts: Sequence[UseText], model: str) -> None:
    """Raise a ValueError when there are too few texts to learn from and to judge by."""
    tokens = sum(len(text.tokens) - text.answer for text in texts)
    if len(texts) < LEAST_TEXTS or tokens < LEAST_TOKENS:
        raise ValueError(
            f"--from-use: {len(texts)} conversations of {model} were kept, with {tokens:,} tokens of answers, and "
            f"{LEAST_TEXTS} with {LEAST_TOKENS:,} are the least to learn from; `chat --learn` and `serve --learn` keep "
            "more, and `learned` lists what there is"
        )
