"""`python -m eval.perplexity`: the loss of prediction by 8-bit activations, quantised weights and rounded caches.

What: perplexity over real English, of the model as it is loaded, and of the same checkpoint as transformers runs it in
float32 with its weights expanded. For a GGUF file both have the same weights, so that the difference is our arithmetic
alone; with `--quantize` on a float checkpoint the difference includes the quantisation, and with `--kv-dtype` the
rounding of the cache. Windows do not overlap: every token but the first of a window is scored once. Why beside
exactness: that check compares drafted text with plain text, and would not notice if both were equally bad. Left out:
ranking models, for which the text is too small and too odd.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM

import specdec
from eval.cli import options as cli
from eval.cli.output import DIFFERS, INTERRUPTED, check_writable, file_name, put_record, run_guarded
from eval.cli.provenance import provenance
from eval.cli.session import Session, open_session
from eval.live.parts import count_bar
from eval.prompts.english import manual_prose
from specdec.util.terminal import Terminal

ABOUT = """\
Compare the perplexity of the model as it is loaded (quantised weights, activations rounded to 8 bits) with that of the
same checkpoint in float32, run by transformers, over the prose of Python's own manual. Perplexity is the exponential of
the mean negative log-likelihood of a token; lower is better. Top-1 agreement: how often both find the same token the
most likely. Exit code 1 when the perplexities differ by more than --within percent."""
ROWS = 64  # positions whose log-likelihood is computed at once: a softmax over 262,144 tokens needs a copy

Logits = Callable[[Tensor], Tensor]
"""Token ids [n] -> logits [n, vocab] of the token that follows each."""


@dataclass(frozen=True)
class Score:
    """Keep a model's score on one window.

    `loss`: the summed negative log-likelihood in nats. `top`: the model's likeliest token at each of the scored
    positions [n - 1].
    """

    loss: float
    top: Tensor

    @classmethod
    def of(cls, logits: Tensor, window: Tensor) -> Score:
        """Score logits [n, vocab] of window [n]: position i predicts token i + 1, and nothing predicts the first.

        Raises ValueError when a logit is not finite: then nothing can be said.
        """
        if not bool(torch.isfinite(logits).all()):
            raise ValueError("the model's logits are not finite; try --dtype float32, or fetch the checkpoint again")
        loss = 0.0
        for part, target in zip(torch.split(logits[:-1], ROWS), torch.split(window[1:], ROWS), strict=True):
            loss += float(torch.nn.functional.cross_entropy(part.double(), target, reduction="sum"))
        return cls(loss, logits[:-1].argmax(dim=-1))


@dataclass
class Comparison:
    """Compare two models on the same windows: (ours, the float32 one), a window counted for both or for neither.

    Figures are NaN as long as nothing was scored.
    """

    scores: list[tuple[Score, Score]] = field(default_factory=list)

    @property
    def tokens(self) -> int:
        """Count the scored tokens of all windows."""
        return sum(len(ours.top) for ours, _ in self.scores)

    @property
    def perplexity(self) -> float:
        """Return our model's perplexity: exp of the mean loss a token."""
        return self._perplexity([ours for ours, _ in self.scores])

    @property
    def reference_perplexity(self) -> float:
        """Return the float32 model's perplexity on the same tokens."""
        return self._perplexity([reference for _, reference in self.scores])

    @property
    def difference(self) -> float:
        """Return the relative difference of the perplexities, in percent; positive when our model is worse."""
        return 100 * (self.perplexity / self.reference_perplexity - 1)

    @property
    def agreement(self) -> float:
        """Return the share of scored positions at which both models find the same token the likeliest."""
        same = sum(int((ours.top == reference.top).sum()) for ours, reference in self.scores)
        return same / self.tokens if self.tokens else math.nan

    def _perplexity(self, scores: Sequence[Score]) -> float:
        return math.exp(sum(score.loss for score in scores) / self.tokens) if self.tokens else math.nan


def windows(ids: Sequence[int], context: int, tokens: int, first: int | None) -> list[Tensor]:
    """Cut `ids` into pieces of at most `context` tokens which together have `tokens` scored ones.

    `first`: the token that begins a text for this model (BOS), put before every window and not scored; for a model
    without BOS, the first token of each window is not scored. Raises ValueError when `ids` are too few.
    """
    if context < 2:
        raise ValueError(f"a window needs a token to predict from and one to predict: --context {context} is too small")
    own = context - 1 if first is not None else context
    unscored = 0 if first is not None else 1
    pieces: list[Tensor] = []
    left, start = tokens, 0
    while left > 0:
        length = min(own, left + unscored)
        piece = list(ids[start : start + length])
        if len(piece) < length:
            raise ValueError(
                f"the text has {tokens - left + max(0, len(piece) - unscored)} tokens to score: ask for fewer --tokens"
            )
        pieces.append(torch.tensor(piece if first is None else [first, *piece], dtype=torch.int64))
        start, left = start + length, left - (length - unscored)
    return pieces


def text_ids(session: Session, text: str) -> tuple[list[int], int | None]:
    """Return the tokens of `text` without special ones, and BOS where this model's texts begin with BOS."""
    plain = session.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]  # long on purpose
    begun = session.tokenizer("a")["input_ids"]
    bos = session.tokenizer.bos_token_id
    return list(plain), bos if bos is not None and begun[:1] == [bos] else None


def _engine_logits(session: Session) -> Logits:
    def logits(window: Tensor) -> Tensor:
        output: Tensor = session.model(window[None]).logits[0]
        return output.cpu()

    return logits


