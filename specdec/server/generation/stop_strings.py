"""Stop strings, cut out of a text that comes in pieces: one may be spread over several tokens and rounds."""

from __future__ import annotations

from collections.abc import Sequence

from specdec.server.formats.reader import overlap


class StopStrings:
    """Cut a text where the first of several strings begins, and hold back what could be the beginning of one."""

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = [string for string in strings if string]
        self.found: str | None = None
        self._held = ""

    def feed(self, text: str) -> str:
        """Return the part of the text so far that no stop string can reach; `found` is set when one has come."""
        if not self.strings or self.found is not None:
            return "" if self.found is not None else text
        text = self._held + text
        places = [(text.find(string), -len(string), string) for string in self.strings if string in text]
        if places:
            place, _, self.found = min(places)
            self._held = ""
            return text[:place]
        held = max(overlap(text, string) for string in self.strings)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return what was held back: the text has ended before a stop string."""
        held, self._held = self._held, ""
        return held
