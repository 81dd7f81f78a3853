"""The comparison of drafted texts with plain ones: `Checker`, and what it counts.

What: every prompt is decoded plainly and then with each drafter. A prompt with media goes on from the cache that
another one left: with the same ids and another picture, nothing of the picture may be used. `ScriptedDrafter` knows the
answer, and makes drafts that no real drafter makes on request. Left out: what is printed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import Tensor

from eval.cli.metrics import TimedRun, first_difference
from eval.cli.session import Session
from eval.prompts.media import MediaPrompt, batch_of
from specdec.cache import KVCache
from specdec.drafting.protocol import Draft
from specdec.engine.sampling import Noise
from specdec.engine.stats import GenerationStats
from specdec.model.decoder import Decoder
from specdec.model.states import States

BATCH = "one batch"  # among the drafters: all prompts at once, with suffix matches


@dataclass(frozen=True)
class Difference:
    """Describe where a text first left the plain one, and how close the plain run's choice was there.

    `position`: among the emitted tokens, from 0. `top`: the two highest of the plain run's logits there, as (token,
    logit); a gap of a rounding error points at arithmetic, a wide one at the loop.
    """

    prompt: str
    position: int
    plain: int | None  # None: that text had ended
    other: int | None
    top: tuple[tuple[int, float], tuple[int, float]]

    @property
    def gap(self) -> float:
        """Return how far the plain run's highest logit lies above the second."""
        return self.top[0][1] - self.top[1][1]

    def __str__(self) -> str:
        (first, high), (second, low) = self.top
        return (
            f"prompt {self.prompt}, new token {self.position + 1}: plain {self.plain}, drafted {self.other}; "
            f"plain's top logits: token {first} {high:.6f}, token {second} {low:.6f}, gap {self.gap:.2e}"
        )


