"""`run.py chat`: a conversation in the terminal, with commands to switch drafting and to see what it does.

Lines come from stdin, so that a pipe works as well as a person. Ctrl-C stops the answer and keeps what was said;
Ctrl-D leaves. With the dashboard a terminal shows the end of an answer above it while it comes, and then all of the
answer, as ordinary text; elsewhere an answer is printed as it comes, and followed by the dashboard's lines.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.text import Text

from eval import cli
from eval.answer import Spoken, one_line
from eval.cli import Settings
from eval.dashboard import WIDTH, Redrawn, position_table, share
from eval.live import HEIGHT, Dashboard
from eval.metrics import Run, summarise
from eval.prompts import Message
from eval.session import Session, open_session

HELP = """\
/draft on|off|N    draft adaptively, not at all, or always N tokens
/stats             what drafting did in the last answer and in the conversation
/dashboard on|off  speed, acceptance, costs and memory, below every answer and while it comes
/temperature X     0 is greedy; /seed N makes sampling repeatable
/system TEXT       give the model a role; without TEXT: take it away
/reset             forget the conversation (the role stays)
/save FILE         keep the conversation and its cache; /load FILE goes on, without computing it again
/quit              leave, as Ctrl-D does; Ctrl-C stops an answer"""
_TAIL = 8  # lines of an answer above the dashboard, where the terminal is high enough
_BREAK = 1000  # characters; what is drawn of an answer begins at a multiple, or every redraw would break lines anew


class Noted(Spoken):
    """Keeps an answer, and does not print it."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.text += text


