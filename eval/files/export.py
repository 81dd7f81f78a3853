"""`run.py export`: a Gemma 4 drafter as a GGUF file in llama.cpp's format."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from drafter.config import MTPHeadConfig
from drafter.files.checkpoint import checked_source, read_stored
from drafter.files.gguf import DIALECTS
from drafter.files.gguf_writer import TYPES, write_assistant
from eval.cli.output import STDOUT, check_writable, put_record
from specdec.open import open_checkpoint
from specdec.util.progress import progress_bar
from specdec.util.terminal import Terminal
from specdec.weights.gguf.kind import architecture
from specdec.weights.gguf.vocabulary import tokenizer_keys
from specdec.weights.hub.paths import model_path
from specdec.weights.metadata import naming


def export(head: str, model: str, out: Path, kind: str, json_file: Path | None) -> int:
    """Write the drafter `head` of `model` to `out`, matrices as `kind`; return the exit code.

    Raises ValueError: the drafter is not readable, is none of Gemma 4's, or does not fit the model.
    """
    check_writable(json_file)
    if out == STDOUT or out.suffix != ".gguf":
        raise ValueError(f"--out {out}: name a file that ends in .gguf; llama.cpp reads no others")
    check_writable(out, "--out", _is_drafter, "export")
    stored = read_stored(head)
    if isinstance(stored.shape, MTPHeadConfig):
        raise ValueError(
            f"{stored.path}: a head of this project's own format, for which llama.cpp has none; only drafters of "
            "Gemma 4 models can be exported"
        )
    path = model_path(model)
    spec, *_ = open_checkpoint(path)
    with naming(stored.path):
        fitted = stored.fit(spec)
        source = checked_source(fitted, stored.checkpoint)
    names = source.names
    tokenizer = tokenizer_keys(path)
    with progress_bar(f"writing {out.name}", len(names)) as advance:

        def read(name: str) -> Tensor:
            advance(1)
            return stored.checkpoint.tensor(names[name])

        write_assistant(out, stored.shape, fitted, read, TYPES[kind], tokenizer, meant=stored.meant)
    size = out.stat().st_size
    console = Terminal(highlight=False)
    console.print(f"{out}: {size / 1e6:.1f} MB, matrices in {kind}", soft_wrap=True)
    put_record(json_file, {"command": "export", "file": str(out), "bytes": size, "type": kind})
    return 0


def _is_drafter(path: Path) -> bool:
    """Tell whether `path` is a drafter's file: only such a file is replaced."""
    try:
        return architecture(path) in DIALECTS
    except ValueError:
        return False
