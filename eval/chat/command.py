"""`run.py chat`: a conversation in the terminal, or through a pipe, with commands about it and about drafting.

The module imports nothing heavy before the model is loaded. `eval.chat.input` reads lines, `eval.chat.commands` runs
them, `eval.chat.turns` asks the model, `eval.chat.view` shows the answers.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from eval.chat.input import Lines, edits, open_reader
from eval.cli.libraries import import_libraries
from eval.cli.options import GenerationSettings
from eval.cli.terminal import keys_waiting

if TYPE_CHECKING:
    from eval.chat.commands import Chat


def chat(
    settings: GenerationSettings,
    dashboard: bool = False,
    markdown: bool = True,
    history: bool = True,
    image_tokens: int | None = None,
    frames: int | None = None,
    learn: int | None = None,
) -> int:
    """Converse until /quit or the end of stdin; return exit code 0.

    `markdown`: show answers as styled text on a terminal. `history`: keep the typed messages, for later sessions.
    `image_tokens`, `frames`: see `MediaOptions`.
    `learn`: keep the conversations for training, in at most so many bytes (None: nothing).

    Raises ValueError: the model is not usable, has no chat template, or reads text alone and has options for media.
    """
    with keys_waiting() if edits() else contextlib.nullcontext():
        import_libraries()
        from eval.chat.commands import Chat
        from eval.chat.media import MediaOptions
        from eval.cli.session import open_session
        from eval.use.recording import open_recorder, say

        session, media = open_session(settings, remember=True), MediaOptions(image_tokens, frames)
        conversation = Chat(session, Console(), dashboard, markdown, media)
        if media != MediaOptions():
            assert conversation.turns.media.processor  # options for a model of text alone are an error
        recorder = None if learn is None else open_recorder(session, learn)
        if recorder is not None:
            conversation.turns.on_text = recorder.add
            conversation.turns.say(f"({say(recorder)})")
        try:
            _converse(conversation, _history_file() if history else None)
        finally:
            if recorder is not None:
                recorder.close()
    return 0


def _converse(conversation: Chat, history: Path | None) -> None:
    reader = open_reader(conversation.commands, history)
    person = sys.stdin.isatty()
    say = conversation.turns.say
    if person:
        more = (
            'a line of """ begins and ends a message of several' if isinstance(reader, Lines) else "Alt-Enter: new line"
        )
        say(f"{conversation.turns.session.settings.model}. /help lists the commands, {more}, Ctrl-D leaves.")
    while True:
        typing = True
        try:
            typed = reader.read()
            typing = False
            if not conversation.line(typed):
                return
        except EOFError:
            if person:
                print()
            return
        except KeyboardInterrupt:  # while typing it drops the text, as in a shell
            if not person:
                raise
            if typing and isinstance(reader, Lines):
                print()
            say("(Ctrl-D or /quit leaves)" if typing else "(stopped)")


def _history_file() -> Path | None:
    from specdec.weights.hub.paths import cache_folder

    try:
        return cache_folder() / "chat-history"
    except (OSError, ValueError):  # no home folder is known, or there is none of that name
        return None
