"""`run.py generate`: one prompt in, the answer on stdout as it comes, statistics on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console
from transformers import TextStreamer

from eval.chat.view import Raw
from eval.cli.metrics import TimedRun, summarise
from eval.cli.options import GenerationSettings
from eval.cli.output import check_writable, put_record
from eval.cli.provenance import provenance
from eval.cli.session import Session, open_session
from eval.prompts.sets import Message
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


def answer(
    settings: GenerationSettings, prompt: str, speculation: bool, stats: bool, raw: bool, json_file: Path | None
) -> int:
    """Print the answer to `prompt` ("-": the text on stdin); return exit code 0.

    Raises ValueError: the model or the prompt is not usable.
    """
    check_writable(json_file)
    where = "the prompt"
    if prompt == "-":
        prompt, where = sys.stdin.read(), "stdin"
    if not prompt.strip():
        raise ValueError('the prompt is empty; give it as an argument, or "-" to read it from stdin')
    check_text(prompt, where)
    session = open_session(settings, remember=True)
    messages: list[Message] = [{"role": "user", "content": prompt}]
    with Raw(Console()) as view:
        spoken = Spoken(session, view.feed)
        run = session.run(session.encode(messages, raw), speculation=speculation, streamer=spoken)
    if stats:
        print(f"[{one_line(run)}]", file=sys.stderr)
    if json_file:
        record = {
            "command": "generate",
            **provenance(session),
            "speculation": speculation,
            "raw": raw,
            "prompt": prompt,
            "text": spoken.text,
            "tokens": list(run.tokens),
            "figures": summarise([run]),
        }
        put_record(json_file, record)
    return 0


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
