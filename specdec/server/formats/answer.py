"""An answer's parts, whatever the format writes them with: content, a thought, tool calls.

What is malformed becomes content. A call is given whole at its end, or as it is written where the caller knows that it
cannot be malformed.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from specdec.server.formats.base import Delta, ToolCallDelta
from specdec.server.formats.reader import Item, Mark, Reader


class MalformedError(Exception):
    """Report that the inside of a call is not what the format writes there."""


class Call(NamedTuple):
    """Hold a complete call: the tool's name and its arguments as JSON text."""

    name: str
    arguments: str


class CallReader(Protocol):
    """Read what stands between the marks of a call."""

    name: str | None
    """The tool's name, once it is known."""

    def feed(self, item: Item) -> str:
        """Return the JSON text of arguments that `item` completes. Raises MalformedError."""

    def close(self) -> list[Call]:
        """Return the calls, all of them complete. Raises MalformedError."""


@dataclass(frozen=True)
class Style:
    """Describe the marks of a format, and what belongs to them. `header`: what a thought begins with; `loose`: line
    breaks around a thought belong to the format."""

    thought_open: str
    thought_close: str
    call_open: str
    call_close: str
    header: str
    loose: bool
    call_reader: Callable[[], CallReader]


class AnswerParser:
    """Parse one answer."""

    def __init__(
        self,
        reader: Reader,
        style: Style,
        thinking: bool,
        tools: Sequence[str],
        stream_calls: bool = True,
    ) -> None:
        """Begin in a thought where `thinking`. `tools`: names that may be called; `stream_calls`: see `ChatFormat`."""
        self.calls, self.cut, self.thoughts = 0, False, 0
        self._reader, self._style, self._tools, self._stream = reader, style, frozenset(tools), stream_calls
        self._thinking = thinking
        self._undecided = 0  # tokens that may be a mark together
        self._header: str | None = None  # of the thought, as far as it was read; None: it was read
        self._breaks = ""  # line breaks at the end of content or thought, which a mark may swallow
        self._leading = False  # line breaks at the beginning belong to the format
        self._index = 0  # of the next call
        self._call: CallReader | None = None
        self._raw: list[Item] = []  # of the call
        self._given = False  # the call's name was given
        self._found: list[Delta] = []

    def feed(self, tokens: Sequence[int]) -> list[Delta]:
        """Return the pieces that `tokens` complete."""
        for token in tokens:
            thinking = self._thinking
            for item in self._reader.feed([token]):
                self._take(item)
            self._count(thinking, 1)
        return self._pieces()

    def _count(self, thinking: bool, newest: int = 0) -> None:
        """Count the tokens that were settled by the `newest` ones: those of a thought that goes on where `thinking`, or
        of a mark that began one."""
        settled = self._undecided + newest - self._reader.undecided
        self._undecided = self._reader.undecided
        self.thoughts += settled if thinking or self._thinking else 0

    def finish(self, by_length: bool = False) -> list[Delta]:
        """Return what was held back; the answer has ended. `by_length`: half a call or mark is no content."""
        thinking = self._thinking
        half_mark = by_length and self._tools and self._call is None and self._reader.begun(self._style.call_open)
        for item in self._reader.finish():
            if half_mark:
                self.cut = True
            else:
                self._take(item)
        self._count(thinking)
        if self._call is not None:
            self._end_call(closed=False, by_length=by_length)
        if self._header:
            self._found.append(Delta(reasoning=self._header))
            self._header = None
        self._text("", flush=True)
        return self._pieces()

    def _take(self, item: Item) -> None:
        name = item.name if isinstance(item, Mark) else None
        style = self._style
        if name == style.call_open:
            if self._call is not None:
                self._end_call(closed=False)
            before = "" if self._thinking else self._breaks
            self._leave(call=True)
            self._call, self._raw, self._given = style.call_reader(), [before, item], False
        elif self._call is not None:
            self._raw.append(item)
            if name == style.call_close:
                self._end_call(closed=True)
            elif name in (style.thought_open, style.thought_close):
                self._give_up()
                self._take(item)
            else:
                self._read_call(item)
        elif name == style.thought_open:
            self._leave()
            self._thinking, self._header, self._leading = True, "", style.loose
        elif name == style.thought_close:
            self._leave()
            self._leading = style.loose
        elif isinstance(item, str):
            self._plain(item)
        elif item.shown:
            self._plain(item.shown)

    def _plain(self, text: str) -> None:
        """Take text outside of calls; the header of a thought is left out."""
        if self._header is not None:
            self._header += text
            if self._style.header.startswith(self._header) and self._header != self._style.header:
                return
            text, self._header = self._header.removeprefix(self._style.header), None
        if self._leading:
            text = text.lstrip("\n")
            self._leading = not text
        self._text(text)

    def _text(self, text: str, flush: bool = False) -> None:
        text = self._breaks + text
        kept = text if flush else text.rstrip("\n")
        self._breaks = text[len(kept) :]
        if kept:
            self._found.append(Delta(reasoning=kept) if self._thinking else Delta(content=kept))

    def _leave(self, call: bool = False) -> None:
        """End the thought, or the content before a mark."""
        if self._thinking and self._header and self._header != self._style.header:
            self._found.append(Delta(reasoning=self._header))  # the beginning of a header, and no more
        if not self._thinking and not call:
            self._text("", flush=True)
        self._header, self._breaks, self._thinking, self._leading = None, "", False, False

    def _read_call(self, item: Item) -> None:
        assert self._call is not None
        try:
            piece = self._call.feed(item)
        except MalformedError:
            self._give_up()
            return
        name = self._call.name
        if name is not None and name not in self._tools:
            self._give_up()
        elif self._stream and name is not None:
            if not self._given:
                self._given = True
                self._give(name, "")
            if piece:
                self._found.append(Delta(tool_call=ToolCallDelta(self._index, None, None, piece)))

    def _end_call(self, closed: bool, by_length: bool = False) -> None:
        """Give the call; where it is not complete, give it up, or drop it where the text would have gone on."""
        assert self._call is not None
        try:
            calls = self._call.close()
            if not all(call.name in self._tools for call in calls):
                raise MalformedError
        except MalformedError:
            if not closed and (by_length or self._given):
                self.cut, self._call, self._index = True, None, self._index + self._given
                return
            self._give_up()
            return
        for call in calls:
            if not self._given:
                self._give(call.name, call.arguments)
            self._index += 1
            self.calls += 1
            self._given = False
        self._call, self._leading = None, True

    def _give_up(self) -> None:
        """Turn what was read of the call into content. A call whose name was given stays incomplete."""
        raw, self._call = self._raw, None
        if self._given:
            self._index += 1
            self.cut = True
            raw = raw[-1:]
        for item in raw:
            self._text(item if isinstance(item, str) else item.shown)

    def _give(self, name: str, arguments: str) -> None:
        call = ToolCallDelta(self._index, f"call_{uuid.uuid4().hex[:24]}", name, arguments)
        self._found.append(Delta(tool_call=call))

    def _pieces(self) -> list[Delta]:
        found, self._found = self._found, []
        return list(joined(found))


def joined(deltas: Iterable[Delta]) -> Iterable[Delta]:
    """Yield `deltas` with neighbours of one kind as one."""
    last: Delta | None = None
    for one in deltas:
        if last is None:
            last = one
        elif last.content and one.content:
            last = Delta(content=last.content + one.content)
        elif last.reasoning and one.reasoning:
            last = Delta(reasoning=last.reasoning + one.reasoning)
        elif (call := last.tool_call) and (more := one.tool_call) and more.id is None and call.index == more.index:
            last = Delta(tool_call=ToolCallDelta(call.index, call.id, call.name, call.arguments + more.arguments))
        else:
            yield last
            last = one
    if last is not None:
        yield last
