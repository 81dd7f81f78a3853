"""Answers from a server that speaks OpenAI's protocol: the costly half of a training set, made where a fast engine is.

What: `AnswerServer`, which is asked, and `ServerAnswers`, which makes texts of its answers. A server gives text, and a
head learns tokens: the conversation is put into the model's own template once more, and an answer counts only where its
tokens follow the prompt's and are its text again. Another answer is left out, and the text is the prompt alone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Generator, Iterator
from itertools import islice
from typing import Any, NamedTuple

from torch import Tensor

from drafter.data.given import EncodedPrompt, GivenText
from drafter.data.patience import Patience
from drafter.data.workers import in_workers
from drafter.prompts.files import TrainingPrompt
from drafter.settings import Answering

_SECONDS = 300.0  # that an answer may take
_BUSY = (429, 503)  # statuses of a server that has no room now
_WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds between attempts
_JUDGED = 24  # answers after which more than half must be usable


class Reply(NamedTuple):
    """Keep an answer's text; `ended`: the model ended it, and not the limit."""

    text: str
    ended: bool


Complete = Callable[[EncodedPrompt, Reply], "Tensor | None"]
"""(prompt, answer) -> the token ids [n] of both, the answer's end token included where the answer ended; None where the
answer's tokens cannot be told from its text."""


class AnswerServer:
    """Ask a server at `url`, with or without "/v1" at its end. `model`: its name there; None: the first that it lists.
    `key`: the API key."""

    def __init__(self, url: str, model: str | None = None, key: str | None = None) -> None:
        """Ask for the models. Raises ValueError: nothing answers, or it knows no such model."""
        import httpx2

        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        self._failures = (httpx2.HTTPError, httpx2.InvalidURL)
        self._client = httpx2.Client(headers=headers, timeout=httpx2.Timeout(_SECONDS, connect=10))
        listed = self._sent("GET", "/models", None).get("data")
        names = [str(one.get("id")) for one in listed or () if isinstance(one, dict)]
        if not names:
            raise ValueError(f"{self.url}/models lists no model; start the server with one, or name another address")
        if model is not None and model not in names:
            raise ValueError(f"{self.url} has no model {model!r}; it has {', '.join(names[:8])}")
        self.model = model or names[0]

    def ask(self, prompt: TrainingPrompt, tokens: int, temperature: float, seed: int) -> Reply | None:
        """Return the answer to `prompt`, of at most `tokens` tokens; None where the server refuses the prompt.

        Raises ValueError when the server cannot be reached, or fails again and again.
        """
        messages = [{"role": role, "content": content} for role, content in prompt.messages]
        body = {
            **{"model": self.model, "messages": messages, "max_tokens": tokens},
            **{"temperature": temperature, "seed": seed, "stream": False},
        }
        found = self._sent("POST", "/chat/completions", body)
        if "error" in found:
            return None
        try:
            choice = found["choices"][0]
            return Reply(str(choice["message"].get("content") or ""), choice["finish_reason"] == "stop")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{self.url}: an answer without choices; is it a chat server?") from error

    def _sent(self, method: str, path: str, body: dict[str, Any] | None) -> dict[str, Any]:
        """Return the JSON reply; of a request that the server refuses, an object with `error`."""
        for wait in (*_WAITS, None):
            try:
                reply = self._client.request(method, self.url + path, json=body)
            except self._failures as error:
                raise ValueError(f"nothing answers at {self.url} ({error or type(error).__name__})") from error
            if reply.status_code not in _BUSY or wait is None:
                break
            time.sleep(wait)
        if reply.status_code in (400, 413, 422) and body is not None:
            return {"error": reply.text[:200]}
        if reply.status_code != 200:
            raise ValueError(
                f"{self.url}{path}: status {reply.status_code}: {reply.text[:200]}{_hint(reply.status_code)}"
            )
        try:
            found = reply.json()
        except ValueError:
            found = None
        if not isinstance(found, dict):
            raise ValueError(f"{self.url}{path}: no JSON object came; is it a server of OpenAI's protocol?")
        return found


def _hint(status: int) -> str:
    return "; its key belongs into OPENAI_API_KEY" if status in (401, 403) else ""


class ServerAnswers:
    """Make texts of a server's answers to prompts, as `GivenTexts`. `prompts()`: the prompts from the first one on;
    texts among them stay as they are.

    `used`, `left_out`: how many answers are texts now, and how many were no use. `together`: requests under way.
    """

    def __init__(
        self,
        server: AnswerServer,
        prompts: Callable[[], Iterator[EncodedPrompt | GivenText]],
        complete: Complete,
        answering: Answering,
        together: int,
    ) -> None:
        self.server, self.together = server, together
        self.used = self.left_out = 0
        self._prompts, self._complete, self._how = prompts, complete, answering
        self._counting = threading.Lock()

    def __call__(self, first: int, patience: Patience) -> Generator[tuple[int, GivenText], None, None]:
        """Ask for answers from prompt number `first` on. Raises ValueError: see `AnswerServer.ask`, or most answers are
        of no use."""

        def due() -> Iterator[tuple[int, EncodedPrompt | GivenText]]:
            for found in enumerate(islice(self._prompts(), first, None), first):
                if patience.over():
                    return
                yield found

        def work(mine: Iterator[tuple[int, EncodedPrompt | GivenText]]) -> Iterator[tuple[int, GivenText]]:
            for number, found in mine:
                yield number, found if isinstance(found, GivenText) else self._text(number, found)

        return in_workers(work, due(), self.together, threading.Event())

    def _text(self, number: int, prompt: EncodedPrompt) -> GivenText:
        how = self._how
        temperature = how.temperatures[number % len(how.temperatures)]
        reply = self.server.ask(prompt.prompt, how.max_new_tokens, temperature, how.seed + number)
        whole = self._complete(prompt, reply) if reply is not None and reply.text else None
        with self._counting:
            self.used += whole is not None
            self.left_out += whole is None
            if self.left_out > max(self.used, _JUDGED // 2):
                raise ValueError(
                    f"{self.left_out} of {self.used + self.left_out} answers of {self.server.model!r} at "
                    f"{self.server.url} are of no use: they are empty, refused, or not what this model's template "
                    "makes tokens of; ask a server that has the same model"
                )
        return GivenText(prompt.ids if whole is None else whole, len(prompt.ids))
