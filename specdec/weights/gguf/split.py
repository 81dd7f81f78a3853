"""Models in several GGUF files, as `llama-gguf-split` cuts them: NAME-00001-of-00003.gguf and the files after it.

What: `read_parts` gives one header for all parts: the first one's metadata, everybody's tensors. Any part names the
model. Left out: writing parts.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from specdec.weights.gguf.header import GGUFHeader, read_header
from specdec.weights.metadata import Values, naming

MOST = 9999  # parts of a model
_PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def first_part(path: Path) -> Path:
    """Return the first file of the model that `path` is a part of; `path` itself where it is whole, or that is not
    there."""
    parts = part_names(path.name)
    return path.with_name(parts[0]) if parts and path.with_name(parts[0]).is_file() else path


def part_names(name: str) -> list[str]:
    """Return the names of all parts of the model in the file `name`, in order; none where it is not one of several."""
    found = _PART.fullmatch(name)
    if found is None or not 1 <= int(found[2]) <= int(found[3]) <= MOST:
        return []
    count = int(found[3])
    return [f"{found[1]}-{i:05d}-of-{count:05d}.gguf" for i in range(1, count + 1)]


def read_parts(path: str | os.PathLike[str]) -> GGUFHeader:
    """Read the header of a GGUF file, with the tensors of all its parts where it is one of several.

    Raises ValueError as `read_header` does, and when parts are missing or are not of one model.
    """
    file = Path(path)
    names = part_names(file.name)
    if len(names) < 2:
        return read_header(file)
    missing = [name for name in names if not file.with_name(name).is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{file}: one of {len(names)} parts; {missing[0]}{more} must lie beside it: fetch them too")
    headers = [read_header(file.with_name(name)) for name in names]
    for i, header in enumerate(headers):
        with naming(header.path):
            _check(header, i, len(names))
    first = headers[0]
    tensors = {name: info for header in headers for name, info in header.tensors.items()}
    with naming(first.path):
        due = Values(first.metadata, "split.").whole("tensors.count")
        if len(tensors) != due or due != sum(len(header.tensors) for header in headers):
            raise ValueError(f"its parts have {len(tensors)} tensors where {due} are due; fetch all parts again")
    return GGUFHeader(first.path, first.metadata, tensors)


def _check(header: GGUFHeader, index: int, count: int) -> None:
    said = Values(header.metadata, "split.")
    if said.whole("count") != count or said.whole("no") != index:
        raise ValueError(
            f"says that it is part {said.whole('no') + 1} of {said.whole('count')}, and is called part {index + 1} of "
            f"{count}; fetch the parts again, and leave their names"
        )
