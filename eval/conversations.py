"""`python -m eval.conversations`: the time that prefix reuse saves, whether texts stay the same, and the memory.

What: a conversation of a long document goes on, is asked again, is asked something else, and goes on from a file. Each
turn has the time to its first token beside that of the same prompt computed whole, and whether the texts are the same.
Then, with `--soak`, many conversations of random lengths in turn, and the resident memory as they go by. Why random
tokens: they cost as much as real ones, and repeat nothing that a drafter could find.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from eval.cli import options as cli
from eval.cli.metrics import TimedRun
from eval.cli.output import DIFFERS, INTERRUPTED, check_writable, put_record, run_guarded
from eval.cli.provenance import provenance
from eval.cli.session import Session, open_session
from eval.kernels.model_pass import random_tokens
from specdec.memory.system import resident_bytes
from specdec.util.terminal import Terminal

SAVES = 0.1  # the first token of a turn that goes on comes in at most this share of the time
FLAT = 1.05  # memory after a soak, against the middle of it


@dataclass(frozen=True)
class Turn:
    """Keep the figures of one request: `reused` of its `tokens` were not computed again. `ttft`: seconds to its first
    token; `whole`: the same without reuse."""

    name: str
    tokens: int
    reused: int
    ttft: float
    whole: float
    identical: bool

    @property
    def ratio(self) -> float:
        """Return the time to the first token with reuse, over the time without."""
        return self.ttft / self.whole

    def to_dict(self) -> dict[str, Any]:
        """Return the figures in JSON types, with the ratio."""
        return {**asdict(self), "ratio": self.ratio}


class Talk:
    """Send requests to `session` that begin with the same document."""

    def __init__(self, session: Session, document: int, answer: int, question: int) -> None:
        """Make the document. Lengths in tokens. Raises ValueError when the model's context does not hold them."""
        if document + 2 * (answer + question) > session.context:
            raise ValueError(f"the model's context is {session.context} tokens; ask for a shorter --document")
        self.session, self.answer, self.question = session, answer, question
        self.document = random_tokens(session.model.decoder, document)

    def turns(self) -> Iterator[Turn]:
        """Run every request once with reuse, and once without; yield its figures."""
        model = self.session.model
        model.conversations.forget()
        first = self._asked(self.document, 1)
        begun = self._run(first, reuse=True)
        longer = self._asked(torch.cat((first, first.new_tensor(begun.tokens))), 2)
        other = self._asked(self.document, 3)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "conversation"
            model.save_conversation(file)
            yield self._turn("first turn", first, begun)
            for name, ids in (("second turn", longer), ("the same again", longer), ("another question", other)):
                yield self._turn(name, ids, self._run(ids, reuse=True))
            model.conversations.forget()
            model.load_conversation(file)
        yield self._turn("second turn, from a file", longer, self._run(longer, reuse=True))

    def _asked(self, text: Tensor, seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        question = torch.randint(self.session.model.decoder.spec.vocab_size, (self.question,), generator=generator)
        return torch.cat((text, question.to(text.device)))

    def _run(self, ids: Tensor, reuse: bool) -> TimedRun:
        return self.session.run(ids[None], reuse=reuse, max_new_tokens=self.answer, eos_token_id=None)

    def _turn(self, name: str, ids: Tensor, run: TimedRun) -> Turn:
        whole = self._run(ids, reuse=False)
        same = run.tokens == whole.tokens
        return Turn(name, len(ids), run.stats.reused, run.stats.ttft, whole.stats.ttft, same)


def soak(session: Session, count: int, longest: int) -> Iterator[int]:
    """Yield the resident bytes after each of `count` conversations of two turns and random lengths, up to `longest`
    tokens."""
    generator = torch.Generator().manual_seed(0)
    vocab = session.model.decoder.spec.vocab_size
    for _ in range(count):
        length, new = (int(torch.randint(8, longest // 2, (1,), generator=generator)) for _ in range(2))
        ids = torch.randint(vocab, (1, length), generator=generator)
        options: dict[str, Any] = {"reuse": True, "max_new_tokens": 1 + new % 32, "eos_token_id": None}
        answer = session.run(ids, **options)
        session.run(torch.cat((ids, ids.new_tensor([[*answer.tokens, 1]])), dim=1), **options)
        yield resident_bytes()


def _show(turns: list[Turn], console: Console) -> None:
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    table.add_column("")
    for name in ("tokens", "reused", "first token s", "computed whole s", "ratio", "same text"):
        table.add_column(name, justify="right")
    for turn in turns:
        figures = (f"{turn.ttft:.3f}", f"{turn.whole:.3f}", f"{turn.ratio:.3f}", "yes" if turn.identical else "NO")
        table.add_row(turn.name, f"{turn.tokens:,}", f"{turn.reused:,}", *figures)
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    """Run `python -m eval.conversations` with the words `argv` (None: the process's own); return its exit code."""
    parser = cli.module_parser("conversations", __doc__)
    parser.add_argument("--document", type=cli.whole_number(1), default=4096, metavar="N", help="tokens (default 4096)")
    parser.add_argument("--answer", type=cli.whole_number(1), default=96, metavar="N", help="tokens (default 96)")
    parser.add_argument("--question", type=cli.whole_number(1), default=48, metavar="N", help="tokens (default 48)")
    parser.add_argument(
        "--soak", type=cli.whole_number(0), default=0, metavar="N", help="conversations (default: none)"
    )
    parser.add_argument(
        "--soak-tokens", type=cli.whole_number(32), default=1500, metavar="N", help="longest (default 1500)"
    )
    cli.add_json_option(parser, "the figures")
    cli.add_drafting_options(parser)
    cli.add_model_options(parser)
    a = parser.parse_args(argv)

    def command() -> int:
        check_writable(a.json)
        session = open_session(cli.settings_from(a))
        console, bar = Terminal(highlight=False), Terminal(stderr=True)
        turns: list[Turn] = []
        memory: list[int] = []
        interrupted = False
        try:
            with bar.status("talking") as status:
                for turn in Talk(session, a.document, a.answer, a.question).turns():
                    turns.append(turn)
                    status.update(f"talking: {turn.name}")
                for resident in soak(session, a.soak, a.soak_tokens):
                    memory.append(resident)
                    status.update(f"soak: {len(memory)} of {a.soak}, {resident / 1e9:.2f} GB")
        except KeyboardInterrupt:
            interrupted = True
        _show(turns, console)
        flat = None
        if len(memory) >= 4:
            quarter = len(memory) // 4
            middle, end = median(memory[2 * quarter : 3 * quarter]), median(memory[3 * quarter :])
            flat = end / middle
            console.print(
                f"{len(memory)} conversations: {middle / 1e9:.3f} GB in the third quarter, {end / 1e9:.3f} in the last"
            )
        record = {
            "command": "conversations",
            "interrupted": interrupted,
            **provenance(session),
            "turns": [turn.to_dict() for turn in turns],
            "soak": memory,
            "growth": flat,
        }
        put_record(a.json, record)
        good = all(turn.identical for turn in turns) and (flat is None or flat <= FLAT)
        good = good and all(turn.ratio <= SAVES for turn in turns if turn.name.startswith("second turn"))
        return INTERRUPTED if interrupted else 0 if good else DIFFERS

    return run_guarded(command, a.json)


if __name__ == "__main__":
    sys.exit(main())
