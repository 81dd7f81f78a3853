"""A ten-turn agent, replayed against this server and against llama.cpp's.

What: both servers read one .gguf file and get the same system message, task and tool results, turn by turn, each with
its own answers in its history, as an agent keeps them. Every answer has the same number of tokens, so that both decode
as much. The turns alternate. What is compared: seconds of all turns as the client sees them, and prompt tokens that
were computed rather than taken from a cache, which both servers report under the same name.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from eval.prompts.sets import Message
from eval.server.client import ask
from eval.server.served import Served

_SYSTEM = (
    "You are a coding agent. You work in a folder of a small Python project, one step at a time. In every step you "
    "say in a sentence what you look for, and then write one command: read FILE, write FILE, run COMMAND, or done."
)
_TASK = "The total of a bill is wrong when a line has a discount. Find out why, mend it, and show the changed file."


def _file(name: str, first: int) -> str:
    lines = [
        f"def {name}_{i}(lines, rate={i}):\n    return sum(line.price * line.count for line in lines) * (1 + rate)\n"
        for i in range(first, first + 6)
    ]
    return f"# {name}.py\n" + "\n".join(lines)


TOOL_RESULTS = (
    "bill.py discount.py tax.py tests/test_bill.py",
    _file("bill", 1),
    _file("discount", 7),
    "tests/test_bill.py:14: AssertionError: assert 90.0 == 81.0",
    _file("tax", 3),
    "1 file written",
    _file("bill", 1).replace("1 + rate", "1 - rate"),
    "tests/test_bill.py:22: AssertionError: assert 109.0 == 99.0",
    "12 passed in 0.31 s",
)
"""What the agent's tools give after each answer but the last: ten turns in all."""


@dataclass(frozen=True)
class Turn:
    """Keep the figures of a turn: its number, seconds, prompt tokens, those that were computed, and emitted tokens."""

    server: str
    conversation: int
    turn: int
    seconds: float
    prompt: int
    computed: int
    emitted: int


def replayed(served: Served, file: Path, threads: int, repeat: int) -> Iterator[Turn]:
    """Replay the agent `repeat` times, each conversation with a beginning of its own, and yield every turn."""
    limit = served.session.settings.max_new_tokens
    with _llama_server(file, threads, served.session.context) as port:
        ports = {"specdec": served.port, "llama.cpp": port}
        for one in ports.values():  # what a first request of all costs is no part of it
            ask(one, _body([{"role": "user", "content": "Hello."}], limit))
        for i in range(repeat):
            begin: list[Message] = [
                {"role": "system", "content": f"Conversation {i}. {_SYSTEM}"},
                {"role": "user", "content": _TASK},
            ]
            histories = {name: list(begin) for name in ports}
            for turn, result in enumerate((*TOOL_RESULTS, "")):
                for name in list(ports) if (i + turn) % 2 else list(ports)[::-1]:
                    reply, seconds = ask(ports[name], _body(histories[name], limit))
                    timings, usage = reply["timings"], reply["usage"]
                    answer = reply["choices"][0]["message"]["content"]
                    histories[name] += [
                        {"role": "assistant", "content": answer},
                        {"role": "user", "content": f"Result:\n{result}"},
                    ]
                    prompt, emitted = usage["prompt_tokens"], usage["completion_tokens"]
                    yield Turn(name, i, turn, seconds, prompt, timings["prompt_n"], emitted)


def replay_record(found: Sequence[Turn]) -> dict[str, Any]:
    """Return all turns, and of each server the seconds and the computed prompt tokens of a conversation (medians), in
    JSON types."""
    record: dict[str, Any] = {"turns": [asdict(one) for one in found]}
    for server in dict.fromkeys(one.server for one in found):
        mine = [one for one in found if one.server == server]
        whole = [[one for one in mine if one.conversation == i] for i in sorted({one.conversation for one in mine})]
        record[server] = {
            "seconds": median(sum(one.seconds for one in turns) for turns in whole),
            "prompt_tokens": median(sum(one.prompt for one in turns) for turns in whole),
            "computed": median(sum(one.computed for one in turns) for turns in whole),
            "emitted": median(sum(one.emitted for one in turns) for turns in whole),
        }
    record["ratio"] = record["llama.cpp"]["seconds"] / record["specdec"]["seconds"]
    return record


def _body(messages: Sequence[Message], limit: int) -> dict[str, Any]:
    return {"messages": list(messages), "temperature": 0, "max_tokens": limit, "ignore_eos": True}


@contextmanager
def _llama_server(file: Path, threads: int, context: int) -> Iterator[int]:
    """Run llama.cpp's server on `file` in a process of its own while the block runs; the value is its port.

    Its settings are its own, but for threads, context, one place, and the loopback address.
    """
    here, there = get_context("spawn").Pipe()
    process = get_context("spawn").Process(target=_serve, args=(there, str(file), threads, context), daemon=True)
    process.start()
    there.close()
    try:
        try:
            yield int(here.recv())
        except EOFError as error:
            raise ValueError(f"llama.cpp's server did not start on {file}") from error
    finally:
        process.terminate()
        process.join(10)


def _serve(pipe: Connection, file: str, threads: int, context: int) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = file
    params.n_ctx, params.n_parallel, params.n_gpu_layers = context, 1, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
    params.port, params.verbosity = 0, -1
    server = xllamacpp.Server(params)
    pipe.send(server.listening_address.rsplit(":", 1)[1])
    pipe.poll(None)  # until the parent has gone
