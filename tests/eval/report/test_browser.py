"""The report as a browser draws it: the script ran and nothing failed, themes, sorting by keys, narrow, in pictures."""

from __future__ import annotations

import json
import re
import struct
import zlib
from pathlib import Path
from typing import Any

import pytest

from eval import browser
from eval.browser import browse, find_browser
from eval.report.command import page
from eval.report.record import Node, label_runs
from eval.screenshots import height_of, shoot
from tests.support.bench_record import MANY, record

try:
    BROWSER, WHY = find_browser(), ""
except ValueError as reason:
    BROWSER, WHY = "", str(reason)
drawn = pytest.mark.skipif(not BROWSER, reason=WHY)

FRAME = """<iframe src="{}" width="{}" height="800"></iframe><script>
document.querySelector("iframe").addEventListener("load", (event) => {{
  const page = event.target.contentDocument, found = {{}};
  {}
  document.title = JSON.stringify(found);
}});
</script>"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("report") / "report.html"
    runs = [(Path(name), Node(record(MANY))) for name in ("a.json", "a-file-with-a-name-that-is-long-indeed.json")]
    path.write_text(page(label_runs(runs)), encoding="utf-8")
    return path


def inside(report: Path, width: int, script: str) -> dict[str, Any]:
    """What `script` put into `found` about `page`, the report in a frame of `width` px."""
    frame = report.with_name("frame.html")
    frame.write_text(FRAME.format(report.name, width, script), encoding="utf-8")
    told = browse(BROWSER, frame.as_uri(), "--allow-file-access-from-files", "--dump-dom").stdout
    title = re.search("<title>(.*?)</title>", told)
    assert title
    found: dict[str, Any] = json.loads(title[1].replace("&amp;", "&"))
    return found


def size_and_corner(picture: Path) -> tuple[int, int, tuple[int, ...]]:
    """Width, height and first pixel of a PNG, which no filter changes: it has no neighbours to differ from."""
    data, at, packed = picture.read_bytes(), 8, b""
    while at < len(data):
        size, kind = struct.unpack(">I4s", data[at : at + 8])
        packed += data[at + 8 : at + 8 + size] if kind == b"IDAT" else b""
        at += size + 12
    return *struct.unpack(">II", data[16:24]), tuple(zlib.decompress(packed)[1:4])


@drawn
def test_the_script_runs_and_nothing_fails(report: Path) -> None:
    done = browse(BROWSER, f"{report.as_uri()}#dark", "--dump-dom", "--enable-logging=stderr")
    opening = re.search("<html[^>]*>", done.stdout)
    assert opening and 'data-script="ran"' in opening[0] and 'data-theme="dark"' in opening[0]
    assert "CONSOLE" not in done.stderr, done.stderr


@drawn
def test_the_button_turns_the_theme_and_names_sort_the_table(report: Path) -> None:
    found = inside(
        report,
        1000,
        """
        for (const one of page.querySelectorAll("details")) one.open = true; // what is folded takes no keys
        const button = page.getElementById("theme"), root = page.documentElement;
        const state = () => [root.dataset.theme, button.textContent, button.hidden];
        button.click(); found.first = state(); button.click(); found.second = state();
        const column = 4, name = page.querySelectorAll("table.sortable thead th")[column];
        const values = () => [...page.querySelector("table.sortable").tBodies[0].rows].map(
          (row) => parseFloat(row.cells[column].textContent));
        const key = name.querySelector("button"); key.focus();
        found.focused = page.activeElement === key;
        key.click(); found.up = values(); found.upwards = name.getAttribute("aria-sort");
        key.click(); found.down = values(); found.downwards = name.getAttribute("aria-sort");
        """,
    )
    assert sorted([found["first"], found["second"]]) == [["dark", "Light theme", False], ["light", "Dark theme", False]]
    assert found["focused"] and (found["upwards"], found["downwards"]) == ("ascending", "descending")
    assert found["up"] == sorted(found["up"]) and found["down"] == sorted(found["up"], reverse=True)
    assert len(set(found["up"])) > 3


@drawn
@pytest.mark.parametrize("width", [360, 700, 1200])
def test_the_page_is_as_wide_as_its_window(report: Path, width: int) -> None:
    script = "found.wide = page.documentElement.scrollWidth; found.seen = page.documentElement.clientWidth;"
    found = inside(report, width, "for (const one of page.querySelectorAll('details')) one.open = true;" + script)
    assert found["wide"] == found["seen"] <= width


@drawn
def test_on_a_telephone_tables_scroll_beside_their_names_and_nothing_is_cut(report: Path) -> None:
    found = inside(
        report,
        375,
        """
        for (const one of page.querySelectorAll("details")) one.open = true;
        found.wide = []; found.moved = []; found.broad = []; found.cut = []; found.ends = [];
        const view = page.defaultView;
        for (const box of page.querySelectorAll(".scroll")) {
          const edge = box.getBoundingClientRect(), table = box.querySelector("table");
          if (edge.right > 375) found.wide.push(table.caption.textContent);
          box.scrollLeft = 100000;
          const name = table.tBodies[0].rows[0].cells[0].getBoundingClientRect();
          const last = [...table.tBodies[0].rows[0].cells].at(-1).getBoundingClientRect();
          if (Math.abs(name.left - edge.left) > 1) found.moved.push(table.caption.textContent);
          if (name.width > edge.width / 2) found.broad.push(table.caption.textContent);
          if (last.right > edge.right + 1 || last.left < name.right - 1) found.ends.push(table.caption.textContent);
          for (const cell of table.querySelectorAll("th, td"))
            if (cell.scrollWidth > cell.clientWidth + 1) found.cut.push(cell.textContent);
        }
        found.tables = page.querySelectorAll(".scroll").length;
        """,
    )
    assert found.pop("tables") > 10
    assert found == {"wide": [], "moved": [], "broad": [], "cut": [], "ends": []}


@drawn
def test_pictures_show_the_page_in_both_themes(report: Path, tmp_path: Path) -> None:
    corners = []
    for theme in ("light", "dark"):
        picture = tmp_path / "pictures" / f"{theme}.png"
        shoot(BROWSER, report, picture, 400, theme, 500)
        width, height, corner = size_and_corner(picture)
        assert (width, height) == (400, 500)
        assert picture.stat().st_size > 8000  # a blank one takes two thousand
        corners.append(corner)
    assert corners == [(0xF4, 0xF5, 0xF7), (0x12, 0x15, 0x19)]
    assert sorted(path.name for path in (tmp_path / "pictures").iterdir()) == ["dark.png", "light.png"]


@drawn
def test_only_a_report_has_a_height(report: Path, tmp_path: Path) -> None:
    assert height_of(BROWSER, report.as_uri(), 400) > height_of(BROWSER, report.as_uri(), 1200) > 1000
    other = tmp_path / "other.html"
    other.write_text("<p>hello", encoding="utf-8")
    with pytest.raises(ValueError, match="not a page of"):
        shoot(BROWSER, other, tmp_path / "x.png", 400)
    assert not (tmp_path / "x.png").exists()


def test_without_a_browser_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(browser, "BROWSERS", ("no-such-browser",))
    with pytest.raises(ValueError, match="apt install chromium"):
        find_browser()
