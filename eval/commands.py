"""The options of `run.py`'s commands, and what their `--help` says.

Imported when a command was named: `run.py --help` lists the commands alone.
"""

from __future__ import annotations

import argparse

from eval.cli.options import (
    DEFAULT_MODEL,
    DTYPES,
    FRAMES,
    KV_DTYPES,
    PICTURES,
    QUANTIZE,
    add_adapter_option,
    add_drafting_options,
    add_json_option,
    add_media_size_options,
    add_model_options,
    add_prometheus_option,
    add_sampling_options,
    fraction,
    media_file,
    not_negative,
    positive,
    whole_number,
)
from eval.cli.output import file_name
from eval.cli.parser import HelpFormatter
from eval.train.options import add_train_options
from eval.use.options import add_learn_options, add_learned_options

BENCH_TEXT = """\
Decode every prompt plainly and with drafting, in alternating order, and compare speed and output. Shows tokens/s,
speed-up, mean acceptance length (tokens per round), acceptance by draft position, time to first token and peak
memory. Exit code 1 when an output differs."""

PROMPTS_TEXT = """\
a .jsonl file with {"prompt": ...}, {"turns": [...]} (Spec-Bench, MT-bench) or {"messages": [...]} per line, or a
.txt file with one prompt per line (default: eight prompts of this project)"""

MODES_TEXT = """\
Besides plain decoding: adaptive (default), k1 to k16 (always so many tokens; fixed: k1 to k6), suffix and mtp (one kind
of draft alone), wrong (drafts that are never right). And other engines, on the same .gguf file, prompts and threads, on
the CPU: transformers and transformers-lookup (in float32 and in bfloat16), llama.cpp and llama.cpp-ngram (all five
kinds of it). They need: pip install -c constraints.txt -e '.[bench]'. Eight prompts take minutes, transformers most of
them: try --limit 2 first. Leave the machine idle meanwhile: one busy core can make an engine that waits for all of its
threads ten times slower."""


MEDIA_TEXT = """\
For models that take them, with pip install -c constraints.txt -e '.[media]'. Each option may be given several times.
docs/media.md says how to try them with a tiny model."""
REPORT_TEXT = """\
Draw what bench --json wrote, several runs side by side, as one HTML page: speed-up by task, acceptance by position,
latencies, where rounds spend their time, what passes cost, memory. The page needs no network and no other file."""
SERVE_TEXT = """\
Answer agents and editors on this machine: OpenAI's chat completions, completions and responses, and Anthropic's
messages, streamed or not. Texts are those of generate(): greedy and seeded answers depend on nothing but the request.

  python run.py serve            # then, in another terminal:
  OPENAI_BASE_URL=http://127.0.0.1:8080/v1 OPENAI_API_KEY=none your-agent
  curl http://127.0.0.1:8080/v1/chat/completions \\
    -H 'Content-Type: application/json' \\
    -d '{"messages": [{"role": "user", "content": "Hello"}], "stream": true}'

docs/serve.md has the endpoints, the fields, and how clients are pointed here. Needs the extra:

  pip install -c constraints.txt -e '.[serve]'"""
PLAN_TEXT = """\
Say what a model, its drafter and a context take in memory, and the longest context that fits, from headers alone. The
exit code is 1 when the context does not fit."""
TRAIN_TEXT = """\
Train a draft head for a model on this machine: the model answers prompts, many at a time, and a small network learns to
foresee its words. What is trained is used with --drafter FOLDER, by every command and by specdec.load. Prompts come
from the built-in generator, from text files, and from your own .jsonl files; the more they are like what you will ask,
the better. Ctrl-C, or a kill, loses at most two minutes: the same command goes on. Evaluations decode held-out prompts
for real, and the head that did best is the one that is kept. On several machines, or sockets:

  torchrun --nproc-per-node N -- run.py train ..."""


