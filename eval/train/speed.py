"""`python -m eval.train.speed`: tokens that this machine collects and trains on in a minute, by where they come from.

What: three sets are collected as `run.py train` does it, shards on disk included, and a head is trained on each for a
while: the model's own answers to generated prompts; answers of a server; passages of documents as they are. The server
is a real one, reached over HTTP, which sends the answers of the first set again, as fast as it is asked for them: so
its row is this machine's share of the work, as if the answers were written on another machine in no time. "Learned" is
what is left when each token is collected and then trained on once.
"""

from __future__ import annotations

import argparse
import json
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import chain, islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich import box
from rich.table import Table
from torch import Tensor

from drafter.config import MTPHeadSpec
from drafter.data.build_dataset import BUILT_IN, HELD_OUT, Collector, encode_prompts, training_prompts
from drafter.data.dataset import Dataset, frequent, read_shard
from drafter.data.features import longest_text
from drafter.data.given import EncodedPrompt, GivenTexts
from drafter.data.mixture import as_given
from drafter.data.patience import Patience
from drafter.data.server import AnswerServer, ServerAnswers
from drafter.files.formats import form_for
from drafter.settings import Answering, Shape, TrainerSettings
from drafter.train.initial import initial_tensors
from drafter.train.loss import Candidates
from drafter.train.model import Network
from drafter.train.trainer import Trainer
from eval.cli import options as cli
from eval.cli.output import check_writable, put_record, run_guarded
from eval.cli.provenance import machine
from eval.cli.session import Session, open_session
from eval.train.texts import Texts, completed, ends_of, messages_of
from specdec.util.terminal import Terminal

OWN, SERVER, PLAIN = "own answers", "a server's answers", "texts as they are"


class Bench(NamedTuple):
    """Keep what all measurements share. `folder`: where sets go; `seconds`: that each measurement takes."""

    session: Session
    spec: MTPHeadSpec
    answering: Answering
    folder: Path
    seconds: float


