"""`speculative` for `custom_generate=`: the loop in a model that transformers loaded, over that model's own weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.generation.utils import GenerateDecoderOnlyOutput

from specdec.drafting.draft_length import AdaptiveLength
from specdec.drafting.registry import DrafterLike, resolve_drafter
from specdec.engine.constraints import Constraint
from specdec.engine.stats import GenerationStats, Round
from specdec.hf.autocast import no_autocast, refuse_autocast
from specdec.hf.batch import Batch, media_of_rows, run_batch
from specdec.hf.options import Options
from specdec.hf.plain_model import refuse_more_than_weights
from specdec.hf.settings import make_plain, refuse_inputs
from specdec.model.build import Source, build_decoder
from specdec.model.decoder import Decoder
from specdec.model.embedder.inputs import MediaInputs
from specdec.model.families import decoder_spec
from specdec.model.media import MediaBlock
from specdec.model.names import with_present_media
from specdec.model.spec import DecoderSpec, RopeSpec
from specdec.weights.state_dict import StateDictCheckpoint


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
    constraint: Constraint | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """Decode for `hf_model.generate(..., custom_generate=specdec.speculative, drafter=...)`.

    The model's own parameters are used where they are, without a copy. `model.last_stats` holds the counts of the call.
    transformers does not hand `tokenizer` on to custom methods, so instead of `stop_strings` pass
    `stopping_criteria=[StopStringCriteria(tokenizer, [...])]`.

    Raises:
        ValueError: the model computes more than its weights and its config say (adapters, hooks, patched or replaced
            layers, dropout, soft prompts); autocast would make it compute in another dtype; a cache or positions from
            outside; the architecture is not in the family table; weights spread over devices or quantised by another
            library; a generation config that asks for something that this loop does not have. The message names the
            reason and the way out.
    """
    refuse_inputs(model_kwargs, model_kwargs.get("attention_mask"))
    refuse_autocast(model.device, model.dtype)
    make_plain(generation_config)
    chosen = resolve_drafter(drafter)
    with no_autocast(model.device):
        decoder = decoder_of(model)
        stats = model.last_stats = GenerationStats()
        if not hasattr(model, "draft_lengths"):
            model.draft_lengths = AdaptiveLength()  # what it learns is for the next call too
        batch = Batch(
            input_ids,
            model_kwargs.get("attention_mask"),
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer if streamer is not None else _callers_streamer(),
            _media(decoder, input_ids, generation_config, model_kwargs),
        )
        options = Options(speculation, draft_length, seed, on_round=on_round, constraint=constraint)
        try:
            return run_batch(decoder, chosen, model.draft_lengths, batch, options, stats)
        finally:
            model.last_stats = stats  # calls that were made meanwhile, from callbacks, have ended before


def _media(
    decoder: Decoder, ids: Tensor, config: GenerationConfig, inputs: dict[str, Any]
) -> list[tuple[MediaBlock, ...]]:
    if MediaInputs.of(inputs).given and (config.num_return_sequences or 1) > 1:
        raise ValueError(
            "num_return_sequences with pictures or sound: transformers repeats the clips of a prompt one by one; "
            "repeat the prompts instead, or use specdec.load"
        )
    return media_of_rows(decoder, ids, inputs.get("attention_mask"), inputs)


def decoder_of(model: PreTrainedModel) -> Decoder:
    """Make a decoder whose weights share the memory of a transformers model's parameters.

    Raises ValueError as `speculative` does.
    """
    state = model.state_dict()
    spec = with_present_media(decoder_spec(model.config), state)
    checkpoint = StateDictCheckpoint(state, type(model).__name__)
    refuse_more_than_weights(model)
    spec = replace(spec, ropes=_ropes(model, spec), tied_head=_tied(model))
    source = Source.huggingface(checkpoint, spec)
    kinds = {state[name].dtype for name in source.names.values() if name in state}
    if len(kinds) > 1:
        raise ValueError(
            f"{type(model).__name__} has weights in {', '.join(sorted(map(str, kinds)))}: convert all of them with "
            f"model.to({model.dtype}), or leave custom_generate out"
        )
    return build_decoder(spec, source, dtype=model.dtype, device=model.device)


def _ropes(model: PreTrainedModel, spec: DecoderSpec) -> dict[str, RopeSpec]:
    """Return the rotations in the buffers of `model`: converting a whole model to another dtype rounds buffers too."""
    rotary = model.get_decoder().rotary_emb

    def rope(kind: str) -> RopeSpec:
        prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
        frequencies: Tensor = getattr(rotary, f"{prefix}inv_freq")  # [D / 2]
        return RopeSpec(tuple(frequencies.float().tolist()), float(getattr(rotary, f"{prefix}attention_scaling")))

    return {kind: rope(kind) for kind in spec.ropes}


def _tied(model: PreTrainedModel) -> bool:
    """Return whether the output matrix is the embedding, whatever the config says."""
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def _callers_streamer() -> Any:
    """Return the `streamer` argument of the `generate` that called `speculative`.

    transformers (5.17 to 5.23, `_extract_generation_mode_kwargs`) hands `streamer` to no callable. A streamer that
    nobody feeds or ends would leave its consumer waiting for ever.
    """
    frame = inspect.currentframe()
    caller = frame.f_back.f_back if frame is not None and frame.f_back is not None else None
    return caller.f_locals.get("streamer") if caller is not None and caller.f_code.co_name == "generate" else None
