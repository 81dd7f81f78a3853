"""The live dashboard: the work of drafting, drawn from the rounds of decoding.

`Dashboard.on_round` is for `generate(on_round=...)`, `Dashboard` itself is for rich: printed, or inside a Live or a
Group, it always has the same height, empty or full, so that nothing jumps. 80 columns and 60 give three columns of
blocks; in fewer columns, and without a terminal, `lines()` give the same figures.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import suppress
from threading import Lock

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

from eval.cli.metrics import acceptance_by_position
from eval.live.blocks import (
    CELLS,
    GAP,
    HEIGHT,
    NARROW,
    PHASES,
    ROWS,
    WINDOW,
    Figures,
    Memory,
    count,
    course_block,
    lengths_block,
    memory_block,
    memory_text,
    passes_block,
    phase_ms,
    phase_shares,
    positions_block,
    round_block,
    sources_block,
    speed_block,
    speed_text,
)
from eval.live.parts import WIDTH, format_percent
from specdec.drafting.costs import Costs
from specdec.engine.stats import GenerationStats, Round


class Dashboard:
    """Count rounds, and draw them.

    `costs` and `memory` are called for every drawing. `plain`: tokens a second after the first, where plain decoding
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
        self.media_tokens = 0  # of the prompt whose answer comes

    def on_round(self, done: Round) -> None:
        """Count a finished round. The method only counts, because it is called between two passes."""
        with self._lock:
            count(self._stats, done)
            self._newest.append(done)
            if not self._course or self._course[-1][0] == self._per_cell:
                if len(self._course) == CELLS:  # half as many, each of twice the rounds
                    pairs = zip(self._course[::2], self._course[1::2], strict=True)
                    self._course = [[a[0] + b[0], a[1] + b[1]] for a, b in pairs]
                    self._per_cell *= 2
                self._course.append([0, 0])
            self._course[-1][0] += 1
            self._course[-1][1] += done.accepted

    def figures(self) -> Figures:
        """Return all figures as they are now, in copies that do not change."""
        stats, now = GenerationStats(), GenerationStats()
        with self._lock:
            stats.merge(self._stats)
            newest, course = list(self._newest), [list(cell) for cell in self._course]
        for one in newest:
            count(now, one)
        with suppress(RuntimeError):  # the decoding thread adds a figure just now: costs as they were a moment ago
            self._known = self.costs()
        return Figures(stats, now, course, self._known, self.memory(), self.plain, self.media_tokens)

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.draw(options.max_width)

    def draw(self, width: int = WIDTH) -> Text:
        """Draw HEIGHT lines of at most `width` columns; below NARROW the plain lines, cut off."""
        width = min(width, WIDTH)
        if width < NARROW:
            rows = [Text(line) for line in self.lines()]
            for row in rows:
                row.truncate(width, overflow="ellipsis")
        else:
            figures, each = self.figures(), (width - 2 * GAP) // 3
            columns = (
                [
                    *speed_block(figures, each),
                    *course_block(figures, each),
                    *round_block(figures, each),
                    *memory_block(figures, each),
                ],
                [*positions_block(figures, each), *lengths_block(figures, each)],
                [*passes_block(figures, each), *sources_block(figures, each)],
            )
            assert all(len(column) == HEIGHT for column in columns)
            for cell in (cell for column in columns for cell in column):
                cell.truncate(each, overflow="crop", pad=True)
            rows = [Text(" " * GAP).join(cells) for cells in zip(*columns, strict=True)]
        return Text("\n", no_wrap=True, overflow="crop").join(rows)

    def lines(self) -> list[str]:
        """Return the same figures in seven plain lines."""
        f = self.figures()
        stats, now = f.stats, f.now
        against = "plain not known"
        if f.plain is not None:
            kind = "estimated" if f.measured is None else "measured"
            against = f"plain {f.plain:.1f} ({kind}): {f.ratio(stats)}"
        positions = acceptance_by_position(stats)
        every, reached = (
            " ".join(format_percent(p[key]) for p in positions) for key in ("accepted", "accepted_of_reached")
        )
        phases = zip(PHASES, phase_ms(now), phase_shares(now), strict=True)
        passes = " ".join(f"{1e3 * f.costs.of_pass(rows):.1f}" for rows in range(1, ROWS + 1)) if f.costs else ""
        lengths = ", ".join(f"{k}: {n}" for k, n in sorted(stats.draft_lengths.items()))
        sources = "; ".join(f"{name} {right} accepted, d {d} ms" for name, right, d in f.sources)
        return [
            f"tokens/s: {speed_text(now)} now, {speed_text(stats)} overall, {against}",
            f"tokens per round: {stats.mean_acceptance_length:.2f}, now {now.mean_acceptance_length:.2f}; "
            f"{stats.rounds:,} rounds, {stats.accepted:,} of {stats.drafted:,} drafted tokens accepted",
            f"accepted by position: {every or '-'}; of those that reached it: {reached or '-'}",
            "a round: " + ", ".join(f"{phase} {ms} ms ({part})" for (phase, _, _), ms, part in phases),
            f"V(1) to V({ROWS}): {passes} ms" if passes else "V(T): not measured",
            f"rounds by draft length: {lengths or '-'}; {sources or 'nothing drafted'}",
            f"memory: {memory_text(f.memory)}" + (f"; {f.media_tokens:,} media tokens" if f.media_tokens else ""),
        ]
