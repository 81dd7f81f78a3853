"""The dashboard: its figures, its size, and what it says where there is nothing to say."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from threading import Thread
from typing import Any

import pytest
from rich.console import Console, Group, RenderableType

from eval.live.blocks import HEIGHT, apportion
from eval.live.dashboard import Dashboard
from specdec import Round
from specdec.drafting.costs import Costs

COSTS = Costs({rows: 0.010 + 0.001 * rows for rows in range(1, 10)}, {"suffix": 0.00003, "mtp": 0.0008})


def dashboard(costs: Costs | None = COSTS, memory: Any = (2_000_000_000, 8_000_000_000), **options: Any) -> Dashboard:
    return Dashboard(lambda: costs, lambda: memory, **options)


def done(drafted: int, accepted: int, source: str = "mtp", seconds: tuple[float, float, float] | None = None) -> Round:
    return Round((source,) * drafted, accepted, accepted + 1, *(seconds or (0.002, COSTS.of_pass(drafted + 1), 0.001)))


def drawn(what: RenderableType, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, record=True, highlight=False)
    console.print(what)
    return console.export_text().splitlines()


def row(lines: list[str], pattern: str) -> str:
    found = [match[0] for line in lines if (match := re.search(pattern, line))]
    assert len(found) == 1, (pattern, lines)
    return found[0]


# Four rounds: 4 drafted and 4, 1 and 0 of them right, and a plain one.
ROUNDS = [done(4, 4), done(4, 1), done(4, 0, "suffix"), done(0, 0)]

FEEDS: dict[str, Callable[[int], Round]] = {
    "as they come": lambda i: ROUNDS[i % 4],
    "plain ones": lambda _: done(0, 0),
    "long drafts": lambda i: done(20, i % 21, "a drafter with a long name"),
    "six drafters": lambda i: done(3, 1, "abcdef"[i % 6]),
    "no time at all": lambda _: done(2, 1, seconds=(0.0, 0.0, 0.0)),
    "for ever": lambda _: done(8, 8, seconds=(1e4, 1e5, 1e4)),
    "several texts": lambda _: Round((), 0, 7, 0.0, 0.02, 0.001),
}


@pytest.mark.parametrize("width", [100, 80, 70, 60])
@pytest.mark.parametrize("feed", FEEDS)
def test_every_frame_is_as_high_and_fits(feed: str, width: int) -> None:
    for costs, memory in ((COSTS, (1, 1)), (None, (None, None)), (Costs({1: 0.0, 2: 0.0}), (10**12, 10**9))):
        one = dashboard(costs, memory)
        for i in range(150):
            if i < 5 or i % 29 == 0:
                lines = drawn(one, width)
                assert len(lines) == HEIGHT
                assert max(map(len, lines)) <= min(width, 80)
            one.on_round(FEEDS[feed](i))


@pytest.mark.parametrize("width", [59, 40, 8])
def test_narrow_terminals_get_the_lines_cut_off(width: int) -> None:
    one = dashboard()
    for feed in FEEDS.values():
        lines = drawn(one, width)
        assert len(lines) == 7 and max(map(len, lines)) <= width
        one.on_round(feed(1))


def test_it_may_be_part_of_a_group() -> None:
    lines = drawn(Group("above", dashboard(), "below"), 80)
    assert lines[0] == "above" and lines[-1] == "below" and len(lines) == HEIGHT + 2


@pytest.mark.parametrize("width", [80, 60])
def test_figures_are_those_of_the_rounds(width: int) -> None:
    one = dashboard(window=2)
    for each in ROUNDS:
        one.on_round(each)
    lines = drawn(one, width)
    # V(5) three times and V(1): 56 ms of passes, and 3 ms each besides; the newest two: 15 + 11 + 6 ms for 2 tokens.
    assert row(lines, r"^(overall|all) +\S+ +\S+").split()[1:] == ["1.51x", f"{9 / 0.068:.1f}"]
    assert row(lines, r"^now +\S+ +\S+").split()[1:] == ["0.72x", f"{2 / 0.032:.1f}"]
    assert row(lines, r"mean \S+ now \S+") == "mean 2.25 now 1.00"
    assert row(lines, r"1 [█░]+ +\S+ +\S+").split()[2:] == ["50%", "67%"]
    assert row(lines, r"2 [█░]+ +\S+ +\S+").split()[2:] == ["25%", "33%"]
    assert row(lines, r"5 [█░]+ +\S+ +\S+").split()[2:] == ["-", "-"]
    assert "ms a round: 16.0" in "\n".join(lines)
    assert row(lines, r"█ verify +\S+ +\d+%").split()[2:] == ["13.0", "81%"]
    assert row(lines, r"mtp +\S+ +\S+").split() == ["mtp", "62%", "0.80"]
    assert row(lines, r"suffix +\S+ +\S+").split() == ["suffix", "0%", "0.03"]
    assert "4 rounds" in "\n".join(lines) and "3.00 drafted each" in "\n".join(lines)
    assert "2.00 GB of 8.00 GB" in "\n".join(lines)
    assert row(lines, r"9 [█▏▎▍▌▋▊▉]+ +19.0 +\S+").split()[-1] == "1.73x"
    bar = row(lines, r"^█+░+")
    assert bar.count("█") == round(len(bar) / 4) > 3, "memory: a quarter is taken"


def test_plain_decoding_is_estimated_or_measured() -> None:
    one = dashboard()
    assert one.figures().plain == pytest.approx(1 / 0.011), "V(1), before a round was heard"
    assert dashboard(None).figures().plain is None
    # Plain rounds are their own estimate, however slow the machine has become since the costs were measured.
    for _ in range(5):
        one.on_round(done(0, 0, seconds=(0.0, 0.022, 0.003)))
    assert one.figures().plain == pytest.approx(1 / 0.025)
    assert row(drawn(one, 80), r"^overall +\S+ +\S+").split() == ["overall", "1.00x", "40.0"]
    # Drafted ones at the pace of the costs: V(1), and a token's part of what a round costs besides.
    drafted = dashboard()
    for each in ROUNDS:
        drafted.on_round(each)
    assert drafted.figures().plain == pytest.approx(1 / (0.011 + 0.004 / 9))
    measured = dashboard(plain=20.0)
    measured.on_round(done(0, 0, seconds=(0.0, 0.022, 0.003)))
    assert row(drawn(measured, 80), r"^plain.*?\d\S*").split() == ["plain,", "measured", "20.0"]
    assert "plain 20.0 (measured): 2.00x" in measured.lines()[0]


@pytest.mark.parametrize("parts", [(1, 1, 1), (0.001, 99.0, 0.999), (0, 0, 5), (1e-9, 1e-9, 1e-8), (2, 3, 4)])
@pytest.mark.parametrize("total", [100, 25, 18, 0])
def test_shares_add_up(parts: tuple[float, ...], total: int) -> None:
    found = apportion(parts, total)
    assert sum(found) == total
    assert all(abs(n - total * part / sum(parts)) < 1 for n, part in zip(found, parts, strict=True))


def test_nothing_has_no_shares() -> None:
    assert apportion((0.0, 0.0), 100) == [0, 0]


def test_percentages_of_a_round_add_up() -> None:
    one = dashboard()
    one.on_round(done(1, 1, seconds=(0.01, 0.01, 0.01)))
    shares = re.findall(r"\((\d+)%\)", one.lines()[3])
    assert len(shares) == 3 and sum(map(int, shares)) == 100


def test_lines_say_the_same() -> None:
    one = dashboard()
    for each in ROUNDS:
        one.on_round(each)
    assert one.lines() == [
        "tokens/s: 132.4 now, 132.4 overall, plain 87.4 (estimated): 1.51x",
        "tokens per round: 2.25, now 2.25; 4 rounds, 5 of 12 drafted tokens accepted",
        "accepted by position: 50% 25% 25% 25%; of those that reached it: 67% 33% 33% 33%",
        "a round: draft 2.0 ms (12%), verify 14.0 ms (82%), other 1.0 ms (6%)",
        "V(1) to V(9): 11.0 12.0 13.0 14.0 15.0 16.0 17.0 18.0 19.0 ms",
        "rounds by draft length: 0: 1, 4: 3; mtp 62% accepted, d 0.80 ms; suffix 0% accepted, d 0.03 ms",
        "memory: 2.00 GB of 8.00 GB",
    ]
    empty = dashboard(None, (None, None)).lines()
    assert len(empty) == 7
    assert empty[0] == "tokens/s: - now, - overall, plain not known"
    assert empty[4:] == [
        "V(T): not measured",
        "rounds by draft length: -; nothing drafted",
        "memory: unknown, no budget",
    ]


def test_the_course_keeps_every_round_in_few_cells() -> None:
    one = dashboard()
    for i in range(1000):
        one.on_round(done(4, 4 * (i >= 500)))
        course = one.figures().course
        assert len(course) <= 48 and sum(n for n, _ in course) == i + 1
    assert sum(accepted for _, accepted in course) == 2000
    lines = drawn(one, 80)
    marks = row(lines, r"^[▁▂▃▄▅▆▇█]{8,}")
    assert marks[0] == "▁" and marks[-1] == "█" and len(marks) <= 25
    assert "▁1 █5.0, each 64 rounds" in "\n".join(lines)


def test_costs_that_change_meanwhile_are_those_of_a_moment_ago() -> None:
    answers: list[Any] = [COSTS, RuntimeError("dictionary changed size during iteration")]

    def costs() -> Costs:
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer  # type: ignore[no-any-return]

    one = Dashboard(costs, lambda: (None, None))
    assert one.figures().costs is one.figures().costs is COSTS


def test_rounds_are_heard_while_it_is_drawn() -> None:
    one = dashboard()

    def decode() -> None:
        for i in range(5000):
            one.on_round(done(i % 12, i % 12 // 2))

    decoding = Thread(target=decode)
    decoding.start()
    frames = 0
    while decoding.is_alive() or not frames:
        assert len(drawn(one, 80)) == HEIGHT
        frames += 1
    assert one.figures().stats.rounds == 5000
