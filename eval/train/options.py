"""The options of `run.py train`. They lie apart from the command because nothing heavy may be imported, as in
`eval.cli`."""

from __future__ import annotations

import argparse
import time

from drafter.settings import ADAPTING_RATE, LATER, Answering, Recipe, Shape, TimeBudget, TrainerSettings
from eval.cli.options import fraction, not_negative, number, positive, share, source, temperature, whole_number
from eval.cli.output import file_name


def add_train_options(train: argparse.ArgumentParser) -> None:
    """Add the options of `run.py train`, and the time at which the command began."""
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
        metavar="NAME[=WEIGHT]",
        help="prompts, which the model answers. builtin (default): generated ones; a folder of text files, or one: "
        "passages with a request; a .jsonl file: your prompts or chats, as for bench. Drawn from in proportion to "
        "their weights",
    )
    data.add_argument(
        "--texts",
        type=source,
        nargs="+",
        default=[],
        metavar="NAME[=WEIGHT]",
        help="texts that the model reads as they are, instead of answering prompts, or among them where --data or "
        "--answers-from is given too: a .jsonl file of chats that end with the assistant's answer; a folder of text "
        "files, or one: passages. What the head is judged on is always answered",
    )
    data.add_argument(
        "--answers-from",
        metavar="URL",
        help="a server of OpenAI's protocol that has the same model (vLLM, Ollama, run.py serve) answers the prompts; "
        "this machine only reads the answers. Its key: OPENAI_API_KEY",
    )
    data.add_argument(
        "--answers-model", metavar="NAME", help="the model's name there (default: the first that the server lists)"
    )
    data.add_argument(
        "--from-use",
        action="store_true",
        help="adapt the head in use (or --start) to what chat and serve kept with --learn, with a third as many "
        "prompts from --data; a tenth of the conversations is held out to judge by. Keep OUT/training to yourself: it "
        "holds the texts",
    )
    data.add_argument(
        "--tokens", type=whole_number(1), metavar="N", help="size of the training set (with --minutes: at most)"
    )
    data.add_argument(
        "--collecting",
        type=fraction,
        default=TimeBudget.collecting,
        metavar="P",
        help="share of --minutes for data (default %(default)s)",
    )
    data.add_argument(
        "--max-new-tokens",
        type=whole_number(8),
        default=Answering.max_new_tokens,
        metavar="N",
        help="of an answer (default %(default)s)",
    )
    data.add_argument(
        "--temperature",
        type=temperature,
        nargs="+",
        default=[*Answering.temperatures],
        metavar="X",
        help="of answers, as the model will be used; several are taken in turn (default 0: greedy)",
    )
    data.add_argument(
        "--max-batch",
        type=whole_number(1),
        default=Answering.max_batch,
        metavar="N",
        help="answers at a time (default %(default)s)",
    )
    shape = train.add_argument_group("the head")
    shape.add_argument(
        "--start",
        metavar="NAME",
        help="go on from a trained head or a released assistant (a folder, or a hub id); its shape comes with it, "
        "--bits, new --aux-layers and a new --draft-vocab apart. It may have been trained for another model, if its "
        "sizes fit: so it follows a fine-tune, merged or by --adapter. A --learning-rate of 2e-5 suits one that is "
        "already good",
    )
    shape.add_argument(
        "--average-with",
        nargs="+",
        default=[],
        metavar="NAME",
        help="begin with the mean of the weights of --start and of these heads, which went on from it, or from the "
        "same one: a mean is often better than each",
    )
    shape.add_argument(
        "--draft-length",
        type=whole_number(1),
        default=Recipe.steps,
        metavar="K",
        help="tokens per draft (default %(default)s)",
    )
    shape.add_argument(
        "--depth", type=whole_number(1), metavar="N", help="layers (default: a tenth of the model's, one of each kind)"
    )
    shape.add_argument(
        "--width", type=whole_number(32), metavar="N", help="of the feed-forward part (default: the model's)"
    )
    shape.add_argument(
        "--draft-vocab",
        type=whole_number(0),
        metavar="N",
        help=f"tokens that it can propose, those that the model chooses most (default {Shape.draft_vocab}, or those of "
        "--start); 0: every token",
    )
    shape.add_argument(
        "--bigram",
        type=whole_number(0),
        default=Shape.bigram,
        metavar="RANK",
        help="bias from the newest token (default %(default)s: none)",
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
        help=f"of the saved matrices (default {Shape.bits}; with --from-use: as the head has them); 4: of the "
        "layers, and 5 for the others",
    )
    how = train.add_argument_group("how to train")
    how.add_argument(
        "--learning-rate",
        type=number,
        metavar="X",
        help=f"default {TrainerSettings.learning_rate}; with --from-use {ADAPTING_RATE}",
    )
    how.add_argument(
        "--matrix-rate",
        type=number,
        default=TrainerSettings.matrix_rate,
        metavar="X",
        help="learning rate of the layers' matrices, which Muon moves, in units of --learning-rate "
        "(default %(default)s; 0: AdamW moves all)",
    )
    how.add_argument(
        "--batch-tokens",
        type=whole_number(1),
        default=TrainerSettings.batch_tokens,
        metavar="N",
        help="per step (default %(default)s)",
    )
    how.add_argument("--hard", action="store_true", help="learn the model's choices, not its distribution")
    how.add_argument(
        "--feature-weight",
        type=number,
        default=Recipe.feature_weight,
        metavar="X",
        help="of the hidden states (default %(default)s)",
    )
    how.add_argument(
        "--unrolled",
        type=fraction,
        default=Recipe.deeper,
        metavar="P",
        help="share of positions from which more than a draft's first token is trained (default %(default)s)",
    )
    how.add_argument(
        "--later-steps",
        choices=LATER,
        default=Recipe.later,
        help="what the later tokens of a draft count: less with every step (decay, default), the chance that the draft "
        "gets so far (chance), or 1 where the head's own draft is the text so far and 0 elsewhere (draft)",
    )
    how.add_argument(
        "--overlap",
        type=not_negative,
        default=Recipe.overlap,
        metavar="X",
        help="learn the overlap with the model's distribution the more, the larger it is: w * cross entropy + (1 - w) "
        "* (1 - overlap), w = exp(-X * overlap); 3 as in arXiv 2602.23881 (default 0: never)",
    )
    how.add_argument(
        "--target-temperature",
        type=positive,
        default=Recipe.target_temperature,
        metavar="X",
        help="of the model's distribution that is learned; sharper below 1 (default %(default)s)",
    )
    how.add_argument(
        "--prompt-rows",
        type=share,
        default=Recipe.prompt_rows,
        metavar="P",
        help="share of positions in prompts that are trained on (default %(default)s: all)",
    )
    how.add_argument(
        "--quantised",
        type=share,
        default=TrainerSettings.quantised,
        metavar="P",
        help="share of the run, at its end, that is trained with the weights rounded as they will be saved (default "
        "%(default)s; 0: never)",
    )
    how.add_argument("--float32", action="store_true", help="no bfloat16 products, where the processor has them")
    how.add_argument(
        "--evaluate-minutes",
        type=number,
        default=TimeBudget.evaluate_minutes,
        metavar="M",
        help="between evaluations (default %(default)s)",
    )
    how.add_argument(
        "--seed",
        type=whole_number(0),
        default=TrainerSettings.seed,
        metavar="N",
        help="of prompts, and of the order in which training goes through their answers (default %(default)s)",
    )
    how.add_argument(
        "--order",
        type=whole_number(0),
        metavar="N",
        help="in which training goes through its set (default: that of --seed); heads that went on from one another or "
        "from the same one (--start), each in another order, are made for --average-with",
    )
