"""The parts that the report is drawn with: figures in words, elements, tables, and charts as inline SVG. Pure.

Along a chart places are shares of its width and down it they are pixels, without a viewBox: text keeps its size at any
width, so one chart serves a wide screen, a telephone and paper. Names and values stand beside the <svg>, in margins as
wide as they are: percentages cannot leave room for pixels. Colours are classes ("tones") of report.css, and every bar
says its name and value itself, so that no colour has to be told from another. All text is escaped here: only an `Html`
goes to the page as it is, and this file alone makes an `Html` of text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape

NONE = "–"
_ROW, _THICK, _HEADING = 20, 13, 22  # px: a bar's line, the bar in it, a group's heading
_LETTER = 6.7  # px of a letter at the charts' 12 px, generously
_LABEL = 22  # letters of a bar's name; what is longer is cut, and whole in the table below
_INSIDE = 0.17  # a share of the chart's width in which a part of a bar can say its own


class Html(str):
    """Mark text that is markup already."""

    __slots__ = ()


def _markup(text: str) -> Html:
    return text if isinstance(text, Html) else Html(escape(text))


def element(name: str, *children: str, **attributes: object) -> Html:
    """Return `<name attributes>children</name>`; `class_` is class, `aria_label` is aria-label, None leaves one out."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    words = "".join(f' {key}="{escape(str(value))}"' for key, value in given.items())
    return Html(f"<{name}{words}>{''.join(map(_markup, children))}</{name}>")


def join_parts(parts: Iterable[str]) -> Html:
    """Return the escaped parts one after another."""
    return Html("".join(map(_markup, parts)))


def fill(form: str, value: float | None) -> str:
    """Return `value` in the form `form` of `str.format`; a dash for None."""
    return NONE if value is None else form.format(value)


def times(value: float | None) -> str:
    """Return a ratio as "1.23x"; a dash for None."""
    return fill("{:.2f}x", value)


def count(value: float | None) -> str:
    """Return a whole number with commas; a dash for None."""
    return fill("{:,.0f}", value)


def format_percent(value: float | None) -> str:
    """Return a share from 0 to 1 in whole percent; a dash for None."""
    return fill("{:.0%}", value)


def duration(seconds: float | None) -> str:
    """Return a time in ms with one or two places, from a second on in seconds; a dash for None."""
    if seconds is None or seconds >= 1:
        return fill("{:.2f} s", seconds)
    return f"{1000 * seconds:.1f} ms" if seconds >= 0.01 else f"{1000 * seconds:.2f} ms"


def size(nbytes: float | None) -> str:
    """Return bytes in MB, from 10^9 on in GB; a dash for None."""
    if nbytes is None or nbytes >= 1e9:
        return fill("{:.2f} GB", nbytes and nbytes / 1e9)
    return f"{nbytes / 1e6:.0f} MB" if nbytes >= 1e7 else f"{nbytes / 1e6:.1f} MB"


def table(caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], kind: str | None = None) -> Html:
    """Return a table, in which the first cell of a row is its heading.

    Figures stand to the right, except in a table of `kind` "words".
    """
    right = [kind != "words" and all(_is_figure(row[i]) for row in rows) for i in range(len(head))]
    names = [element("th", name, scope="col", class_="n" if n else None) for name, n in zip(head, right, strict=True)]
    lines = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell, class_="n" if n else None) for cell, n in zip(row[1:], right[1:], strict=True)),
        )
        for row in rows
    ]
    whole = element(
        "table",
        element("caption", caption),
        element("thead", element("tr", *names)),
        element("tbody", *lines),
        class_=kind,
    )
    return element("div", whole, class_="scroll", role="group", aria_label=caption, tabindex=0)


def _is_figure(cell: str) -> bool:
    return cell == NONE or cell[:1].isdigit()


def collapsible(summary: str, *children: str, open_: bool = False) -> Html:
    """Return <details> that `summary` unfolds; `open_`: unfolded at first."""
    return element("details", element("summary", summary), *children, open="open" if open_ else None)


def legend(entries: Iterable[tuple[str, str]]) -> Html:
    """Return a legend. `entries`: each tone with its meaning."""
    return element(
        "ul",
        *(element("li", element("span", class_=f"swatch {tone}", aria_hidden="true"), text) for tone, text in entries),
        class_="legend",
    )


