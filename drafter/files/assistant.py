"""The head of a Gemma 4 backbone is its assistant, and is saved as transformers saves an assistant.

`assistant_config` makes the config of an assistant for a backbone. `save_assistant` writes the folder that
transformers' `Gemma4UnifiedAssistantForCausalLM` (or `Gemma4AssistantForCausalLM`) loads: config.json and
model.safetensors. The backbone's fingerprint and the provenance stand beside these files in `specdec.json`: the format
of config.json is transformers', not ours.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Gemma4AssistantConfig, Gemma4UnifiedAssistantConfig, GenerationConfig

from drafter.config import Config, MTPHeadConfig, MTPHeadSpec
from specdec.model.decoder import Decoder
from specdec.model.names import expected_tensors
from specdec.model.spec import DecoderSpec
from specdec.util.atomic import replacing
from specdec.weights.metadata import Values, one_line, read_object

ABOUT_FILE = "specdec.json"
# What an assistant's text config repeats of its backbone's; the sizes of K/V are added from its spec.
_SHARED = (
    "vocab_size",
    "rope_parameters",
    "rms_norm_eps",
    "hidden_activation",
    "max_position_embeddings",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
)


def assistant_config(backbone: Config, spec: DecoderSpec, head: MTPHeadConfig) -> Config:
    """Return the config of an assistant with the sizes and layers of `head`, for the model with text config `backbone`.

    Raises:
        ValueError: transformers has no assistant for such a model.
    """
    kinds = {"gemma4_text": Gemma4AssistantConfig, "gemma4_unified_text": Gemma4UnifiedAssistantConfig}
    if backbone.model_type not in kinds:
        raise ValueError(
            f"transformers has no assistants for {backbone.model_type} models, only for {', '.join(kinds)}"
        )
    sliding, full = (
        spec.layers[spec.shared_kv_layers[kind]]
        for kind in sorted(spec.shared_kv_layers, key=lambda kind: kind == "full_attention")
    )
    text = type(backbone)(
        **{name: getattr(backbone, name) for name in _SHARED},
        num_key_value_heads=sliding.kv_heads,
        num_global_key_value_heads=full.kv_heads,
        head_dim=sliding.head_dim,
        global_head_dim=full.head_dim,
        attention_k_eq_v=full.values_from_keys,
        sliding_window=sliding.window,
        hidden_size=head.hidden_size,
        intermediate_size=head.intermediate_size,
        num_attention_heads=head.heads,
        num_hidden_layers=len(head.reads),
        num_kv_shared_layers=len(head.reads),
        layer_types=[spec.layers[read].kind for read in head.reads],
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=0,
    )
    made = kinds[backbone.model_type](text_config=text, backbone_hidden_size=backbone.hidden_size)
    made.architectures = [type(made).__name__.replace("Config", "ForCausalLM")]
    return made


def save_assistant(
    folder: Path,
    config: Config,
    spec: MTPHeadSpec,
    tensors: Mapping[str, Tensor],
    backbone: Decoder,
    about: Mapping[str, Any],
    draft_length: int,
) -> None:
    """Write the assistant for `backbone` that has `tensors`, as `Network.tensors()` gives them, to `folder`.

    The tensors are written as float32, over an older assistant if there is one, and last of all files. `draft_length`:
    how many tokens transformers will draft with.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config.dtype = torch.float32
    config.save_pretrained(folder)
    GenerationConfig(num_assistant_tokens=draft_length, num_assistant_tokens_schedule="constant").save_pretrained(
        folder
    )
    record = {"backbone": {"fingerprint": backbone.fingerprint, "name": about.get("backbone_name", "unnamed")}}
    record["provenance"] = {key: value for key, value in about.items() if key != "backbone_name"}
    (folder / ABOUT_FILE).write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    inner = expected_tensors(spec.text)
    named = {f"model.{name}" if name in inner else name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(folder / "model.safetensors") as temporary:
        save_file(named, temporary, metadata={"format": "pt"})


def assistants_backbone(folder: Path) -> tuple[str, str] | None:
    """Return fingerprint and name of the backbone of the assistant in `folder`; None without a `specdec.json`.

    Raises:
        ValueError: the file `specdec.json` is damaged.
    """
    path = folder / ABOUT_FILE
    if not path.is_file():
        return None
    try:
        backbone = Values(read_object(path)).inner("backbone")
        return backbone.text("fingerprint"), one_line(backbone.text("name"))
    except ValueError as error:
        raise ValueError(f"{path}: damaged ({error}); delete it to load the assistant unchecked") from error
