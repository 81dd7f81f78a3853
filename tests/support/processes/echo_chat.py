"""`python -m tests.support.processes.echo_chat OPTIONS`: `run.py chat` without a model, for tests of its terminal.

The answer says what the model would have got, as JSON, and how often it was asked: `heard 1: "hello"`. The answer to
"slowly" is a word every 20 ms, and the one to "md" is Markdown.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

import torch
from torch import Tensor

import eval.cli.session
import run
from eval.cli.metrics import TimedRun
from eval.cli.options import DEFAULT_MODEL, GenerationSettings
from eval.cli.session import Session
from specdec.engine.stats import GenerationStats

MARKDOWN = "# Title\n\nSome **bold** and `code`.\n\n```\nx = 1\n```\n"


class EchoSession(Session):
    """A session whose answers say what was asked."""

    converses, context = True, 100_000

    def __init__(self, settings: GenerationSettings, remember: bool = False) -> None:
        self.settings, self.tokenizer = settings, None
        self.asked, self.times = "", 0

    def costs(self) -> None:
        return None

    def encode(self, messages: Any, raw: bool = False) -> Tensor:
        self.asked = messages[-1]["content"]
        return torch.zeros((1, len(messages)), dtype=torch.long)

    def run(self, ids: Tensor, streamer: Any = None, **options: Any) -> TimedRun:
        self.times += 1
        if self.asked == "slowly":
            for i in range(200):
                streamer.on_finalized_text(f"word{i} ")
                time.sleep(0.02)
        elif self.asked == "md":
            streamer.on_finalized_text(MARKDOWN)
        else:
            streamer.on_finalized_text(f"heard {self.times}: {json.dumps(self.asked)}")
        return TimedRun((1,), 0.1, GenerationStats())


if __name__ == "__main__":
    eval.cli.session.open_session = EchoSession
    sys.exit(run.main(["chat", "--model", DEFAULT_MODEL, *sys.argv[1:]]))