@dataclass(frozen=True)
class Drawing:
    """Keep the inside of a chart, its height and the margins beside it in px, and its text for readers who do not see
    it."""

    inside: Html
    height: float
    left: float
    right: float
    says: str


def svg(name: str, title: str, drawing: Drawing) -> Html:
    """Return a chart as an <svg>; `name` is its id on the page."""
    return element(
        "svg",
        element("title", title, id=f"{name}-title"),
        element("desc", drawing.says, id=f"{name}-desc"),
        drawing.inside,
        xmlns="http://www.w3.org/2000/svg",
        id=name,
        role="img",
        aria_labelledby=f"{name}-title {name}-desc",
        height=round(drawing.height),
        style=f"margin-left:{drawing.left:.0f}px;width:calc(100% - {drawing.left + drawing.right:.0f}px)",
    )


@dataclass(frozen=True)
class Part:
    """Describe a stretch of a bar; `text` stands inside it where there is room."""

    value: float
    tone: str
    text: str = ""


@dataclass(frozen=True)
class Bar:
    """Describe a bar of parts one after another. `text` is the bar's value in words, at its end."""

    label: str
    parts: tuple[Part, ...]
    text: str

    @property
    def length(self) -> float:
        """Return the sum of the parts; a negative part counts as none."""
        return sum(max(part.value, 0.0) for part in self.parts)


@dataclass(frozen=True)
class BarMark:
    """Describe a line across all bars at `value`."""

    value: float
    text: str


Group = tuple[str, Sequence[Bar]]


def longest(groups: Iterable[Group], mark: BarMark | None = None) -> float:
    """Return the value that takes all of the width: charts that are compared share it."""
    return max([bar.length for _, bars in groups for bar in bars] + ([mark.value] if mark else []), default=0.0)


def bars(groups: Sequence[Group], mark: BarMark | None = None, most: float | None = None) -> Drawing:
    """Draw horizontal bars in groups (an empty name: no heading), from zero to `most`, or to the longest one."""
    scale = max(longest(groups, mark) if most is None else most, 1e-300)
    every = [bar for _, some in groups for bar in some]
    left = min(max((len(bar.label) for bar in every), default=0), _LABEL) * _LETTER + 10
    right = max((len(bar.text) for bar in every), default=0) * _LETTER + 10
    top = y = 18.0 if mark else 2.0
    drawn: list[Html] = []
    values: list[Html] = []  # on top of the mark
    said: list[str] = []
    for heading, some in groups:
        if heading:
            drawn.append(element("text", heading, class_="heading", x=round(-left), y=round(y + 15)))
            y += _HEADING
        start = y
        for bar in some:
            drawn.append(element("text", _cut(bar.label), x=-8, y=round(y + 14), text_anchor="end"))
            place = y + (_ROW - _THICK) / 2
            drawn += _parts(bar, place, scale)
            # Behind the mark, where the bar ends before it: beside the bar the value might lie across the line.
            end = max(bar.length, mark.value) if mark else bar.length
            at = {"x": _percent(end / scale), "dx": 6, "y": round(place + 10.5, 1)}
            values.append(element("text", bar.text, class_="value", **at))
            said.append(f"{heading + ', ' if heading else ''}{bar.label}: {bar.text}")
            y += _ROW
        drawn.append(element("line", class_="axis", x1=0, x2=0, y1=start, y2=y))
        y += 6 if heading else 0
    if mark:
        x = _percent(mark.value / scale)
        drawn.append(element("line", class_="mark", x1=x, x2=x, y1=top - 2, y2=y))
        drawn.append(element("text", mark.text, class_="faint", x=x, y=11, text_anchor="middle"))
        said.append(f"line at {mark.text}")
    return Drawing(join_parts([*drawn, *values]), y + 2, left, right, "; ".join(said))


def _parts(bar: Bar, y: float, scale: float) -> list[Html]:
    drawn, at = [], 0.0
    for part in bar.parts:
        share = max(part.value, 0.0) / scale
        x, place = _percent(at), round(y, 1)
        drawn.append(element("rect", class_=part.tone, x=x, y=place, width=_percent(share), height=_THICK))
        if part.text and share >= _INSIDE:
            inside = {"class_": f"inside on-{part.tone}", "x": _percent(at + share / 2), "text_anchor": "middle"}
            drawn.append(element("text", part.text, y=round(y + 10.5, 1), **inside))
        at += share
    return drawn


