"""Random text from tables: a pair of braces in a template is drawn anew for every text.

A table is a list of templates, or a dict of groups of them. In a template:

    {animal}  {topic@f}      an item of a table; from the group that tag f chose (the first to ask chooses)
    {animal:1}               the same item wherever :1 stands in this text; other draws from the table avoid it
    {a animal}  {many animal}  {^animal}     with its article; plural; first letter in upper case
    {2..4 of note_line/, }   several, with this between them (default: a space)
    {#topic@f}               the name of the group that tag f chose
    {3..90}  {3..90:n}       a number; the same number
    {yes|no|{a animal}}      one of these, on one line

Braces around anything else are text, so program code needs no escapes.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import accumulate

Table = Sequence[str] | Mapping[str, Sequence[str]]
Part = str | Callable[["Draw"], str]

_SLOT = re.compile(
    r"\{(?:(?P<low>-?\d+)\.\.(?P<high>\d+)(?::(?P<number>\w+))?|(?P<cap>\^?)(?:#(?P<group>\w+)@(?P<of>\w+)"
    r"|(?:(?P<least>\d+)\.\.(?P<most>\d+) of )?(?P<form>a |many |)"
    r"(?P<table>[a-z]\w*)(?:@(?P<at>\w+))?(?::(?P<tag>\w+))?(?:/(?P<between>[^{}]*))?))\}"
)
_TRIES = 3  # to find an item that this text does not have yet, before all are looked through


class Grammar:
    """Keep tables by name; `draw` begins a text. Templates are parsed when they are first drawn."""

    def __init__(self, tables: Mapping[str, Table]) -> None:
        self.tables = tables
        self._parsed: dict[str, tuple[Part, ...]] = {}
        self._groups: dict[str, tuple[list[str], list[int]]] = {}

    def draw(self, rng: random.Random, **kept: str) -> Draw:
        """Begin the random choices of one text; `kept` are tables of one item each that are there for this text
        only."""
        return Draw(self, rng, kept)

    def groups(self, table: str) -> tuple[list[str], list[int]]:
        """Return the names of a table's groups and their sizes summed up: every item has the same chance."""
        if table not in self._groups:
            found = self.tables[table]
            assert isinstance(found, Mapping), f"{table} has no groups"
            self._groups[table] = list(found), list(accumulate(map(len, found.values())))
        return self._groups[table]

    def parts(self, template: str) -> tuple[Part, ...]:
        """Return the parsed parts of `template`.

        Raises:
            ValueError: a slot names no table, and is not tagged `:given`.
        """
        if template not in self._parsed:
            self._parsed[template] = tuple(self._parse(template))
        return self._parsed[template]

    def _parse(self, text: str) -> Iterator[Part]:
        start, position = 0, text.find("{")  # start: of the text that is in no part yet
        while position >= 0:
            end = position + 1
            part: Part = ""
            if match := _SLOT.match(text, position):
                part, end = self._slot(match), match.end()
            elif options := _options(text, position):
                part, end = _choice([self.parts(option) for option in options]), position + len("|".join(options)) + 2
            if part:
                yield text[start:position]
                yield part
                start = end
            position = text.find("{", end)
        yield text[start:]

    def _slot(self, match: re.Match[str]) -> Part:
        low, high, number = match.group("low", "high", "number")
        if low:
            return lambda draw: draw.number(int(low), int(high), number)
        table, at, tag = match.group("table", "at", "tag")
        group, of = match.group("group", "of")
        if (group or table) not in self.tables and tag != "given":
            raise ValueError(f"{match[0]} names no table")
        form = _FORMS[match["form"] or ""]

        def one(draw: Draw) -> str:
            text = draw.group(group, of) if group else form(draw.item(table, at, tag))
            return text[:1].upper() + text[1:] if match["cap"] else text

        if not match["least"]:
            return one
        least, most, between = int(match["least"]), int(match["most"]), match["between"] or " "
        return lambda draw: between.join([one(draw) for _ in range(draw.rng.randint(least, most))])


