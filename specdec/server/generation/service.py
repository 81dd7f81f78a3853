"""What every endpoint shares: the model, its tokenizer and chat format, and the way from a prompt to an answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from specdec.drafting.calibrate import calibrate
from specdec.drafting.protocol import DraftLength, bind_drafter
from specdec.drafting.registry import draft_spec
from specdec.engine.constraints import Constraint
from specdec.engine.engine import Engine
from specdec.engine.event import Event
from specdec.engine.sequence import Request
from specdec.hf import SpecdecForCausalLM
from specdec.hf.batch import media_of_rows
from specdec.media.processor import Processor
from specdec.memory.plan import picture_bytes, text_bytes
from specdec.model.adapters.adapter import NONE
from specdec.model.media import MediaBlock
from specdec.server.conversation import Conversation
from specdec.server.errors import ApiError, bad_request, too_long
from specdec.server.formats import ChatFormat, Wanted, constraint_for, format_for
from specdec.server.formats.base import OutputParser
from specdec.server.generation import warm
from specdec.server.generation.answer import Answer, Output
from specdec.server.generation.engine_thread import EngineThread, Listener
from specdec.server.generation.partings import Partings
from specdec.server.generation.sampling import Defaults, Sampling
from specdec.server.generation.stop_strings import StopStrings
from specdec.server.media import Media, media_parts, put_media, read_media
from specdec.util.threads import turn_to_compute

T = TypeVar("T")

OnText = Callable[[list[int], int, str], None]
"""Called in the engine's thread with every text without media that has come to its own end: all its token ids, how many
of them are the prompt's, and the name of its adapter in caches ("": none)."""


