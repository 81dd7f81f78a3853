"""`python -m eval.exactness`: does drafting emit, token for token, the text of plain decoding?

What: every prompt is decoded plainly and then with each drafter, greedily and sampled, and the token ids are compared.
Texts go on past EOS to the full length, so that many of them outgrow sliding windows. Why a scripted drafter beside the
real one: its drafts are all right, all wrong and right up to the middle of the plain text in turn, at every length,
which no real drafter does on request. Left out: speed, which `run.py bench` measures.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor

from eval.cli import options as cli
from eval.cli.metrics import TimedRun, first_difference
from eval.cli.output import DIFFERS, INTERRUPTED, check_writable, put_record, run_guarded
from eval.cli.provenance import provenance
from eval.cli.session import Session, open_session
from eval.live.parts import count_bar
from eval.prompts.sets import Prompt, exactness_prompts
from eval.scripted import ScriptedDrafter
from specdec.util.terminal import Terminal

ABOUT = """\
Decode prompts plainly and with drafting, greedily and sampled, and compare the token ids. Texts go on past EOS to the
full length. The scripted drafter knows the plain text: its drafts are all right, all wrong, and right up to the middle,
in turn. Exit code 1 when anything differs."""
LONG = 1024  # tokens, prompt and answer together, above which a text counts as long


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
    tallies: dict[tuple[float, str], Tally] = field(default_factory=dict)
    lengths: list[int] = field(default_factory=list)  # of the plain texts, prompt included

    def check(self, prompts: Sequence[Prompt], advance: Callable[[], None] = lambda: None) -> Iterator[Tally]:
        """Decode and compare; yield a tally after each comparison. `advance` is called after each run.

        Raises ValueError when a text cannot be as long as asked for, or the model refuses a prompt.
        """
        for prompt in prompts:
            ids = self.session.encode(prompt.opening())
            if ids.shape[1] + self.tokens > self.session.context:
                raise ValueError(
                    f"prompt {prompt.name} has {ids.shape[1]} tokens; {self.tokens} more exceed the model's context of "
                    f"{self.session.context}: ask for fewer --tokens"
                )
            for temperature in self.temperatures:
                plain = self._run(ids, temperature)
                self.lengths.append(ids.shape[1] + len(plain.tokens))
                advance()
                for drafter in self.drafters:
                    yield self._compare(prompt, ids, temperature, drafter, plain)
                    advance()

    def _compare(self, prompt: Prompt, ids: Tensor, temperature: float, drafter: str, plain: TimedRun) -> Tally:
        answer = [*ids[0].tolist(), *plain.tokens]
        vocabulary = self.session.model.decoder.spec.vocab_size
        proposer = ScriptedDrafter(answer, vocabulary, self.draft_length) if drafter == "scripted" else drafter
        run = self._drafted(ids, temperature, drafter=proposer, draft_length=self.draft_length)
        tally = self.tallies.setdefault((temperature, drafter), Tally(self._sampling(temperature), drafter))
        at = first_difference(plain.tokens, run.tokens)
        tally.total += 1
        tally.identical += at is None
        tally.drafted += run.stats.drafted
        tally.accepted += run.stats.accepted
        tally.reused += run.stats.reused
        if at is not None and tally.first is None:
            tally.first = Difference(
                prompt.name, at, _at(plain.tokens, at), _at(run.tokens, at), self._top_two(ids, temperature, at)
            )
        return tally

    def _drafted(self, ids: Tensor, temperature: float, **options: Any) -> TimedRun:
        """Decode with drafts; with `reuse` in two halves, between which the cache is saved to disk and loaded again."""
        if not self.reuse or self.tokens < 2:
            return self._run(ids, temperature, speculation=True, **options)
        model, half = self.session.model, self.tokens // 2
        first = self._run(ids, temperature, speculation=True, reuse=True, **options, max_new_tokens=half)
        with TemporaryDirectory() as folder:
            model.save_conversation(Path(folder) / "cache")
            model.conversations.forget()
            model.load_conversation(Path(folder) / "cache")
        longer = torch.cat((ids, ids.new_tensor([first.tokens])), dim=1)
        rest = self.tokens - len(first.tokens)
        second = self._run(longer, temperature, speculation=True, reuse=True, **options, max_new_tokens=rest)
        first.stats.merge(second.stats)
        return TimedRun(first.tokens + second.tokens, first.seconds + second.seconds, first.stats)

    def _run(self, ids: Tensor, temperature: float, speculation: bool = False, **options: Any) -> TimedRun:
        return self.session.run(ids, speculation=speculation, **(self._sampling_options(temperature) | options))

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

    def _top_two(self, ids: Tensor, temperature: float, at: int) -> tuple[tuple[int, float], tuple[int, float]]:
        """Repeat the plain run up to emitted token `at`; return the two highest logits that this token was chosen
        from."""
        options = self._sampling_options(temperature) | {"max_new_tokens": at + 1}
        output = self.session.model.generate(
            ids.to(self.session.model.device),
            attention_mask=ids.new_ones(ids.shape),
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


def exactness(checker: Checker, prompts: Sequence[Prompt], json_file: Path | None) -> int:
    """Check, show and write; return the exit code: 0, 1 when anything differs, 130 after Ctrl-C."""
    runs = len(prompts) * len(checker.temperatures) * (1 + len(checker.drafters))
    interrupted = False
    with count_bar("texts", runs) as advance:
        try:
            for tally in checker.check(prompts, advance):
                if tally.identical < tally.total:
                    advance(0, "texts [red]DIFFERENT[/red]")
        except KeyboardInterrupt:
            interrupted = True
    tallies = list(checker.tallies.values())
    identical, total = sum(t.identical for t in tallies), sum(t.total for t in tallies)
    record = {
        "command": "exactness",
        "interrupted": interrupted,
        **provenance(checker.session),
        "prompts": len(prompts),
        "tokens": checker.tokens,
        "draft_length": checker.draft_length,
        "seed": checker.seed,
        "reuse": checker.reuse,
        "identical": identical,
        "total": total,
        "texts": len(checker.lengths),
        "texts_over_1024": sum(length > LONG for length in checker.lengths),
        "shortest_text": min(checker.lengths, default=0),
        "longest_text": max(checker.lengths, default=0),
        "configurations": [tally.to_dict() for tally in tallies],
    }
    _show(tallies, record)
    put_record(json_file, record)
    return INTERRUPTED if interrupted else 0 if identical == total else DIFFERS


def _show(tallies: Sequence[Tally], record: dict[str, Any]) -> None:
    console = Terminal(highlight=False)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("sampling", "drafter"):
        table.add_column(name)
    for name in ("identical", "drafted", "accepted", "reused"):
        table.add_column(name, justify="right")
    for tally in tallies:
        same = Text(f"{tally.identical}/{tally.total}", style="green" if tally.identical == tally.total else "bold red")
        counts = (f"{count:,}" for count in (tally.drafted, tally.accepted, tally.reused))
        table.add_row(tally.sampling, tally.drafter, same, *counts)
    console.print(table)
    console.print(
        f"{record['identical']}/{record['total']} identical, token for token. {record['texts']} plain texts of "
        f"up to {record['tokens']} new tokens; {record['texts_over_1024']} of them longer than {LONG:,} tokens in "
        f"total (shortest {record['shortest_text']:,}, longest {record['longest_text']:,})."
    )
    for tally in tallies:
        if tally.first is not None:
            text = f"first difference, {tally.sampling}, {tally.drafter}: {tally.first}"
            console.print(text, style="red", markup=False)
    if record["interrupted"]:
        console.print("interrupted: these are the texts that were compared", style="yellow")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m eval.exactness` with the words `argv` (None: the process's own); return its exit code."""
    parser = cli.module_parser("exactness", ABOUT)
    parser.add_argument(
        "--prompts", type=cli.whole_number(1), default=40, metavar="N", help="the first N of 40 (default: all)"
    )
    parser.add_argument(
        "--tokens", type=cli.whole_number(1), default=256, metavar="M", help="new tokens each (default 256)"
    )
    parser.add_argument(
        "--drafter",
        nargs="+",
        default=["auto", "suffix", "scripted"],
        metavar="NAME",
        help="auto, suffix, scripted, or a drafter checkpoint (default: auto suffix scripted)",
    )
    parser.add_argument(
        "--temperature", nargs="+", type=cli.temperature, default=[0.0, 0.8], metavar="X", help="default: 0 0.8"
    )
    parser.add_argument("--top-p", type=cli.fraction, default=0.95, metavar="P", help="when sampling (default 0.95)")
    parser.add_argument("--seed", type=cli.whole_number(0), default=0, metavar="N", help="when sampling (default 0)")
    parser.add_argument("--draft-length", type=cli.whole_number(1), default=8, metavar="N", help="fixed (default 8)")
    parser.add_argument(
        "--reuse",
        action="store_true",
        help="decode drafted texts in two halves, between which their cache is saved, forgotten and loaded",
    )
    cli.add_json_option(parser, "the figures and the first differences")
    cli.add_model_options(parser)
    arguments = parser.parse_args(argv)

    def command() -> int:
        check_writable(arguments.json)
        prompts = exactness_prompts(arguments.prompts)
        settings = cli.settings_from(arguments)
        session = open_session(replace(settings, drafter="none", max_new_tokens=arguments.tokens, temperature=0.0))
        checker = Checker(
            session,
            arguments.temperature,
            arguments.drafter,
            arguments.tokens,
            arguments.top_p,
            arguments.seed,
            arguments.draft_length,
            arguments.reuse,
        )
        return exactness(checker, prompts, arguments.json)

    return run_guarded(command, arguments.json)


if __name__ == "__main__":
    sys.exit(main())
