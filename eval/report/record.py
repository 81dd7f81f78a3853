"""Records of a bench as files that someone else wrote: `read` refuses a file that is no record, `Node` treats a missing
value, or one of another type, as not there, and `RecordedRun` is a record with its name on the page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from eval.cli.words import DISTURBED
from eval.report.charts import NONE

_LARGEST = 1e30  # above it no figure of a bench is real, and sums might not be finite


class Node:
    """Keep a value in a record, or the lack of a value."""

    def __init__(self, value: object = None) -> None:
        self.value = value

    def __getitem__(self, key: str) -> Node:
        return Node(self.value.get(key)) if isinstance(self.value, dict) else Node()

    @property
    def number(self) -> float | None:
        """Return the value where it is a number, which a bool is not; else None."""
        value = self.value
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    @property
    def text(self) -> str:
        """Return the value where it is a string, with what cannot be seen replaced; else ""."""
        return clean(self.value) if isinstance(self.value, str) else ""

    @property
    def nodes(self) -> list[Node]:
        """Return the entries where the value is a list; else none."""
        return [Node(value) for value in self.value] if isinstance(self.value, list) else []

    @property
    def items(self) -> list[tuple[str, Node]]:
        """Return keys and values where the value is a dict; else none."""
        return [(clean(key), Node(value)) for key, value in self.value.items()] if isinstance(self.value, dict) else []

    @property
    def shown(self) -> str:
        """Return a setting of any type, in words."""
        if self.value in (None, [], {}, ""):
            return NONE
        if isinstance(self.value, bool):
            return "yes" if self.value else "no"
        if isinstance(self.value, float):
            return f"{self.value:g}"
        parts = [f"{key}: {node.shown}" for key, node in self.items] or [node.shown for node in self.nodes]
        return ", ".join(parts) if parts else clean(str(self.value))


@dataclass(frozen=True)
class RecordedRun:
    """Keep the `number`-th record (from 0) with its name on the page; `letter` is empty where the page has one
    record."""

    number: int
    letter: str
    label: str
    record: Node

    @property
    def modes(self) -> list[Node]:
        """Return the modes of the record that have a name, in its order, in which the plain one comes first."""
        return [mode for mode in self.record["modes"].nodes if mode["mode"].text]

    @property
    def best(self) -> Node:
        """Return the mode that the record puts first; where it names none, the first mode that drafted."""
        named = [mode for mode in self.modes if mode["mode"].text == self.record["headline"].text]
        return (named or [mode for mode in self.modes if mode["drafted"].number] or self.modes[1:] or [Node()])[0]

    @property
    def name(self) -> str:
        """Return the name of the best mode."""
        return self.best["mode"].text

    @property
    def drafting(self) -> list[Node]:
        """Return the modes that drafted tokens."""
        return [mode for mode in self.modes if mode["drafted"].number]

    @property
    def synthetic(self) -> bool:
        """Tell whether drafts were right by arrangement: `bench --synthetic-acceptance`."""
        return self.record["synthetic_acceptance"].value is not None

    @property
    def unreliable(self) -> bool:
        """Tell whether a speed-up exceeds what acceptance can give, or waiting engines used the processor."""
        return bool(self.record["implausible"].nodes) or (self.record["others_cpu"].number or 0.0) > DISTURBED

    @property
    def tone(self) -> str:
        """Return the run's colour beside other runs: six are told apart."""
        return f"series{self.number % 6}"

    def id(self, name: str) -> str:
        """Return the id on the page of this run's element `name`."""
        return f"{name}-{self.letter.lower()}" if self.letter else name

    def figure_of_best(self, key: str) -> float | None:
        """Return a figure of all prompts: the record's own, or else the best mode's."""
        own = self.record[key].number
        return self.best[key].number if own is None else own


def clean(text: str) -> str:
    """Replace what cannot be seen: control characters, halves of surrogate pairs, marks that turn a line around."""
    return "".join(c if c.isprintable() else " " if c.isspace() else "\ufffd" for c in text)


def read(path: Path) -> Node:
    """Read the record in `path`. Raises ValueError, which names the file and the fault."""
    try:
        value = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=_finite, parse_float=_finite, parse_int=_whole
        )
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); name files that run.py bench --json wrote"
        ) from error
    except RecursionError:
        raise ValueError(f"{path}: not a record of run.py bench --json (nested too deeply)") from None
    except ValueError as error:
        raise ValueError(f"{path}: not a record of run.py bench --json ({error})") from None
    if not isinstance(value, dict) or value.get("command") != "bench":
        raise ValueError(f"{path}: not a record of run.py bench --json")
    if not isinstance(value.get("modes"), list):
        raise ValueError(f"{path}: not a record of run.py bench --json as it is now (no modes); measure again")
    return Node(value)


def _finite(text: str) -> float:
    if not abs(value := float(text)) < _LARGEST:
        raise ValueError(f"{text[:20]} is not a figure")
    return value


def _whole(text: str) -> int:
    _finite(text)
    return int(text)


def label_runs(files: Sequence[tuple[Path, Node]]) -> list[RecordedRun]:
    """Name runs by file and model; the second run of one name is (2)."""
    runs: list[RecordedRun] = []
    for number, (path, record) in enumerate(files):
        model = record["model"]["name"].text.rstrip("/").rpartition("/")[2]
        wanted = label = clean(path.name) + (f" · {model}" if model else "")
        again = 1
        while label in {run.label for run in runs}:
            again += 1
            label = f"{wanted} ({again})"
        letter = "" if len(files) == 1 else chr(ord("A") + number) if number < 26 else f"R{number + 1}"
        runs.append(RecordedRun(number, letter, label, record))
    return runs
