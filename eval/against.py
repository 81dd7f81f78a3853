"""`run.py bench --against`: our decoding, plain and drafted, beside other engines on the same file, in turns.

Every engine decodes every prompt once per repetition, and reads one prompt of 512 tokens. The engines take turns
prompt by prompt, and who begins changes from turn to turn: whatever slows the machine down for a while slows them all.
A prompt's new tokens are as many as our plain run gave it, up to its EOS, for all engines alike: text that goes on
past EOS repeats itself, which would flatter drafting. Figures are medians over the repetitions, after one warm-up
each:

- decode tokens/s: tokens after the first, of all prompts, over the sum of the prompts' median seconds for them;
- prefill tokens/s: tokens of the long prompt over the median seconds to the first token of its answer;
- lowest and highest: the same figure by repetition.

Each repetition reads another stretch of text in the prefill, so that no engine can have kept the beginning.
`others_cpu` is the CPU time that waiting engines used while another was timed, in cores: not zero means that the
figures disturb each other. Left out: later turns of a conversation, and whether other engines write the same text
(their arithmetic differs, so near-ties fall differently).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.console import Console

import specdec
from eval.against_report import Case, Turn, figures, view_for
from eval.cli import Settings
from eval.engines import DTYPES, Engine, LlamaCpp, Ours, Sampling, Timing, Transformers, check_packages
from eval.metrics import Pair
from eval.prompts import Prompt, long_prompts
from eval.remote import Remote
from eval.session import Session

PREFILL = 512  # tokens
PREFILL_NAME = "prefill"  # among the names of cases
REPEAT = 5
_STEP = 41  # tokens by which the prefill's stretch of text moves from one repetition to the next
_WARM_UP = 8  # tokens


@dataclass
class Against:
    """`engines` on `cases` and on stretches of `text` (token ids, of more than `PREFILL`), `repeat` times."""

    engines: Sequence[Engine]
    cases: Sequence[Case]
    text: Sequence[int]
    repeat: int = REPEAT
    waited: float = 0.0  # seconds that engines were timed
    disturbed: float = 0.0  # CPU seconds that the others used in them

    def turns(self) -> Iterator[Turn]:
        """Warm every engine up, then measure; a turn is yielded when all engines have had it.

        Raises ValueError: an engine refuses the work, or its process has ended; the message names it.
        """
        for engine in self.engines:
            engine.run(self.prefill(0).ids, _WARM_UP)
        began = 0
        for repetition in range(1, self.repeat + 1):
            for case in (*self.cases, self.prefill(repetition)):
                order = [*self.engines[began:], *self.engines[:began]]
                yield Turn(repetition, case, {engine.name: self._timed(engine, case) for engine in order})
                began = (began + 1) % len(self.engines)

    def prefill(self, repetition: int) -> Case:
        size = min(PREFILL, len(self.text))
        at = repetition * _STEP % (len(self.text) - size + 1)
        return Case(PREFILL_NAME, tuple(self.text[at : at + size]), 1)

    def _timed(self, engine: Engine, case: Case) -> Timing:
        waiting = {other.process: other for other in self.engines if other.process != engine.process}.values()
        before = sum(other.cpu_seconds() for other in waiting)
        began = time.perf_counter()
        timing = engine.run(case.ids, case.tokens)
        self.waited += time.perf_counter() - began
        self.disturbed += sum(other.cpu_seconds() for other in waiting) - before
        return timing


def check_possible(words: Sequence[str], settings: Settings) -> None:
    """Raise a ValueError, before anything loads, when engines cannot be compared with these settings."""
    check_packages(words)
    if settings.max_new_tokens < 2:
        raise ValueError("--against compares the tokens after the first: ask for --max-new-tokens 2 or more")
    if specdec.model_path(settings.model).suffix != ".gguf":
        raise ValueError(
            f"--against compares engines on one .gguf file, and {settings.model} is none: name such a file, or "
            "smollm2-135m-instruct or gemma-3-270m"
        )
    if settings.device != "cpu" and (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise ValueError("--against compares engines on the CPU: add --device cpu")


def cases_of(session: Session, prompts: Sequence[Prompt], pairs: Sequence[Pair]) -> list[Case]:
    """The first turn of every prompt, as long as its plain run was; without those that ended at once.

    `pairs`: those of all turns of all `prompts`, in order.
    """
    cases: list[Case] = []
    upcoming = iter(pairs)
    for number, prompt in enumerate(prompts, start=1):
        pair, *_ = [next(upcoming) for _ in prompt.turns]
        ids = session.encode([*prompt.history(), {"role": "user", "content": prompt.turns[0]}])[0].tolist()
        taken = {PREFILL_NAME, *(case.name for case in cases)}  # results go by name, and files may repeat one
        name = prompt.name if prompt.name not in taken else f"{prompt.name}, prompt {number}"
        if len(pair.plain.tokens) > 1:
            cases.append(Case(name, tuple(ids), len(pair.plain.tokens)))
    return cases


def prefill_text(session: Session) -> list[int]:
    """Token ids of English text: several times `PREFILL`, or as far as the context has room for them and an answer."""
    messages = [{"role": "user", "content": prompt.turns[0]} for prompt in long_prompts()]
    ids: list[int] = session.encode(messages, raw=True)[0].tolist()
    return ids if session.context >= PREFILL + _WARM_UP else ids[: session.context - _WARM_UP]


@contextmanager
def open_engines(session: Session, words: Sequence[str], context: int, console: Console) -> Iterator[list[Engine]]:
    """Ours, plain and drafted, and those that `words` name, ready to run on `context` positions.

    Raises ValueError that names the engine when one cannot load the model.
    """
    file, threads, sampling = specdec.model_path(session.settings.model), torch.get_num_threads(), sampling_of(session)
    engines: list[Engine] = [Ours(session, drafted=False)]
    if session.model.drafter.name != "none":
        engines.append(Ours(session, drafted=True))
    children: list[tuple[Any, ...]] = []
    if "transformers" in words:
        children += [(f"transformers {dtype}", Transformers, file, dtype, threads, sampling) for dtype in DTYPES]
    if "llama.cpp" in words:
        children.append(("llama.cpp", LlamaCpp, file, threads, context, sampling))
    with ExitStack() as stack:
        for name, *how in children:
            with console.status(f"loading {name}"):
                engines.append(Remote(name, *how))
            stack.callback(engines[-1].close)
        yield engines


def sampling_of(session: Session) -> Sampling:
    """The session's settings, with what generate() takes where they say nothing."""
    s, config = session.settings, session.model.generation_config
    defaults = config._get_default_generation_params()

    def chosen(name: str) -> Any:
        return next(v for v in (getattr(s, name), getattr(config, name), defaults[name]) if v is not None)

    return Sampling(s.temperature, chosen("top_p"), chosen("top_k"), s.seed or 0)


