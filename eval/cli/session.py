"""A loaded model with its tokenizer, as every command uses it: messages in, a timed run out.

The figures are taken around `model.generate` itself, so that they are those that a user of the library gets.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

import specdec
from eval.cli.metrics import TimedRun
from eval.cli.options import GenerationSettings
from eval.cli.output import check_writable, is_metrics, put_text
from eval.prompts.sets import Message
from specdec.drafting.costs import Costs
from specdec.drafting.registry import DrafterLike
from specdec.engine.stats import GenerationStats
from specdec.engine.telemetry import prometheus
from specdec.memory.plan import parse_bytes
from specdec.memory.system import resident_bytes
from specdec.model.adapters.adapter import name_of
from specdec.util.text import check_text


class Session:
    """Keep `model` and `tokenizer`, and the settings of a run that gives no others."""

    def __init__(
        self, model: specdec.SpecdecForCausalLM, tokenizer: PreTrainedTokenizerBase, settings: GenerationSettings
    ) -> None:
        self.model, self.tokenizer, self.settings = model, tokenizer, settings
        self.counts = GenerationStats()  # of all runs so far, for Prometheus

    @property
    def context(self) -> int:
        """Return how many positions the model can hold, prompt and answer together."""
        return self.model.decoder.context

    @property
    def converses(self) -> bool:
        """Tell whether the model was trained on turns; a base model continues plain text."""
        return bool(self.tokenizer.chat_template)

    def encode(self, messages: Sequence[Message], raw: bool = False, ended: bool = False) -> Tensor:
        """Return the token ids [1, n] of `messages`, ready for the answer; `ended`: as they stand.

        They go through the chat template where the tokenizer has one; otherwise, and with `raw`, the contents are plain
        text. Raises ValueError when the template refuses the messages, or a message is not text.
        """
        for message in messages:
            check_text(message["content"], f"the {message['role']}'s message")
        if raw or not self.converses:
            text = "\n\n".join(message["content"] for message in messages)
            ids: Tensor = self.tokenizer(text, return_tensors="pt")["input_ids"]
            return ids.long()  # of an empty text: float
        try:
            encoded = self.tokenizer.apply_chat_template(
                list(messages), add_generation_prompt=not ended, return_tensors="pt", return_dict=True
            )
        except Exception as error:  # templates raise jinja2's kinds, and what their authors thought of
            raise ValueError(f"the model's chat template refuses this conversation: {error}") from error
        templated: Tensor = encoded["input_ids"]
        return templated

    def text(self, tokens: Sequence[int]) -> str:
        """Return the text of `tokens`, special ones left out."""
        return str(self.tokenizer.decode(list(tokens), skip_special_tokens=True))

    def run(
        self,
        ids: Tensor,
        speculation: bool = True,
        drafter: DrafterLike = None,
        streamer: BaseStreamer | None = None,
        reuse: bool = False,
        **overrides: Any,
    ) -> TimedRun:
        """Decode after `ids` [1, n]; return the timed run.

        `reuse`: go on from an earlier run's cache; off, because the whole work is what is measured. `overrides`:
        keyword arguments of `generate`, instead of the settings'.

        Raises ValueError: see `SpecdecForCausalLM.generate`.
        """
        options = self.generation_options() | overrides
        room = self.context - ids.shape[1]
        options["max_new_tokens"] = max(1, min(options["max_new_tokens"], room))
        ids = ids.to(self.model.device)
        began = time.perf_counter()
        output = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),  # without it transformers guesses, and warns when pad is EOS
            speculation=speculation,
            drafter=drafter,
            streamer=streamer,
            reuse=reuse,
            **options,
        )
        seconds = time.perf_counter() - began
        assert isinstance(output, Tensor)
        if self.settings.prometheus is not None:
            self.counts.merge(self.model.last_stats)
            put_text(self.settings.prometheus, prometheus(self.counts, self.settings.model))
        tokens = tuple(output[0, ids.shape[1] :].tolist())
        ends = options.get("eos_token_id", self.model.generation_config.eos_token_id)
        ended = bool(tokens) and tokens[-1] in (ends if isinstance(ends, (list, tuple)) else [ends])
        finish = "length" if len(tokens) >= options["max_new_tokens"] and not ended else "stop"
        return TimedRun(tokens, seconds, self.model.last_stats, finish)

    def costs(self) -> Costs | None:
        """Return V(T) and d as they are now, or None before they are measured."""
        lengths = self.model.lengths
        return None if lengths.measured_for is None else lengths.costs

    def memory(self) -> tuple[int, int | None]:
        """Return the bytes that this process takes now, and the budget (None without one)."""
        budget = self.settings.memory_budget
        return resident_bytes(), None if budget is None else parse_bytes(budget)

    def generation_options(self) -> dict[str, Any]:
        """Return the settings as keyword arguments of `generate`."""
        s = self.settings
        options: dict[str, Any] = {
            "max_new_tokens": s.max_new_tokens,
            "draft_length": s.draft_length,
            "do_sample": s.temperature > 0,
        }
        if s.temperature == 0:
            # A model's own sampling settings would be warned about, for greedy decoding does not use them.
            return options | {"temperature": None, "top_p": None, "top_k": None}
        options |= {"temperature": s.temperature, "seed": s.seed}
        return options | {name: v for name in ("top_p", "top_k") if (v := getattr(s, name)) is not None}


def adapters_of(pairs: Sequence[tuple[str, str]]) -> dict[str, str]:
    """Return the paths of adapters by name, from those of `--adapter`. Raises ValueError where two have one name."""
    found: dict[str, str] = {}
    for name, path in pairs:
        name = name or name_of(Path(path))
        if name in found:
            raise ValueError(f"--adapter: two adapters are called {name!r}; write NAME={path} with another name")
        found[name] = path
    return found


def open_session(settings: GenerationSettings, remember: bool = False) -> Session:
    """Load the model and the tokenizer that `settings` name. Raises ValueError: see `specdec.load`.

    `remember`: go on from what draft lengths learned in the last run; not where a run is to be compared with others.
    """
    check_writable(settings.prometheus, "--prometheus", is_metrics)
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    model = specdec.load(
        settings.model,
        drafter=settings.drafter,
        dtype=settings.dtype,
        quantize=settings.quantize,  # type: ignore[arg-type]  # argparse has checked the word
        device=settings.device,
        kv_dtype=settings.kv_dtype,
        memory_budget=settings.memory_budget,
        remember=remember,
        adapter=adapters_of(settings.adapter),
    )
    return Session(model, specdec.load_tokenizer(settings.model), settings)
