"""`run.py serve`: load a model, and answer OpenAI's and Anthropic's clients until Ctrl-C."""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eval.cli.options import GenerationSettings

if TYPE_CHECKING:
    from drafter.use.recorder import UseRecorder
    from eval.cli.session import Session
    from specdec.media.processor import Processor

NEEDED = ("starlette", "uvicorn", "llguidance")


@dataclass(frozen=True)
class ServeOptions:
    """Describe where to listen, whom to answer, and how much at a time."""

    host: str = "127.0.0.1"
    port: int = 8080
    api_key: tuple[str, ...] = ()
    allow_host: tuple[str, ...] = ()
    allow_origin: tuple[str, ...] = ()
    alias: str | None = None
    max_sequences: int = 4
    max_waiting: int = 32
    grace: float = 30.0
    keep_alive: float = 10.0
    cache_dir: Path | None = None
    debug: bool = False
    learn: bool = False
    learn_limit: int = 0  # bytes


def options_from(arguments: argparse.Namespace) -> ServeOptions:
    """Return the options among parsed `arguments`."""
    known = ServeOptions.__dataclass_fields__
    found: dict[str, Any] = {name: value for name, value in vars(arguments).items() if name in known}
    found |= {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
    options = ServeOptions(**found)
    if not options.api_key and (key := os.environ.get("SPECDEC_API_KEY")):
        options = replace(options, api_key=(key,))
    return options


def check_installed() -> None:
    """Raise a ValueError when the packages of a server are missing."""
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        raise ValueError(
            f"serve needs {', '.join(missing)}; install them with: pip install -c constraints.txt -e '.[serve]'"
        )


def check_folder(folder: Path) -> None:
    """Make the folder of conversations, for its owner alone. Raises ValueError when that cannot be."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--cache-dir {folder}: {error.strerror}") from error
    if not os.access(folder, os.W_OK):
        raise ValueError(f"--cache-dir {folder}: cannot be written")


def serve(settings: GenerationSettings, options: ServeOptions) -> int:
    """Serve until a signal comes; return exit code 0.

    Raises ValueError: the address cannot be listened at, or the model is not usable.
    """
    check_installed()
    if options.cache_dir is not None:
        check_folder(options.cache_dir)
    print(f"loading {settings.model} ...", file=sys.stderr, flush=True)
    from eval.cli.session import open_session
    from eval.use.recording import open_recorder, say
    from specdec.drafting.protocol import FixedLength
    from specdec.server.generation.service import Service
    from specdec.server.guard import Access
    from specdec.server.listen import Listening, listen

    recorders: list[UseRecorder] = []

    def load() -> Service:
        session = open_session(settings, remember=True)
        if options.learn:
            recorders.append(open_recorder(session, options.learn_limit))
        lengths = None if isinstance(settings.draft_length, str) else FixedLength(settings.draft_length)
        return Service(
            session.model,
            session.tokenizer,
            options.alias or settings.model,
            options.max_sequences,
            options.max_waiting,
            lengths,
            options.cache_dir,
            _processor(session),
            recorders[0].add if recorders else None,
        )

    def started(address: str, service: Service) -> None:
        print(f"{service.name}, drafter {service.model.drafter.name}, is served at {address}/v1", file=sys.stderr)
        if not service.tokenizer.chat_template:
            print("it has no chat template: /v1/completions alone answers", file=sys.stderr)
        print(f"what it does is drawn at {address}/", file=sys.stderr)
        if recorders:
            print(say(recorders[0]), file=sys.stderr)
        print(
            f"at most {options.max_sequences} at a time, {service.context:,} tokens of context each; "
            f"{'a key is asked for' if options.api_key else 'no key is asked for'}; Ctrl-C ends",
            file=sys.stderr,
        )

    def ending(answers: int) -> None:
        under_way = f"{answers} under way may go on for {options.grace:g} s" if answers else "none is under way"
        kept = "" if options.cache_dir is None else f"; then conversations are written to {options.cache_dir}"
        print(
            f"the server ends: no more answers begin, {under_way}{kept}; Ctrl-C again ends answers at once",
            file=sys.stderr,
        )

    access = Access(options.api_key, (options.host, *options.allow_host), options.allow_origin)
    where = Listening(options.host, options.port, access, options.grace, options.debug, options.keep_alive)
    try:
        listen(load, where, started, ending)
    finally:
        for recorder in recorders:
            recorder.close()
    return 0


def _processor(session: Session) -> Processor | None:
    """Return what reads pictures and sound for a model that takes them. Says so where a library for that is missing."""
    if session.model.decoder.media is None:
        return None
    import specdec

    try:
        return specdec.load_processor(session.settings.model, session.tokenizer)
    except (ImportError, ValueError) as error:
        print(f"pictures and sound are refused: {error}", file=sys.stderr)
        return None
