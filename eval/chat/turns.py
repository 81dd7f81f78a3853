"""The turns of a conversation: questions, answers, asking again, taking back; saving the turns to a file and loading
them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

from rich.console import Console

from eval.chat.answer import Spoken, cut_note, one_line
from eval.chat.files import KINDS
from eval.chat.media import (
    MediaOptions,
    MediaReader,
    Message,
    Part,
    check_embedder,
    is_message,
    media_of,
    message_of,
    name_files,
    quote_message,
    text_of,
)
from eval.chat.view import moves_the_cursor, shorten, view_of
from eval.cli.metrics import TimedRun
from eval.cli.session import Session
from eval.cli.words import byte_size
from eval.live.dashboard import Dashboard
from specdec.util.atomic import user_path
from specdec.util.text import visible

_FAILURES = (ValueError, RuntimeError, OSError, MemoryError)  # of a turn; RuntimeError: torch, out of memory


class Turns:
    """Keep a conversation with the model of `session`, on `console`.

    `messages` alternate between user and assistant; `system` is the model's role, "" for none. `shown`: whether the
    dashboard is shown; `markdown`: whether a terminal gets answers as styled text.

    Raises ValueError: the model has no chat template.
    """

    def __init__(
        self,
        session: Session,
        console: Console,
        dashboard: bool = False,
        markdown: bool = True,
        media: MediaOptions | None = None,
    ) -> None:
        if not session.converses:
            raise ValueError(
                f"{session.settings.model} has no chat template: it continues texts and does not converse; "
                'use: python run.py generate --model ... "text"'
            )
        self.session, self.console = session, console
        self.messages: list[Message] = []
        self.media = MediaReader(session.settings.model, media, session.tokenizer)
        self.attached: list[Part] = []  # media that go with the next question
        self.system = ""
        self.speculation = True
        self.runs: list[TimedRun] = []
        self.markdown = markdown
        self.shown, self.dashboard = dashboard, Dashboard(session.costs, session.memory)
        self.on_text: Callable[[list[int], int], None] | None = None  # hears of answers that were not stopped
        self._again = 0  # how often the last question was asked again

    @property
    def question(self) -> str:
        """Return the last question; "" before the first."""
        return text_of(self.messages[-2]) if self.messages else ""

    def attach(self, kind: str, path: Path) -> None:
        """Read a file that goes with the next question. Raises ValueError: it cannot be used."""
        parts = self.media.parts(kind, path, "/")
        check_embedder(self.session, parts)
        self.attached += parts
        about = " and ".join(f"a {KINDS[part['type']]} of {self.media.tokens([part]):,} tokens" for part in parts)
        self.say(f"{path.name}: {about}, with the next message")
        if note := self.media.shortage(parts):
            self.say(f"({note})")

    def detach(self, kind: str) -> None:
        """Forget the files of `kind` that would go with the next question, a video with its sound."""
        paths = {part["path"] for part in self.attached if part["type"] == kind}
        away = [part for part in self.attached if part["path"] in paths]
        self.attached = [part for part in self.attached if part["path"] not in paths]
        none = f"no {KINDS[kind]} waits for the next message; /{kind} FILE adds one"
        self.say(f"taken away: {name_files(away)}" if away else none)

    def ask(self, question: str) -> None:
        """Decode the answer to `question` and what is attached, and add both."""
        self._again = 0
        if self._answer(self.messages, message_of(question, self.attached)):
            self.attached = []

    def ask_again(self) -> None:
        """Put another answer in the place of the last one; where that fails, the last answer stays.

        Raises ValueError: there is no answer yet.
        """
        self._require_answer()
        s = self.session.settings
        self._again += 1
        options: dict[str, Any] = {}
        if s.temperature == 0:
            self.say("(greedy decoding has one answer to a conversation; /temperature 0.8 gives it others)")
        elif s.seed is not None:
            options["seed"] = s.seed + self._again
            self.say(f"(seed {options['seed']})")
        self._answer(self.messages[:-2], self.messages[-2], **options)

    def take_back(self) -> None:
        """Forget the last question and its answer. Raises ValueError: there is no answer yet."""
        self._require_answer()
        self.say(f"forgotten: {shorten(quote_message(self.messages[-2]), 60)}")
        del self.messages[-2:]
        self._again = 0

    def _require_answer(self) -> None:
        if not self.messages:
            raise ValueError("no answers yet")

    def _answer(self, before: list[Message], question: Message, **options: Any) -> bool:
        """Decode the answer to `question` after the turns `before`; the conversation is then `before`, question and
        answer. Return whether there is an answer.

        An answer that is stopped counts as far as it came. A turn that fails leaves the conversation as it was.
        """
        asked: list[Message] = [*before, question]
        role: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        view = view_of(self.console, self.dashboard if self.shown else None, self.markdown)
        spoken = Spoken(self.session, view.feed)
        try:
            ids, inputs = self.media.inputs(role + asked, self.session)
            self.dashboard.media_tokens = self.media.tokens([part for one in asked for part in media_of(one)])
            if ids.shape[1] >= self.session.context:
                raise ValueError(
                    f"the conversation has reached {ids.shape[1]} tokens and the model's context is "
                    f"{self.session.context}; /undo takes the last turn back, /reset starts anew"
                )
            with view:
                run = self.session.run(
                    ids,
                    speculation=self.speculation,
                    streamer=spoken,
                    reuse=True,
                    on_round=self.dashboard.on_round,
                    **inputs,
                    **options,
                )
        except KeyboardInterrupt:
            if not spoken.text.strip():
                self.say("(stopped before the first word; the conversation is as it was)")
                return False
            self.say("(stopped)")
        except BrokenPipeError:  # the reader of the output has left
            raise
        except _FAILURES as error:
            self.say(f"error: {error}")
            return False
        else:
            self.runs.append(run)
            if self.on_text is not None and not inputs:
                self.on_text([*ids[0].tolist(), *run.tokens], ids.shape[1])
            self.say(f"({one_line(run)})")
            if run.finish == "length":
                self.say(f"({cut_note(self.session, run)})")
        self.messages = [*asked, {"role": "assistant", "content": spoken.text.strip()}]
        if self.shown and moves_the_cursor(self.console):
            self.console.print(self.dashboard)
        elif self.shown:
            for line in self.dashboard.lines():
                self.console.print(line, highlight=False, markup=False, soft_wrap=True)
        return True

    def reset(self) -> None:
        """Forget the conversation and its figures; the role stays."""
        self.messages, self.attached = [], []
        self.media = MediaReader(self.session.settings.model, self.media.options, self.session.tokenizer)
        self.runs.clear()
        self.dashboard = Dashboard(self.session.costs, self.session.memory)
        self._again = 0

    def save(self, name: str) -> None:
        """Write the conversation and its cache to the file `name`.

        Raises ValueError: there is no conversation, or the file is anything but an older conversation.
        """
        self._require_answer()
        path = _file(name)
        self.session.model.save_conversation(path, notes={"system": self.system, "messages": self.messages})
        self.say(f"saved in {path}, {byte_size(path.stat().st_size)}")
        if self.attached:
            self.say(f"not in it: {name_files(self.attached)}, which still waits for the next message")

    def load(self, name: str) -> None:
        """Go on with the conversation in the file `name`, and show its last messages.

        Raises ValueError: no such file, a damaged file, one of another model, or one that was not saved here.
        """
        path = _file(name)
        found = self.session.model.load_conversation(path)
        notes = found.notes if isinstance(found.notes, dict) else {}
        messages, system = notes.get("messages"), notes.get("system", "")
        if not _is_conversation(messages) or not isinstance(system, str):
            raise ValueError(f"{path}: holds a cache that was not saved here: nobody says who said what")
        waiting = self.attached
        self.reset()
        self.system, self.messages, self.attached = system, messages, waiting
        self.say(f"{len(messages)} messages, {len(found.tokens):,} tokens; the last ones:")
        self.say(f"> {shorten(quote_message(messages[-2]))}")
        self.say(shorten(text_of(messages[-1])))
        for number, message in enumerate(messages[:-2], 1):
            if media := media_of(message):
                self.say(f"message {number} of {len(messages)}: {name_files(media)}")
        paths = {part["path"]: None for message in messages for part in media_of(message)}
        if gone := [path for path in paths if not Path(path).is_file()]:
            self.say(f"put back before the next message, which reads the files again: {', '.join(gone)}")
        if waiting:
            self.say(f"{name_files(waiting)} still waits for the next message")

    def say(self, text: str) -> None:
        """Print a line that is about the conversation and no part of it."""
        self.console.print(visible(text), style="dim", highlight=False, markup=False)


def _file(name: str) -> Path:
    if not name:
        raise ValueError("name a file")
    return user_path(name)


def _is_conversation(messages: Any) -> TypeGuard[list[Message]]:
    """Tell whether `messages`, read from a file, are turns of a user and an assistant."""
    return (
        isinstance(messages, list)
        and len(messages) >= 2
        and len(messages) % 2 == 0
        and all(
            is_message(message) and message.get("role") == ("user", "assistant")[i % 2]
            for i, message in enumerate(messages)
        )
    )
