"""`run.py bench`: every prompt decoded plainly and in other ways, in turns, in one process for all modes of ours.

The baseline is the same loop with nothing drafted. One warm-up of each mode comes first, and the mode that begins
changes from prompt to prompt, so that a slow stretch of the machine slows all modes down. Where other engines take
part, each repetition also has them read a prompt of `PREFILL_TOKENS`, another stretch of text each time, so that no
engine can have kept its beginning. Other engines decode as many tokens as the plain run did, so they follow the plain
run in the first repetition.

`others_cpu` of the record is the CPU time that waiting processes used while another was timed, in cores: not zero means
that the figures disturb each other.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from eval.bench.comparison import PREFILL, Turn, Way, compare
from eval.bench.modes import Mode, Ours, check_possible, open_modes
from eval.bench.tables import show
from eval.bench.view import View, view_for
from eval.cli.metrics import TimedRun, peak_memory
from eval.cli.names import OTHERS, PLAIN, expand_modes
from eval.cli.options import GenerationSettings
from eval.cli.output import DIFFERS, INTERRUPTED, check_writable, put_record
from eval.cli.provenance import provenance
from eval.cli.session import Session, open_session
from eval.prompts.sets import Prompt, default_prompts, load_prompts, long_prompts, suite_prompts
from specdec.util.terminal import Terminal

WARM_UP_TOKENS = 16
PREFILL_TOKENS = 512
_STEP = 41  # tokens by which the prefill's stretch of text moves from one repetition to the next
_SPARE = 256  # positions that other engines get besides: servers keep a few for themselves


@dataclass
class Bench:
    """Compare `prompts` in all of `modes`, the plain one first, `repeat` times."""

    session: Session
    prompts: Sequence[Prompt]
    modes: Sequence[Mode]
    repeat: int = 1
    finished: int = 0  # repetitions of all prompts
    waited: float = 0.0  # seconds that something was timed
    disturbed: float = 0.0  # CPU seconds that other processes of ours used in them
    answers: dict[str, tuple[int, ...]] = field(default_factory=dict)  # the plain text of each turn, by name

    def turns(self, view: View) -> Iterator[Turn]:
        """Decode prompt by prompt, turn by turn; a turn sees the plain run's answers to the turns before it.

        Raises ValueError that names the prompt: see `Session.run` and `Mode.run`.
        """
        self._warm_up()
        began = 0
        for repetition in range(1, self.repeat + 1):
            for number, name, task, ids in self._cases(repetition):
                order = [*self.modes[began:], *self.modes[:began]]
                began = (began + 1) % len(self.modes)
                if name not in self.answers and not all(isinstance(mode, Ours) and not mode.rates for mode in order):
                    order.sort(key=lambda mode: mode.name != PLAIN)  # the others need its answer
                try:
                    runs = {mode.name: self._run(view, number, name, mode, ids) for mode in order}
                except ValueError as error:
                    raise ValueError(f"prompt {name}: {error}") from error
                turn = Turn(name, task, repetition, runs)
                view.finished(turn)
                yield turn
            self.finished = repetition

    def _cases(self, repetition: int) -> Iterator[tuple[int, str, str, Tensor]]:
        """Yield number of the prompt, name, task and token ids [1, n] of every turn; later turns hold the answers."""
        taken: set[str] = {PREFILL}  # results go by name, and files may repeat one
        for number, prompt in enumerate(self.prompts, start=1):
            history, base = prompt.history(), prompt.name
            base = base if base not in taken else f"{base}, prompt {number}"
            taken.add(base)
            for turn, content in enumerate(prompt.turns, start=1):
                history.append({"role": "user", "content": content})
                name = base if len(prompt.turns) == 1 else f"{base}, turn {turn}"
                yield number, name, prompt.task, self.session.encode(history)
                history.append({"role": "assistant", "content": self.session.text(self.answers[name])})
        if not all(mode.ours for mode in self.modes):
            yield len(self.prompts), PREFILL, "", self.prefill(repetition)

    def prefill(self, repetition: int) -> Tensor:
        """Return token ids [1, n] of English text, as long as `PREFILL_TOKENS` or the context with room for an
        answer."""
        messages = [{"role": "user", "content": prompt.turns[0]} for prompt in long_prompts()]
        text = self.session.encode(messages, raw=True)
        size = min(PREFILL_TOKENS, text.shape[1], self.session.context - WARM_UP_TOKENS)
        at = repetition * _STEP % (text.shape[1] - size + 1)
        return text[:, at : at + size]

    def _run(self, view: View, number: int, name: str, mode: Mode, ids: Tensor) -> TimedRun:
        watch = view.begin(number, name, mode.name)
        waiting = {other.process: other for other in self.modes if other.process != mode.process}.values()
        before = sum(other.cpu_seconds() for other in waiting)
        began = time.perf_counter()
        answer = (0,) if name == PREFILL else self.answers.get(name)
        run = mode.run(ids, answer, watch, None if watch is None else watch.on_round)
        self.waited += time.perf_counter() - began
        self.disturbed += sum(other.cpu_seconds() for other in waiting) - before
        if mode.name == PLAIN and name != PREFILL:
            self.answers.setdefault(name, run.tokens)
        return run

    def _warm_up(self) -> None:
        ids = self.session.encode([{"role": "user", "content": "Count from one to ten, twice."}])
        for mode in self.modes:
            mode.run(ids, (0,) * WARM_UP_TOKENS)


@dataclass(frozen=True)
class BenchOptions:
    """Keep the options of a `run.py bench`; see its --help."""

    prompts_file: Path | None = None
    suite: bool = False
    limit: int | None = None
    modes: tuple[str, ...] = ()
    repeat: int = 1
    rates: tuple[float, ...] = ()
    json_file: Path | None = None


def bench(settings: GenerationSettings, options: BenchOptions) -> int:
    """Run, show and write a bench; return the exit code: 0, 1 when an output differs, 130 after Ctrl-C.

    The JSON file gets one object with every figure.

    Raises ValueError: the model, a prompt or a file is not usable, or an engine failed (after all else is written); the
    message says why.
    """
    check_writable(options.json_file)
    length = settings.draft_length
    names = expand_modes(options.modes or ("adaptive" if length == "adaptive" else f"k{length}",))
    check_possible(names, settings)
    if options.rates and any(name in OTHERS for name in names):
        raise ValueError("--synthetic-acceptance is not for comparisons with other engines; leave them out of --modes")
    prompts = _prompts(options)
    session = open_session(settings)
    console, name = Terminal(), _title(session, options.rates)
    turns: list[Turn] = []
    interrupted, failure = False, None
    measured = Bench(session, prompts, (), options.repeat)
    try:
        context = max(_longest(session, prompts), PREFILL_TOKENS) + settings.max_new_tokens + _SPARE
        with (
            open_modes(names, session, options.rates, context, console) as measured.modes,
            view_for(console, name, len(prompts), options.repeat, session) as view,
        ):
            for turn in measured.turns(view):
                turns.append(turn)
    except KeyboardInterrupt:
        interrupted = True
        print("\ninterrupted: these are the prompts that were finished", file=sys.stderr)
    except ValueError as error:
        if not turns:
            raise
        failure = str(error)
    ways = [Way(mode.name, mode.details, mode.ours) for mode in measured.modes] or [Way(PLAIN)]
    record = {
        "command": "bench",
        "prompts_file": str(options.prompts_file) if options.prompts_file else "suite" if options.suite else None,
        "limit": options.limit,
        "repeat": options.repeat,
        "repetitions_finished": measured.finished,
        "interrupted": interrupted,
        "error": failure,
        "synthetic_acceptance": list(options.rates) or None,
        **provenance(session),
        "memory": {**peak_memory(session.model.device.type), "budget": session.memory()[1]},
        "costs": _costs(measured.modes),
        "others_cpu": measured.disturbed / measured.waited if measured.waited > 0 else 0.0,
        **compare(turns, ways),
    }
    show(console, name, record)
    put_record(options.json_file, record)
    if failure:
        raise ValueError(failure)
    return INTERRUPTED if interrupted else 0 if record["identical"] else DIFFERS


def _prompts(options: BenchOptions) -> list[Prompt]:
    if options.prompts_file and options.suite:
        raise ValueError("--suite and --prompts are two sets of prompts: choose one")
    if options.prompts_file:
        return load_prompts(options.prompts_file)[: options.limit]
    if not options.suite:
        return default_prompts()[: options.limit]
    every = suite_prompts()
    if options.limit is None:
        return every
    tasks: dict[str, list[Prompt]] = {}
    for prompt in every:
        tasks.setdefault(prompt.task, []).append(prompt)
    # As many of each task, so that a short run has figures of every task.
    return [prompt for rank in zip(*tasks.values(), strict=True) for prompt in rank][: options.limit]


def _longest(session: Session, prompts: Sequence[Prompt]) -> int:
    """Return the tokens of the longest prompt, answers to its earlier turns left out."""
    messages = [[*p.history(), *({"role": "user", "content": turn} for turn in p.turns)] for p in prompts]
    return max((session.encode(m, raw=True).shape[1] + 32 * len(m) for m in messages), default=0)


def _costs(modes: Sequence[Mode]) -> dict[str, dict[str, float]] | None:
    """Return V(T) and d in seconds, as the first mode that chooses lengths has them now."""
    for mode in modes:
        if isinstance(mode, Ours) and mode.adaptive and mode.lengths.measured_for:
            costs = mode.lengths.costs
            return {
                "pass_seconds": {str(rows): seconds for rows, seconds in costs.passes.items()},
                "draft_seconds": dict(costs.steps),
                "draft_start_seconds": dict(costs.starts),
            }
    return None


def _title(session: Session, rates: Sequence[float]) -> str:
    s = session.settings
    mode = "greedy" if s.temperature == 0 else f"temperature {s.temperature:g}, seed {s.seed}"
    name = Path(s.model).name
    acceptance = f", SYNTHETIC acceptance {' '.join(f'{rate:g}' for rate in rates)}" if rates else ""
    return f"{name}, drafter {session.model.drafter.name}, {mode}, up to {s.max_new_tokens} tokens{acceptance}"