def against(
    session: Session, words: Sequence[str], cases: Sequence[Case], repeat: int, console: Console
) -> dict[str, Any]:
    """Measure and return the figures, in JSON types; after Ctrl-C, or when an engine fails, those of finished turns.

    `interrupted` and `error` (None, or the message) tell of that; nothing is raised for it.
    """
    text = prefill_text(session)
    context = max(len(case.ids) + case.tokens for case in [*cases, Case("", (0,) * PREFILL, _WARM_UP)])
    turns: list[Turn] = []
    measured = Against((), cases, text, repeat)
    interrupted, error = False, None
    try:
        # Some more than needed: servers keep a few positions for themselves.
        with open_engines(session, words, context + 256, console) as engines:
            measured.engines = engines
            with view_for(console, repeat * (len(cases) + 1)) as advance:
                for turn in measured.turns():
                    turns.append(turn)
                    advance(turn)
    except KeyboardInterrupt:
        interrupted = True
    except ValueError as reason:
        error = str(reason)
    return {
        "repeat": repeat,
        "threads": torch.get_num_threads(),
        "interrupted": interrupted,
        "error": error,
        "others_cpu": measured.disturbed / measured.waited if measured.waited > 0 else 0.0,
        **figures(turns, [(engine.name, engine.details) for engine in measured.engines]),
    }
