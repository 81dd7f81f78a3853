"""`SpecdecForCausalLM`: transformers' face of the loop, whose `generate` ends in `specdec.hf.batch.run_batch`."""

from __future__ import annotations

import copy
import inspect
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.auto import modeling_auto

from specdec.cache import Conversation, Conversations
from specdec.cache.conversation_file import load_conversation, save_conversation
from specdec.drafting.draft_length import AdaptiveLength
from specdec.drafting.protocol import Drafter, bind_drafter
from specdec.drafting.registry import DrafterLike, draft_spec, resolve_drafter
from specdec.engine.constraints import Constraint
from specdec.engine.stats import GenerationStats, Round
from specdec.hf import forward as passes
from specdec.hf.autocast import no_autocast
from specdec.hf.batch import Batch, media_of_rows, run_batch
from specdec.hf.fixed_weights import FixedWeights
from specdec.hf.forward import ForwardCache
from specdec.hf.options import Options
from specdec.hf.plain_model import patches
from specdec.hf.settings import INSTEAD, make_plain, refuse_inputs, refuse_unsupported
from specdec.hf.weights import storage
from specdec.memory.plan import conversations_of
from specdec.model.adapters.adapter import PLAIN
from specdec.model.decoder import Decoder
from specdec.model.embedder.inputs import MEDIA_INPUTS
from specdec.util.threads import LastOf

_POSITIONAL = list(inspect.signature(GenerationMixin.generate).parameters)[3:-1]  # after self, inputs and the config