class Service:
    """Answer requests with a model: its engine runs in a thread of its own until `close`.

    `name`: what the model is called in replies. `max_sequences`: texts that are decoded at a time; `max_waiting`: those
    that may wait besides. `lengths`: what chooses draft lengths (None: the model's own adaptive lengths).
    `kept_in`: the folder where conversations are kept between runs (None: nowhere). `processor`: reads pictures and
    sound for the model (None: it reads text alone). `on_text`: hears of every text that has ended.
    """

    def __init__(
        self,
        model: SpecdecForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        max_sequences: int = 4,
        max_waiting: int = 32,
        lengths: DraftLength | None = None,
        kept_in: Path | None = None,
        processor: Processor | None = None,
        on_text: OnText | None = None,
    ) -> None:
        self.model, self.tokenizer, self.name, self.processor = model, tokenizer, name, processor
        self.on_text = on_text
        self.decoder = model.decoder
        ends = _ids(model.generation_config.eos_token_id) or _ids(tokenizer.eos_token_id)
        self.format: ChatFormat = format_for(tokenizer, ends, self.decoder.spec.vocab_size)
        self.created = int(time.time())
        self.partings = Partings(model.conversations)
        self.kept_in = kept_in
        self._loaded = set[str]() if kept_in is None else warm.load(model, kept_in)
        self.defaults = Defaults.of(model.generation_config)
        # The server says itself that a prompt is too long for the context, to the client whose prompt it is.
        tokenizer.deprecation_warnings["sequence-length-is-longer-than-the-specified-maximum"] = True
        self.ends = frozenset(self.format.ends)
        with turn_to_compute(), bind_drafter(model.drafter, self.decoder):
            if lengths is None:
                calibrate(model.lengths, self.decoder, model.drafter, max_sequences)
        self.engine = Engine(self.decoder, model.drafter, lengths or model.lengths, model.conversations, max_sequences)
        room = None if self.decoder.room is None else self.decoder.room.cache
        self.thread = EngineThread(self.engine, max_waiting, room, self._bytes)
        self._preparing = 0  # requests that are in one of these threads, or wait for it
        # Long prompts and large pictures take a while, and others must go on.
        self._encoding = ThreadPoolExecutor(1, "specdec encoding")
        self._reading = ThreadPoolExecutor(1, "specdec media")

    @property
    def context(self) -> int:
        """Return how many tokens prompt and answer may have together."""
        return self.decoder.context

    @property
    def models(self) -> dict[str, str]:
        """Return the names that requests may ask for, each with the adapter that it means: the model's own name means
        none, and NAME:ADAPTER an adapter."""
        return {self.name: NONE, **{f"{self.name}:{one}": one for one in self.decoder.adapters.names}}

    def adapter_of(self, model: str) -> str | None:
        """Return the adapter that the name of a model means; None for a name that means nothing here, of which there
        may be any. Raises ApiError for an adapter that is not there."""
        adapters = self.decoder.adapters
        if not len(adapters):
            return None
        if (found := self.models.get(model)) is not None or model in adapters.names:
            return found or model
        if model.startswith(f"{self.name}:"):
            raise ApiError(
                404, f"there is no {model[:100]!r} here, but {', '.join(self.models)}", "model", "model_not_found"
            )
        return None

    async def prompt(self, conversation: Conversation) -> list[int]:
        """Return the token ids of a conversation. Raises ApiError when it cannot be written."""
        media = await self._media(conversation)
        return await self.encoded(lambda: self._written(conversation, media))

    async def converse(self, conversation: Conversation, sampling: Sampling, streamed: bool) -> Answer:
        """Queue the answer to a conversation; return the answer. Raises ApiError as `prompt` and `ask` do, and for
        tools or a schema that cannot be kept to."""

        media = await self._media(conversation)

        def prepare() -> tuple[list[int], tuple[MediaBlock, ...], Wanted, Constraint | None, list[int]]:
            wanted = Wanted.of(conversation.wanted)
            prompt = self._written(conversation, media)
            row = torch.tensor([prompt], dtype=torch.int64)  # [1, n]
            (blocks,) = media_of_rows(self.decoder, row, None, media.inputs)
            prediction = self.tokens(conversation.prediction, special=False) if conversation.prediction else []
            return prompt, blocks, wanted, constraint_for(self.format, prompt, wanted), prediction

        prompt, blocks, wanted, constraint, prediction = await self.encoded(prepare)
        # Under a constraint no call can be malformed, and its arguments may come as they are written.
        piecemeal = streamed and constraint is not None
        return self.ask(
            [prompt],
            sampling,
            lambda: self.format.parser(prompt, wanted.names, piecemeal),
            constraint,
            self.format.pins(prompt),
            prediction,
            blocks,
        )

    async def _media(self, conversation: Conversation) -> Media:
        """Return the pictures and sound of a conversation. Raises ApiError for those that cannot be used."""
        if not (parts := media_parts(conversation.messages)):
            return Media()
        return await self.encoded(lambda: read_media(parts, self.processor, self.context), self._reading)

    def _written(self, conversation: Conversation, media: Media) -> list[int]:
        prompt = self.format.prompt(conversation.messages, conversation.tools, conversation.options)
        return put_media(prompt, media, self.processor)

    async def encoded(self, encode: Callable[[], T], thread: ThreadPoolExecutor | None = None) -> T:
        """Return what `encode` makes of a request, in a thread for texts or in `thread`. Its ValueErrors are a
        client's. Raises ApiError when as many requests wait for it as there are places for texts."""
        if self.thread.closing is not None:
            raise self.thread.closing
        if self._preparing >= self.thread.places:
            raise ApiError(429, f"{self._preparing} requests are being read; try again later", code="queue_full")
        self._preparing += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(thread or self._encoding, encode)
        except ValueError as error:
            raise bad_request(str(error), getattr(error, "param", None)) from error
        finally:
            self._preparing -= 1

    def tokens(self, text: str, special: bool = True) -> list[int]:
        """Return the token ids of a text, with the tokens that begin every text of the model where `special`."""
        return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

    def ask(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        parser: Callable[[], OutputParser],
        constraint: Constraint | None = None,
        pins: Sequence[int] = (),
        prediction: Sequence[int] = (),
        media: tuple[MediaBlock, ...] = (),
    ) -> Answer:
        """Queue `sampling.choices` texts for each of `prompts`; return the answer, whose choices come prompt by prompt.

        `constraint`: what the texts must look like. `pins`: lengths at which later prompts are likely to part from
        these. `prediction`: the tokens of an expected answer, which drafts are made of. `media`: the pictures and sound
        of each prompt.
        Raises ApiError: a prompt that is empty, too long or no text of this model, no such adapter, or a full queue.
        """
        adapter = self.adapter_of(sampling.model)
        for prompt in prompts:
            self._check(prompt)
        outputs = [
            Output(i, parser(), StopStrings(sampling.stop), self.ends, sampling.ignore_eos)
            for i in range(len(prompts) * sampling.choices)
        ]
        if len(outputs) > self.thread.places:
            raise bad_request(
                f"{len(outputs)} texts are asked for at once, and this server takes at most {self.thread.places}; "
                "ask for fewer, or start it with a larger --max-waiting",
                "n",
            )
        answer = Answer(outputs, sum(map(len, prompts)), sampling.logprobs)
        queued: list[tuple[Request, Listener]] = []
        for i, (output, seed) in enumerate(zip(outputs, sampling.seeds(len(outputs)), strict=True)):
            prompt = prompts[i // sampling.choices]
            limit = min(len(prompt) + (sampling.max_tokens or self.context), self.context)
            row = torch.tensor(prompt, dtype=torch.int64)  # [n]
            sampler = sampling.sampler(len(prompt), seed)
            request = Request(
                row,
                limit,
                sampler,
                output.stop,
                stats=output.stats,
                media=media,
                constraint=constraint,
                pins=frozenset(pins),
                prediction=tuple(prediction[: self.context]),  # no answer is longer
                adapter=adapter,
            )
            listener: Listener = partial(answer.on_event, output)
            if self.on_text is not None and sampling.store and not media:
                listener = partial(_tell_text, listener, self.on_text)
            queued.append((request, listener))
        places = [block.place for block in media]
        answer.parting = self.partings.note(prompts[0], places, self.decoder.adapters.resolve(adapter))
        answer.begin(self.thread, self.thread.submit(queued))
        return answer

    def close(self) -> None:
        """End all answers and the engine's thread; keep the newest conversations where a folder was named."""
        self.thread.close()
        if self.kept_in is not None:
            warm.save(self.model, self.kept_in, self._loaded)
        self._encoding.shutdown(cancel_futures=True)
        self._reading.shutdown(cancel_futures=True)

    def _bytes(self, positions: int, block: int) -> int:
        """Return the bytes of a text's caches of `positions`, and of a pass over a picture of `block` soft tokens."""
        decoder = self.decoder
        pictures = picture_bytes(decoder.spec, block, decoder.kv_dtype, decoder.dtype) if block else 0
        return text_bytes(decoder.spec, positions, decoder.kv_dtype, draft_spec(self.model.drafter)) + pictures

    def _check(self, prompt: Sequence[int]) -> None:
        if not prompt:
            raise bad_request("the prompt is empty", "prompt")
        if len(prompt) >= self.context:
            raise too_long(len(prompt), self.context)
        if min(prompt) < 0 or max(prompt) >= self.decoder.spec.vocab_size:
            raise bad_request(f"token ids must lie in 0..{self.decoder.spec.vocab_size - 1}", "prompt")


def _tell_text(listener: Listener, on_text: OnText, what: Event | ApiError | Exception) -> None:
    """Tell `on_text` of a text that has come to its end, then pass `what` on to `listener`. A client that left, and an
    error, end a text half way: nobody is told."""
    if isinstance(what, Event) and what.sequence.finish in ("stop", "length"):
        on_text(what.sequence.row.tolist(), len(what.sequence.request.row), what.sequence.adapter)
    listener(what)


def _ids(known: Any) -> list[int]:
    """Return the token ids of a setting that is an id, a list of ids, or None."""
    return [known] if isinstance(known, int) else list(known or ())
