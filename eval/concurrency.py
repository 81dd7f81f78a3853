"""`python -m eval.concurrency`: what texts that are decoded at once cost each other, and whether they change.

What: prompts in groups of 1, 2, 4, each group once with drafts and once without, in turn: tokens/s and the ratio. Texts
beside others that join, and leave before they have ended, at random, against the same texts alone. With `--join`: a
long prompt is read while another text is decoded; how long this text waits for its next token, and how much later the
long prompt has its first one.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor

from eval.cli import options as cli
from eval.cli.output import DIFFERS, INTERRUPTED, check_writable, put_record, run_guarded
from eval.cli.provenance import provenance
from eval.cli.session import Session, open_session
from eval.kernels.model_pass import random_tokens
from eval.prompts.sets import suite_prompts
from specdec.drafting.calibrate import calibrate
from specdec.drafting.protocol import FixedLength, NoDraft, bind_drafter
from specdec.engine.engine import Engine
from specdec.engine.sampling import Sampler
from specdec.engine.schedule import PROMPT_ROWS
from specdec.engine.sequence import Request
from specdec.engine.sequence import Sequence as Text
from specdec.engine.verify import Choice
from specdec.util.terminal import Terminal


@dataclass(frozen=True)
class Together:
    """Keep the figures of prompts decoded `at_once` texts at a time: tokens a second without drafts and with them."""

    at_once: int
    plain: float
    drafted: float
    mean_acceptance_length: float
    identical: bool

    @property
    def ratio(self) -> float:
        """Return drafted over plain tokens a second."""
        return self.drafted / self.plain

    def to_dict(self) -> dict[str, Any]:
        """Return the figures in JSON types, with the ratio."""
        return {**asdict(self), "ratio": self.ratio}


@dataclass(frozen=True)
class Join:
    """Keep the seconds of one join of a long prompt: the longest and the median wait of the other text for a token;
    `chunk`, the median pass over `PROMPT_ROWS` rows of the prompt alone; and the time to the prompt's first token,
    alone and beside the other text."""

    longest_wait: float
    median_wait: float
    chunk: float
    ttft_alone: float
    ttft_beside: float

    def to_dict(self) -> dict[str, Any]:
        """Return the figures in JSON types, with the wait in chunks."""
        return {**asdict(self), "chunks": self.longest_wait / self.chunk}


@dataclass(frozen=True)
class Joins:
    """Keep the `joins` of a prompt of `tokens` tokens. A figure of all joins is the median of theirs."""

    tokens: int
    joins: Sequence[Join]

    def ratio(self, over: str, under: str) -> tuple[float, float, float]:
        """Return the median, the least and the largest of `over` / `under`, which are fields of a join."""
        found = [getattr(one, over) / getattr(one, under) for one in self.joins]
        return median(found), min(found), max(found)

    def lines(self) -> Iterator[str]:
        """Yield what the joins say, a line for each figure."""
        yield f"a prompt of {self.tokens:,} tokens joins a text that is decoded, {len(self.joins)} times;"
        yield "medians, and in brackets the least and the largest ratio:"
        for over, under, what in (
            ("longest_wait", "chunk", "the text's longest wait for a token / a chunk"),
            ("median_wait", "chunk", "the text's median wait for a token / a chunk"),
            ("ttft_beside", "ttft_alone", "the prompt's first token after, beside the text / alone"),
        ):
            middle, least, most = self.ratio(over, under)
            seconds = " / ".join(f"{median(getattr(one, name) for one in self.joins):.3f} s" for name in (over, under))
            yield f"  {what}: {seconds}, ratio {middle:.2f} ({least:.2f} to {most:.2f})"
        yield f"  a chunk: {PROMPT_ROWS} rows of the prompt in a pass of their own, the median of these passes"

    def to_dict(self) -> dict[str, Any]:
        """Return the figures of each join and the medians, in JSON types."""
        return {
            "tokens": self.tokens,
            "joins": [one.to_dict() for one in self.joins],
            "chunks": self.ratio("longest_wait", "chunk")[0],
            "median_chunks": self.ratio("median_wait", "chunk")[0],
            "ttft": self.ratio("ttft_beside", "ttft_alone")[0],
        }


def _never(tokens: Tensor, choice: Choice) -> bool:
    return False


class Crowd:
    """Decode texts of `session`'s model, `tokens` new tokens each, at its temperature."""

    def __init__(self, session: Session, tokens: int) -> None:
        self.model, self.tokens, self.settings = session.model, tokens, session.settings

    def engine(self, drafting: bool, at_once: int) -> Engine:
        """Return an engine that keeps nothing of its texts."""
        decoder, drafter = self.model.decoder, self.model.drafter
        if not drafting:
            return Engine(decoder, NoDraft(), FixedLength(0), max_batch=at_once)
        with bind_drafter(drafter, decoder):
            calibrate(self.model.lengths, decoder, drafter, at_once)
        return Engine(decoder, drafter, self.model.lengths, max_batch=at_once)

    def request(self, ids: Tensor, number: int) -> Request:
        """Return a request for text `number` after prompt `ids` [n]; it ends after its tokens, or with the context."""
        sampler = Sampler.at_temperature(self.settings.temperature, (self.settings.seed or 0) + number)
        return Request(ids, min(len(ids) + self.tokens, self.model.decoder.context), sampler, _never)

    def decode_at_once(self, prompts: Sequence[Tensor], at_once: int) -> Together:
        """Time groups of `at_once` prompts with drafts and without; the two take turns to be first."""
        seconds, emitted = {False: 0.0, True: 0.0}, {False: 0, True: 0}
        rounds = accepted = 0
        identical = True
        for begin in range(0, len(prompts) - at_once + 1, at_once):
            texts = {}
            order = (False, True) if begin // at_once % 2 == 0 else (True, False)
            for drafting in order:
                engine = self.engine(drafting, at_once)
                before = time.perf_counter()
                group = [self.request(ids, begin + i) for i, ids in enumerate(prompts[begin : begin + at_once])]
                sequences = [engine.add(one) for one in group]
                for _ in engine.run_to_end():
                    pass
                seconds[drafting] += time.perf_counter() - before
                emitted[drafting] += engine.stats.emitted
                texts[drafting] = [one.row.tolist() for one in sequences]
                if drafting:
                    rounds, accepted = rounds + engine.stats.rounds, accepted + engine.stats.accepted
            identical &= texts[False] == texts[True]
        speed = {drafting: emitted[drafting] / seconds[drafting] for drafting in seconds}
        return Together(at_once, speed[False], speed[True], 1 + accepted / max(1, rounds), identical)

    def beside_others(self, prompts: Sequence[Tensor], others: int, seed: int) -> Iterator[bool]:
        """Decode each prompt alone and beside `others` that come and go at random; yield whether both texts are the
        same."""
        draws = random.Random(seed)
        for number, ids in enumerate(prompts):
            alone = self.engine(False, 1)
            (event,) = [e for e in alone.run([self.request(ids, number)]) if e.sequence.ended]
            engine = self.engine(True, others + 1)
            mine, beside = engine.add(self.request(ids, number)), list[Text]()
            while not mine.ended:
                beside = [one for one in beside if not one.ended]
                if len(beside) < others and draws.random() < 0.3:
                    other = draws.randrange(len(prompts))
                    beside.append(engine.add(self.request(prompts[other], other)))
                elif beside and draws.random() < 0.1:
                    engine.cancel(draws.choice(beside))
                engine.step()
            engine.close()
            yield mine.row.tolist() == event.sequence.row.tolist()

    def join_long(self, prompt: Tensor, long: Tensor) -> Join:
        """Read `long` alone, and then while `prompt` is decoded."""
        engine = self.engine(True, 2)
        whole = self.engine(False, 1)
        reading, passes = whole.add(self.request(long, 0)), []
        while not reading.decoding:
            before = time.perf_counter()
            whole.step()
            passes.append(time.perf_counter() - before)
        whole.close()
        talking = engine.add(Request(prompt, self.model.decoder.context, Sampler(), _never))
        for _ in range(12):
            engine.step()
        joining, waits, beside = engine.add(self.request(long, 0)), list[float](), 0.0
        while not beside:  # and the wait after the one that ends with the long prompt's first token
            beside = sum(waits) if joining.decoding else 0.0
            before, length = time.perf_counter(), talking.length
            while talking.length == length:
                engine.step()
            waits.append(time.perf_counter() - before)
        engine.close()
        chunk = median(passes[: len(long) // PROMPT_ROWS] or passes)  # of those with as many rows
        return Join(max(waits), median(waits), chunk, sum(passes), beside)


def _show(found: Sequence[Together], console: Console) -> None:
    table = Table(box=box.SIMPLE, show_edge=False, pad_edge=False)
    for name in ("texts at once", "plain tokens/s", "drafted tokens/s", "ratio", "tokens/round", "same texts"):
        table.add_column(name, justify="right")
    for one in found:
        figures = (f"{one.plain:.1f}", f"{one.drafted:.1f}", f"{one.ratio:.2f}x", f"{one.mean_acceptance_length:.2f}")
        table.add_row(str(one.at_once), *figures, "yes" if one.identical else "NO")
    console.print(table)


def main(argv: list[str] | None = None) -> int:
    """Run `python -m eval.concurrency` with the words `argv` (None: the process's own); return its exit code."""
    parser = cli.module_parser("concurrency", __doc__)
    parser.add_argument(
        "--prompts", type=cli.whole_number(1), default=24, metavar="N", help="of the suite (default 24)"
    )
    parser.add_argument(
        "--at-once", type=cli.whole_number(1), nargs="+", default=[1, 2, 4], metavar="N", help="texts (default 1 2 4)"
    )
    parser.add_argument(
        "--others", type=cli.whole_number(0), default=4, metavar="N", help="that come and go (default 4)"
    )
    parser.add_argument(
        "--join", type=cli.whole_number(0), default=0, metavar="N", help="tokens of a prompt that joins (default: none)"
    )
    parser.add_argument(
        "--joins", type=cli.whole_number(1), default=5, metavar="N", help="of that prompt, for medians (default 5)"
    )
    cli.add_json_option(parser, "the figures")
    parser.add_argument(
        "--max-new-tokens", type=cli.whole_number(1), default=96, metavar="M", help="of each text (default 96)"
    )
    parser.add_argument("--temperature", type=cli.temperature, default=0.0, metavar="X", help="0 is greedy (default)")
    parser.add_argument("--seed", type=cli.whole_number(0), default=0, metavar="N", help="of sampling (default 0)")
    cli.add_drafting_options(parser)
    cli.add_model_options(parser)
    a = parser.parse_args(argv)

    def command() -> int:
        check_writable(a.json)
        settings = cli.settings_from(a)
        console, bar = Terminal(highlight=False), Terminal(stderr=True)
        session = open_session(settings)
        every = suite_prompts()
        chosen = every[:: max(1, len(every) // a.prompts)][: a.prompts]
        prompts = [session.encode(one.opening())[0] for one in chosen]
        crowd, found, same = Crowd(session, settings.max_new_tokens), list[Together](), list[bool]()
        joins, interrupted = list[Join](), False
        try:
            for at_once in a.at_once:
                with bar.status(f"{at_once} at once"):
                    found.append(crowd.decode_at_once(prompts, at_once))
            with bar.status("beside others"):
                if a.others:
                    same.extend(crowd.beside_others(prompts, a.others, settings.seed or 0))
            with bar.status("joins"):
                for _ in range(a.joins if a.join else 0):
                    joins.append(crowd.join_long(prompts[0], random_tokens(session.model.decoder, a.join)))
        except KeyboardInterrupt:
            interrupted = True
        _show(found, console)
        if same:
            console.print(f"{sum(same)}/{len(same)} texts the same beside {a.others} others that come and go")
        joined = Joins(a.join, joins) if joins else None
        for line in joined.lines() if joined is not None else ():
            console.print(line)
        record = {
            "command": "concurrency",
            "interrupted": interrupted,
            **provenance(session),
            "together": [one.to_dict() for one in found],
            "beside_others": {"others": a.others, "identical": sum(same), "total": len(same)},
            "joined": None if joined is None else joined.to_dict(),
        }
        put_record(a.json, record)
        if interrupted:
            return INTERRUPTED
        return 0 if all(one.identical for one in found) and all(same) else DIFFERS

    return run_guarded(command, a.json)


if __name__ == "__main__":
    sys.exit(main())
