"""The ways to decode that a bench compares: ours, each with its own draft lengths, and other engines.

    plain         nothing drafted; always there, and what the others are measured against
    adaptive      the draft length chosen each round; every source of drafts that the model has
    k1, k2, ...   always so many tokens
    suffix, mtp   adaptive, with suffix matches alone, or with the trained head alone
    wrong         the head's drafts with every token replaced: the cost of a drafter that is never right
    transformers, transformers-lookup, llama.cpp, llama.cpp-ngram-...
                  other engines on the same .gguf file, plain or with their own speculation (see `eval.bench.engines`)

`fixed` stands for k1 to k6, `llama.cpp-ngram` for all its kinds. A mode of ours keeps its acceptance record to itself,
so that modes do not teach each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

import specdec
from eval.bench.engines import DTYPES, LOOKUP, EngineTiming, LlamaCpp, Sampling, Transformers, check_packages
from eval.bench.remote import Remote
from eval.cli.metrics import TimedRun
from eval.cli.names import ADAPTIVE, OTHERS, PLAIN
from eval.cli.options import GenerationSettings
from eval.cli.session import Session
from eval.synthetic.acceptance import SyntheticAcceptance
from specdec import kernels
from specdec.cache import KVCache
from specdec.drafting.composite import CompositeDrafter
from specdec.drafting.draft_length import AdaptiveLength
from specdec.drafting.protocol import Draft, Drafter, Proposer
from specdec.drafting.suffix import SuffixDrafter
from specdec.engine.sampling import Noise
from specdec.engine.stats import GenerationStats, Round
from specdec.model.decoder import Decoder
from specdec.model.states import States
from specdec.util.device import resolve_device


class Mode(Protocol):
    """Decode in one way, for a bench.

    `name`: for tables. `details`: one line. `ours`: whether its text must be the plain one. `process`: the id of the
    process that computes, None for this process.
    """

    name: str
    details: str
    ours: bool
    process: int | None

    def run(
        self,
        ids: Tensor,
        answer: Sequence[int] | None,
        streamer: BaseStreamer | None = None,
        on_round: Callable[[Round], None] | None = None,
    ) -> TimedRun:
        """Decode after `ids` [1, n], as far as `answer`, the plain text, where it is known. Raises ValueError."""

    def cpu_seconds(self) -> float:
        """Return the CPU time that the mode's process has used so far."""


class Ours:
    """Decode with a session, in one way. `rates`: of synthetic acceptance (`eval.synthetic.acceptance`)."""

    ours = True
    process: int | None = None

    def __init__(
        self,
        session: Session,
        name: str,
        draft_length: str | int,
        drafter: Drafter | None = None,
        rates: Sequence[float] = (),
    ) -> None:
        """Make the mode `name`. `draft_length`: "adaptive", or a number; `drafter` None: the model's own."""
        self.name, self.rates, self.adaptive = name, rates, draft_length == "adaptive"
        self._session, self._length = session, draft_length
        self._drafter = drafter or session.model.drafter
        self.details = (
            f"kernels: {kernels.active(session.model.device)}" if draft_length == 0 else f"drafter {self._drafter.name}"
        )
        # Costs are the machine's, and measured; the acceptance record is this mode's own.
        known = session.model.lengths
        self.lengths = AdaptiveLength(known.costs if known.measured_for else None)
        self.lengths.measured_for = known.measured_for

    def run(
        self,
        ids: Tensor,
        answer: Sequence[int] | None,
        streamer: BaseStreamer | None = None,
        on_round: Callable[[Round], None] | None = None,
    ) -> TimedRun:
        """Decode after `ids` [1, n], with this mode's own draft lengths in the place of the model's.

        Where `answer` is known, decode as many tokens as it has; with `rates`, the drafts follow it at those rates.
        """
        model, drafter = self._session.model, self._drafter
        model.lengths = self.lengths
        if self.rates and answer is not None:
            text = [*ids[0].tolist(), *answer]
            drafter = SyntheticAcceptance(drafter, text, self.rates, model.decoder.spec.vocab_size)
        tokens: dict[str, Any] = {} if answer is None else {"max_new_tokens": len(answer)}
        return self._session.run(
            ids,
            speculation=self._length != 0,
            drafter=drafter,
            streamer=streamer,
            draft_length=self._length,
            on_round=on_round,
            **tokens,
        )

    def cpu_seconds(self) -> float:
        """Return the CPU time of this process, in which all modes of ours run."""
        return time.process_time()


class Other:
    """Decode with another engine, in a process of its own.

    Its text is not compared with the plain text: other arithmetic decides near-ties in another way.
    """

    ours = False

    def __init__(self, name: str, engine: Remote) -> None:
        self.name, self.engine, self.details = name, engine, engine.details
        self.process: int | None = engine.process

    def run(
        self,
        ids: Tensor,
        answer: Sequence[int] | None,
        streamer: BaseStreamer | None = None,
        on_round: Callable[[Round], None] | None = None,
    ) -> TimedRun:
        """Decode as many tokens after `ids` [1, n] as `answer` has; nothing is streamed, and no round is told."""
        assert answer is not None, "other engines decode as many tokens as the plain run did"
        return _as_run(self.engine.run(ids[0].tolist(), len(answer)), ids.shape[1])

    def cpu_seconds(self) -> float:
        """Return the CPU time of the engine's process."""
        return self.engine.cpu_seconds()


