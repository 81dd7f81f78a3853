"""Charts of a report: places of values, scales, and colours that can be told apart."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from eval.report.charts import Bar, BarMark, Part, bars, element
from eval.report.speed import bar

ROOT = Path(__file__).parents[3]
BARS = ("blue", "sky", "orange", "green", "pink", "gold", "grey")


def test_no_value_lies_across_the_mark() -> None:
    drawn = bars([("", [bar("slow", 0.9, "0.90x"), bar("fast", 1.8, "1.80x")])], BarMark(1.0, "1.0x"))
    places = dict(re.findall(r'class="value" x="([\d.]+)%"[^>]*>([^<]+)<', drawn.inside))
    assert {text: float(place) for place, text in places.items()} == {
        "0.90x": pytest.approx(100 / 1.8, abs=0.01),  # behind the line, not beside the bar
        "1.80x": pytest.approx(100.0),
    }


def test_bars_keep_their_scale_and_stay_in_sight() -> None:
    drawn = bars(
        [("", [Bar("a", (Part(3.0, "main"),), "3"), Bar("b", (Part(-1.0, "main"),), "-1")])], BarMark(1.5, "half")
    )
    assert re.findall(r'<rect [^>]*width="([\d.]+)%"', drawn.inside) == ["100.00", "0.00"]
    assert 'x1="50.00%"' in drawn.inside and drawn.says == "a: 3; b: -1; line at half"
    assert element("p", "<", title='"') == '<p title="&quot;">&lt;</p>'


def test_colours_can_be_told_from_what_is_behind_them() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    style = (ROOT / "eval" / "report" / "report.css").read_text(encoding="utf-8")
    found = {name: both for name, *both in re.findall(r"--([\w-]+): light-dark\((#\w+), (#\w+)\)", style)}
    for theme in (0, 1):
        for name, least in (*((n, 4.5) for n in ("text", "faint", "link", "good", "bad")), *((n, 3.0) for n in BARS)):
            for behind in ("card", "back"):
                one, two = sorted(luminance(found[n][theme]) for n in (name, behind))
                assert (two + 0.05) / (one + 0.05) >= least, (name, behind, theme)
