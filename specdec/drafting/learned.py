"""What draft lengths learned, kept between runs: costs and acceptance records, in a small file in the cache folder.

A file is of one machine, model, kernels, number of threads and drafter, its weights included: the name is a hash of all
of them, and the content repeats the hash. A file that is damaged, of another format or of something else is as good as
none; a folder that cannot be written keeps nothing, and no run fails for it. The texts do not depend on any of it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from specdec import kernels
from specdec.drafting.acceptance import AcceptanceRecord
from specdec.drafting.costs import Costs
from specdec.drafting.draft_length import AdaptiveLength, Learned
from specdec.drafting.protocol import Drafter
from specdec.model.decoder import Decoder
from specdec.util.atomic import write_text
from specdec.weights.hub.paths import cache_folder

FORMAT = 2
MOST_BYTES, MOST_FILES = 65536, 64  # of a file that is read, and in the folder: the oldest go
MOST_SOURCES, MOST_ROWS = 16, 256


class LearnedFile(NamedTuple):
    """Read and write the file of one machine, model, kernels, number of threads and drafter; `key` is a hash of
    these."""

    path: Path
    key: str

    def read_into(self, lengths: AdaptiveLength) -> bool:
        """Let `lengths` go on from what the file holds; return whether it held anything of use."""
        try:
            with self.path.open("rb") as stream:
                content = stream.read(MOST_BYTES + 1)
            found = json.loads(content) if len(content) <= MOST_BYTES else None
            if not isinstance(found, dict) or (found.get("format"), found.get("key")) != (FORMAT, self.key):
                return False
            learned = _learned(found, lengths.longest)
        except (OSError, ValueError, TypeError, KeyError, OverflowError, RecursionError):
            return False
        lengths.recall(learned)
        return True

    def write(self, lengths: AdaptiveLength) -> None:
        """Keep what `lengths` learned; nothing where its costs were not measured, or the folder cannot be written."""
        learned = lengths.learned()
        if learned.measured_for is None:
            return
        costs = learned.costs
        record = {
            "format": FORMAT,
            "key": self.key,
            "measured_for": learned.measured_for,
            "credit": learned.credit,
            "costs": {**vars(costs), "passes": {str(rows): seconds for rows, seconds in costs.passes.items()}},
            "records": {name: record.to_dict() for name, record in learned.records.items()},
        }
        with contextlib.suppress(OSError, ValueError):  # the folder cannot be written
            write_text(self.path, json.dumps(record, allow_nan=False))
            files = sorted(self.path.parent.glob("*.json"), key=lambda file: file.stat().st_mtime, reverse=True)
            for old in files[MOST_FILES:]:
                old.unlink(missing_ok=True)


def learned_file(backbone: Decoder, drafter: Drafter, identity: str) -> LearnedFile | None:
    """Return the file of `backbone` and `drafter`, whose `drafter_identity` is `identity`, on this machine. None where
    there is no cache folder."""
    about = [
        (platform.node(), platform.machine(), _processor(), os.cpu_count()),
        (backbone.identity_of(backbone.adapters.default), str(backbone.device)),
        (kernels.active(backbone.device), torch.get_num_threads()),
        (drafter.name, drafter.max_draft, identity),
    ]
    key = hashlib.sha256(repr(about).encode()).hexdigest()[:32]
    try:
        return LearnedFile(cache_folder() / "learned" / f"{key}.json", key)
    except (OSError, ValueError):
        return None


def _processor() -> str:
    """Return the processor's name, where the system tells it."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as lines:
            return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    except OSError:
        return platform.processor()


def _learned(found: Mapping[str, Any], longest: int) -> Learned:
    """Return the content of a file. Raises ValueError, TypeError, KeyError or OverflowError for one that is damaged."""
    threads, texts = found["measured_for"]
    costs, records = found["costs"], found["records"]
    passes = {int(rows): _seconds(seconds) for rows, seconds in costs["passes"].items()}
    steps, starts, readings = (
        {str(name): _seconds(s) for name, s in costs[part].items()} for part in ("steps", "starts", "readings")
    )
    text = None if costs["text"] is None else _seconds(costs["text"])
    if not (2 <= len(passes) <= MOST_ROWS and min(passes) == 1 and min(passes.values()) > 0):
        raise ValueError("costs of passes")
    if max(map(len, (steps, starts, readings, records))) > MOST_SOURCES:
        raise ValueError("sources")
    kept = {str(name): AcceptanceRecord.from_dict(record, longest, str(name)) for name, record in records.items()}
    return Learned(
        Costs(passes, steps, starts, text, readings), (int(threads), int(texts)), kept, _seconds(found["credit"])
    )


def _seconds(value: Any) -> float:
    number = float(value)
    if not (math.isfinite(number) and number >= 0):
        raise ValueError(f"{value!r} is no number of seconds")
    return number