def _as_run(timing: EngineTiming, prompt_tokens: int) -> TimedRun:
    stats = GenerationStats(1, prompt_tokens, emitted=timing.tokens, drafted=timing.drafted, accepted=timing.accepted)
    seconds = timing.first + timing.rest
    stats.timeline = [(timing.first, 1), (seconds, timing.tokens)][: timing.tokens]
    stats.seconds |= {"prefill": timing.first, "verify": timing.rest}
    return TimedRun((), seconds, stats)


class Wrong:
    """Draft as `drafter` does, with every token replaced by its neighbour."""

    name = "wrong"

    def __init__(self, drafter: Drafter) -> None:
        self._drafter, self.max_draft, self._vocabulary = drafter, drafter.max_draft, 0

    @property
    def aux_layers(self) -> tuple[int, ...]:
        """Return the layers whose outputs the wrapped drafter wants."""
        return self._drafter.aux_layers

    def bind(self, backbone: Decoder) -> None:
        """Bind the wrapped drafter, and note the size of the vocabulary, in which neighbours are counted."""
        self._drafter.bind(backbone)
        self._vocabulary = backbone.spec.vocab_size

    def start(self, cache: KVCache, noise: Noise | None = None) -> Neighbours:
        """Return the proposer of one text, around the wrapped drafter's."""
        return Neighbours(self._drafter.start(cache, noise), self._vocabulary)


class Neighbours:
    """Propose for one text: the proposer of `Wrong`."""

    name = Wrong.name

    def __init__(self, proposer: Proposer, vocabulary: int) -> None:
        self._proposer, self.max_draft, self._vocabulary = proposer, proposer.max_draft, vocabulary

    def propose(self, tokens: Sequence[int], states: States, k: int) -> Draft:
        """Return the wrapped proposer's draft with every token id raised by one, modulo the vocabulary."""
        drafted = self._proposer.propose(tokens, states, k).tokens
        return Draft.by(self.name, [(token + 1) % self._vocabulary for token in drafted])


def check_possible(names: Sequence[str], settings: GenerationSettings) -> None:
    """Raise a ValueError, before anything loads, when these modes cannot be compared with these settings."""
    others = [name for name in names if name in OTHERS]
    if not others:
        return
    check_packages(sorted({name.partition("-")[0] for name in others}))
    if not specdec.model_path(settings.model).is_file():
        raise ValueError(
            f"--modes {others[0]} compares engines on one .gguf file, and {settings.model} is none: name such a file, "
            "or smollm2-135m-instruct or gemma-3-270m"
        )
    if resolve_device(settings.device).type != "cpu":
        raise ValueError(f"--modes {others[0]} compares engines on the CPU: add --device cpu")
    if settings.adapter:
        raise ValueError(f"--modes {others[0]} compares engines on the model alone: leave --adapter out")


@contextmanager
def open_modes(
    names: Sequence[str], session: Session, rates: Sequence[float], context: int, console: Console
) -> Iterator[list[Mode]]:
    """Open the modes `names`, ready to run on `context` positions; other engines live until the end of the block.

    Raises ValueError: the model has no head for `mtp` or `wrong`, or an engine cannot load the model.
    """
    threads, sampling = torch.get_num_threads(), sampling_of(session)
    modes: list[Mode] = []
    with ExitStack() as stack:
        for name in names:
            if name not in OTHERS:
                modes.append(_ours(name, session, rates))
                continue
            for full, make in _engines(name, threads, sampling, context):
                with console.status(f"loading {full}"):
                    remote = Remote(full, make[0], specdec.model_path(session.settings.model), *make[1:])
                stack.callback(remote.close)
                modes.append(Other(full, remote))
        yield modes


def _ours(name: str, session: Session, rates: Sequence[float]) -> Ours:
    if name == PLAIN:
        return Ours(session, name, 0)
    if name[0] == "k":
        return Ours(session, name, int(name[1:]), rates=rates)
    drafters: dict[str, Callable[[], Drafter]] = {
        ADAPTIVE: lambda: session.model.drafter,
        "suffix": SuffixDrafter,
        "mtp": lambda: _head(session),
        "wrong": lambda: Wrong(_head(session)),
    }
    return Ours(session, name, "adaptive", drafters[name](), rates)


def _head(session: Session) -> Drafter:
    drafter = session.model.drafter
    head = drafter.other if isinstance(drafter, CompositeDrafter) else drafter
    if head.name != "mtp":
        raise ValueError(
            f"--modes mtp and wrong need a trained head, and there is none for {session.settings.model}: name one with "
            "--drafter, or train one with run.py train"
        )
    return head


def _engines(name: str, threads: int, sampling: Sampling, context: int) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Yield the engines that a word stands for: full names, each with a class and its arguments after the file."""
    if name.startswith("transformers"):
        lookup = LOOKUP if name.endswith("lookup") else 0
        for dtype in DTYPES:
            yield f"{name} {dtype}", (Transformers, dtype, threads, sampling, lookup)
    else:
        yield name, (LlamaCpp, threads, context, sampling, name.removeprefix("llama.cpp").removeprefix("-"))


def sampling_of(session: Session) -> Sampling:
    """Return the session's settings; a setting that is not given has the value that generate() takes."""
    s, config = session.settings, session.model.generation_config
    defaults = config._get_default_generation_params()

    def chosen(name: str) -> Any:
        return next(v for v in (getattr(s, name), getattr(config, name), defaults[name]) if v is not None)

    return Sampling(s.temperature, chosen("top_p"), chosen("top_k"), s.seed or 0)