def _parser() -> argparse.ArgumentParser:
    made = cli.module_parser("train.speed", __doc__)
    made.add_argument(
        "--seconds",
        type=cli.positive,
        default=60.0,
        metavar="S",
        help="of each of six measurements, at most (default %(default)s)",
    )
    made.add_argument(
        "--texts",
        default=sysconfig.get_path("stdlib"),
        metavar="NAME",
        help="documents, or a .jsonl file of chats (default: Python's own library)",
    )
    made.add_argument(
        "--max-new-tokens",
        type=cli.whole_number(8),
        default=Answering.max_new_tokens,
        metavar="N",
        help="of an answer (default %(default)s)",
    )
    cli.add_json_option(made, "the figures")
    cli.add_model_options(made)
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Run `python -m eval.train.speed` with the words `argv` (None: the process's own); return its exit code."""
    arguments = _parser().parse_args(argv)
    return run_guarded(lambda: run(arguments), arguments.json)


def run(arguments: argparse.Namespace) -> int:
    """Measure, print the table and write the record. Raises ValueError: the model or the texts are not usable."""
    a = arguments
    check_writable(a.json)
    texts = Texts([(a.texts, 1.0)], 0)
    session = open_session(replace(cli.settings_from(a), drafter="none"))
    if not session.converses:
        raise ValueError(f"{a.model} has no chat template, and a server answers conversations; name another model")
    backbone = session.model.decoder
    spec = form_for(Shape(), backbone.spec, session.model.config.get_text_config()).spec(backbone.spec)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(session, spec, Answering(a.max_new_tokens), Path(folder), a.seconds)
        rows = measure(bench, texts)
    Terminal().print(_table(rows))
    print(f"The answers of the server were ready before: {SERVER} is this machine's share of the work.")
    about = {"seconds": a.seconds, "texts": a.texts, "max_new_tokens": a.max_new_tokens}
    put_record(a.json, {"command": "train speed", **machine(session.model.device), **about, "rows": rows})
    return 0


def measure(bench: Bench, texts: Texts) -> list[dict[str, Any]]:
    """Return a row of figures for each kind of text, in tokens a minute."""
    session, how = bench.session, bench.answering
    longest = min(longest_text(session.model.decoder, bench.spec.reads), how.max_prompt + how.max_new_tokens)
    texts.encode(session, longest)
    asked = list(islice(_prompts(session, how, longest), HELD_OUT + 4096))
    rows = [_row(bench, OWN, asked, None)]
    replies = _replies(session, asked[HELD_OUT:], bench.folder / OWN)
    with replaying(replies) as address:
        server = ServerAnswers(
            AnswerServer(address),
            lambda: islice(iter(asked), HELD_OUT, HELD_OUT + len(replies)),
            partial(completed, session),
            how,
            how.max_batch,
        )
        rows.append(_row(bench, SERVER, asked, server))
    rows[-1]["left_out"] = server.left_out
    plain = as_given(lambda: chain.from_iterable(part for _, part in texts.parts(session, longest)))
    rows.append(_row(bench, PLAIN, asked, plain))
    return rows


def _prompts(session: Session, how: Answering, longest: int) -> Iterator[EncodedPrompt]:
    drawn = training_prompts([(BUILT_IN, 1.0)], how.seed)
    return encode_prompts(
        drawn, lambda prompt: session.encode(messages_of(prompt))[0], min(how.max_prompt, 2 * longest // 3)
    )


def _row(bench: Bench, name: str, asked: Sequence[EncodedPrompt], given: GivenTexts | None) -> dict[str, Any]:
    """Collect a set of one kind, and train on it; return the figures. Raises ValueError: no text was collected."""
    session = bench.session
    collector = Collector(
        bench.folder / name,
        session.model.decoder,
        bench.spec.reads,
        (one.ids for one in asked),
        ends_of(session),
        bench.answering,
        {},
        given=given,
    )
    began = time.monotonic()
    for _ in collector.grow(Patience(began + bench.seconds)):
        pass
    seconds, size = time.monotonic() - began, collector.size()
    if not size.tokens:
        raise ValueError(f"{name}: no text came in {bench.seconds:g} seconds; give more --seconds")
    collected, trained = 60 * size.tokens / seconds, 60 * _training_speed(bench, bench.folder / name)
    return {
        "name": name,
        "texts": size.texts,
        "tokens": size.tokens,
        "seconds": seconds,
        "collected": collected,
        "trained": trained,
        "learned": 1 / (1 / collected + 1 / trained),
    }


def _training_speed(bench: Bench, folder: Path) -> float:
    """Return how many tokens of the set in `folder` are trained on in a second, the first step left out."""
    backbone, dataset = bench.session.model.decoder, Dataset(folder)
    vocab = backbone.spec.vocab_size
    ids, _ = frequent(dataset, vocab, bench.spec.text.vocab_size)
    candidates = Candidates.of(ids, vocab, backbone.head.rows(ids, torch.float32))

    def embed(tokens: Tensor) -> Tensor:
        return backbone.embed(tokens).float().clone()

    network = Network(bench.spec, initial_tensors(bench.spec, backbone, ids))
    trainer = Trainer(network, dataset, embed, candidates, TrainerSettings())
    trainer.step(0.0)
    began, tokens = time.monotonic(), 0
    while not tokens or time.monotonic() - began < bench.seconds:
        tokens += trainer.step(0.5).tokens
    return tokens / (time.monotonic() - began)


def _replies(session: Session, asked: Sequence[EncodedPrompt], folder: Path) -> dict[str, str]:
    """Return the answers in the set at `folder`, by the messages that they answer."""
    texts = (text for shard in Dataset(folder).shards for text in read_shard(shard))
    return {
        json.dumps(messages_of(prompt.prompt)): session.text(text.tokens[text.answer :].tolist())
        for prompt, text in zip(asked, texts, strict=False)
    }


@contextmanager
def replaying(replies: Mapping[str, str]) -> Iterator[str]:
    """Serve `replies` (messages as JSON -> answer) as a server of OpenAI's protocol does; yield its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send({"data": [{"id": "replayed"}]})

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            answer = {"role": "assistant", "content": replies[json.dumps(asked["messages"])]}
            self._send({"choices": [{"message": answer, "finish_reason": "stop"}]})

        def _send(self, value: Mapping[str, Any]) -> None:
            body = json.dumps(value).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Say nothing."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            server.shutdown()
            thread.join()


def _table(rows: Sequence[Mapping[str, Any]]) -> Table:
    made = Table(box=box.SIMPLE, show_edge=False, pad_edge=False, title="tokens a minute", title_justify="left")
    made.add_column("texts")
    for name in ("collected", "against own", "trained", "learned"):
        made.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        against = row["collected"] / rows[0]["collected"]
        cells = (f"{row['collected']:,.0f}", f"{against:.2f}x", f"{row['trained']:,.0f}", f"{row['learned']:,.0f}")
        made.add_row(row["name"], *cells)
    return made


if __name__ == "__main__":
    sys.exit(main())
