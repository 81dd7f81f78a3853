"""`run.py train`: train a head for a model, from the model's own answers or texts as they are; the folder that the
command leaves is a drafter.

Under `torchrun` each process runs this command; the first one prints.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import distributed

from drafter.data.build_dataset import BUILT_IN, HELD_OUT, Collector, encode_prompts, training_prompts
from drafter.data.features import longest_text
from drafter.data.given import EncodedPrompt, GivenText, GivenTexts
from drafter.data.mixture import as_given
from drafter.data.server import AnswerServer, ServerAnswers
from drafter.files.formats import Start, form_for, read_start, stored_bits
from drafter.prompts.generator import mix_prompts
from drafter.settings import ADAPTING_RATE, Answering, Recipe, Shape, TimeBudget, fast_bfloat16
from drafter.settings import TrainerSettings as Training
from drafter.train.run import TrainingRun
from drafter.use.log import use_folder
from drafter.use.texts import UseSplit
from eval.cli.options import GenerationSettings
from eval.cli.output import INTERRUPTED, check_writable, put_record
from eval.cli.provenance import machine
from eval.cli.session import open_session
from eval.train.from_use import counts, head_in_use, texts_of_use, use_record
from eval.train.texts import Texts, completed, ends_of, messages_of
from eval.train.view import view_for
from specdec.util.terminal import Terminal

WAIT = timedelta(days=1)  # of the other processes, while the first one collects


@dataclass(frozen=True)
class TrainOptions:
    """Keep the options of a `run.py train`; see its --help."""

    out: Path
    data: tuple[tuple[str, float], ...]
    texts: tuple[tuple[str, float], ...]
    asks: bool  # whether the backbone, or a server, answers prompts, besides those that the head is judged on
    budget: TimeBudget
    answering: Answering
    training: Training
    shape: Shape
    draft_vocab: int | None  # as it was asked for; the shape has the default else
    start: str | None
    average_with: tuple[str, ...]  # heads whose weights are averaged with those of the start
    answers_from: str | None
    answers_model: str | None
    from_use: Path | None  # the folder of logs
    own_bits: bool  # whether the saved head has the bits of the one that training begins with
    began: float  # on time.monotonic(): when the budget's minutes began


def train(settings: GenerationSettings, options: TrainOptions, json_file: Path | None) -> int:
    """Train as `options` say; return the exit code.

    Raises ValueError: the model, the data or the shape of the head is not usable, or `options.out` holds another run.
    """
    check_writable(json_file)
    parallel = "WORLD_SIZE" in os.environ and "RANK" in os.environ
    if parallel:
        distributed.init_process_group("gloo", timeout=WAIT)
    try:
        return _train(settings, options, json_file, parallel)
    finally:
        if parallel:
            distributed.destroy_process_group()


def _train(settings: GenerationSettings, options: TrainOptions, json_file: Path | None, parallel: bool) -> int:
    console = Console(quiet=parallel and distributed.get_rank() > 0)
    training_prompts(options.data, options.answering.seed)  # before the model: a wrong name fails at once
    texts = Texts(options.texts, options.answering.seed)
    server = None
    if options.answers_from is not None:
        server = AnswerServer(options.answers_from, options.answers_model, os.environ.get("OPENAI_API_KEY"))
    session = open_session(replace(settings, drafter="none"))
    if server is not None and not session.converses:
        raise ValueError(
            f"{settings.model} has no chat template, and a server answers conversations; leave out --answers-from"
        )
    backbone = session.model.decoder

    start, name, others = None, options.start, dict[str, Start]()
    if options.from_use is not None and name is None:
        name = head_in_use(backbone)
    if name is not None:
        bits = stored_bits(name) if options.own_bits else options.shape.bits
        start = read_start(name, backbone, bits, options.shape.aux_layers)
        others = {other: read_start(other, backbone, bits, options.shape.aux_layers) for other in options.average_with}
        start = start.averaged(others)
        if options.draft_vocab is not None:
            start = start.with_draft_vocab(options.draft_vocab)
    form = start.form if start else form_for(options.shape, backbone.spec, session.model.config.get_text_config())
    spec = form.spec(backbone.spec)
    layers = spec.reads
    most = min(options.answering.max_prompt, 2 * longest_text(backbone, layers) // 3)
    made_from: dict[str, Any] = {"data": [list(source) for source in options.data]}

    longest = min(longest_text(backbone, layers), options.answering.max_prompt + options.answering.max_new_tokens)
    texts.encode(session, longest)
    if texts:
        made_from |= {"texts": [list(source) for source in options.texts], "asks": options.asks}

    def prompts() -> Iterator[EncodedPrompt]:
        drawn = training_prompts(options.data, options.answering.seed)
        return encode_prompts(drawn, lambda prompt: session.encode(messages_of(prompt))[0], most)

    use = None
    if options.from_use is not None:
        use = texts_of_use(options.from_use, options.out, session, layers, not parallel or distributed.get_rank() == 0)
        made_from["from_use"] = True

    def items(asked: Iterator[EncodedPrompt]) -> Iterator[EncodedPrompt | GivenText]:
        """Return `asked`, where prompts are to be answered, mixed with the texts that are read as they are."""
        if use is not None:
            return use.mixed(asked)
        if not texts:
            return asked
        parts: list[tuple[float, Iterator[EncodedPrompt | GivenText]]] = []
        if options.asks:
            parts.append((sum(weight for _, weight in options.data), asked))
        return mix_prompts([*parts, *texts.parts(session, longest)], options.answering.seed)

    answers: ServerAnswers | None = None
    given: GivenTexts | None = None
    if server is not None:
        given = answers = ServerAnswers(
            server,
            lambda: items(islice(prompts(), HELD_OUT, None)),
            partial(completed, session),
            options.answering,
            options.answering.max_batch,
        )
        made_from["answers_from"] = server.model
    elif not options.asks:
        given = as_given(lambda: mix_prompts(texts.parts(session, longest), options.answering.seed))
    asked = prompts()
    held_out = list(use.prompts(most)) if use else [one.ids for one in islice(asked, HELD_OUT)]
    collector = Collector(
        options.out / "training" / "set",
        backbone,
        layers,
        chain(held_out, (one if isinstance(one, GivenText) else one.ids for one in items(asked))),
        ends_of(session),
        options.answering,
        made_from,
        spec.aux_layers,
        given,
        len(held_out),
    )
    here = machine(backbone.device)
    began = None
    if start is not None:
        assert name is not None
        began = start.record(name, others)
        if start.trained_for is not None:
            _say(console, f"{name} was trained for {start.trained_for}; it is adapted to {settings.model}.")
    about = {"backbone_name": settings.model, "start": began, "versions": here["versions"]}
    about |= {"adapter": backbone.adapters.default} if backbone.adapters.default else {}
    about |= {"from_use": counts(use)} if use else {}
    about["cpu"], about["threads"] = here["host"]["cpu"], here["host"]["threads"]
    training_run = TrainingRun(
        options.out, backbone, collector, form, options.training, options.budget, about, start, began=options.began
    )
    console = Terminal(quiet=not training_run.first)
    try:
        with view_for(console, f"{settings.model}: a draft head in {options.out}", lambda: training_run.status) as view:
            for event in training_run.run():
                view.on_event(event)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return INTERRUPTED
    if training_run.first:
        _report(console, training_run, options, json_file, answers, use)
    return 0


def _report(
    console: Console,
    training_run: TrainingRun,
    options: TrainOptions,
    json_file: Path | None,
    answers: ServerAnswers | None,
    use: UseSplit | None,
) -> None:
    scores = training_run.progress.scores
    best = max(scores, key=lambda score: float(score["real"]))
    k = options.training.recipe.steps
    _say(
        console,
        f"\n{options.out}: {best['real']:.2f} tokens per round with {k} drafted, on held-out prompts.\n"
        f"Use it: --drafter {options.out} with any command, or specdec.load(..., drafter={str(options.out)!r}).\n"
        f"{options.out}/training may be deleted once you are done.",
    )
    if options.start is not None and use is None and (before := training_run.before) is not None:
        averaged = f", averaged with {', '.join(options.average_with)}," if options.average_with else ""
        _say(console, f"{options.start}{averaged} had {before['real']:.2f} on the same prompts before.")
    record: dict[str, Any] = {
        "command": "train",
        "out": str(options.out),
        "best": best,
        "scores": scores,
        "before": training_run.before if training_run.start is not None else None,
        "set": training_run.collected._asdict(),
        "budget": asdict(options.budget),
        "training": asdict(options.training),
        "shape": training_run.form.to_dict(),
        **machine(training_run.backbone.device),
    }
    if answers is not None and answers.used:
        _say(
            console,
            f"{answers.used} answers came from {answers.server.url}, and {answers.left_out} more were left out: empty, "
            "refused, or not the text of their own tokens.",
        )
        record["answers"] = {"from": answers.server.model, "used": answers.used, "left_out": answers.left_out}
    if use is not None:
        record["from_use"] = found = use_record(use, scores)
        before, after = found["before"], found["after"]
        console.print(
            f"On conversations of your use that were held out: {before['real']:.2f} tokens per round before, "
            f"{after['real']:.2f} now"
            + (", the same head: it learned nothing of use yet." if after["step"] == before["step"] else "."),
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
    put_record(json_file, record)


def _say(console: Console, text: str) -> None:
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def options_from(arguments: argparse.Namespace) -> TrainOptions:
    """Return the options that the parsed `arguments` ask for. Raises ValueError for a combination that makes no
    sense."""
    a = arguments
    if a.from_use and (a.answers_from or a.texts):
        other = "--texts" if a.texts else "--answers-from"
        raise ValueError(f"--from-use learns from texts that are there already; leave out {other}")
    if a.average_with and not (a.start or a.from_use):
        raise ValueError("--average-with names more heads to begin with; name the first with --start")
    usual = ADAPTING_RATE if a.from_use else Training.learning_rate
    return TrainOptions(
        out=a.out,
        data=tuple(a.data or [(BUILT_IN, 1.0)]),
        texts=tuple(a.texts),
        asks=bool(a.data or a.answers_from or not a.texts),
        budget=TimeBudget(a.minutes, a.steps, a.tokens, a.collecting, a.evaluate_minutes),
        answering=Answering(a.max_new_tokens, temperatures=tuple(a.temperature), seed=a.seed, max_batch=a.max_batch),
        training=Training(
            recipe=Recipe(
                steps=a.draft_length,
                feature_weight=a.feature_weight,
                soft=not a.hard,
                deeper=a.unrolled,
                later=a.later_steps,
                overlap=a.overlap,
                target_temperature=a.target_temperature,
                prompt_rows=a.prompt_rows,
            ),
            learning_rate=usual if a.learning_rate is None else a.learning_rate,
            matrix_rate=a.matrix_rate,
            batch_tokens=a.batch_tokens,
            bfloat16=not a.float32 and fast_bfloat16(),
            quantised=a.quantised,
            seed=a.seed if a.order is None else a.order,
        ),
        start=a.start,
        average_with=tuple(a.average_with),
        answers_from=a.answers_from,
        answers_model=a.answers_model,
        from_use=use_folder() if a.from_use else None,
        own_bits=a.from_use and a.bits is None,
        began=a.began,
        shape=Shape(
            a.depth,
            a.width,
            Shape.draft_vocab if a.draft_vocab is None else a.draft_vocab,
            a.bigram,
            a.bits or Shape.bits,
            tuple(a.aux_layers),
        ),
        draft_vocab=a.draft_vocab,
    )
