"""Figures of `eval.kernels` and their tables: pure, no clock and no model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from eval.kernels.model_pass import Decoding
from eval.kernels.timing import KernelTiming


@dataclass(frozen=True)
class Point:
    """Keep the figures of one number of rows.

    `bytes_read`: out of memory in a call, 0 where everything comes out of the cache. `ceiling`: read bandwidth in
    bytes/s. `one`: V(1) in seconds, None where one row was not timed.
    """

    rows: int
    timing: KernelTiming
    bytes_read: int
    ceiling: float
    one: float | None

    @property
    def bytes_per_second(self) -> float | None:
        """Return the bytes read a second in the median call; None where a call reads no memory."""
        return self.bytes_read / self.timing.median if self.bytes_read else None

    @property
    def share(self) -> float | None:
        """Return the share of the read bandwidth; it compares with the machine at its best, so that noise cannot push
        it up."""
        speed = self.bytes_per_second
        return None if speed is None else speed / self.ceiling

    @property
    def ratio(self) -> float | None:
        """Return V(T) / V(1)."""
        return None if self.one is None else self.timing.median / self.one

    def to_dict(self) -> dict[str, Any]:
        """Return the figures in JSON types: microseconds, GB/s, shares."""
        speed = self.bytes_per_second
        return {
            "rows": self.rows,
            "us": self.timing.median * 1e6,
            "fastest_us": self.timing.fastest * 1e6,
            "repetitions": len(self.timing.seconds),
            "gb_per_second": None if speed is None else speed / 1e9,
            "share_of_bandwidth": self.share,
            "ratio_to_one_row": self.ratio,
        }


@dataclass(frozen=True)
class Series:
    """Keep the times of one kernel or pass at several numbers of rows, and the read bandwidth around them in
    bytes/s."""

    name: str
    what: str
    bytes_read: int
    ceiling: float
    points: tuple[Point, ...]

    @classmethod
    def of(cls, name: str, what: str, timings: Mapping[int, KernelTiming], bytes_read: int, ceiling: float) -> Series:
        """Return the series of `timings`, one for each number of rows; `ceiling`: read bandwidth in bytes/s."""
        one = timings[1].median if 1 in timings else None
        points = (Point(rows, timing, bytes_read, ceiling, one) for rows, timing in timings.items())
        return cls(name, what, bytes_read, ceiling, tuple(points))

    def to_dict(self) -> dict[str, Any]:
        """Return the series in JSON types, a dict for each of its points."""
        return {
            "name": self.name,
            "what": self.what,
            "bytes_read": self.bytes_read,
            "bandwidth_gb_per_second": self.ceiling / 1e9,
            "points": [point.to_dict() for point in self.points],
        }


def heading(series: Series) -> str:
    """Return the line above a series' table: kernel, shape, and the bytes that a call reads."""
    read = f": reads {_size(series.bytes_read)}" if series.bytes_read else ""
    return f"{series.name} {series.what}{read}"


def series_table(series: Series) -> Table:
    """Return a table with a row for each number of rows; columns without a figure are left out."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    columns = ["T", "us", "V(T)/V(1)"]
    if series.bytes_read:
        columns[2:2] = ["GB/s", f"of {series.ceiling / 1e9:.0f} GB/s"]
    for column in columns:
        table.add_column(column, justify="right")
    for point in series.points:
        cells = [str(point.rows), _microseconds(point.timing.median), _or_dash(point.ratio, ".2f")]
        if series.bytes_read:
            speed = point.bytes_per_second
            assert speed is not None
            cells[2:2] = [f"{speed / 1e9:.1f}", _or_dash(point.share, ".0%")]
        table.add_row(*cells)
    return table


def decoding_dict(decoding: Decoding, bytes_read: int, ceiling: float) -> dict[str, Any]:
    """Return a `Decoding` in JSON types, with its share of the speed that the bandwidth would allow."""
    return {
        "tokens": decoding.tokens,
        "prompt_tokens": decoding.prompt_tokens,
        "prefill_seconds": decoding.prefill_seconds,
        "tokens_per_second": decoding.tokens_per_second,
        "median_tokens_per_second": decoding.median_tokens_per_second,
        "bytes_per_token": bytes_read,
        "bandwidth_gb_per_second": ceiling / 1e9,
        "share_of_bandwidth": decoding.tokens_per_second * bytes_read / ceiling,
        "median_share_of_bandwidth": decoding.median_tokens_per_second * bytes_read / ceiling,
    }


def bandwidth_dict(readings: Sequence[float], reader: str) -> dict[str, Any]:
    """Return every reading, bytes/s in and GB/s out, in the order in which the readings were taken."""
    return {
        "reader": reader,
        "best_gb_per_second": max(readings) / 1e9,
        "worst_gb_per_second": min(readings) / 1e9,
        "readings_gb_per_second": [reading / 1e9 for reading in readings],
    }


def _microseconds(seconds: float) -> str:
    us = seconds * 1e6
    return f"{us:,.1f}" if us < 100 else f"{us:,.0f}"


def _or_dash(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"
