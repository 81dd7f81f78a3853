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


MODELS_TEXT = """\
List the models on this disk, with their sizes and what each would take in memory: those that were fetched here or by
other clients of the hub, and those that Ollama, LM Studio and llama.cpp keep. The names are those that --model
takes."""
PULL_TEXT = """\
Fetch a model: safetensors, or one .gguf file with the drafter (mtp-*) and the embedder (mmproj-*) of its repository. A
download that broke off goes on, and what has arrived is compared with the hub's SHA-256."""


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


def add_models_options(models: argparse.ArgumentParser) -> None:
    """Add the options of `run.py models`."""
    models.description = MODELS_TEXT
    add_json_option(models, "the list")


def add_show_options(show: argparse.ArgumentParser) -> None:
    """Add the options of `run.py show`."""
    show.description = (
        "Say what a model is, what becomes of its types of weights, what it takes in memory, and what lies "
    )
    show.description += "beside it. Only headers are read; a model of the hub is fetched first."
    show.add_argument("name", help="as for --model of every command")
    add_json_option(show, "the figures")


def add_pull_options(pull: argparse.ArgumentParser) -> None:
    """Add the options of `run.py pull`."""
    pull.description = PULL_TEXT
    pull.add_argument(
        "name", help="a model of the hub (owner/name, owner/name:Q4_0, owner/name/FILE.gguf), or a named one"
    )
    add_json_option(pull, "where the files are")


def add_remove_options(remove: argparse.ArgumentParser) -> None:
    """Add the options of `run.py remove`."""
    remove.description = (
        "Delete a model that was fetched: from this project's cache, or from the hub's. Files that you or "
    )
    remove.description += "other programs keep are left alone."
    remove.add_argument("name", help="as `models` shows it; owner/name alone: all files of the repository")
    remove.add_argument("--yes", action="store_true", help="do not ask")


ADD_OPTIONS = {
    "export": add_export_options,
    "models": add_models_options,
    "show": add_show_options,
    "pull": add_pull_options,
    "remove": add_remove_options,
}
