"""The options of `run.py train`. They lie apart from the command because nothing heavy may be imported, as in
`eval.cli`."""

from __future__ import annotations

import argparse
import time

from eval.cli.options import fraction, number, source, temperature, whole_number
from eval.cli.output import file_name


def add_train_options(train: argparse.ArgumentParser) -> None:
    train.set_defaults(began=time.monotonic())  # of --minutes, to which loading torch and the model belongs
    train.add_argument(
        "--out",
        type=file_name,
        required=True,
        metavar="FOLDER",
        help="where the head goes: a new folder, or one that train wrote",
    )
    long = train.add_argument_group("how long").add_mutually_exclusive_group(required=True)
    long.add_argument(
        "--minutes",
        type=number,
        metavar="M",
        help="in all: loading, collecting and evaluations too; when a stopped command goes on, what it had done counts",
    )
    long.add_argument(
        "--steps", type=whole_number(1), metavar="N", help="steps of training, after --tokens were collected"
    )
    data = train.add_argument_group("what to learn from")
    data.add_argument(
        "--data",
        type=source,
        nargs="+",
        default=[("builtin", 1.0)],
        metavar="NAME[=WEIGHT]",
        help="builtin (default): generated prompts; a folder of text files, or one: passages with a request; a .jsonl "
        "file: your prompts or chats, as for bench. Drawn from in proportion to their weights",
    )
    data.add_argument(
        "--tokens", type=whole_number(1), metavar="N", help="size of the training set (with --minutes: at most)"
    )
    data.add_argument(
        "--collecting", type=fraction, default=0.55, metavar="P", help="share of --minutes for data (default 0.55)"
    )
    data.add_argument(
        "--max-new-tokens", type=whole_number(8), default=200, metavar="N", help="of an answer (default 200)"
    )
    data.add_argument(
        "--temperature",
        type=temperature,
        nargs="+",
        default=[0.0],
        metavar="X",
        help="of answers, as the model will be used; several are taken in turn (default 0: greedy)",
    )
    data.add_argument(
        "--max-batch", type=whole_number(1), default=48, metavar="N", help="answers at a time (default 48)"
    )
    shape = train.add_argument_group("the head")
    shape.add_argument(
        "--start",
        metavar="NAME",
        help="go on from a trained head or a released assistant (a folder, or a hub id); its shape comes with it, "
        "--bits and new --aux-layers apart. A --learning-rate of 2e-5 suits one that is already good",
    )
    shape.add_argument(
        "--draft-length", type=whole_number(1), default=4, metavar="K", help="tokens per draft (default 4)"
    )
    shape.add_argument(
        "--depth", type=whole_number(1), metavar="N", help="layers (default: a tenth of the model's, one of each kind)"
    )
    shape.add_argument(
        "--width", type=whole_number(32), metavar="N", help="of the feed-forward part (default: the model's)"
    )
    shape.add_argument(
        "--draft-vocab", type=whole_number(0), default=8192, metavar="N", help="default 8192; 0: every token"
    )
    shape.add_argument(
        "--bigram", type=whole_number(0), default=0, metavar="RANK", help="bias from the newest token (0: none)"
    )
    shape.add_argument(
        "--aux-layers",
        type=whole_number(0),
        nargs="+",
        default=[],
        metavar="N",
        help="layers of the model, counted from 0, whose outputs a draft begins with besides the last state: a low, a "
        "middle and a high one in EAGLE-3 (default: none)",
    )
    shape.add_argument(
        "--bits",
        type=int,
        choices=(8, 5, 4),
        default=8,
        help="of the saved matrices (default 8); 4: of the layers, and 5 for the others",
    )
    how = train.add_argument_group("how to train")
    how.add_argument("--learning-rate", type=number, default=1e-3, metavar="X", help="default 1e-3")
    how.add_argument(
        "--matrix-rate",
        type=number,
        default=3.0,
        metavar="X",
        help="learning rate of the layers' matrices, which Muon moves, in units of --learning-rate (default 3; 0: "
        "AdamW moves all)",
    )
    how.add_argument("--batch-tokens", type=whole_number(1), default=2048, metavar="N", help="per step (default 2048)")
    how.add_argument("--hard", action="store_true", help="learn the model's choices, not its distribution")
    how.add_argument(
        "--feature-weight", type=number, default=0.3, metavar="X", help="of the hidden states (default 0.3)"
    )
    how.add_argument(
        "--unrolled",
        type=fraction,
        default=0.25,
        metavar="P",
        help="share of positions from which more than a draft's first token is trained (default 0.25)",
    )
    how.add_argument("--float32", action="store_true", help="no bfloat16 products, where the processor has them")
    how.add_argument(
        "--evaluate-minutes", type=number, default=4.0, metavar="M", help="between evaluations (default 4)"
    )
    how.add_argument(
        "--seed", type=whole_number(0), default=0, metavar="N", help="of prompts and of their order (default 0)"
    )
