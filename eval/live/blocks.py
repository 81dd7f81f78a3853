"""The blocks of the live dashboard: the figures of one moment, and each of the dashboard's parts in lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.text import Text

from eval.cli.metrics import acceptance_by_position
from eval.live.parts import format_percent, size
from specdec.drafting.costs import Costs
from specdec.engine.stats import GenerationStats, Round

HEIGHT = 16  # lines, from NARROW columns on
NARROW = 60  # columns that three blocks need side by side
_WIDE = 24  # columns of a block that has room for longer words
WINDOW = 64  # rounds that "now" means
POSITIONS, ROWS, _SOURCES = 8, 9, 3  # that have a line each
CELLS = 48  # of the course of the acceptance length: twice as many as are drawn
GAP = 2  # columns between blocks
_EIGHTHS = " ▏▎▍▌▋▊▉"
_LEVELS = " ▁▂▃▄▅▆▇█"
PHASES = (("draft", "▒", "yellow"), ("verify", "█", "cyan"), ("other", "░", "dim"))

Memory = tuple[int | None, int | None]
"""Bytes that the process takes now, and those that it may take; None: not known, and no budget."""


@dataclass(frozen=True)
class Figures:
    """Keep the figures of one moment: the counts of all rounds, and of the newest rounds.

    `course`: pairs of rounds and the tokens accepted in them, oldest first. `costs`: None where they were not measured.
    `measured`: tokens/s of plain decoding, None where they were not measured either. `media_tokens`: soft tokens of the
    prompt.
    """

    stats: GenerationStats
    now: GenerationStats
    course: list[list[int]]
    costs: Costs | None
    memory: Memory
    measured: float | None
    media_tokens: int = 0

    @property
    def plain(self) -> float | None:
        """Return the tokens/s of plain decoding: as measured, or else estimated from V(1); None without either.

        The estimate is 1 / V(1), at the pace at which the rounds' passes went and with what a token cost besides. For
        plain rounds the estimate is their own speed. For drafted rounds it is too high if anything: the tokens of a
        round share what the round costs besides.
        """
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
        """Return the speed of the rounds in `stats` over plain decoding's, as text."""
        plain = self.plain
        return f"{stats.decode_tokens_per_second / plain:.2f}x" if plain and stats.rounds else "-"

    @property
    def sources(self) -> list[tuple[str, str, str]]:
        """Return name, accepted share and d in ms of every source, the busiest first."""
        steps = self.costs.steps if self.costs is not None else {}
        records = {name: (0, 0) for name in steps} | {k: (n, a) for k, (n, a) in self.stats.draft_sources.items()}
        return [
            (
                name,
                format_percent(accepted / drafted) if drafted else "-",
                f"{1e3 * steps[name]:.2f}" if name in steps else "-",
            )
            for name, (drafted, accepted) in sorted(records.items(), key=lambda one: -one[1][0])
        ]


def apportion(parts: Sequence[float], total: int) -> list[int]:
    """Return whole numbers in proportion to `parts` that add up to `total`; zeros where all parts are zero."""
    whole = sum(parts)
    if whole <= 0:
        return [0] * len(parts)
    exact = [total * part / whole for part in parts]
    found = [int(one) for one in exact]
    most_left = sorted(range(len(parts)), key=lambda i: found[i] - exact[i])
    for i in most_left[: total - sum(found)]:
        found[i] += 1
    return found


# Every block always has the same number of lines, of `width` columns (18 or more).


def speed_block(f: Figures, width: int) -> list[Text]:
    """Return four lines: tokens/s and ratio to plain, now and overall, and the plain speed."""
    rows = [
        f"{label:<{width - 13}}{f.ratio(stats):>6}{speed_text(stats):>7}"
        for label, stats in (("now", f.now), (_fitting(width, "overall", "all"), f.stats))
    ]
    kind = _fitting(width, "estimated", "est.") if f.measured is None else _fitting(width, "measured", "real")
    label, figure = ("plain", "-") if f.plain is None else (f"plain, {kind}", f"{f.plain:.1f}")
    plain = f"{label:<{width - 7}}{figure:>7}"
    return [_title("tokens/s", width), *map(Text, (*rows, plain))]


def course_block(f: Figures, width: int) -> list[Text]:
    """Return four lines: the tokens per round from the first round to now as a curve, mean and newest figure, the
    scale."""
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


def round_block(f: Figures, width: int) -> list[Text]:
    """Return five lines: the seconds of the newest rounds by phase, as one bar and in ms."""
    seconds = [f.now.seconds[phase] for phase, _, _ in PHASES]
    shown = zip(PHASES, apportion(seconds, width), phase_ms(f.now), phase_shares(f.now), strict=True)
    bar, rows = Text(), []
    for (phase, mark, style), cells, ms, part in shown:
        bar.append(mark * cells, style)
        rows.append(Text.assemble((mark, style), f" {phase:<6}{ms:>{width - 12}}{part:>4}"))
    each = f": {1e3 * sum(seconds) / f.now.rounds:.1f}" if f.now.rounds else ""
    return [_title(f"ms a round{each}", width), bar, *rows]