@dataclass(frozen=True)
class Line:
    """Describe a curve by its `points` (x, y) from the left to the right, one at least."""

    name: str
    tone: str
    points: tuple[tuple[float, float], ...]


_PLOT, _ABOVE, _BELOW, _LEFT, _RIGHT = 160, 30, 42, 36, 24  # px
_VALUES = 8  # values that stand side by side on a telephone


def lines(series: Sequence[Line], x_name: str, y_name: str, show: Callable[[float], str]) -> Drawing:
    """Draw points that straight lines connect; `show` gives a value's text; the y axis begins at zero."""
    points = [point for line in series for point in line.points]
    ticks = _ticks(max((y for _, y in points), default=0.0))
    first, last = min((x for x, _ in points), default=0.0), max((x for x, _ in points), default=0.0)
    bottom = _ABOVE + _PLOT

    def down(y: float) -> float:
        return round(bottom - _PLOT * y / ticks[-1], 1)

    def across(x: float) -> str:
        return _percent((x - first) / (last - first) if last > first else 0.5)

    drawn = [element("text", y_name, class_="faint", x=-_LEFT, y=11)]
    for tick in ticks:
        drawn.append(element("line", class_="grid-line", x1=0, x2="100%", y1=down(tick), y2=down(tick)))
        drawn.append(element("text", f"{tick:g}", class_="faint", x=-12, y=down(tick) + 4, text_anchor="end"))
    places = sorted({x for x, _ in points})
    for x in places[:: -(-len(places) // _VALUES)] if places else []:
        drawn.append(element("text", f"{x:g}", class_="faint", x=across(x), y=bottom + 18, text_anchor="middle"))
    drawn.append(element("text", x_name, class_="faint", x="50%", y=bottom + 38, text_anchor="middle"))
    for number, line in enumerate(series):
        for (x1, y1), (x2, y2) in zip(line.points, line.points[1:], strict=False):
            ends = {"x1": across(x1), "y1": down(y1), "x2": across(x2), "y2": down(y2)}
            drawn.append(element("line", class_=f"curve {line.tone} dash{number % 4}", **ends))
        every = -(-len(line.points) // _VALUES)
        for i, (x, y) in enumerate(line.points):
            drawn.append(element("circle", class_=line.tone, cx=across(x), cy=down(y), r=4))
            if len(series) == 1 and i % every == 0:
                place = {"x": across(x), "y": down(y) - 9, "text_anchor": "middle"}
                drawn.append(element("text", show(y), class_="value", **place))
    if len(series) > 1:
        ends_of = _apart([(down(line.points[-1][1]), across(line.points[-1][0]), line.name) for line in series])
        drawn += [element("text", name, class_="value", x=x, dx=10, y=y + 4) for y, x, name in ends_of]
    says = "; ".join(f"{line.name}: " + ", ".join(f"{x:g} {show(y)}" for x, y in line.points) for line in series)
    return Drawing(join_parts(drawn), bottom + _BELOW, _LEFT, _RIGHT, f"{y_name} by {x_name}. {says}")


def _ticks(most: float) -> list[float]:
    """Return four to six round steps from zero to above `most`."""
    if most <= 0:
        return [0.0, 1.0]
    rough = most / 4
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * nice for nice in (1, 2, 2.5, 5, 10) if power * nice >= rough * 0.999)
    return [step * i for i in range(math.ceil(most / step * 0.999) + 1)]


def _apart(places: Sequence[tuple[float, str, str]], least: float = 14.0) -> list[tuple[float, str, str]]:
    """Move names (y, x, name) at the ends of lines down where they would lie upon each other."""
    moved: list[tuple[float, str, str]] = []
    for y, x, name in sorted(places):
        moved.append((max(y, moved[-1][0] + least) if moved else y, x, name))
    return moved


def _cut(text: str, letters: int = _LABEL) -> str:
    return text if len(text) <= letters else text[: letters - 1] + "…"


def _percent(share: float) -> str:
    return f"{100 * share:.2f}%"