class SpecdecForCausalLM(FixedWeights, PreTrainedModel, GenerationMixin):  # type: ignore[misc]
    """Generate as transformers' causal language models do, and speculatively; made by `specdec.load`.

    `generate(**anything transformers accepts, speculation=True, draft_length="adaptive", seed=None, reuse=True,
    on_round=None, constraint=None, adapter=None)`; the text depends on prompt, settings, seed, constraint and adapter,
    never on the other arguments. `last_stats` holds the counts of the last call. `lengths` holds the measured costs and
    acceptance. `conversations` holds the caches of former conversations, which a prompt that continues one need not
    fill again.
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
        """Wrap `decoder`. `conversations` None: no cache outlives its call. Raises ValueError: the drafter refuses
        it."""
        super().__init__(config)
        self.conversations = conversations or Conversations(decoder.new_cache)
        self.decoder = decoder
        self.generation_config = generation_config
        self.drafter = drafter
        with bind_drafter(drafter, decoder):
            pass  # a drafter may refuse the model
        self.lengths = AdaptiveLength()
        self._stats = LastOf(GenerationStats())

    @property
    def last_stats(self) -> GenerationStats:
        """Return the stats of this thread's last call; in a thread without a call, those of the last call of all."""
        return self._stats.get()

    @property
    def device(self) -> torch.device:
        """Return the device of the weights."""
        return self.decoder.device

    @property
    def dtype(self) -> torch.dtype:
        """Return the dtype of activations and float weights."""
        return self.decoder.dtype

    def __repr__(self) -> str:
        """Return a line about the model: family, layers, weights and their storage, drafter, context, device."""
        spec = self.decoder.spec
        stored = f"{self.num_parameters() / 1e6:,.0f} million weights in {self.decoder.nbytes / 1e6:,.0f} MB"
        stored += f" ({storage(self.decoder)})"
        return (
            f"{type(self).__name__}({self.config.model_type}, {len(spec.layers)} layers, {stored}, "
            f"drafter {self.drafter.name}, context {spec.max_positions:,}, {self.dtype} on {self.device})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> SpecdecForCausalLM:
        """Return another model over the same weights, which nothing changes; it begins without conversations."""
        settings = copy.deepcopy((self.config, self.generation_config), memo)
        conversations = conversations_of(self.decoder, draft_spec(self.drafter))
        conversations.limit = self.conversations.limit
        made = memo[id(self)] = type(self)(self.decoder, *settings, self.drafter, conversations)
        made.train(self.training)
        return made

    def __copy__(self) -> SpecdecForCausalLM:
        made = type(self).__new__(type(self))
        made.__dict__.update(self.__dict__)
        return made

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        self.decoder.__reduce_ex__(protocol)

    @classmethod
    def can_generate(cls) -> bool:
        """Tell transformers that the model has `generate`."""
        return True

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the loop has its own cache; transformers need not make one

    # torch.compile would trace its way to calls of ours that it cannot know; transformers has imported dynamo by now.
    @torch.compiler.disable(recursive=True)  # type: ignore[untyped-decorator, no-untyped-call]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: ForwardCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Compute logits [B, n, vocab] float32 for token ids [B, n], without gradients.

        `generate` does not come by here. Arguments and output are those of transformers' models. `past_key_values` of
        an output goes into the next call, with `attention_mask` [B, columns so far + n]. `logits_to_keep` is the number
        of last positions, or the positions. `labels` [B, n] add the mean cross-entropy of the next token, -100 left
        out. `output_hidden_states` adds the embeddings and the output of each layer, [B, n, hidden] each.
        `return_dict=False` makes a tuple. Masked positions get zeros. `position_ids` may be given where they leave no
        gap. Media come as for `generate`.

        Raises:
            ValueError: attention maps, embeddings as a prompt, a transformers cache, token ids outside the vocabulary,
                media that do not fit the ids.
        """
        config = self.config
        with no_autocast(self.device):
            output = passes.forward(
                self.decoder,
                input_ids,
                attention_mask,
                position_ids,
                past_key_values,
                labels,
                getattr(config, "use_cache", True) if use_cache is None else use_cache,
                logits_to_keep,
                config.output_hidden_states if output_hidden_states is None else output_hidden_states,
                **{"output_attentions": config.output_attentions, **kwargs},
            )
        return output if (config.return_dict if return_dict is None else return_dict) else output.to_tuple()

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
        pixel_values: Tensor | None = None,
        image_position_ids: Tensor | None = None,
        pixel_values_videos: Tensor | None = None,
        video_position_ids: Tensor | None = None,
        num_frames_per_video: Tensor | None = None,
        input_features: Tensor | None = None,
        input_features_mask: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        constraint: Constraint | None = None,
        adapter: str | None = None,
    ) -> dict[str, Any]:
        """Take the keyword arguments that `generate` passes to the loop: transformers checks names against these."""
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def generate(
        self, inputs: Tensor | None = None, generation_config: GenerationConfig | None = None, *args: Any, **kwargs: Any
    ) -> Tensor | GenerateDecoderOnlyOutput:
        """Generate as transformers' `generate` does, with the same output, decoded speculatively.

        Pictures, videos and sound come as the model's processor in transformers makes them (`pixel_values`,
        `input_features` and so on). Besides everything that transformers accepts: `speculation` (False decodes
        plainly), `draft_length` ("adaptive" or a number), `seed`, `reuse` (False: compute the whole prompt, and keep
        nothing for the next one), `drafter` (another drafter for this call), `on_round` (called with a
        `specdec.Round` after every round), `constraint` (what each text must look like: a
        `specdec.engine.grammar.Grammar`, say) and `adapter` (the name of a loaded adapter; "none": the model as it is).
        `last_stats` is this call's `GenerationStats` afterwards, also after an interrupt.

        Raises:
            ValueError: beam search and other methods that this loop does not have; the message says what to use.
                Media for a model that has no embedder for them, or that do not fit the prompts.
        """
        given = {**dict(zip(_POSITIONAL, args, strict=False)), **kwargs}
        refuse_inputs({name: given[name] for name in INSTEAD if name in given}, given.get("attention_mask"))
        if given.get("custom_generate") is not None:
            raise ValueError("custom_generate is not needed: this model's generate() is the speculative loop already")
        for patch in patches(self):
            raise ValueError(f"generate() does not come by forward(), and this model {patch}, or load it anew")
        with no_autocast(self.device):
            return super().generate(inputs, generation_config, *args, **kwargs)

    def _prepare_generation_config(
        self, generation_config: GenerationConfig | None, **kwargs: Any
    ) -> tuple[GenerationConfig, dict[str, Any]]:
        # transformers merges the model's own config, the call's and its keyword arguments here, before it picks a
        # decoding method by the result.
        config, model_kwargs = super()._prepare_generation_config(generation_config, **kwargs)
        make_plain(config)
        refuse_unsupported(config)
        if config.guidance_scale not in (None, 1):
            raise ValueError("guidance_scale needs a transformers model, and custom_generate=specdec.speculative")
        return config, model_kwargs

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor, dict[str, Any]]:
        # transformers would repeat each picture by itself, and two pictures of a prompt would change places.
        media = {name: kwargs.pop(name) for name in MEDIA_INPUTS if name in kwargs}
        ids, expanded = super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **kwargs)
        return ids, expanded | media

    def _refuse_batching(self, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError("pass the prompts as one padded batch to generate(): its rows share their passes")

    generate_batch = init_continuous_batching = continuous_batching_context_manager = _refuse_batching

    def save_conversation(
        self, path: str | os.PathLike[str], ids: Tensor | None = None, notes: dict[str, Any] | None = None
    ) -> None:
        """Write the cache of a conversation to `path`: the one that ids [n] or [1, n] begin with; None: the last one.

        `notes`: any JSON that belongs to the conversation. Raises ValueError when there is no such conversation or the
        file cannot be written.
        """
        with self.conversations.lent(None if ids is None else ids.flatten()) as found:
            save_conversation(found, Path(path), self.decoder.identity_of(found.cache.adapter), notes or {})

    def load_conversation(self, path: str | os.PathLike[str]) -> Conversation:
        """Take in a conversation that `save_conversation` wrote: a prompt that begins with it goes on from its cache.

        The conversation's `tokens` [n] int64 are all but the text's last token, whose row had not been computed yet.
        Raises ValueError when the file is missing or damaged, belongs to another model or to another way to load it, or
        is larger than the memory for conversations.
        """
        identity_of, new_cache = self.decoder.identity_of, self.decoder.new_cache
        caches = {identity_of(name): partial(new_cache, adapter=name) for name in self.decoder.adapters.names}
        found = load_conversation(Path(path), identity_of(PLAIN), partial(new_cache, adapter=PLAIN), caches)
        if found.nbytes > self.conversations.limit:
            raise ValueError(
                f"{path}: takes {found.nbytes / 1e9:.2f} GB, and conversations may take "
                f"{self.conversations.limit / 1e9:.2f}; raise model.conversations.limit or memory_budget"
            )
        self.conversations.add(found)
        return found

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
        constraint: Constraint | None = None,
        adapter: str | None = None,
        **kwargs: Any,
    ) -> Tensor | GenerateDecoderOnlyOutput:
        refuse_inputs(kwargs, attention_mask)
        chosen = self.drafter if drafter is None else resolve_drafter(drafter)
        stats = GenerationStats()
        copies = generation_config.num_return_sequences or 1
        media = media_of_rows(self.decoder, input_ids, attention_mask, kwargs, copies)
        batch = Batch(
            input_ids, attention_mask, logits_processor, stopping_criteria, generation_config, streamer, media
        )
        options = Options(speculation, draft_length, seed, reuse, on_round, constraint, adapter)
        self._stats.set(stats)  # so that `last_stats` shows this call while it runs
        try:
            return run_batch(self.decoder, chosen, self.lengths, batch, options, stats, self.conversations)
        finally:
            self._stats.set(stats)  # calls that were made meanwhile, from callbacks, have ended before


# pipeline() looks class names up here, and prints an error with a few hundred of them when it finds none.
for _task in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
    getattr(modeling_auto, f"MODEL_FOR_{_task}_MAPPING_NAMES")["specdec"] = SpecdecForCausalLM.__name__