def memory_block(f: Figures, width: int) -> list[Text]:
    """Return three lines: the memory that is taken, as a bar where there is a budget, and the media in the prompt."""
    now, budget = f.memory
    bar = _bar(now / budget, width) if now is not None and budget else Text()
    title = f"memory; media: {f.media_tokens:,}" if f.media_tokens else "memory"
    return [_title(title, width), bar, Text(memory_text(f.memory))]


def positions_block(f: Figures, width: int) -> list[Text]:
    """Return ten lines: for each draft position the accepted share of all rounds, and of the drafts that reached it."""
    positions, room = acceptance_by_position(f.stats), width - 15
    more = f"1-{POSITIONS}/{len(positions)}" if len(positions) > POSITIONS else ""
    rows = [Text(f"{more:<{room}}{'of all':>7}{'reached':>8}", style="dim")]
    for i in range(POSITIONS):
        every = reached = "-"
        accepted = 0.0
        if i < len(positions):
            accepted = positions[i]["accepted"]
            every, reached = format_percent(accepted), format_percent(positions[i]["accepted_of_reached"])
        rows.append(Text.assemble(f"{i + 1} ", _bar(accepted, room), f"{every:>5}{reached:>8}"))
    return [_title(_fitting(width, "accepted at position", "accepted at"), width), *rows]


def lengths_block(f: Figures, width: int) -> list[Text]:
    """Return six lines: the rounds by draft length, as columns two lines high; the last column is `POSITIONS` and
    more."""
    counts, stats = [0] * (POSITIONS + 1), f.stats
    for length, n in stats.draft_lengths.items():
        counts[min(length, POSITIONS)] += n
    levels = [max(round(16 * n / (max(counts) or 1)), n > 0) for n in counts]
    upper, lower = (" ".join(_LEVELS[min(8, max(0, level - below))] for level in levels) for below in (8, 0))
    labels = " ".join(map(str, range(POSITIONS + 1))) + "+"
    each = f"{stats.drafted / stats.rounds:.2f}" if stats.rounds else "-"
    below = map(Text, (labels, f"{stats.rounds:,} rounds", f"{each} drafted each"))
    return [_title("draft lengths", width), Text(upper, style="cyan"), Text(lower, style="cyan"), *below]


def passes_block(f: Figures, width: int) -> list[Text]:
    """Return ten lines: V(T) in ms, and over V(1), for a pass of 1 to `ROWS` rows."""
    title, room = _title("V(T), ms a pass", width), width - 15
    if f.costs is None:
        return [title, Text("not measured"), *(Text() for _ in range(ROWS - 1))]
    times = [f.costs.of_pass(rows) for rows in range(1, ROWS + 1)]
    rows = []
    for i, seconds in enumerate(times):
        whole, rest = divmod(round(8 * room * seconds / (max(times) or 1)), 8)
        bar = f"{'█' * whole + _EIGHTHS[rest]:<{room}}"[:room]
        ratio = f"{seconds / times[0]:.2f}x" if times[0] > 0 else "-"
        rows.append(Text.assemble(f"{i + 1} ", (bar, "cyan"), f"{1e3 * seconds:>7.1f}{ratio:>6}"))
    return [title, *rows]


def sources_block(f: Figures, width: int) -> list[Text]:
    """Return six lines: the accepted share and the cost of a token of the `_SOURCES` busiest sources."""
    room, stats = width - 11, f.stats
    rows = [Text(f"{name[: room - 1]:<{room}}{right:>5}{d[:5]:>6}") for name, right, d in f.sources[:_SOURCES]]
    rows += [Text("-") for _ in range(_SOURCES - len(rows))]
    label, rate = _fitting(width, f"all {stats.drafted:,}", "all"), format_percent(stats.acceptance_rate)
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


def count(stats: GenerationStats, done: Round) -> None:
    """Count a round as the decoding loop does; the prompt and the first token come before the first round and do not
    count."""
    stats.count_round(done)
    stats.emitted += done.emitted
    for phase, seconds in zip(("draft", "verify", "other"), done[3:], strict=True):
        stats.seconds[phase] += seconds


def phase_ms(stats: GenerationStats) -> list[str]:
    """Return the milliseconds a round of each of `PHASES`, "-" before the first round."""
    return [f"{1e3 * stats.seconds[phase] / stats.rounds:.1f}" if stats.rounds else "-" for phase, _, _ in PHASES]


def phase_shares(stats: GenerationStats) -> list[str]:
    """Return the share of each of `PHASES` in percent, 100 together; "-" before the first round."""
    shares = apportion([stats.seconds[phase] for phase, _, _ in PHASES], 100)
    return [f"{one}%" if stats.rounds else "-" for one in shares]


def speed_text(stats: GenerationStats) -> str:
    """Return the tokens/s of the rounds in `stats`, "-" before the first one."""
    return f"{stats.decode_tokens_per_second:.1f}" if stats.rounds else "-"


def memory_text(memory: Memory) -> str:
    """Return in words what the process takes, and its budget."""
    now, budget = memory
    taken = "unknown" if now is None else size(now)
    return f"{taken}, no budget" if budget is None else f"{taken} of {size(budget)}"
