"""`run.py generate`: one prompt in, the answer on stdout as it comes, statistics on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from transformers import TextStreamer

from eval.chat.media import MediaOptions, MediaReader, Part, check_embedder, media_of, message_of
from eval.chat.view import Raw
from eval.cli.metrics import TimedRun, graphs_text, summarise
from eval.cli.options import GenerationSettings
from eval.cli.output import check_writable, put_record
from eval.cli.provenance import provenance
from eval.cli.session import Session, open_session
from specdec.util.text import check_text


class Spoken(TextStreamer):  # type: ignore[misc]
    """Hand an answer word by word to `show`, and keep it: after Ctrl-C `text` is the part that had come."""

    def __init__(self, session: Session, show: Callable[[str], None]) -> None:
        super().__init__(session.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.text, self.show = "", show

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Keep and show a piece of text that no later token can change: `TextStreamer` calls this."""
        self.text += text
        self.show(text)


@dataclass(frozen=True)
class Question:
    """Keep what is asked: a prompt ("-": the text on stdin), with files of media, each with its kind. `raw`: the prompt
    is continued, without the chat template."""

    prompt: str
    raw: bool = False
    files: tuple[tuple[str, Path], ...] = ()
    media: MediaOptions | None = None


def answer(
    settings: GenerationSettings, question: Question, speculation: bool, stats: bool, json_file: Path | None
) -> int:
    """Print the answer to `question`; return exit code 0.

    Raises ValueError: the model, the prompt or a file is not usable.
    """
    check_writable(json_file)
    prompt, raw = question.prompt, question.raw
    where = "the prompt"
    if prompt == "-":
        prompt, where = sys.stdin.read(), "stdin"
    if not prompt.strip():
        raise ValueError('the prompt is empty; give it as an argument, or "-" to read it from stdin')
    check_text(prompt, where)
    media = MediaReader(settings.model, question.media)
    message = message_of(prompt, _read(media, question.files))  # before the model loads, which may take minutes
    session = open_session(settings, remember=True)
    check_embedder(session, media_of(message))
    ids, inputs = (session.encode([message], raw), {}) if raw else media.inputs([message], session)
    with Raw(Console()) as view:
        spoken = Spoken(session, view.feed)
        run = session.run(ids, speculation=speculation, streamer=spoken, **inputs)
    if run.finish == "length":
        print(f"[{cut_note(session, run)}]", file=sys.stderr)
    if stats:
        print(f"[{one_line(run)}]", file=sys.stderr)
        if graphs := graphs_text(run.stats.graphs):
            print(f"[{graphs}]", file=sys.stderr)
    if json_file:
        record = {
            "command": "generate",
            **provenance(session),
            "speculation": speculation,
            "raw": raw,
            "prompt": prompt,
            "media": [media.record(part) for part in media_of(message)],
            "media_options": media.options_record() if question.files else None,
            "text": spoken.text,
            "tokens": list(run.tokens),
            "finish_reason": run.finish,
            "figures": summarise([run]),
        }
        put_record(json_file, record)
    return 0


def _read(media: MediaReader, files: Sequence[tuple[str, Path]]) -> list[Part]:
    """Return the parts of the files that options name.

    Raises ValueError: the model reads text alone, or a file cannot be used; the message then names the option.
    """
    if not files:
        return []
    assert media.processor  # a model of text alone is no fault of a file
    found: list[Part] = []
    for kind, path in files:
        try:
            found += media.parts(kind, path)
        except ValueError as error:
            raise ValueError(f"--{kind} {error}") from None
    if note := media.shortage(found):
        print(f"[{note}]", file=sys.stderr)
    return found


def cut_note(session: Session, run: TimedRun) -> str:
    """Return a sentence about an answer that the limit of tokens, or the context, has cut."""
    count = f"cut after {len(run.tokens):,} tokens"
    if run.stats.prompt_tokens + len(run.tokens) >= session.context:
        return f"{count}, where the context of {session.context:,} tokens ends"
    return f"{count}, the limit; a larger --max-new-tokens gives longer answers"


def one_line(run: TimedRun) -> str:
    """Describe a run in a line of at most 80 columns."""
    stats = run.stats
    parts = [
        f"{len(run.tokens)} tokens in {run.seconds:.2f} s",
        f"{run.tokens_per_second:.1f}/s",
        f"TTFT {stats.ttft:.2f} s",
        f"{stats.mean_acceptance_length:.2f} per round",
    ]
    if stats.drafted:
        parts.append(f"{100 * stats.acceptance_rate:.0f}% accepted")
    return ", ".join(parts)