class LiveAnswer(Redrawn):
    """The end of an answer that is on its way, above the dashboard; alone where the terminal is too low for both."""

    def __init__(self, console: Console, dashboard: Dashboard, answer: Noted) -> None:
        self.dashboard, self.answer = dashboard, answer
        super().__init__(console, "", 4, transient=True)

    def draw(self) -> RenderableType:
        room = self.console.height - HEIGHT - 2  # one line between them, and one below, where the cursor ends
        below: list[RenderableType] = ["", self.dashboard]
        if room < 1:  # a frame that is higher than the terminal could not be taken away again
            room, below = max(1, self.console.height - 1), []
        room = min(room, _TAIL)
        text, width = self.answer.text, min(self.console.width, WIDTH)
        recent = text[max(0, len(text) // _BREAK - 1) * _BREAK :] or "reading the prompt"
        lines = Text(recent, style="" if text else "dim").wrap(self.console, width)[-room:]
        return Group(*lines, *[Text()] * (room - len(lines)), *below)


class Chat:
    """The state of a conversation; `line` is one turn of it. `dashboard`: whether it is shown."""

    def __init__(self, session: Session, console: Console, dashboard: bool = False) -> None:
        if not session.converses:
            raise ValueError(
                f"{session.settings.model} has no chat template: it continues texts and does not converse; "
                'use: python run.py generate --model ... "text"'
            )
        self.session, self.console = session, console
        self.messages: list[Message] = []
        self.system = ""
        self.speculation = True
        self.runs: list[Run] = []
        self.shown, self.dashboard = dashboard, Dashboard(session.costs, session.memory)
        self.commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: self.say(HELP),
            "/draft": self.draft,
            "/stats": lambda _: self.stats(),
            "/dashboard": self.switch_dashboard,
            "/reset": lambda _: self.reset(),
            "/save": self.save,
            "/load": self.load,
            "/system": self.set_system,
            "/temperature": self.set_temperature,
            "/seed": self.set_seed,
        }

    def line(self, text: str) -> bool:
        """Handle one line of input; False when it asks to leave."""
        word, _, rest = text.strip().partition(" ")
        if word in ("/quit", "/exit"):
            return False
        if word.startswith("/"):
            command = self.commands.get(word)
            if command is None:
                self.say(f"there is no {word}; /help lists the commands")
            else:
                try:
                    command(rest.strip())
                except (ValueError, argparse.ArgumentTypeError) as error:
                    self.say(f"{word}: {error}")
        elif word:
            self.answer(text.strip())
        return True

    def answer(self, question: str) -> None:
        """Decode the answer to `question`; a turn that fails leaves the conversation as it was."""
        self.messages.append({"role": "user", "content": question})
        role: list[Message] = [{"role": "system", "content": self.system}] if self.system else []
        live = self.shown and self.console.is_terminal and not self.console.is_dumb_terminal
        spoken = Noted(self.session) if live else Spoken(self.session)
        try:
            ids = self.session.encode(role + self.messages)
            if ids.shape[1] >= self.session.context:
                raise ValueError(
                    f"the conversation has reached {ids.shape[1]} tokens and the model's context is "
                    f"{self.session.context}; /reset starts anew"
                )
            with self._drawn(spoken):
                run = self.session.run(
                    ids, speculation=self.speculation, streamer=spoken, reuse=True, on_round=self.dashboard.heard
                )
        except KeyboardInterrupt:
            self.say("(stopped)")
        except ValueError as error:
            self.messages.pop()
            self.say(f"error: {error}")
            return
        else:
            self.runs.append(run)
            self.say(f"({one_line(run)})")
        self.messages.append({"role": "assistant", "content": spoken.text.strip()})
        if live:
            self.console.print(self.dashboard)
        elif self.shown:
            for line in self.dashboard.lines():
                self.console.print(line, highlight=False, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def _drawn(self, answer: Spoken) -> Iterator[None]:
        """Shows an answer that does not print itself; in the end, however it comes, all of it stays as text."""
        if not isinstance(answer, Noted):
            yield
            return
        try:
            with LiveAnswer(self.console, self.dashboard, answer):
                yield
        finally:
            self.console.show_cursor()  # a second Ctrl-C may have come while the first one's was brought back
            if answer.text:
                self.console.out(answer.text, highlight=False)

    def draft(self, value: str) -> None:
        if value:
            if value not in ("on", "off") and not value.isdecimal():
                raise ValueError(f"say on, off or a number of tokens, not {value!r}")
            self.speculation = value not in ("off", "0")
            if self.speculation:
                self._set(draft_length="adaptive" if value == "on" else int(value))
        name, length = self.session.model.drafter.name, self.session.settings.draft_length
        self.say(f"drafting: {f'{name}, {length}' if self.speculation else 'off'}")

    def stats(self) -> None:
        if not self.runs:
            self.say("no answers yet")
            return
        self.say(f"last answer: {one_line(self.runs[-1])}")
        figures = summarise(self.runs)
        self.say(
            f"all {len(self.runs)}: {figures['tokens']} tokens, {figures['tokens_per_second']:.1f}/s, "
            f"{figures['mean_acceptance_length']:.2f} per round, {share(figures['acceptance_rate'])} accepted"
        )
        if figures["acceptance_by_position"]:
            self.console.print(position_table(figures["acceptance_by_position"]))

    def switch_dashboard(self, value: str) -> None:
        if value not in ("", "on", "off"):
            raise ValueError(f"say on or off, not {value!r}")
        self.shown = value == "on" if value else self.shown
        self.say(f"dashboard: {'on' if self.shown else 'off'}")

    def reset(self) -> None:
        self.messages.clear()
        self.runs.clear()
        self.dashboard = Dashboard(self.session.costs, self.session.memory)
        self.say("the conversation begins anew")

    def save(self, name: str) -> None:
        if not name:
            raise ValueError("name a file")
        if not self.runs:
            raise ValueError("no answers yet")
        self.session.model.save_conversation(name, notes={"system": self.system, "messages": self.messages})
        self.say(f"saved in {name}, {Path(name).stat().st_size / 1e6:.0f} MB")

    def load(self, name: str) -> None:
        if not name:
            raise ValueError("name a file")
        found = self.session.model.load_conversation(name)
        if "messages" not in found.notes:
            raise ValueError(f"{name}: holds a cache that was not saved here: nobody says who said what")
        self.reset()
        self.system, self.messages = found.notes["system"], found.notes["messages"]
        self.say(f"{len(self.messages)} messages, {len(found.tokens):,} tokens")

    def set_system(self, text: str) -> None:
        self.system = text
        self.say("the role is set" if text else "no role")

    def set_temperature(self, text: str) -> None:
        self._set(temperature=cli.temperature(text))
        self.say(f"temperature {text}")

    def set_seed(self, text: str) -> None:
        self._set(seed=cli.whole(0)(text))
        self.say(f"seed {text}")

    def say(self, text: str) -> None:
        self.console.print(text, style="dim", highlight=False, markup=False)

    def _set(self, **changes: Any) -> None:
        self.session.settings = replace(self.session.settings, **changes)


def chat(settings: Settings, dashboard: bool = False) -> int:
    """Converse until /quit or the end of stdin; returns exit code 0.

    Raises ValueError: the model is not usable, or has no chat template.
    """
    conversation = Chat(open_session(settings), Console(), dashboard)
    person = sys.stdin.isatty()
    if person:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401  # gives input() a history and line editing
        conversation.say(f"{settings.model}. /help lists the commands, Ctrl-D leaves.")
    while True:
        try:
            if not conversation.line(input("> " if person else "")):
                return 0
        except EOFError:
            if person:
                print()
            return 0
        except KeyboardInterrupt:  # while typing: drop the line, as a shell does
            if not person:
                raise
            print()