def add_bench_options(bench: argparse.ArgumentParser) -> None:
    """Add the options of `run.py bench`."""
    bench.description = BENCH_TEXT
    bench.add_argument("--prompts", type=file_name, metavar="FILE", help=PROMPTS_TEXT)
    bench.add_argument(
        "--suite", action="store_true", help="ask 128 prompts of eight tasks, Spec-Bench's six among them"
    )
    bench.add_argument(
        "--media", action="store_true", help="time the first token after pictures, sound and video, by kind and size"
    )
    bench.add_argument("--limit", type=whole_number(1), metavar="N", help="only the first N prompts")
    add_json_option(bench, "all figures")
    add_prometheus_option(bench)
    add_sampling_options(bench, max_new_tokens=128, seed=0)
    add_drafting_options(bench)
    add_model_options(bench)
    bench.add_argument(
        "--synthetic-acceptance",
        nargs="+",
        type=fraction,
        default=[],
        metavar="P",
        help="make the first, second, ... drafted token right with these probabilities, whatever the drafter says (it "
        "still takes its time): for checkpoints of random weights; labelled as synthetic",
    )
    modes = bench.add_argument_group("modes", MODES_TEXT)
    modes.add_argument("--modes", nargs="+", default=[], metavar="MODE", help="what to compare with plain decoding")
    modes.add_argument(
        "--repeat",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="repetitions; figures are medians of them (default 1)",
    )


def add_report_options(page: argparse.ArgumentParser) -> None:
    """Add the options of `run.py report`."""
    page.description = REPORT_TEXT
    page.add_argument("files", type=file_name, nargs="+", metavar="FILE", help="what run.py bench --json wrote")
    page.add_argument(
        "--out",
        type=file_name,
        metavar="FILE",
        help="the page (default: report.html here; -: stdout). Only a page that report wrote is replaced",
    )


def add_generate_options(generate: argparse.ArgumentParser) -> None:
    """Add the options of `run.py generate`."""
    generate.description = "Answer one prompt on stdout, word by word as it comes."
    generate.add_argument("prompt", help="the prompt, or - to read it from stdin")
    generate.add_argument("--raw", action="store_true", help="continue the text as it is, without the chat template")
    generate.add_argument("--stats", action="store_true", help="say on stderr what drafting did")
    generate.add_argument("--no-speculation", action="store_true", help="decode plainly")
    media = generate.add_argument_group("pictures, sound and video", MEDIA_TEXT)
    for kind, what in (("image", "a picture"), ("audio", "a sound"), ("video", "a video, with its sound")):
        media.add_argument(f"--{kind}", type=media_file, action="append", default=[], metavar="FILE", help=what)
    media.add_argument("--no-sound", action="store_true", help="do not listen to the videos")
    add_media_options(media)
    add_json_option(generate, "text, token ids and figures")
    add_prometheus_option(generate)
    add_sampling_options(generate, max_new_tokens=256, seed=None)
    add_drafting_options(generate)
    add_model_options(generate)


def add_media_options(media: argparse._ArgumentGroup) -> None:
    """Add the options that say how much of the context media take."""
    media.add_argument(
        "--image-tokens",
        type=whole_number(1),
        choices=PICTURES,
        metavar="N",
        help=f"soft tokens that a picture may take: {', '.join(map(str, PICTURES))} (default: the model's, 280)",
    )
    media.add_argument(
        "--frames",
        type=whole_number(1, FRAMES),
        metavar="N",
        help=f"frames of a video, spread evenly, {FRAMES:,} at most (default: the model's, 32)",
    )


def add_chat_options(chat: argparse.ArgumentParser) -> None:
    """Add the options of `run.py chat`."""
    chat.description = "Converse in the terminal, or through a pipe. /help lists the commands."
    chat.add_argument(
        "--dashboard",
        action="store_true",
        help="draw speed against plain, acceptance, where rounds spend their time, costs and memory while an answer "
        "comes; 'now' is the last 64 rounds. Plain lines after every answer where the output is not a terminal",
    )
    chat.add_argument(
        "--plain", action="store_true", help="show answers as the model wrote them: no Markdown, no wrapping"
    )
    chat.add_argument("--no-history", action="store_true", help="keep nothing of what is typed for the next session")
    add_media_options(chat.add_argument_group("pictures, sound and video", "For /image, /audio and /video."))
    add_learn_options(chat)
    add_prometheus_option(chat)
    add_sampling_options(chat, max_new_tokens=512, seed=None)
    add_drafting_options(chat)
    add_model_options(chat)