def reference_logits(name: str, by: str) -> Logits:
    """Load the same checkpoint in float32 on the CPU: transformers' own module, or our decoder with dense weights.

    Raises ValueError when transformers cannot read the checkpoint.
    """
    if by == "specdec":
        ours = specdec.load(name, drafter=None, dtype="float32", quantize="none", device="cpu")
        return lambda window: ours(window[None]).logits[0]
    path = specdec.model_path(name)
    folder, file = (path.parent, path.name) if path.is_file() else (path, None)
    try:
        with redirect_stderr(StringIO()):  # its bars know no terminal from a file; what goes wrong is raised
            theirs = AutoModelForCausalLM.from_pretrained(
                folder, gguf_file=file, dtype=torch.float32, trust_remote_code=False
            ).eval()
    except (ValueError, KeyError, OSError, ImportError) as error:
        raise ValueError(f"{name}: transformers cannot load it ({error}); use --reference specdec") from error

    @torch.inference_mode()
    def logits(window: Tensor) -> Tensor:
        output: Tensor = theirs(window[None], use_cache=False).logits[0].float()
        return output

    return logits


def compare(
    comparison: Comparison, pieces: Sequence[Tensor], engine: Logits, reference: Logits, progress: Callable[[], None]
) -> bool:
    """Score all of `pieces` into `comparison`; return whether Ctrl-C ended the loop. `progress` is called for every
    window."""
    try:
        for window in pieces:
            comparison.scores.append((Score.of(engine(window), window), Score.of(reference(window), window)))
            progress()
    except KeyboardInterrupt:
        return True
    return False


def perplexity(arguments: argparse.Namespace) -> int:
    """Measure, show and write; return the exit code: 0, 1 when the difference exceeds `--within`, 130 after Ctrl-C.

    Raises ValueError: the model, the text or a file is not usable; the message says why.
    """
    check_writable(arguments.json)
    text = _read(arguments.text) if arguments.text else manual_prose()
    session = open_session(replace(cli.settings_from(arguments), drafter="none"))
    ids, first = text_ids(session, text)
    if arguments.context > session.context:
        raise ValueError(f"--context {arguments.context} exceeds the model's {session.context}: ask for less")
    pieces = windows(ids, arguments.context, arguments.tokens, first)
    reference = reference_logits(arguments.model, arguments.reference)
    comparison = Comparison()
    with count_bar("windows", len(pieces)) as advance:

        def tick() -> None:
            advance(1, f"windows ({comparison.difference:+.2f} %)")

        interrupted = compare(comparison, pieces, _engine_logits(session), reference, tick)
    scored = comparison.tokens
    record = {
        "command": "perplexity",
        "interrupted": interrupted,
        **provenance(session),
        "text": str(arguments.text) if arguments.text else "the manual of this Python (pydoc_data.topics)",
        "text_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "reference": arguments.reference,
        "context": arguments.context,
        "tokens": scored,
        "windows": len(comparison.scores),
        "perplexity": comparison.perplexity if scored else None,
        "reference_perplexity": comparison.reference_perplexity if scored else None,
        "difference_percent": comparison.difference if scored else None,
        "within_percent": arguments.within,
        "top_1_agreement": comparison.agreement if scored else None,
    }
    passed = scored > 0 and abs(comparison.difference) <= arguments.within
    _show(record, passed)
    put_record(arguments.json, record)
    return INTERRUPTED if interrupted else 0 if passed else DIFFERS


def _show(record: dict[str, Any], passed: bool) -> None:
    console = Terminal(highlight=False)
    if record["tokens"]:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        table.add_column("model")
        table.add_column("perplexity", justify="right")
        table.add_row("as loaded", f"{record['perplexity']:.4f}")
        table.add_row(f"float32, by {record['reference']}", f"{record['reference_perplexity']:.4f}")
        console.print(table)
        console.print(
            f"{record['difference_percent']:+.3f} % (allowed: {record['within_percent']:g} %); top-1 agreement "
            f"{record['top_1_agreement']:.2%}; {record['tokens']:,} tokens in {record['windows']} windows of "
            f"{record['context']}",
            style="green" if passed else "bold red",
        )
    else:
        console.print("nothing was scored")
    if record["interrupted"]:
        console.print("interrupted: these are the windows that were scored", style="yellow")


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--text {file}: cannot be read as UTF-8 text ({error})") from error


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m eval.perplexity` with the words `argv` (None: the process's own); return its exit code."""
    parser = cli.module_parser("perplexity", ABOUT)
    parser.add_argument(
        "--tokens", type=cli.whole_number(1), default=20000, metavar="N", help="tokens to score (default 20000)"
    )
    parser.add_argument(
        "--context", type=cli.whole_number(2), default=512, metavar="N", help="tokens of a window (default 512)"
    )
    parser.add_argument(
        "--within", type=cli.temperature, default=1.0, metavar="P", help="percent that are allowed (default 1.0)"
    )
    parser.add_argument("--text", type=file_name, metavar="FILE", help="another text, UTF-8 (default: Python's manual)")
    parser.add_argument(
        "--reference",
        choices=["transformers", "specdec"],
        default="transformers",
        help="who runs the float32 model (default transformers, which is independent of us; specdec: our own decoder)",
    )
    cli.add_json_option(parser, "the figures")
    cli.add_model_options(parser)
    arguments = parser.parse_args(argv)
    return run_guarded(lambda: perplexity(arguments), arguments.json)


if __name__ == "__main__":
    sys.exit(main())
