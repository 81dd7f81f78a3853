"""Options that every command shares.

What: argparse groups, types of their values, and `GenerationSettings`, made from the parsed options. Why apart from the
commands: neither torch nor transformers is imported here, so that `--help` and a mistyped option answer at once.
"""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from eval.cli.names import expand_modes
from eval.cli.output import file_name
from eval.cli.parser import HelpFormatter, Parser

DEFAULT_MODEL = "smollm2-135m-instruct"
_THREADS_EACH, _THREADS = 4, 16  # of a processor, at most, where that is not less than so many
QUANTIZE = ("int4", "int4-all", "int8", "none")
DTYPES = ("float32", "bfloat16", "float16")  # of activations
PICTURES = (70, 140, 280, 560, 1120)  # soft tokens of a picture: the budgets that a processor has
FRAMES = 4096  # of a video, at most, as `specdec.media.video` has them
KV_DTYPES = (*DTYPES, "int8")  # as `specdec.memory.plan` has them, which imports torch


@dataclass(frozen=True)
class GenerationSettings:
    """Say how to load a model and how to decode with it; None leaves the choice to the engine or to the model."""

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
    adapter: tuple[tuple[str, str], ...] = ()  # names ("": of the folder or file) and paths, the default first

    def to_dict(self) -> dict[str, Any]:
        """Return the settings in JSON types."""
        return {**asdict(self), "prometheus": None if self.prometheus is None else str(self.prometheus)}


def settings_from(arguments: argparse.Namespace) -> GenerationSettings:
    """Return the settings among parsed `arguments`; an option that the command does not offer keeps its default."""
    known = GenerationSettings.__dataclass_fields__
    found: dict[str, Any] = {name: value for name, value in vars(arguments).items() if name in known}
    return GenerationSettings(**{**found, "adapter": tuple(found.get("adapter", ()))})


def check_names(settings: GenerationSettings, modes: Sequence[str] = (), shapes: Sequence[str] = ()) -> None:
    """Raise a ValueError when a name is mistyped, before torch is imported, which takes seconds.

    `modes`: of a bench; `shapes`: other names that the model may have.
    """
    # Here, because it imports rich, which --help need not wait for.
    from specdec.weights.hub.names import HubName
    from specdec.weights.hub.paths import drafter_path, is_path, local_path

    local_path(settings.model, shapes)
    drafter_path(settings.drafter)
    for _, path in settings.adapter:
        if not is_path(Path(path)) and HubName.of(path) is None:
            raise ValueError(
                f"--adapter {path}: there is no such file or folder, and no adapter of the hub is called so"
            )
    expand_modes(modes)


def module_parser(name: str, about: str | None) -> argparse.ArgumentParser:
    """Return the parser of `python -m eval.NAME`, which describes the module with `about`."""
    return Parser(prog=f"python -m eval.{name}", description=about, formatter_class=HelpFormatter)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which model to load, and how: `GenerationSettings` has a field for each."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME",
        help="smollm2-135m-instruct (default) or gemma-3-270m, both fetched on first use; a .gguf file or a folder; a "
        "model of the hub (owner/name, owner/name:Q4_0, owner/name/FILE.gguf); or ollama:NAME:TAG",
    )
    group.add_argument(
        "--quantize",
        choices=QUANTIZE,
        help="quantise a float checkpoint while it loads; int4 leaves the vocabulary at 8 bits, int4-all does not; "
        "none: expand a quantised one (default: as stored)",
    )
    group.add_argument("--dtype", choices=DTYPES, help="of activations and float weights")
    group.add_argument("--device", help="cpu, cuda (cuda:1: the second) or mps (default: cuda where there is one)")
    group.add_argument(
        "--kv-dtype",
        choices=KV_DTYPES,
        help="what the cache keeps of the context (default: as --dtype); rounds, so another one may change the text",
    )
    add_adapter_option(group)
    group.add_argument("--memory-budget", metavar="SIZE", help="what this process may take in all, like 9GB")
    group.add_argument("--threads", type=threads, metavar="N", help="CPU threads (default: torch's choice)")


