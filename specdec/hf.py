"""`SpecdecForCausalLM`, and `speculative` for `custom_generate=`: the two ways into `specdec.generate.run_batch`."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from specdec.cache import Conversation, Conversations
from specdec.cache.conversation_file import load_conversation, save_conversation
from specdec.control import AdaptiveLength
from specdec.drafting import Drafter
from specdec.generate import Batch, Options, refuse_unsupported, run_batch
from specdec.model.build import Source, build_decoder
from specdec.model.decoder import Decoder
from specdec.model.families import decoder_spec
from specdec.resolve import resolve_drafter
from specdec.stats import GenerationStats, Round
from specdec.threads import LastOf
from specdec.weights.state_dict import StateDictCheckpoint

DrafterLike = Drafter | str | None


class SpecdecForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """A causal language model that decodes speculatively; made by `specdec.load`.

    `generate(**anything transformers accepts, speculation=True, draft_length="adaptive", seed=None, reuse=True,
    on_round=None)`; the text depends on prompt, settings and seed, never on the others. `last_stats` tells what the
    last call did, `lengths` what was learned of costs and acceptance, `conversations` holds the caches that a prompt
    which goes on need not fill again.
    """

    main_input_name = "input_ids"
    _supports_sdpa = True  # whatever the config asks for: our attention has one implementation

    def __init__(
        self,
        decoder: Decoder,
        config: Any,
        generation_config: GenerationConfig,
        drafter: Drafter,
        conversations: Conversations | None = None,
    ) -> None:
        super().__init__(config)
        self.conversations = conversations or Conversations(decoder.new_cache)
        self.decoder = decoder
        self.generation_config = generation_config
        self.drafter = drafter
        self.drafter.bind(decoder)
        self.lengths = AdaptiveLength()
        self._stats = LastOf(GenerationStats())

    @property
    def last_stats(self) -> GenerationStats:
        """What the last call of this thread did; in a thread that made none, what the last call of all did."""
        return self._stats.get()

    @property
    def device(self) -> torch.device:
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        return self.decoder.dtype

    def to(self, *args: Any, **kwargs: Any) -> SpecdecForCausalLM:
        """Only a check: weights are laid out for their device while they load."""
        device, dtype, *_ = torch._C._nn._parse_to(*args, **kwargs)
        if (device is not None and device.type != self.device.type) or dtype not in (None, self.dtype):
            raise ValueError("a loaded model stays where it is; use specdec.load(..., device=..., dtype=...)")
        return self

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of all weights, as stored."""
        return self.decoder.nbytes

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError("weights are held in an inference layout; keep the checkpoint that this model was loaded from")

    @classmethod
    def can_generate(cls) -> bool:
        return True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the loop has its own cache; transformers need not make one

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int = 0,
        past_key_values: None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, n, vocab] of whole sequences [B, n], for scoring; `generate` does not come by here.

        `logits_to_keep`: only the last so many positions (0: all). Masked positions get zeros. With `labels` [B, n]
        also the mean cross-entropy of the next token, -100 left out.
        """
        if past_key_values is not None:
            raise ValueError("forward() takes whole sequences; for incremental decoding use generate()")
        keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        logits = self.decoder.embed(input_ids[:1, :1].flatten()).new_zeros(
            *input_ids.shape, self.decoder.spec.vocab_size, dtype=torch.float32
        )
        for row, (ids, mask) in enumerate(zip(input_ids.to(self.device), keep.bool().to(self.device), strict=True)):
            cache = self.decoder.new_cache()
            rows = []
            for chunk in ids[mask].split(cache.max_rows):
                rows.append(self.decoder.logits(self.decoder.forward(chunk, cache)))
                cache.commit(len(chunk))
            logits[row, mask] = torch.cat(rows)
        loss = None
        if labels is not None:
            following = labels[:, 1:].flatten().to(self.device)  # [B * (n - 1)]
            loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), following)
        return CausalLMOutputWithPast(loss=loss, logits=logits[:, -logits_to_keep:] if logits_to_keep else logits)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        past_key_values: None = None,
        logits_to_keep: int = 0,
        use_cache: bool = True,
        speculation: bool = True,
        draft_length: str | int = "adaptive",
        seed: int | None = None,
        reuse: bool = True,
        drafter: DrafterLike = None,
        on_round: Callable[[Round], None] | None = None,
    ) -> dict[str, Any]:
        """The keyword arguments that `generate` passes through to the loop: transformers checks names against these."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """transformers' `generate`, decoded speculatively, with the same output.

        Besides everything that transformers accepts: `speculation` (False decodes plainly), `draft_length` ("adaptive"
        or a number), `seed`, `reuse` (False: compute all of the prompt, and keep nothing for the next one), `drafter`
        (another one for this call), and `on_round` (called with a `specdec.Round` after every round). `last_stats` is
        this call's `GenerationStats` afterwards, also after an interrupt.

        Raises:
            ValueError: beam search and other methods that this loop does not have; the message says what to use.
        """
        self._refuse(generation_config or self.generation_config, kwargs)
        return super().generate(inputs, generation_config, *args, **kwargs)

    def save_conversation(
        self, path: str | os.PathLike[str], ids: Tensor | None = None, notes: dict[str, Any] | None = None
    ) -> None:
        """Write the cache of the conversation that ids [n] or [1, n] begin with to `path`; None: of the last one.

        `notes`: any JSON that belongs to it. Raises ValueError: there is none, or the file cannot be written.
        """
        with self.conversations.lent(None if ids is None else ids.flatten()) as found:
            save_conversation(found, Path(path), self.decoder.identity, notes or {})

    def load_conversation(self, path: str | os.PathLike[str]) -> Conversation:
        """Take in what `save_conversation` wrote: a prompt that begins with it goes on from there.

        Its `tokens` [n] int64 are all but the text's last one, from which nothing had been computed yet. Raises
        ValueError: the file is not there, damaged, of another model or another way to load it, or larger than what the
        memory for conversations holds.
        """
        found = load_conversation(Path(path), self.decoder.identity, self.decoder.new_cache)
        if found.nbytes > self.conversations.limit:
            raise ValueError(
                f"{path}: takes {found.nbytes / 1e9:.2f} GB, and conversations may take "
                f"{self.conversations.limit / 1e9:.2f}; raise model.conversations.limit or memory_budget"
            )
        self.conversations.add(found)
        return found

    def _refuse(self, config: GenerationConfig, kwargs: dict[str, Any]) -> None:
        # Before transformers picks another decoding method for these, or prepares things that nothing would use.
        for name, use in (
            ("assistant_model", "pass drafter= (a checkpoint or a Drafter) to specdec.load or to generate"),
            ("past_key_values", "the loop keeps its own cache; pass the whole prompt"),
            ("inputs_embeds", "pass input_ids"),
            ("pixel_values", "images are not supported; pass text only"),
            ("input_features", "audio is not supported; pass text only"),
            ("custom_generate", "this model's generate() is the speculative loop already"),
        ):
            if kwargs.get(name) is not None:
                raise ValueError(f"{name} is not supported by {type(self).__name__}: {use}")
        effective = GenerationConfig.from_dict(
            {**config.to_dict(), **{k: v for k, v in kwargs.items() if hasattr(config, k)}}
        )
        refuse_unsupported(effective)
        if effective.guidance_scale not in (None, 1, 1.0):
            raise ValueError("guidance_scale needs a transformers model, and custom_generate=specdec.speculative")

    def _sample(
        self,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer: Any = None,
        attention_mask: Tensor | None = None,
        speculation: bool = True,
        draft_length: str | int = "adaptive",
        seed: int | None = None,
        reuse: bool = True,
        drafter: DrafterLike = None,
        on_round: Callable[[Round], None] | None = None,
        **kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        chosen = self.drafter if drafter is None else resolve_drafter(drafter)
        stats = GenerationStats()
        batch = Batch(input_ids, attention_mask, logits_processor, stopping_criteria, generation_config, streamer)
        options = Options(speculation, draft_length, seed, reuse, on_round)
        self._stats.set(stats)  # also for whoever looks while it runs
        try:
            return run_batch(self.decoder, chosen, self.lengths, batch, options, stats, self.conversations)
        finally:
            self._stats.set(stats)  # calls that were made meanwhile, from callbacks, have ended before


# pipeline() looks class names up here, and prints an error with a few hundred of them when it finds none.
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["specdec"] = SpecdecForCausalLM.__name__


def speculative(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Any,
    stopping_criteria: Any,
    generation_config: GenerationConfig,
    synced_gpus: bool = False,
    streamer: Any = None,
    drafter: DrafterLike = "auto",
    speculation: bool = True,
    draft_length: str | int = "adaptive",
    seed: int | None = None,
    on_round: Callable[[Round], None] | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """A decoding method for `hf_model.generate(..., custom_generate=specdec.speculative, drafter=...)`.

    The model's own parameters are used where they are, without a copy; `model.last_stats` tells what the call did.
    transformers does not hand `tokenizer` on to custom methods, so instead of `stop_strings` pass
    `stopping_criteria=[StopStringCriteria(tokenizer, [...])]`.

    Raises:
        ValueError: the architecture is not in the family table, its weights are spread over devices or quantised by
            another library, or the generation config asks for something that this loop does not have.
    """
    if model_kwargs.get("inputs_embeds") is not None or model_kwargs.get("pixel_values") is not None:
        raise ValueError("custom_generate=specdec.speculative takes text prompts: pass input_ids only")
    decoder = decoder_of(model)
    chosen = resolve_drafter(drafter)
    stats = GenerationStats()
    if not hasattr(model, "draft_lengths"):
        model.draft_lengths = AdaptiveLength()  # what it learns is for the next call too
    batch = Batch(
        input_ids,
        model_kwargs.get("attention_mask"),
        logits_processor,
        stopping_criteria,
        generation_config,
        streamer if streamer is not None else _callers_streamer(),
    )
    options = Options(speculation, draft_length, seed, on_round=on_round)
    model.last_stats = stats
    try:
        return run_batch(decoder, chosen, model.draft_lengths, batch, options, stats)
    finally:
        model.last_stats = stats


def decoder_of(model: PreTrainedModel) -> Decoder:
    """Our decoder over the parameters of a transformers model, which it shares. Raises as `speculative` does."""
    spec = decoder_spec(model.config)
    source = Source.huggingface(StateDictCheckpoint(model.state_dict(), type(model).__name__), spec)
    return build_decoder(spec, source, dtype=model.dtype, device=model.device)


def _callers_streamer() -> Any:
    """The `streamer` argument of the `generate` that called `speculative`.

    transformers (5.17 to 5.23, `_extract_generation_mode_kwargs`) keeps it from callables, and a streamer that nobody
    feeds or ends leaves its consumer waiting for ever.
    """
    frame = inspect.currentframe()
    caller = frame.f_back.f_back if frame is not None and frame.f_back is not None else None
    return caller.f_locals.get("streamer") if caller is not None and caller.f_code.co_name == "generate" else None