@dataclass
class Tally:
    """Count the comparisons of one configuration."""

    sampling: str
    drafter: str
    identical: int = 0
    total: int = 0
    drafted: int = 0
    accepted: int = 0
    reused: int = 0
    first: Difference | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the counts in JSON types; the first difference with its gap."""
        first = None if self.first is None else asdict(self.first) | {"gap": self.first.gap}
        return asdict(self) | {"first": first}


class ScriptedDrafter:
    """Draft from the plain run's text: all right, all wrong, right up to the middle, in turn.

    `answer`: prompt and emitted tokens. Lengths go round 1..`longest`; 3 kinds and 8 lengths have no common divisor, so
    that every kind meets every length. Where the text has already left `answer`, drafts are simply wrong.
    """

    name = "scripted"
    aux_layers: tuple[int, ...] = ()

    def __init__(self, answer: Sequence[int], vocabulary: int, longest: int = 8) -> None:
        self.answer, self.vocabulary, self.max_draft = list(answer), vocabulary, longest
        self.turn = 0

    def bind(self, backbone: Decoder) -> None:
        """Do nothing: the script needs no model."""

    def start(self, cache: KVCache, noise: Noise | None = None) -> ScriptedDrafter:
        """Begin the script anew, and return the drafter as the text's proposer."""
        self.turn = 0  # one text at a time: the script is of one answer
        return self

    def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
        """Return the next draft of the script, of at most `k` tokens, to follow `tokens`."""
        length = min(1 + self.turn % self.max_draft, k)
        follow = self.answer[len(tokens) : len(tokens) + length]
        right = (len(follow), 0, len(follow) // 2)[self.turn % 3]
        self.turn += 1
        wrong = ((token + 1) % self.vocabulary for token in follow[right:])
        return Draft.by(self.name, (*follow[:right], *wrong))


@dataclass
class Checker:
    """Compare `drafters` ("scripted", or a name that `specdec.load` accepts) with plain decoding, prompt by prompt."""

    session: Session
    temperatures: Sequence[float]
    drafters: Sequence[str]
    tokens: int
    top_p: float = 0.95
    seed: int = 0
    draft_length: int = 8
    reuse: bool = False
    media: bool = False
    tallies: dict[tuple[float, str], Tally] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)  # of the plain texts, prompt included

    def check(self, prompts: Sequence[MediaPrompt], advance: Callable[[], None] = lambda: None) -> Iterator[Tally]:
        """Decode and compare; yield a tally after each comparison. `advance` is called after each run.

        Raises ValueError when a text cannot be as long as asked for, or the model refuses a prompt.
        """
        for prompt in prompts:
            if prompt.ids.shape[1] + self.tokens > self.session.context:
                raise ValueError(
                    f"prompt {prompt.name} has {prompt.ids.shape[1]} tokens; {self.tokens} more exceed the model's "
                    f"context of {self.session.context}: ask for fewer --tokens"
                )
        greedy = list[TimedRun]()
        for prompt in prompts:
            for temperature in self.temperatures:
                plain = self._run(prompt, temperature)
                self.lengths.append(prompt.ids.shape[1] + len(plain.tokens))
                greedy += [plain] if temperature == 0 else []
                advance()
                for drafter in self.drafters:
                    run = self._drafted(prompt, temperature, drafter, plain)
                    yield self._compare(prompt, temperature, drafter, plain.tokens, run.tokens, run.stats)
                    advance()
        if self.media and greedy:  # rows of a batch are sampled with seeds of their own
            for prompt, plain, tokens in zip(prompts, greedy, self._batch(prompts), strict=True):
                yield self._compare(prompt, 0, BATCH, plain.tokens, tokens)
                advance()

    def _compare(
        self,
        prompt: MediaPrompt,
        temperature: float,
        drafter: str,
        plain: Sequence[int],
        tokens: Sequence[int],
        stats: GenerationStats | None = None,
    ) -> Tally:
        tally = self.tallies.setdefault((temperature, drafter), Tally(self._sampling(temperature), drafter))
        at = first_difference(plain, tokens)
        tally.total += 1
        tally.identical += at is None
        if stats is not None:
            tally.drafted += stats.drafted
            tally.accepted += stats.accepted
            tally.reused += stats.reused
        if at is not None and tally.first is None:
            top = self._top_two(prompt, temperature, at)
            tally.first = Difference(prompt.name, at, _at(plain, at), _at(tokens, at), top)
        return tally

    def _drafted(self, prompt: MediaPrompt, temperature: float, drafter: str, plain: TimedRun) -> TimedRun:
        """Decode with drafts; with `reuse` in two halves, between which the cache is saved to disk and loaded again."""
        model, half = self.session.model, self.tokens // 2
        answer = [*prompt.ids[0].tolist(), *plain.tokens]
        vocabulary = model.decoder.spec.vocab_size
        proposer = ScriptedDrafter(answer, vocabulary, self.draft_length) if drafter == "scripted" else drafter
        options: dict[str, Any] = {"speculation": True, "drafter": proposer, "draft_length": self.draft_length}
        if not self.reuse or half == 0:
            return self._run(prompt, temperature, reuse=self.media, **options)
        first = self._run(prompt, temperature, reuse=True, **options, max_new_tokens=half)
        with TemporaryDirectory() as folder:
            model.save_conversation(Path(folder) / "cache")
            model.conversations.forget()
            model.load_conversation(Path(folder) / "cache")
        longer = replace(prompt, ids=torch.cat((prompt.ids, prompt.ids.new_tensor([first.tokens])), dim=1))
        rest = self.tokens - len(first.tokens)
        second = self._run(longer, temperature, reuse=True, **options, max_new_tokens=rest)
        first.stats.merge(second.stats)
        return TimedRun(first.tokens + second.tokens, first.seconds + second.seconds, first.stats)

    def _run(self, prompt: MediaPrompt, temperature: float, speculation: bool = False, **options: Any) -> TimedRun:
        options = self._sampling_options(temperature) | options | prompt.inputs
        return self.session.run(prompt.ids, speculation=speculation, **options)

    def _batch(self, prompts: Sequence[MediaPrompt]) -> list[list[int]]:
        """Decode all prompts as one batch, greedily; return the new tokens of each."""
        batch, model = batch_of(prompts), self.session.model
        options = self._sampling_options(0) | {"drafter": "suffix", "draft_length": self.draft_length}
        output = model.generate(batch.ids.to(model.device), **batch.inputs, **options, reuse=False)
        assert isinstance(output, Tensor)
        rows: list[list[int]] = output[:, batch.ids.shape[1] :].tolist()
        return rows

    def _sampling_options(self, temperature: float) -> dict[str, Any]:
        # Without EOS nothing stops a text early, and no logit is touched to get there.
        options: dict[str, Any] = {"max_new_tokens": self.tokens, "eos_token_id": None}
        if temperature == 0:
            return options | {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        # top_k 0: transformers' default of 50 would hide most of the vocabulary from the comparison.
        return options | {
            "do_sample": True,
            "temperature": temperature,
            "top_p": self.top_p,
            "top_k": 0,
            "seed": self.seed,
        }

    def _sampling(self, temperature: float) -> str:
        return "greedy" if temperature == 0 else f"temperature {temperature:g}, top-p {self.top_p:g}"

    def _top_two(self, prompt: MediaPrompt, temperature: float, at: int) -> tuple[tuple[int, float], tuple[int, float]]:
        """Repeat the plain run up to emitted token `at`; return the two highest logits that this token was chosen
        from."""
        options = self._sampling_options(temperature) | {"max_new_tokens": at + 1}
        output = self.session.model.generate(
            prompt.ids.to(self.session.model.device),
            attention_mask=torch.ones_like(prompt.ids),
            **prompt.inputs,
            speculation=False,
            reuse=False,
            output_logits=True,
            return_dict_in_generate=True,
            **options,
        )
        assert not isinstance(output, Tensor)
        values, tokens = output.logits[-1][0].float().topk(2)  # [1, vocab] -> [2]
        (a, b), (x, y) = tokens.tolist(), values.tolist()
        return (a, x), (b, y)


def _at(tokens: Sequence[int], index: int) -> int | None:
    return tokens[index] if index < len(tokens) else None
