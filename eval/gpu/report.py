"""Judge what was measured on a GPU: bars, their table, and whether anything differs. Pure: no clock and no device."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table
from rich.text import Text

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Bar:
    """Keep what is wanted of the figure named `figure`: at least `least` of it, or at most `most`. `form` writes it."""

    name: str
    figure: str
    least: float | None = None
    most: float | None = None
    form: Callable[[float], str] = "{:.2f}".format

    def holds(self, value: float) -> bool:
        """Return whether `value` is what is wanted."""
        return (self.least is None or value >= self.least) and (self.most is None or value <= self.most)

    @property
    def wanted(self) -> str:
        """Return what is wanted in words."""
        if self.least is not None:
            return f"at least {self.form(self.least)}"
        assert self.most is not None
        return f"at most {self.form(self.most)}"


_SHARE, _TIMES = "{:.0%}".format, "{:.2f}x".format
BARS = (
    Bar("product of one row, 15360x3840 in 4 bits, of the bandwidth", "product_share", least=0.6, form=_SHARE),
    Bar("plain token, of bytes over bandwidth", "token_share", least=0.5, form=_SHARE),
    Bar("plain tokens a second, of transformers in bfloat16", "token_gain", least=3.0, form=_TIMES),
    Bar("V(4) / V(1)", "v4", most=1.1),
    Bar("V(8) / V(1)", "v8", most=1.2),
    Bar("a drafted token of a 12B's assistant, of V(1)", "draft_cost", most=0.05, form="{:.3f}".format),
    Bar("synthetic acceptance .8 .6 .5, three drafted, of plain", "drafted_gain", least=1.9, form=_TIMES),
    Bar("prefill of 2,048 tokens, of transformers in bfloat16", "prefill_gain", least=0.7, form=_TIMES),
    Bar("12B, drafter and 32k positions, GB of its memory", "memory_gb", most=9.5),
    Bar("texts that drafting left as they are", "identical_share", least=1.0, form=_SHARE),
)


def judge(figures: Figures) -> list[dict[str, Any]]:
    """Return every bar with its figure in JSON types: `ok` None where nothing was measured."""
    return [
        {
            "bar": bar.name,
            "figure": bar.figure,
            "wanted": bar.wanted,
            "measured": (value := figures.get(bar.figure)),
            "ok": None if value is None else bar.holds(value),
        }
        for bar in BARS
    ]


def differs(record: Figures) -> bool:
    """Return whether the results of this machine are not to be trusted: a check that does not hold or was not made, a
    drafted text that is not the plain one, texts that a GPU was to decode and did not, or an op that torch computes
    because its kernel failed its check."""
    if record["kernels_missing"] is not None or record.get("checks_ok") != len(record.get("checks", ())):
        return True
    if not record["interpreted"] and set(record.get("texts", ())) != set(record.get("texts_wanted", ("some",))):
        return True
    return record.get("identical_share", 1.0) < 1 or not record.get("drafted_text_is_plain_text", True)


def checks_table(checks: Sequence[Figures]) -> Table:
    """Return the table of what was compared with the reference, an op a row."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("op", "cases", "largest error", "allowed", "rows alike"):
        table.add_column(name, no_wrap=True)
    for kernel in dict.fromkeys(one["kernel"] for one in checks):
        of_it = [one for one in checks if one["kernel"] == kernel]
        worst = max(of_it, key=lambda one: (not one["ok"], one["error"]))
        alike = all(one["alike"] for one in of_it)
        style = "green" if all(one["ok"] for one in of_it) else "bold red"
        numbers = (str(len(of_it)), f"{worst['error']:.1e}", f"{worst['bound']:.1e}", "yes" if alike else "no")
        table.add_row(kernel, *(Text(number, style=style) for number in numbers))
    return table


def finite(value: Any) -> Any:
    """Return `value`, of JSON types, with None for each number that JSON cannot hold."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(one) for key, one in value.items()}
    return [finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def bars_table(figures: Figures) -> Table:
    """Return the table of all bars."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("what", "wanted", "measured"):
        table.add_column(name)
    for bar in BARS:
        value = figures.get(bar.figure)
        if value is None:
            found = Text("not measured", style="yellow")
        else:
            found = Text(bar.form(value), style="green" if bar.holds(value) else "bold red")
        table.add_row(bar.name, bar.wanted, found)
    return table
