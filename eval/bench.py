"""`run.py bench`: every prompt decoded plainly and with drafting, in one process, in alternating order.

The baseline is the same loop with nothing drafted. One warm-up of each kind comes first; which of the two goes first
changes from prompt to prompt, so that neither gets the warmer machine. Left out: repetitions and their spread, which
only the comparison with other engines has (`eval.against`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import Tensor

from eval.against import REPEAT, against, cases_of, check_possible
from eval.against_report import notes, table
from eval.cli import DIFFERS, INTERRUPTED, Settings, check_writable, write_json
from eval.dashboard import View, position_table, prompt_table, summary_table, view_for
from eval.metrics import Pair, Run, compare, peak_memory
from eval.prompts import Prompt, default_prompts, load_prompts
from eval.provenance import provenance
from eval.session import Session, open_session
from eval.synthetic_acceptance import SyntheticAcceptance

WARM_UP_TOKENS = 16


@dataclass(frozen=True)
class Bench:
    """What to compare: `prompts` on `session`. `rates`: where there are any, drafts are right as often as they say."""

    session: Session
    prompts: Sequence[Prompt]
    rates: Sequence[float] = ()

    def pairs(self, view: View) -> Iterator[Pair]:
        """Decode prompt by prompt, turn by turn; a turn sees the plain run's answers to the ones before it.

        Raises ValueError that names the prompt: see `Session.run`.
        """
        self._warm_up()
        for index, prompt in enumerate(self.prompts):
            history = prompt.history()
            for turn, content in enumerate(prompt.turns, start=1):
                history.append({"role": "user", "content": content})
                name = prompt.name if len(prompt.turns) == 1 else f"{prompt.name}, turn {turn}"
                try:
                    pair = self._pair(view, index, name, prompt.task, self.session.encode(history))
                except ValueError as error:
                    raise ValueError(f"prompt {name}: {error}") from error
                view.finished(pair)
                yield pair
                history.append({"role": "assistant", "content": self.session.text(pair.plain.tokens)})

    def _pair(self, view: View, index: int, name: str, task: str, ids: Tensor) -> Pair:
        runs: dict[str, Run] = {}
        drafter = None
        # Synthetic drafts are made from the plain run's text, which then comes first.
        for mode in ("plain", "drafted") if index % 2 == 0 or self.rates else ("drafted", "plain"):
            watch = view.begin(index + 1, name, mode)
            if mode == "drafted" and self.rates:
                model, answer = self.session.model, [*ids[0].tolist(), *runs["plain"].tokens]
                drafter = SyntheticAcceptance(model.drafter, answer, self.rates, model.decoder.spec.vocab_size)
            runs[mode] = self.session.run(ids, speculation=mode == "drafted", drafter=drafter, streamer=watch)
        return Pair(name, task, runs["plain"], runs["drafted"])

    def _warm_up(self) -> None:
        ids = self.session.encode([{"role": "user", "content": "Count from one to ten, twice."}])
        for speculation in (False, True):
            self.session.run(ids, speculation=speculation, max_new_tokens=WARM_UP_TOKENS)


def bench(
    settings: Settings,
    prompts_file: Path | None,
    limit: int | None,
    json_file: Path | None,
    engines: Sequence[str] = (),
    repeat: int | None = None,
    rates: Sequence[float] = (),
) -> int:
    """Run, show and write a bench; returns the exit code: 0, 1 when an output differs, 130 after Ctrl-C.

    The last line of stdout is one JSON object with every figure; `json_file` gets the same. `engines` ("transformers",
    "llama.cpp") are then compared with, `repeat` times; their figures are the object's "against". `rates`: of synthetic
    acceptance.
    Raises ValueError: the model, a prompt or a file is not usable, or an engine failed (after all else is written); the
    message says why.
    """
    check_writable(json_file)
    if engines:
        check_possible(engines, settings)
    elif repeat is not None:
        raise ValueError("--repeat is how often engines are compared: name them with --against transformers llama.cpp")
    if engines and rates:
        raise ValueError("--synthetic-acceptance is not for comparisons with other engines; leave --against away")
    prompts = (load_prompts(prompts_file) if prompts_file else default_prompts())[:limit]
    session = open_session(settings)
    console = Console()
    pairs: list[Pair] = []
    interrupted = False
    try:
        with view_for(console, _title(session, rates), len(prompts), session.text) as view:
            for pair in Bench(session, prompts, rates).pairs(view):
                pairs.append(pair)
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted: these are the prompts that were finished", file=sys.stderr)
    record = {
        "command": "bench",
        "prompts_file": str(prompts_file) if prompts_file else None,
        "limit": limit,
        "interrupted": interrupted,
        "synthetic_acceptance": list(rates) or None,
        **provenance(session),
        "memory": peak_memory(session.model.device.type),
        **compare(pairs),
    }
    _show(console, session, pairs, record)
    if engines and pairs and not interrupted:
        found = against(session, engines, cases_of(session, prompts, pairs), repeat or REPEAT, console)
        record["against"] = found
        _show_against(console, found)
        interrupted = record["interrupted"] = found["interrupted"]
    print(json.dumps(record, ensure_ascii=False, allow_nan=False), flush=True)
    if json_file:
        write_json(json_file, record)
    if "against" in record and record["against"]["error"]:
        raise ValueError(record["against"]["error"])
    return INTERRUPTED if interrupted else 0 if record["identical"] else DIFFERS


def _show(console: Console, session: Session, pairs: Sequence[Pair], record: dict[str, Any]) -> None:
    if not pairs:
        console.print("nothing was finished")
        return
    console.print()
    if console.is_terminal:  # elsewhere every prompt has had its line
        console.print(_title(session, record["synthetic_acceptance"]), style="bold", highlight=False)
        console.print(prompt_table(pairs), "")
    console.print(summary_table(record, record["memory"], record["host"]["kernels"]), "")
    if positions := record["drafted"]["acceptance_by_position"]:
        console.print(position_table(positions), "")
    if record["synthetic_acceptance"]:
        console.print("SYNTHETIC: drafts were right as often as was asked for; no drafter did this.\n", style="yellow")
    if record["implausible"]:
        console.print(
            f"These timings are not reliable: {', '.join(record['implausible'])} sped up by more than acceptance can "
            "give (tokens per round), so something else slowed the plain run down. Run it again on an idle machine.\n",
            style="yellow",
            highlight=False,
            markup=False,
        )
    for pair in pairs:
        if (at := pair.difference) is not None:
            plain, drafted = (list(run.tokens[at : at + 3]) for run in (pair.plain, pair.drafted))
            console.print(
                f"{pair.name}: differs from new token {at + 1} on: plain {plain}, drafted {drafted}",
                style="bold red",
                highlight=False,
                markup=False,
            )


def _show_against(console: Console, found: dict[str, Any]) -> None:
    if found["interrupted"]:
        print("\ninterrupted: these are the turns that every engine finished", file=sys.stderr)
    if not found["turns"]:
        console.print("no engine was compared\n")
        return
    console.print(table(found), "")
    for note in notes(found):
        console.print(note, style="dim", highlight=False, markup=False)
    console.print()


def _title(session: Session, rates: Sequence[float] | None) -> str:
    s = session.settings
    mode = "greedy" if s.temperature == 0 else f"temperature {s.temperature:g}, seed {s.seed}"
    name = Path(s.model).name
    acceptance = f", SYNTHETIC acceptance {' '.join(f'{rate:g}' for rate in rates)}" if rates else ""
    return f"{name}, drafter {session.model.drafter.name}, {mode}, up to {s.max_new_tokens} tokens{acceptance}"