def add_train_command_options(train: argparse.ArgumentParser) -> None:
    """Add the options of `run.py train`."""
    train.description = TRAIN_TEXT
    train.formatter_class = HelpFormatter
    add_train_options(train)
    add_json_option(train, "scores, settings and versions")
    add_model_options(train)


def add_plan_options(planned: argparse.ArgumentParser) -> None:
    """Add the options of `run.py plan`."""
    planned.description = PLAN_TEXT
    planned.add_argument(
        "--model",
        default=DEFAULT_MODEL,
        metavar="NAME",
        help="as for every command, or gemma-4-12b: the shape alone, of which no weights need to be here",
    )
    planned.add_argument(
        "--drafter", default="auto", metavar="NAME", help="auto (default), suffix, none, or a checkpoint"
    )
    planned.add_argument("--context", type=whole_number(1), default=4096, metavar="N", help="positions (default 4096)")
    planned.add_argument(
        "--device",
        default="cpu",
        help="whose memory: the machine's (cpu, default) or a GPU's (cuda; cuda:1: the second), which need not be here "
        "if --budget says how much it has",
    )
    planned.add_argument("--budget", metavar="SIZE", help="such as 16GB (default: what is free now)")
    planned.add_argument("--kv-dtype", choices=KV_DTYPES, help="what the cache keeps (default: as --dtype)")
    planned.add_argument("--quantize", choices=QUANTIZE, help="as for every command")
    planned.add_argument(
        "--dtype",
        choices=DTYPES,
        help="of activations (default: float32, on a GPU bfloat16)",
    )
    add_adapter_option(planned)
    add_media_size_options(planned)
    add_json_option(planned, "the figures")


def add_serve_options(serve: argparse.ArgumentParser) -> None:
    """Add the options of `run.py serve`."""
    serve.description = SERVE_TEXT
    serve.formatter_class = HelpFormatter
    serve.add_argument(
        "--host", default="127.0.0.1", metavar="ADDRESS", help="default 127.0.0.1; another one needs --api-key"
    )
    serve.add_argument(
        "--port", type=whole_number(0, 65535), default=8080, metavar="N", help="default 8080; 0: a free one"
    )
    serve.add_argument("--alias", metavar="NAME", help="what the model is called in replies (default: --model)")
    serve.add_argument(
        "--max-sequences",
        type=whole_number(1),
        default=4,
        metavar="N",
        help="answers that are decoded at a time (default 4)",
    )
    serve.add_argument(
        "--max-waiting",
        type=whole_number(0),
        default=32,
        metavar="N",
        help="requests that may wait besides; the next one is told to come back later (default 32)",
    )
    serve.add_argument(
        "--grace",
        type=not_negative,
        default=30.0,
        metavar="SECONDS",
        help="for answers to end after the first Ctrl-C or SIGTERM (default 30); the second ends them",
    )
    serve.add_argument(
        "--keep-alive",
        type=positive,
        default=10.0,
        metavar="SECONDS",
        help="of silence, after which a stream gets a comment (default 10): proxies give up on silent connections",
    )
    serve.add_argument(
        "--cache-dir",
        type=file_name,
        metavar="FOLDER",
        help="keep the newest conversations there when the server ends, and go on with them when it starts again",
    )
    serve.add_argument(
        "--debug", action="store_true", help="show at /debug/cache what is cached, and where prompts parted from it"
    )
    access = serve.add_argument_group("access")
    access.add_argument(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="ask for this key, as a bearer token or in x-api-key; several times: for one of them. Other users of this "
        "machine can see a command line: the environment variable SPECDEC_API_KEY does the same",
    )
    access.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name under which the server is reached, besides localhost, this machine's name and addresses",
    )
    access.add_argument(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="a site whose pages may ask, like https://example.org; *: every site",
    )
    add_learn_options(serve)
    add_drafting_options(serve)
    add_model_options(serve)


ADD_OPTIONS = {
    "bench": add_bench_options,
    "report": add_report_options,
    "generate": add_generate_options,
    "chat": add_chat_options,
    "serve": add_serve_options,
    "train": add_train_command_options,
    "plan": add_plan_options,
    "learned": add_learned_options,
}
