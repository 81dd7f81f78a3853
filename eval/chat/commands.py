"""The commands of a chat: their list, the rule for telling a command from a message, and the work of each."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

from rich.cells import cell_len
from rich.console import Console

from eval.chat.answer import one_line
from eval.chat.files import check_file, dragged, files_in
from eval.chat.input import Typed, written_in_editor
from eval.chat.media import MediaOptions, name_files
from eval.chat.turns import Turns
from eval.cli import options as cli
from eval.cli.metrics import summarise
from eval.cli.session import Session
from eval.live.parts import format_percent, position_table

KEYS = """\
Enter sends, Alt-Enter or Ctrl-J begins another line; what is pasted is one \
message, and so is what stands between two lines with three quotation marks. \
Ctrl-C stops an answer and keeps what was said; Ctrl-D leaves. A message that \
begins as a command does is sent with one more slash: //help."""
_ALIASES = {"/exit": "/quit", "/bye": "/quit", "/clear": "/reset", "/regen": "/regenerate", "/?": "/help"}
_LIKE_A_COMMAND = re.compile(r"/[A-Za-z]+")


class Command(NamedTuple):
    """Describe a command. `arguments`: what may follow the name, for the help; "": nothing may. `lines`: several lines
    may."""

    run: Callable[[str], None]
    arguments: str
    about: str
    lines: bool = False


class Chat:
    """Lead a conversation by lines of text: `turns`, and the commands about them."""

    def __init__(
        self,
        session: Session,
        console: Console,
        dashboard: bool = False,
        markdown: bool = True,
        media: MediaOptions | None = None,
    ) -> None:
        """Begin a conversation. Raises ValueError: see `Turns`."""
        self.turns = Turns(session, console, dashboard, markdown, media)
        self.commands: dict[str, Command] = {
            "/help": Command(lambda _: self._help(), "", "this list"),
            "/regenerate": Command(lambda _: self.turns.ask_again(), "", "another answer to the last question"),
            "/edit": Command(self._edit, "[TEXT]", "write in $EDITOR, beginning with TEXT or the last question"),
            "/undo": Command(lambda _: self.turns.take_back(), "", "forget the last question and its answer"),
            "/reset": Command(lambda _: self._reset(), "", "forget the conversation (the role stays)"),
            "/system": Command(self._set_system, "[TEXT]", "give the model a role; without TEXT: take it away", True),
            "/temperature": Command(self._set_temperature, "X", "0 is greedy"),
            "/seed": Command(self._set_seed, "N", "makes sampling repeatable"),
            "/draft": Command(self._draft, "[on|off|N]", "draft adaptively, not at all, or always N tokens"),
            "/adapter": Command(self._adapter, "[NAME]", "answer with this adapter (--adapter), or with none"),
            "/stats": Command(lambda _: self._stats(), "", "what drafting did in the last answer and in all of them"),
            "/dashboard": Command(
                self._switch_dashboard, "[on|off]", "speed, acceptance, costs and memory with answers"
            ),
            "/markdown": Command(
                self._switch_markdown, "[on|off]", "styles and whole words; off: as the model wrote it"
            ),
            "/image": Command(
                partial(self._attach, "image"),
                "[FILE ...]",
                "add pictures to the next message; alone: take them back",
            ),
            "/audio": Command(partial(self._attach, "audio"), "[FILE ...]", "the same with sound"),
            "/video": Command(partial(self._attach, "video"), "[FILE ...]", "the same with videos and their sound"),
            "/save": Command(self.turns.save, "FILE", "keep the conversation and its cache"),
            "/load": Command(self.turns.load, "FILE", "go on with a saved one, without computing it again"),
            "/quit": Command(lambda _: None, "", "leave"),
        }

    def line(self, typed: Typed | str) -> bool:
        """Run what was typed: a command, or a message; return False when it asks to leave."""
        text, message = (typed, False) if isinstance(typed, str) else typed
        text = text.strip()
        if not text:
            return True
        if any("\ud800" <= character <= "\udfff" for character in text):
            self.turns.say("error: that holds bytes which are no UTF-8 text; convert it first, with iconv for example")
            return True
        name, rest = "", ""
        try:
            if not message:
                name, rest = split(text, self.commands)
            if name == "/quit":
                return False
            if name:
                self.commands[name].run(rest)
            else:
                self._say(text if message else re.sub(r"\A//(?=[A-Za-z?])", "/", text), message)
        except (ValueError, argparse.ArgumentTypeError) as error:
            self.turns.say(f"{name}: {error}" if name else str(error))
        return True

    def _say(self, text: str, message: bool) -> None:
        """Ask; files that the text begins with, as a terminal writes those that are dropped on it, go with it."""
        files, rest = ([], text) if message else dragged(text)
        if files and self.turns.media.welcome:
            for kind, path in files:
                self.turns.attach(kind, path)
            text = rest
        elif files:
            model = self.turns.session.settings.model
            self.turns.say(f"({model} reads text alone: the path goes as text, and the file does not)")
        if text:
            self.turns.ask(text)

    def _attach(self, kind: str, text: str) -> None:
        if not text:
            self.turns.detach(kind)
        paths = files_in(text) if text else []
        for path in paths:
            check_file(path)  # all of them first: a name that is mistyped attaches nothing
        for path in paths:
            self.turns.attach(kind, path)

    def _help(self) -> None:
        names = [f"{name} {command.arguments}".rstrip() for name, command in self.commands.items()]
        width = max(map(cell_len, names)) + 2
        lines = (f"{name:<{width}}{one.about}" for name, one in zip(names, self.commands.values(), strict=True))
        self.turns.say("\n".join([*lines, KEYS]))
        if waiting := name_files(self.turns.attached):
            self.turns.say(f"With the next message: {waiting}.")

    def _edit(self, text: str) -> None:
        written = written_in_editor(text or self.turns.question)
        if not written:
            raise ValueError("nothing was changed, so nothing is sent")
        self.turns.say(f"> {written}")
        self.line(Typed(written, message=True))

    def _reset(self) -> None:
        away = name_files(self.turns.attached)
        self.turns.reset()
        self.turns.say("the conversation begins anew" + (f", without {away}" if away else ""))

    def _draft(self, value: str) -> None:
        turns = self.turns
        if value:
            if value not in ("on", "off") and not value.isdecimal():
                raise ValueError(f"say on, off or a number of tokens, not {value!r}")
            turns.speculation = value not in ("off", "0")
            if turns.speculation:
                self._set(draft_length="adaptive" if value == "on" else int(value))
        name, length = turns.session.model.drafter.name, turns.session.settings.draft_length
        turns.say(f"drafting: {f'{name}, {length}' if turns.speculation else 'off'}")

    def _adapter(self, name: str) -> None:
        model = self.turns.session.model
        if name:
            model.set_adapter(name)
        names = model.decoder.adapters.names
        known = f"there are: {', '.join((*names, 'none'))}" if names else "the model has none; --adapter adds one"
        self.turns.say(f"adapter: {' '.join(model.active_adapters()) or 'none'} ({known})")

    def _stats(self) -> None:
        runs = self.turns.runs
        if not runs:
            raise ValueError("no answers yet")
        self.turns.say(f"last answer: {one_line(runs[-1])}")
        figures = summarise(runs)
        self.turns.say(
            f"all {len(runs)}: {figures['tokens']} tokens, {figures['tokens_per_second']:.1f}/s, "
            f"{figures['mean_acceptance_length']:.2f} per round, {format_percent(figures['acceptance_rate'])} accepted"
        )
        if figures["acceptance_by_position"]:
            self.turns.console.print(position_table(figures["acceptance_by_position"]))

    def _switch_dashboard(self, value: str) -> None:
        self.turns.shown = _switched(value, self.turns.shown)
        self.turns.say(f"dashboard: {_word(self.turns.shown)}")

    def _switch_markdown(self, value: str) -> None:
        self.turns.markdown = _switched(value, self.turns.markdown)
        self.turns.say(f"markdown: {_word(self.turns.markdown)}")

    def _set_system(self, text: str) -> None:
        self.turns.system = text
        self.turns.say("the role is set" if text else "no role")

    def _set_temperature(self, text: str) -> None:
        self._set(temperature=cli.temperature(text))
        self.turns.say(f"temperature {text}")

    def _set_seed(self, text: str) -> None:
        self._set(seed=cli.whole_number(0)(text))
        self.turns.say(f"seed {text}")

    def _set(self, **changes: Any) -> None:
        self.turns.session.settings = replace(self.turns.session.settings, **changes)


