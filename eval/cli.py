"""Options that every command shares, and how a command ends: exit codes, errors in one line, JSON in one piece.

What: argparse groups, `Settings` made from them, `guarded`, `write_json`. Why apart from the commands: it imports
neither torch nor transformers, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

DEFAULT_MODEL = "smollm2-135m-instruct"
QUANTIZE = ("int4", "int4-all", "int8", "none")
DIFFERS, USER_ERROR, INTERRUPTED = 1, 2, 130  # exit codes; 130 is what a shell reports after Ctrl-C


@dataclass(frozen=True)
class Settings:
    """How to load a model and how to decode with it; None leaves the choice to the engine or to the model."""

    model: str = DEFAULT_MODEL
    drafter: str = "auto"
    draft_length: str | int = "adaptive"
    max_new_tokens: int = 128
    temperature: float = 0.0  # 0: greedy
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = 0
    threads: int | None = None
    dtype: str | None = None
    quantize: str | None = None
    device: str | None = None
    kv_dtype: str | None = None
    memory_budget: str | None = None
    prometheus: Path | None = None

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "prometheus": None if self.prometheus is None else str(self.prometheus)}


def settings_from(arguments: argparse.Namespace) -> Settings:
    """The settings among parsed `arguments`; what a command does not offer keeps its default."""
    known = Settings.__dataclass_fields__
    return Settings(**{name: value for name, value in vars(arguments).items() if name in known})


def module_parser(name: str, about: str | None) -> argparse.ArgumentParser:
    """Of `python -m eval.NAME`, whose module says what it is `about`."""
    return argparse.ArgumentParser(
        prog=f"python -m eval.{name}", description=about, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def add_model_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME",
        help="smollm2-135m-instruct (default) or gemma-3-270m, both fetched on first use; a .gguf file; "
        "a folder with safetensors; or a hub id (owner/name)",
    )
    group.add_argument(
        "--quantize",
        choices=QUANTIZE,
        help="quantise a float checkpoint while it loads; int4 leaves the vocabulary at 8 bits, int4-all does not; "
        "none: expand a quantised one (default: as stored)",
    )
    group.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], help="of activations and float weights")
    group.add_argument("--device", help="cpu, cuda or mps (default: a GPU where there is one)")
    group.add_argument(
        "--kv-dtype",
        choices=["float32", "bfloat16", "float16", "int8"],
        help="what the cache keeps of the context (default: as --dtype); rounds, so another one may change the text",
    )
    group.add_argument("--memory-budget", metavar="SIZE", help="what this process may take in all, like 9GB")
    group.add_argument("--threads", type=whole(1), metavar="N", help="CPU threads (default: torch's choice)")


def add_drafting_options(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("drafting (never changes the text, only how soon it comes)")
    group.add_argument(
        "--drafter",
        default="auto",
        metavar="NAME",
        help="auto (default), suffix, none, or the folder or hub id of a drafter checkpoint",
    )
    group.add_argument(
        "--draft-length",
        type=draft_length,
        default="adaptive",
        metavar="N",
        help="tokens per draft: a number, or adaptive (default): chosen each round from measured costs",
    )


def add_sampling_options(parser: argparse.ArgumentParser, max_new_tokens: int, seed: int | None) -> None:
    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--max-new-tokens", type=whole(1), default=max_new_tokens, metavar="N", help=f"default {max_new_tokens}"
    )
    group.add_argument("--temperature", type=temperature, default=0.0, metavar="X", help="0 is greedy (default)")
    group.add_argument("--top-p", type=share, metavar="P", help="nucleus sampling (default: the model's own setting)")
    group.add_argument(
        "--top-k", type=whole(0), metavar="K", help="0 switches it off (default: the model's own setting)"
    )
    default = "a new one each time" if seed is None else str(seed)
    group.add_argument("--seed", type=whole(0), default=seed, metavar="N", help=f"of sampling (default: {default})")


def add_json_option(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument("--json", type=Path, metavar="FILE", help=f"also write {what} to FILE")


def add_prometheus_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--prometheus",
        type=Path,
        metavar="FILE",
        help="write counters (drafts, accepted tokens by position, seconds, ...) to FILE in Prometheus' text format, "
        "after every answer; for node_exporter's textfile collector the name must end in .prom",
    )


def whole(least: int) -> Callable[[str], int]:
    """An argparse type: a whole number of at least `least`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        return value

    return parse


def number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be finite, got {text}")
    return value


def temperature(text: str) -> float:
    """An argparse type: a number from 0."""
    if (value := number(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be 0 (greedy) or more, got {text}")
    return value


def share(text: str) -> float:
    """An argparse type: above 0, up to 1."""
    if not 0 < (value := number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def source(text: str) -> tuple[str, float]:
    """An argparse type: NAME, or NAME=WEIGHT."""
    name, equals, weight = text.rpartition("=")
    if not equals:
        return text, 1.0
    if (value := number(weight)) <= 0 or not name:
        raise argparse.ArgumentTypeError(f"must be NAME=WEIGHT with a positive weight, got {text!r}")
    return name, value


def draft_length(text: str) -> str | int:
    """An argparse type: "adaptive", or a whole number from 0."""
    if text == "adaptive":
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be adaptive or a whole number, got {text!r}")
    return int(text)


def guarded(command: Callable[[], int]) -> int:
    """Run `command` and return its exit code; what a user can mend or meant to do ends without a traceback."""
    try:
        return command()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return USER_ERROR
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe (head, less) has left
        # The interpreter flushes stdout once more when it ends; let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DIFFERS


def check_writable(path: Path | None, option: str = "--json") -> None:
    """Raise a ValueError before the work, not after it, when `path`, which `option` named, cannot be written."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"{option} {path}: is a folder; name a file")
    if not path.absolute().parent.is_dir():
        raise ValueError(f"{option} {path}: the folder {path.parent} does not exist; create it first")
    if not os.access(path.absolute().parent, os.W_OK):
        raise ValueError(f"{option} {path}: the folder {path.parent} cannot be written")


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write `record` as one line, all or nothing: whoever reads the file never sees half of it."""
    path = path.absolute()
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with open(handle, "w", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n")
        os.chmod(temporary, 0o666 & ~_umask())  # mkstemp makes private files
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