class Draw:
    """Make the random choices of one text. `kept`: "table:tag" -> item, "@tag" -> group; no table repeats an item
    early."""

    def __init__(self, grammar: Grammar, rng: random.Random, given: Mapping[str, str]) -> None:
        """Begin without a choice. `given`: tables of one item each that are there for this text only."""
        self.rng = rng
        self.kept = {f"{name}:given": value for name, value in given.items()}
        self._grammar = grammar
        self._drawn: set[tuple[str, str]] = set()

    def expand(self, template: str) -> str:
        """Return `template` with all of its slots drawn."""
        return self.join(self._grammar.parts(template))

    def join(self, parts: Iterable[Part]) -> str:
        """Return `parts` as one text: strings as they are, and what the other parts draw."""
        return "".join([part if isinstance(part, str) else part(self) for part in parts])

    def item(self, table: str, at: str | None, tag: str | None) -> str:
        """Return a drawn item of `table`, itself expanded.

        `at`: the tag whose group the item comes from (None: any group); `tag`: a second call with this tag returns the
        same item. An item that this text has already is drawn again only when no other is left.
        """
        key = f"{table}:{tag}"
        if key in self.kept:
            return self.kept[key]
        items = self._grammar.tables[table]
        if isinstance(items, Mapping):
            items = items[self.group(table, at)]
        for _ in range(_TRIES):
            item = self.rng.choice(items)
            if (table, item) not in self._drawn:
                break
        else:
            item = self.rng.choice([item for item in items if (table, item) not in self._drawn] or items)
        self._drawn.add((table, item))
        value = self.expand(item)
        if tag:
            self.kept[key] = value
        return value

    def group(self, table: str, at: str | None) -> str:
        """Return the name of a drawn group of `table`; the chance of a group grows with its items.

        `at`: a second call with this tag returns the same name.
        """
        key = f"@{at}"
        if key in self.kept:
            return self.kept[key]
        names, cumulative = self._grammar.groups(table)
        name = self.rng.choices(names, cum_weights=cumulative)[0]
        if at:
            self.kept[key] = name
        return name

    def number(self, low: int, high: int, tag: str | None) -> str:
        """Return a number from `low` to `high` in digits; the same one for the same bounds and `tag`."""
        value = str(self.rng.randint(low, high))
        return self.kept.setdefault(f"{low}..{high}:{tag}", value) if tag else value


def _options(text: str, start: int) -> list[str]:
    """Return the alternatives of `{one|two}` at `start`; none if these braces are text."""
    depth, options, begin = 0, [], start + 1
    for position in range(start, len(text)):
        letter = text[position]
        depth += (letter == "{") - (letter == "}")
        if letter == "\n":
            break
        if depth == 0 or (depth == 1 and letter == "|"):
            options.append(text[begin:position])
            begin = position + 1
        if depth == 0:
            return options if len(options) > 1 else []
    return []


def _choice(options: Sequence[Sequence[Part]]) -> Part:
    return lambda draw: draw.join(draw.rng.choice(options))


_AN = re.compile(r"[aeio]|u(?!ni|se|k)|hour|honest|heir|[AEIO]|[FHLMNRSX](?![a-z])|8|11\b|18\b")
_NOT_AN = re.compile(r"eu|Eu|one\b|uni(?=[cfov])|unit")
_HEAD = re.compile(r"(.+?)( (?:of|in|on|after|from|with|without) .*)?")
_PLURALS = (
    (re.compile(r"(moose|salmon|sheep|fish|glasses)$"), r"\1"),
    (re.compile(r"man$"), "men"),
    (re.compile(r"child$"), "children"),
    (re.compile(r"mouse$"), "mice"),
    (re.compile(r"goose$"), "geese"),
    (re.compile(r"(kni|wi|li)fe$"), r"\1ves"),
    (re.compile(r"(wol|shel|lea|scar|thie)f$"), r"\1ves"),
    (re.compile(r"(potat|tomat|mang|ech|her)o$"), r"\1oes"),
    (re.compile(r"(s|x|z|ch|sh)$"), r"\1es"),
    (re.compile(r"([^aeiou])y$"), r"\1ies"),
)


def with_article(noun: str) -> str:
    """Return `noun` with its article: 'an owl', 'a unicorn', 'an SSD': by sound, as far as spelling tells it."""
    return f"{'an' if _AN.match(noun) and not _NOT_AN.match(noun) else 'a'} {noun}"


def plural(noun: str) -> str:
    """Return the plural of a countable noun: 'wolves', 'jars of honey'."""
    match = _HEAD.fullmatch(noun)
    head, rest = (match[1], match[2] or "") if match else (noun, "")
    for pattern, ending in _PLURALS:
        if pattern.search(head):
            return pattern.sub(ending, head) + rest
    return f"{head}s{rest}"


_FORMS: dict[str, Callable[[str], str]] = {"": str, "a ": with_article, "many ": plural}