def split(text: str, commands: Mapping[str, Command]) -> tuple[str, str]:
    """Split a command into its name and the text behind it; return ("", text) for a message.

    The first word tells a command, which has one line (or several, with `Command.lines`). A path (`/usr/lib`) is part
    of a message. Raises ValueError: the first word is a slash and letters, such as `/sats`, and no command; or text
    stands behind a command that takes none.
    """
    word, *after = text.split(maxsplit=1)
    rest = after[0] if after else ""
    name = _ALIASES.get(word.lower(), word.lower())
    command = commands.get(name)
    if "\n" in text and not (command and command.lines):
        return "", text
    if command is None:
        if not _LIKE_A_COMMAND.fullmatch(word):
            return "", text
        near = difflib.get_close_matches(name, [*commands, *_ALIASES], n=1, cutoff=0.6)
        near = near or [known for known in commands if known.startswith(name)][:1]
        hint = f"did you mean {near[0]}? " if near else ""
        raise ValueError(f"there is no {word}; {hint}/help lists the commands, and /{word} sends it as a message")
    if rest and not command.arguments:
        raise ValueError(f"takes nothing behind it; /{word} ... sends it as a message")
    return name, rest


def _switched(value: str, before: bool) -> bool:
    if value not in ("", "on", "off"):
        raise ValueError(f"say on or off, not {value!r}")
    return value == "on" if value else before


def _word(on: bool) -> str:
    return "on" if on else "off"
