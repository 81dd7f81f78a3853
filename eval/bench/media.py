"""`run.py bench --media`: the time to the first token of prompts with pictures, sound and video, by kind and size.

What: for each medium the time of a first question about it, that of a text of as many tokens, and that of a second
question, which goes on from the first one's cache; and the seconds of embedding alone. Figures are medians of the
repetitions, and the three take turns. Why random pixels: see `eval/prompts/media.py`. Left out: reading files and
preparing pixels, which no model takes part in.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from eval.cli.figure_table import Column, FigureTable
from eval.cli.options import GenerationSettings
from eval.cli.output import INTERRUPTED, check_writable, put_record
from eval.cli.provenance import provenance
from eval.cli.session import Session, open_session
from eval.prompts.media import FRAMES_A_SECOND, FULL, MediaPrompt, Part, Picture, Sound, Video, media_prompt
from specdec.model.embedder.blocks import media_blocks
from specdec.model.embedder.inputs import MediaInputs
from specdec.util.terminal import Terminal
from specdec.weights.metadata import naming

QUESTION = 20  # tokens of text after a medium, and of a second question
CASES: dict[str, Part] = {
    **{f"picture, {budget}": Picture(*size) for budget, size in FULL.items()},
    **{f"sound, {seconds} s": Sound(seconds * FRAMES_A_SECOND) for seconds in (5, 30)},
    **{f"video, {frames} frames": Video(frames) for frames in (8, 32)},
}


@dataclass
class Timed:
    """Keep the seconds of one medium: to the first token of the first question, of a text of as many tokens, of the
    second question; and of embedding."""

    name: str
    soft_tokens: int
    prompt_tokens: int
    first: list[float] = field(default_factory=list)
    text: list[float] = field(default_factory=list)
    second: list[float] = field(default_factory=list)
    embedding: list[float] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures in JSON types, with medians and ratios."""
        first, text, second = median(self.first), median(self.text), median(self.second)
        medians = {"first": first, "text": text, "second": second, "embedding": median(self.embedding)}
        ratios = {"first_to_text": first / text, "second_to_first": second / first}
        return {**asdict(self), "median": medians, **ratios}


def bench_media(settings: GenerationSettings, limit: int | None, repeat: int, json_file: Path | None) -> int:
    """Time, show and write; return the exit code: 0, or 130 after Ctrl-C.

    Raises ValueError: the model takes no pictures or no sound, or none of the prompts fits into its context.
    """
    check_writable(json_file)
    session = open_session(settings)
    console, found, interrupted = Terminal(), dict[str, Timed](), False
    try:
        with naming(settings.model), console.status("timing") as status:
            for timed in measure(session, list(CASES)[:limit], repeat):
                found[timed.name] = timed
                status.update(f"timed {timed.name}, {len(timed.first)} of {repeat}")
    except KeyboardInterrupt:
        interrupted = True
    rows = [timed.to_dict() for timed in found.values()]
    _show(console, rows)
    record = {"command": "bench-media", "interrupted": interrupted, "repeat": repeat, **provenance(session)}
    put_record(json_file, record | {"media": rows})
    return INTERRUPTED if interrupted else 0


def measure(session: Session, names: Sequence[str], repeat: int) -> Iterator[Timed]:
    """Time each of CASES that `names` lists, `repeat` times; yield its figures so far after each repetition.

    A prompt that does not fit into the context is left out. Raises ValueError as `bench_media` does.
    """
    spec = session.model.decoder.spec
    prompts = {name: media_prompt(name, [4, CASES[name], QUESTION], spec) for name in names}
    room = session.context - QUESTION - 2
    prompts = {name: prompt for name, prompt in prompts.items() if prompt.ids.shape[1] <= room}
    if not prompts:
        raise ValueError(f"no prompt with media fits into a context of {session.context}")
    found = {name: _counted(session, prompt) for name, prompt in prompts.items()}
    _first_token(session, next(iter(prompts.values())))  # the first of all is slower
    for _ in range(repeat):
        for name, prompt in prompts.items():
            timed = found[name]
            session.model.conversations.forget()
            timed.embedding.append(_embedding(session, prompt))
            text = media_prompt(name, [prompt.ids.shape[1]], spec, seed=1)
            timed.text.append(_first_token(session, text)[0])
            seconds, tokens = _first_token(session, prompt, reuse=True)
            timed.first.append(seconds)
            question = media_prompt(name, [QUESTION], spec, seed=2).ids
            longer = torch.cat((prompt.ids, prompt.ids.new_tensor([tokens]), question), dim=1)
            timed.second.append(_first_token(session, MediaPrompt(name, longer, prompt.inputs), reuse=True)[0])
            yield timed
    session.model.conversations.forget()


def _counted(session: Session, prompt: MediaPrompt) -> Timed:
    ids, tokens = prompt.ids, session.model.decoder.spec.media
    assert tokens is not None
    soft = [token for token in (tokens.tokens.image, tokens.tokens.video, tokens.tokens.audio) if token is not None]
    count = int(torch.isin(ids, torch.tensor(soft, dtype=torch.int64)).sum())
    return Timed(prompt.name, count, ids.shape[1])


def _first_token(session: Session, prompt: MediaPrompt, reuse: bool = False) -> tuple[float, tuple[int, ...]]:
    """Return the seconds to the first token after `prompt`, and this token."""
    options: dict[str, Any] = {"max_new_tokens": 1, "eos_token_id": None, "speculation": False, "reuse": reuse}
    run = session.run(prompt.ids, **(options | prompt.inputs))
    return run.seconds, run.tokens


def _embedding(session: Session, prompt: MediaPrompt) -> float:
    """Return the seconds in which all media of `prompt` are embedded."""
    (blocks,) = media_blocks(prompt.ids, None, MediaInputs.of(prompt.inputs), session.model.decoder.media)
    began = time.perf_counter()
    rows: list[Tensor] = [block.rows() for block in blocks]
    assert sum(map(len, rows))
    return time.perf_counter() - began


def _show(console: Terminal, rows: Sequence[dict[str, Any]]) -> None:
    columns = [
        Column("soft tokens", 5),
        Column("prompt", 4),
        Column("first s", 9),
        Column("text s", 7),
        Column("first/text", 10),
        Column("second s", 6),
        Column("second/first", 8),
        Column("embedding s", 3),
    ]
    table = FigureTable("medium", columns, caption="seconds to the first token; medians")
    for row in rows:
        seconds = row["median"]
        table.add(
            row["name"],
            [
                f"{row['soft_tokens']:,}",
                f"{row['prompt_tokens']:,}",
                f"{seconds['first']:.3f}",
                f"{seconds['text']:.3f}",
                f"{row['first_to_text']:.2f}",
                f"{seconds['second']:.3f}",
                f"{row['second_to_first']:.3f}",
                f"{seconds['embedding']:.3f}",
            ],
        )
    console.print(table)
