"""The settings of transformers' `generate` and their fate: obeyed, without effect on the text, or refused.

A setting that is in no table here was added by a newer transformers: tests/hf/test_settings.py fails until somebody has
read what the setting does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from specdec.model.embedder.inputs import MEDIA_INPUTS

Config = Any  # transformers' GenerationConfig


class Refusal(NamedTuple):
    """Describe a setting that would change the text or the result in a way that the loop does not have.

    `harmless`: the values that ask for nothing. `instead`: what a user writes in its place.
    """

    harmless: tuple[Any, ...]
    instead: str


_OFF = (None, False)
_BEAMS = "constrained beam search is not supported; use prefix_allowed_tokens_fn"

REFUSED: Mapping[str, Refusal] = {
    "num_beams": Refusal(
        (None, 1), "beam search is not supported; use num_beams=1, or a transformers model's own generate()"
    ),
    "num_beam_groups": Refusal((None, 1), "group beam search is not supported; use num_beams=1"),
    "constraints": Refusal((None, []), _BEAMS),
    "force_words_ids": Refusal((None, []), _BEAMS),
    "penalty_alpha": Refusal((None, 0), "contrastive search is not supported; use do_sample=True with top_k or top_p"),
    "dola_layers": Refusal((None, []), "DoLa needs logits of inner layers; use a transformers model's own generate()"),
    "prompt_lookup_num_tokens": Refusal((None,), "use drafter='suffix' instead of prompt_lookup_num_tokens"),
    "assistant_early_exit": Refusal((None,), "inner layers do not draft here; leave it out, drafts come from drafter="),
    "use_mtp": Refusal(_OFF, "leave it out: with drafter='auto', or drafter= and a trained head, tokens are drafted"),
    "is_assistant": Refusal(_OFF, "this loop drafts for itself; pass drafter= instead of an assistant model"),
    "output_attentions": Refusal(_OFF, "attention maps are never formed; load the model with transformers for them"),
    "output_hidden_states": Refusal(
        _OFF, "hidden states are not kept; call the model itself on the text, model(ids, output_hidden_states=True)"
    ),
    "cache_implementation": Refusal(
        (
            *(None, "dynamic", "dynamic_full", "static", "offloaded", "offloaded_static", "sliding_window"),
            *("hybrid", "hybrid_chunked", "offloaded_hybrid", "offloaded_hybrid_chunked"),
        ),
        "this cache would change the text, or batch otherwise; for a rounded cache use specdec.load(..., "
        "kv_dtype='int8'), for many prompts pass them as one padded batch",
    ),
}
"""Settings that raise a ValueError, and what to do instead."""

OBEYED = frozenset(
    {
        # How long a text gets
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time", "stop_strings"),
        # How a token is chosen
        *("do_sample", "temperature", "top_k", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff"),
        *("repetition_penalty", "encoder_repetition_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size"),
        *("bad_words_ids", "renormalize_logits", "forced_bos_token_id", "forced_eos_token_id", "remove_invalid_values"),
        *("exponential_decay_length_penalty", "suppress_tokens", "begin_suppress_tokens", "sequence_bias"),
        *("guidance_scale", "watermarking_config", "token_healing"),
        # What comes back
        *("num_return_sequences", "output_scores", "output_logits", "return_dict_in_generate"),
        # Special tokens
        *("pad_token_id", "bos_token_id", "eos_token_id"),
    }
)
"""Settings that do what they do in transformers, whose own processors and stopping criteria are used."""

WITHOUT_EFFECT: Mapping[str, str] = {
    **dict.fromkeys(("early_stopping", "length_penalty", "diversity_penalty"), "rank beams, of which there are none"),
    **dict.fromkeys(
        ("use_cache", "cache_config", "max_cache_len", "prefill_chunk_size"),
        "shape a cache that is not used: the loop has its own, and the text is the one without any cache",
    ),
    **dict.fromkeys(("compile_config", "disable_compile"), "are about torch.compile, which is not used"),
    **dict.fromkeys(
        (
            *("num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold"),
            *("assistant_lookbehind", "target_lookbehind", "assistant_ensemble_weight", "speculation_type"),
        ),
        "are about an assistant model, which is refused; draft_length= says how much is drafted here",
    ),
    "max_matching_ngram_size": "belongs to prompt_lookup_num_tokens, which is refused",
    "low_memory": "belongs to contrastive search, which is refused",
    "decoder_start_token_id": "belongs to models with an encoder",
    "continuous_batching_config": "belongs to generate_batch(), which is refused",
    **dict.fromkeys(("transformers_version", "_from_model_config", "_commit_hash"), "say where a config comes from"),
}
"""Settings that may have any value, and why the text is the same with each."""


def refuse_unsupported(config: Config) -> None:
    """Raise a ValueError for a generation config that this loop cannot honour, saying what to use instead.

    `config`: as `make_plain` leaves it.
    """
    for name, (harmless, instead) in REFUSED.items():
        value = getattr(config, name, None)
        if value not in harmless:
            raise ValueError(f"{name}={value!r}: {instead}")


def make_plain(config: Config) -> None:
    """Replace, in place, the numpy and torch numbers among the settings of `config` with Python's.

    Arrays and tensors of several numbers become lists. Attributes that are no setting of transformers' stay as they
    are.
    """
    for name in (*OBEYED, *REFUSED):
        if hasattr(config, name):
            setattr(config, name, plain(getattr(config, name)))


def plain(value: Any) -> Any:
    """Return `value` with Python numbers and lists in place of numpy's and torch's."""
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, (np.ndarray, Tensor)):
        return value.tolist()
    if isinstance(value, (list, tuple)) and type(value) in (list, tuple):
        return type(value)(plain(one) for one in value)
    if type(value) is dict:
        return {plain(key): plain(one) for key, one in value.items()}
    return value


_TAKEN = frozenset({"attention_mask", "use_cache", "logits_to_keep", "tokenizer", "assistant_tokenizer", *MEDIA_INPUTS})
INSTEAD: Mapping[str, str] = {
    "past_key_values": "the loop keeps its own cache; pass the whole prompt, and no cache",
    "inputs_embeds": "pass input_ids; prompts that are embeddings are not supported",
    "assistant_model": "pass drafter= (a checkpoint or a Drafter) to specdec.load or to generate",
    "position_ids": "positions count the tokens that attention_mask keeps; leave position_ids out",
    "token_type_ids": "images of models that mark them so are not supported; pass text only, whose types are all 0",
    "output_attentions": REFUSED["output_attentions"].instead,
    "output_hidden_states": REFUSED["output_hidden_states"].instead,
}
"""Model inputs that others take, and what to do in their place here."""


def refuse_inputs(inputs: Mapping[str, Any], mask: Tensor | None) -> None:
    """Raise a ValueError for model inputs besides token ids and media that would change the text, saying what to use
    instead.

    `inputs`: the keyword arguments that reach a decoding method. `mask`: the attention mask [rows, n], None: all ones.
    """
    for name, value in inputs.items():
        if name in _TAKEN or value is None or value is (name == "is_causal"):  # a switch at its default
            continue
        if name == "token_type_ids" and not bool(torch.as_tensor(value).any()):
            continue
        if name == "position_ids" and usual_positions(value, mask):
            continue
        if name == "past_key_values" and not _from_outside(value):
            continue
        raise ValueError(f"{name} is not supported: {INSTEAD.get(name, 'this loop has no use for it; leave it out')}")


def usual_positions(positions: Tensor, mask: Tensor | None, starts: Sequence[int] | None = None) -> bool:
    """Return whether positions [rows or 1, n] count, without a gap, the tokens that mask [rows, n] keeps.

    Attention looks at distances alone, so a row may begin anywhere, as rows with padding on the left do. `starts`: the
    position at which each row has to begin, because the row goes on.
    """
    positions = torch.as_tensor(positions)
    rows = mask.shape[0] if mask is not None else positions.shape[0]
    if positions.dim() != 2 or positions.shape[0] not in (1, rows):
        return False
    if mask is not None and positions.shape[1] != mask.shape[1]:
        return False
    for row, line in enumerate(positions.expand(rows, -1)):
        kept = line if mask is None else line[mask[row].bool().to(line.device)]  # [tokens of the row]
        if len(kept) and bool((kept.diff() != 1).any() or (starts is not None and kept[0] != starts[row])):
            return False
    return True


def _from_outside(cache: Any) -> bool:
    """Return whether the caller of `generate` made `cache`: transformers makes an empty one for itself."""
    length = getattr(cache, "get_seq_length", lambda: 1)
    return bool(getattr(cache, "_is_user_defined", False)) or int(length()) > 0