def add_adapter_option(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Add `--adapter`."""
    parser.add_argument(
        "--adapter",
        type=adapter,
        action="append",
        default=[],
        metavar="NAME=PATH",
        help="a LoRA adapter: a PEFT folder, a .gguf file or a hub id; NAME= may be left out. Several times: the first "
        "is used, and serve answers with each, as the model MODEL:NAME",
    )


def add_drafting_options(parser: argparse.ArgumentParser) -> None:
    """Add `--drafter` and `--draft-length`."""
    group = parser.add_argument_group("drafting (never changes the text, only how soon it comes)")
    group.add_argument(
        "--drafter",
        default="auto",
        metavar="NAME",
        help="auto (default), suffix, none; the folder, .gguf file or hub id of a head; or a smaller model of the same "
        "vocabulary, by any name that --model takes",
    )
    group.add_argument(
        "--draft-length",
        type=draft_length,
        default="adaptive",
        metavar="N",
        help="tokens per draft: a number, or adaptive (default): chosen each round from measured costs",
    )


def add_sampling_options(parser: argparse.ArgumentParser, max_new_tokens: int, seed: int | None) -> None:
    """Add the options of decoding. `max_new_tokens`, `seed`: the defaults of the command; seed None: drawn each
    time."""
    group = parser.add_argument_group("decoding")
    group.add_argument(
        "--max-new-tokens", type=whole_number(1), default=max_new_tokens, metavar="N", help=f"default {max_new_tokens}"
    )
    group.add_argument("--temperature", type=temperature, default=0.0, metavar="X", help="0 is greedy (default)")
    group.add_argument(
        "--top-p", type=fraction, metavar="P", help="nucleus sampling (default: the model's own setting)"
    )
    group.add_argument(
        "--top-k", type=whole_number(0), metavar="K", help="0 switches it off (default: the model's own setting)"
    )
    default = "a new one each time" if seed is None else str(seed)
    group.add_argument(
        "--seed", type=whole_number(0), default=seed, metavar="N", help=f"of sampling (default: {default})"
    )


def add_media_size_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how large the media of a prompt are."""
    parser.add_argument(
        "--picture", type=int, choices=PICTURES, default=0, help="a picture of so many soft tokens (default: none)"
    )
    parser.add_argument(
        "--frames",
        type=whole_number(0, FRAMES),
        default=0,
        metavar="N",
        help="a video of so many frames (default: none)",
    )


def add_json_option(parser: argparse.ArgumentParser, what: str) -> None:
    """Add `--json FILE`. `what`: what the command writes there, for the help."""
    parser.add_argument(
        "--json",
        type=file_name,
        metavar="FILE",
        help=f"write {what} to FILE too, as one line of JSON (-: to stdout, and the rest to stderr). Only what --json "
        "wrote is replaced; links are followed, devices and pipes written to",
    )


def add_prometheus_option(parser: argparse.ArgumentParser) -> None:
    """Add `--prometheus FILE`."""
    parser.add_argument(
        "--prometheus",
        type=file_name,
        metavar="FILE",
        help="write counters (drafts, accepted tokens by position, seconds, ...) to FILE in Prometheus' text format, "
        "after every answer; for node_exporter's textfile collector the name must end in .prom. Only what "
        "--prometheus wrote is replaced",
    )


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Return an argparse type: a whole number of at least `least`, and at most `most`."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if value < least:
            raise argparse.ArgumentTypeError(f"must be at least {least}, got {value}")
        if most is not None and value > most:
            raise argparse.ArgumentTypeError(f"must be at most {most}, got {value}")
        return value

    return parse


def media_file(text: str) -> Path:
    """Parse the path of a picture, sound or video, or a file: address: an argparse type."""
    from specdec.media.source import file_path

    try:
        return file_path(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def threads(text: str) -> int:
    """Parse a number of threads that this machine can be asked for: an argparse type."""
    processors = os.cpu_count() or 1
    if (value := whole_number(1)(text)) > (most := max(_THREADS_EACH * processors, _THREADS)):
        raise argparse.ArgumentTypeError(
            f"this machine has {processors} processors; ask for at most {most}, not {text}"
        )
    return value


def number(text: str) -> float:
    """Parse a finite number: an argparse type."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be finite, got {text}")
    return value


def temperature(text: str) -> float:
    """Parse a number from 0: an argparse type."""
    if (value := number(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be 0 (greedy) or more, got {text}")
    return value


def positive(text: str) -> float:
    """Parse a number above 0: an argparse type."""
    if (value := number(text)) <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0, got {text}")
    return value


def not_negative(text: str) -> float:
    """Parse a number of at least 0: an argparse type."""
    if (value := number(text)) < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {text}")
    return value


def fraction(text: str) -> float:
    """Parse a number above 0, up to 1: an argparse type."""
    if not 0 < (value := number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be above 0 and at most 1, got {text}")
    return value


def share(text: str) -> float:
    """Parse a number from 0 to 1: an argparse type."""
    if not 0 <= (value := number(text)) <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got {text}")
    return value


def adapter(text: str) -> tuple[str, str]:
    """Parse NAME=PATH, or PATH: an argparse type."""
    name, equals, path = text.partition("=")
    if not equals or "/" in name or not path:  # a path may have an equals sign too
        name, path = "", text
    if not path:
        raise argparse.ArgumentTypeError("must be NAME=PATH or PATH, got ''")
    return name, _expanded(path)


def source(text: str) -> tuple[str, float]:
    """Parse NAME, or NAME=WEIGHT: an argparse type."""
    name, equals, weight = text.rpartition("=")
    if not equals:
        return _expanded(text), 1.0
    if (value := number(weight)) <= 0 or not name:
        raise argparse.ArgumentTypeError(f"must be NAME=WEIGHT with a positive weight, got {text!r}")
    return _expanded(name), value


def _expanded(name: str) -> str:
    return str(file_name(name)) if name.startswith("~") else name


def draft_length(text: str) -> str | int:
    """Parse "adaptive", or a whole number from 0: an argparse type."""
    if text == "adaptive":
        return text
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be adaptive or a whole number, got {text!r}")
    return int(text)
