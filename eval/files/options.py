"""The options of the commands about files, and what their `--help` says."""

from __future__ import annotations

import argparse

from eval.cli.options import DEFAULT_MODEL, add_json_option
from eval.cli.output import file_name

TYPES = ("q8_0", "q4_0", "bf16", "f16", "f32")  # as `drafter.files.gguf_writer` has them, which imports torch
EXPORT_TEXT = """\
Write a drafter of a Gemma 4 model as a .gguf file that llama.cpp reads (--spec-type draft-mtp), and every command here:
one that run.py train made, or a published assistant. Heads of other models have a format of this project's own, which
no other program reads. A head that scores clusters of its vocabulary (E2B, E4B) is written as llama.cpp has it, and
scores the whole vocabulary."""


def add_export_options(export: argparse.ArgumentParser) -> None:
    """Add the options of `run.py export`."""
    export.description = EXPORT_TEXT
    export.add_argument("head", help="the folder, .gguf file or hub id of the drafter")
    export.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME",
        help="the model that it drafts for, as for every command: its vocabulary goes into the file",
    )
    export.add_argument("--out", type=file_name, required=True, metavar="FILE", help="the .gguf file to write")
    export.add_argument("--type", choices=TYPES, default="q8_0", help="of the matrices (default q8_0)")
    add_json_option(export, "what was written")


ADD_OPTIONS = {"export": add_export_options}
