"""The live dashboard: what drafting does, from the rounds that it hears of.

`Dashboard.heard` is for `generate(on_round=...)`, `Dashboard` itself is for rich: printed, or inside a Live or a Group,
it is always as high, empty or full, so that nothing jumps. 80 columns and 60 give three columns of blocks; where there
are fewer, and where no terminal is, `lines()` say the same.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from threading import Lock

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from eval.dashboard import WIDTH, share, size
from eval.metrics import acceptance_by_position
from specdec.control import Costs
from specdec.stats import GenerationStats, Round

HEIGHT = 16  # lines, from NARROW columns on
NARROW = 60  # columns that three blocks need side by side
_WIDE = 24  # columns of a block that has room for longer words
WINDOW = 64  # rounds that "now" means
_POSITIONS, _ROWS, _SOURCES = 8, 9, 3  # that have a line each
_CELLS = 48  # of the course of the acceptance length: twice as many as are drawn
_GAP = 2  # columns between blocks
_EIGHTHS = " ▏▎▍▌▋▊▉"
_LEVELS = " ▁▂▃▄▅▆▇█"
_PHASES = (("draft", "▒", "yellow"), ("verify", "█", "cyan"), ("other", "░", "dim"))

Memory = tuple[int | None, int | None]
"""Bytes that the process takes now, and those that it may take; None: not known, and no budget."""


@dataclass(frozen=True)
class Figures:
    """What there is to draw at one moment: the counts of all rounds, and of the newest ones.

    `course`: pairs of rounds and the tokens accepted in them, oldest first. `costs`: None where nobody measured them.
    `measured`: tokens/s of plain decoding, None where nobody measured them either.
    """

    stats: GenerationStats
    now: GenerationStats
    course: list[list[int]]
    costs: Costs | None
    memory: Memory
    measured: float | None

    @property
    def plain(self) -> float | None:
        """Tokens/s of plain decoding, as measured; else 1 / V(1), at the pace at which the rounds' passes went and with
        what a token cost besides. For plain rounds that is their own speed, for drafted ones too high if anything: the
        tokens of a round share what it costs besides."""
        if self.measured is not None or self.costs is None:
            return self.measured
        one, stats = self.costs.of_pass(1), self.stats
        expected = sum(n * self.costs.of_pass(k + 1) for k, n in stats.draft_lengths.items())
        if expected > 0:
            one *= stats.seconds["verify"] / expected
        if stats.emitted:
            one += stats.seconds["other"] / stats.emitted
        return 1 / one if one > 0 else None

    def ratio(self, stats: GenerationStats) -> str:
        """Their speed against plain."""
        plain = self.plain
        return f"{stats.decode_tokens_per_second / plain:.2f}x" if plain and stats.rounds else "-"

    @property
    def sources(self) -> list[tuple[str, str, str]]:
        """Of every source, the busiest first: name, accepted share, d in ms."""
        steps = self.costs.steps if self.costs is not None else {}
        records = {name: (0, 0) for name in steps} | {k: (n, a) for k, (n, a) in self.stats.draft_sources.items()}
        return [
            (name, share(accepted / drafted) if drafted else "-", f"{1e3 * steps[name]:.2f}" if name in steps else "-")
            for name, (drafted, accepted) in sorted(records.items(), key=lambda one: -one[1][0])
        ]


class Dashboard:
    """Counts rounds, and draws them.

    `costs` and `memory` are asked whenever it is drawn. `plain`: tokens a second after the first, where plain decoding
    was measured. `window`: so many rounds are "now".
    """

    def __init__(
        self,
        costs: Callable[[], Costs | None],
        memory: Callable[[], Memory],
        plain: float | None = None,
        window: int = WINDOW,
    ) -> None:
        self.costs, self.memory, self.plain = costs, memory, plain
        self._lock = Lock()  # rounds are heard in the thread that decodes, and drawn in rich's
        self._stats = GenerationStats()
        self._newest: deque[Round] = deque(maxlen=window)
        self._course: list[list[int]] = []
        self._per_cell = 1  # rounds
        self._known: Costs | None = None

    def heard(self, done: Round) -> None:
        """A round is over. Only counts: it is called between two passes."""
        with self._lock:
            _count(self._stats, done)
            self._newest.append(done)
            if not self._course or self._course[-1][0] == self._per_cell:
                if len(self._course) == _CELLS:  # half as many, each of twice the rounds
                    pairs = zip(self._course[::2], self._course[1::2], strict=True)
                    self._course = [[a[0] + b[0], a[1] + b[1]] for a, b in pairs]
                    self._per_cell *= 2
                self._course.append([0, 0])
            self._course[-1][0] += 1
            self._course[-1][1] += done.accepted

    def figures(self) -> Figures:
        """All as it is now, in copies that nobody changes."""
        stats, now = GenerationStats(), GenerationStats()
        with self._lock:
            stats.merge(self._stats)
            newest, course = list(self._newest), [list(cell) for cell in self._course]
        for one in newest:
            _count(now, one)
        with suppress(RuntimeError):  # the decoding thread adds a figure just now: costs as they were a moment ago
            self._known = self.costs()
        return Figures(stats, now, course, self._known, self.memory(), self.plain)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.draw(options.max_width)

    def draw(self, width: int = WIDTH) -> Text:
        """HEIGHT lines of at most `width` columns; below NARROW the plain lines, cut off."""
        width = min(width, WIDTH)
        if width < NARROW:
            rows = [Text(line) for line in self.lines()]
            for row in rows:
                row.truncate(width, overflow="ellipsis")
        else:
            figures, each = self.figures(), (width - 2 * _GAP) // 3
            columns = (
                [*_speed(figures, each), *_course(figures, each), *_round(figures, each), *_memory(figures, each)],
                [*_positions(figures, each), *_lengths(figures, each)],
                [*_passes(figures, each), *_sources(figures, each)],
            )
            assert all(len(column) == HEIGHT for column in columns)
            for cell in (cell for column in columns for cell in column):
                cell.truncate(each, overflow="crop", pad=True)
            rows = [Text(" " * _GAP).join(cells) for cells in zip(*columns, strict=True)]
        return Text("\n", no_wrap=True, overflow="crop").join(rows)

    def lines(self) -> list[str]:
        """The same in seven plain lines."""
        f = self.figures()
        stats, now = f.stats, f.now
        against = "plain not known"
        if f.plain is not None:
            kind = "estimated" if f.measured is None else "measured"
            against = f"plain {f.plain:.1f} ({kind}): {f.ratio(stats)}"
        positions = acceptance_by_position(stats)
        every, reached = (" ".join(share(p[key]) for p in positions) for key in ("accepted", "accepted_of_reached"))
        phases = zip(_PHASES, _phase_ms(now), _phase_shares(now), strict=True)
        passes = " ".join(f"{1e3 * f.costs.of_pass(rows):.1f}" for rows in range(1, _ROWS + 1)) if f.costs else ""
        lengths = ", ".join(f"{k}: {n}" for k, n in sorted(stats.draft_lengths.items()))
        sources = "; ".join(f"{name} {right} accepted, d {d} ms" for name, right, d in f.sources)
        return [
            f"tokens/s: {_speed_text(now)} now, {_speed_text(stats)} overall, {against}",
            f"tokens per round: {stats.mean_acceptance_length:.2f}, now {now.mean_acceptance_length:.2f}; "
            f"{stats.rounds:,} rounds, {stats.accepted:,} of {stats.drafted:,} drafted tokens accepted",
            f"accepted by position: {every or '-'}; of those that reached it: {reached or '-'}",
            "a round: " + ", ".join(f"{phase} {ms} ms ({part})" for (phase, _, _), ms, part in phases),
            f"V(1) to V({_ROWS}): {passes} ms" if passes else "V(T): not measured",
            f"rounds by draft length: {lengths or '-'}; {sources or 'nothing drafted'}",
            f"memory: {_memory_text(f.memory)}",
        ]


def apportioned(parts: Sequence[float], total: int) -> list[int]:
    """Whole numbers in proportion to `parts` that add up to `total`; zeros where all parts are."""
    whole = sum(parts)
    if whole <= 0:
        return [0] * len(parts)
    exact = [total * part / whole for part in parts]
    found = [int(one) for one in exact]
    most_left = sorted(range(len(parts)), key=lambda i: found[i] - exact[i])
    for i in most_left[: total - sum(found)]:
        found[i] += 1
    return found


# Every block is as many lines of `width` columns, 18 or more, whatever there is to say.


def _speed(f: Figures, width: int) -> list[Text]:
    rows = [
        f"{label:<{width - 13}}{f.ratio(stats):>6}{_speed_text(stats):>7}"
        for label, stats in (("now", f.now), (_fitting(width, "overall", "all"), f.stats))
    ]
    kind = _fitting(width, "estimated", "est.") if f.measured is None else _fitting(width, "measured", "real")
    label, figure = ("plain", "-") if f.plain is None else (f"plain, {kind}", f"{f.plain:.1f}")
    plain = f"{label:<{width - 7}}{figure:>7}"
    return [_title("tokens/s", width), *map(Text, (*rows, plain))]


def _course(f: Figures, width: int) -> list[Text]:
    together = max(1, -(-len(f.course) // width))
    marks = [f.course[i : i + together] for i in range(0, len(f.course), together)]
    lengths = [1 + sum(a for _, a in mark) / sum(n for n, _ in mark) for mark in marks]
    high = max([2.0, *lengths])
    drawn = "".join(_LEVELS[1 + round(7 * (length - 1) / (high - 1))] for length in lengths)
    each = f", each {sum(n for n, _ in marks[0])} rounds" if marks else ""
    scale = f"▁1 █{high:.1f}{_fitting(width, each, '')}"
    mean, now = (f"{s.mean_acceptance_length:.2f}" if s.rounds else "-" for s in (f.stats, f.now))
    lines = (Text(drawn, style="cyan"), Text(f"mean {mean} now {now}"), Text(scale, style="dim"))
    return [_title("tokens per round", width), *lines]


def _round(f: Figures, width: int) -> list[Text]:
    seconds = [f.now.seconds[phase] for phase, _, _ in _PHASES]
    shown = zip(_PHASES, apportioned(seconds, width), _phase_ms(f.now), _phase_shares(f.now), strict=True)
    bar, rows = Text(), []
    for (phase, mark, style), cells, ms, part in shown:
        bar.append(mark * cells, style)
        rows.append(Text.assemble((mark, style), f" {phase:<6}{ms:>{width - 12}}{part:>4}"))
    each = f": {1e3 * sum(seconds) / f.now.rounds:.1f}" if f.now.rounds else ""
    return [_title(f"ms a round{each}", width), bar, *rows]


def _memory(f: Figures, width: int) -> list[Text]:
    now, budget = f.memory
    bar = _bar(now / budget, width) if now is not None and budget else Text()
    return [_title("memory", width), bar, Text(_memory_text(f.memory))]


def _positions(f: Figures, width: int) -> list[Text]:
    positions, room = acceptance_by_position(f.stats), width - 15
    more = f"1-{_POSITIONS}/{len(positions)}" if len(positions) > _POSITIONS else ""
    rows = [Text(f"{more:<{room}}{'of all':>7}{'reached':>8}", style="dim")]
    for i in range(_POSITIONS):
        every = reached = "-"
        accepted = 0.0
        if i < len(positions):
            accepted = positions[i]["accepted"]
            every, reached = share(accepted), share(positions[i]["accepted_of_reached"])
        rows.append(Text.assemble(f"{i + 1} ", _bar(accepted, room), f"{every:>5}{reached:>8}"))
    return [_title(_fitting(width, "accepted at position", "accepted at"), width), *rows]


def _lengths(f: Figures, width: int) -> list[Text]:
    counts, stats = [0] * (_POSITIONS + 1), f.stats
    for length, n in stats.draft_lengths.items():
        counts[min(length, _POSITIONS)] += n
    levels = [max(round(16 * n / (max(counts) or 1)), n > 0) for n in counts]
    upper, lower = (" ".join(_LEVELS[min(8, max(0, level - below))] for level in levels) for below in (8, 0))
    labels = " ".join(map(str, range(_POSITIONS + 1))) + "+"
    each = f"{stats.drafted / stats.rounds:.2f}" if stats.rounds else "-"
    below = map(Text, (labels, f"{stats.rounds:,} rounds", f"{each} drafted each"))
    return [_title("draft lengths", width), Text(upper, style="cyan"), Text(lower, style="cyan"), *below]


def _passes(f: Figures, width: int) -> list[Text]:
    title, room = _title("V(T), ms a pass", width), width - 15
    if f.costs is None:
        return [title, Text("not measured"), *(Text() for _ in range(_ROWS - 1))]
    times = [f.costs.of_pass(rows) for rows in range(1, _ROWS + 1)]
    rows = []
    for i, seconds in enumerate(times):
        whole, rest = divmod(round(8 * room * seconds / (max(times) or 1)), 8)
        bar = f"{'█' * whole + _EIGHTHS[rest]:<{room}}"[:room]
        ratio = f"{seconds / times[0]:.2f}x" if times[0] > 0 else "-"
        rows.append(Text.assemble(f"{i + 1} ", (bar, "cyan"), f"{1e3 * seconds:>7.1f}{ratio:>6}"))
    return [title, *rows]


def _sources(f: Figures, width: int) -> list[Text]:
    room, stats = width - 11, f.stats
    rows = [Text(f"{name[: room - 1]:<{room}}{right:>5}{d[:5]:>6}") for name, right, d in f.sources[:_SOURCES]]
    rows += [Text("-") for _ in range(_SOURCES - len(rows))]
    label, rate = _fitting(width, f"all {stats.drafted:,}", "all"), share(stats.acceptance_rate)
    total = Text(f"{label:<{room}}{rate if stats.drafted else '-':>5}")
    header = Text(f"{'':<{room}}{'right':>5}{'d, ms':>6}", style="dim")
    return [_title("drafted by", width), header, *rows, total]


def _title(title: str, width: int) -> Text:
    return Text.assemble((title, "bold"), (f" {'─' * (width - len(title) - 1)}", "dim"))


def _fitting(width: int, long: str, short: str) -> str:
    return long if width >= _WIDE else short


def _bar(part: float, width: int) -> Text:
    full = min(width, max(0, round(part * width)))
    return Text.assemble(("█" * full, "cyan"), ("░" * (width - full), "dim"))


def _count(stats: GenerationStats, done: Round) -> None:
    """As the loop counts a round; what is before the first of them is not heard of, prompt and first token."""
    stats.count_round(done)
    stats.emitted += done.emitted
    for phase, seconds in zip(("draft", "verify", "other"), done[3:], strict=True):
        stats.seconds[phase] += seconds


def _phase_ms(stats: GenerationStats) -> list[str]:
    return [f"{1e3 * stats.seconds[phase] / stats.rounds:.1f}" if stats.rounds else "-" for phase, _, _ in _PHASES]


def _phase_shares(stats: GenerationStats) -> list[str]:
    shares = apportioned([stats.seconds[phase] for phase, _, _ in _PHASES], 100)
    return [f"{one}%" if stats.rounds else "-" for one in shares]


def _speed_text(stats: GenerationStats) -> str:
    return f"{stats.decode_tokens_per_second:.1f}" if stats.rounds else "-"


def _memory_text(memory: Memory) -> str:
    now, budget = memory
    taken = "unknown" if now is None else size(now)
    return f"{taken}, no budget" if budget is None else f"{taken} of {size(budget)}"
