"""Tiny random assistants for the tiny Gemma 4 backbones of `tests.support.tiny`.

Checkpoints are written tensor by tensor, because transformers 5.23.0 cannot build the model; parity then loads them
into transformers' class, which must accept every tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from safetensors.torch import save_file
from torch import Tensor

from drafter import MTPDrafter, load_drafter
from drafter.config import MTPHeadConfig, MTPHeadSpec, assistant_spec, extra_tensors, head_spec, head_tensors
from drafter.files.checkpoint import build_assistant, checked_source, read_stored
from drafter.files.gguf_writer import write_assistant
from drafter.inference import MTPHead
from drafter.train.model import Network
from specdec.cache import KVCache
from specdec.drafting.protocol import Draft
from specdec.engine.sampling import Noise
from specdec.hf import decoder_of
from specdec.model.decoder import Decoder
from specdec.model.names import expected_tensors
from specdec.model.states import States
from specdec.weights.state_dict import StateDictCheckpoint
from tests.support.tiny import VOCAB, WINDOW, tiny_model

CENTROIDS = {"use_ordered_embeddings": True, "num_centroids": 32, "centroid_intermediate_top_k": 4}

# backbone's family -> its assistant's class, and what the text config must repeat of the backbone
ASSISTANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gemma4_unified": ("Gemma4UnifiedAssistant", "Gemma4UnifiedTextConfig", {}),
    "gemma4": (
        "Gemma4Assistant",
        "Gemma4TextConfig",
        {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
    ),
    "gemma4-moe": (
        "Gemma4Assistant",
        "Gemma4TextConfig",
        {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0},
    ),
    "gemma4-e2b": (
        "Gemma4Assistant",
        "Gemma4TextConfig",
        {
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "attention_k_eq_v": False,
            "num_global_key_value_heads": None,
        },
    ),
}
ASSISTANTS["gemma4-e4b"] = ASSISTANTS["gemma4-e2b"]


def assistant_config(family: str, text: dict[str, Any] | None = None, **top: Any) -> Any:
    name, text_name, repeated = ASSISTANTS[family]
    arguments = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_kv_shared_layers": 3,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_global_key_value_heads": 1,
        "head_dim": 16,
        "global_head_dim": 32,
        "attention_k_eq_v": True,
        "sliding_window": WINDOW,
        **repeated,
        **(text or {}),
    }
    text_config = getattr(transformers, text_name)(**arguments)
    return getattr(transformers, f"{name}Config")(**{"text_config": text_config, "backbone_hidden_size": 64, **top})


def save_assistant(folder: Path, family: str, seed: int = 0, **top: Any) -> Path:
    """A random assistant for the tiny backbone of `family`, as transformers would save it."""
    config = assistant_config(family, **top)
    config.architectures = [f"{ASSISTANTS[family][0]}ForCausalLM"]
    config.save_pretrained(folder)
    spec = assistant_spec(config, backbone(family).spec)
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    shapes = {f"model.{name}": shape for name, shape in expected_tensors(spec.text).items()}
    for name, shape in {**shapes, **extra_tensors(spec)}.items():
        tensor = torch.randn(shape, generator=generator) * (0.3 if "norm" in name else 0.1) + float("norm" in name)
        # Softer attention than the tiny backbones have: theirs multiplies rounding errors with every step.
        tensor = tensor * 0.5 if "q_norm" in name else tensor
        tensors[name] = torch.full(shape, 0.8) if name.endswith("layer_scalar") else tensor
    if spec.centroids:
        tensors["masked_embedding.token_ordering"] = torch.randperm(VOCAB, generator=generator)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def write_gguf(path: Path, folder: Path, family: str, kind: Type = Type.F32, **options: Any) -> Path:
    """The assistant in `folder` as a GGUF file for the tiny backbone of `family`; `options` of `write_assistant`."""
    stored = read_stored(folder)
    spec = stored.spec(backbone(family))
    names = checked_source(spec, stored.checkpoint).names
    write_assistant(path, stored.shape, spec, lambda name: stored.checkpoint.tensor(names[name]), kind, {}, **options)
    return path


def backbone(family: str) -> Decoder:
    return decoder_of(tiny_model(family))


def prefilled(decoder: Decoder, ids: Tensor, aux_layers: Sequence[int] = ()) -> tuple[KVCache, States]:
    """A cache with ids [n] committed, and the states of the last of them."""
    cache = decoder.new_cache()
    states = States(torch.empty(0, dtype=torch.float32))
    for chunk in ids.split(cache.max_rows):
        states = decoder.forward(chunk, cache, aux_layers)[-1]
        cache.commit(len(chunk))
    return cache, states


def bound(folder: Path, decoder: Decoder) -> tuple[MTPDrafter, MTPHead]:
    drafter = load_drafter(folder)
    drafter.bind(decoder)
    assert drafter._assistant is not None
    return drafter, drafter._assistant


def proposed(
    drafter: MTPDrafter, cache: KVCache, ids: Tensor, states: States, k: int, noise: Noise | None = None
) -> Draft:
    return drafter.start(cache, noise).propose(ids.tolist(), states, k)


def transformers_assistant(folder: Path, family: str) -> Any:
    """What transformers makes of the assistant in `folder`, all of whose tensors it takes."""
    model_class = getattr(transformers, f"{ASSISTANTS[family][0]}ForCausalLM")
    try:
        model, report = model_class.from_pretrained(folder, output_loading_info=True, attn_implementation="eager")
    except ValueError as error:
        if "layer types producing a cache" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__} cannot build its own assistant: {error}")
    assert not any(report.values()), report
    return model.float().eval()


def spec_of(family: str, **changes: Any) -> MTPHeadSpec:
    """Gemma 4's assistant where there is one for the family, else a head of our own."""
    if family in ASSISTANTS and not changes:
        return assistant_spec(assistant_config(family), backbone(family).spec)
    spec = backbone(family).spec
    source = spec.layers[spec.shared_kv_layers["full_attention"]]
    config = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "reads": tuple(spec.shared_kv_layers.values()),
        "heads": source.heads,
        "draft_vocab": 40,
        "bigram": 8,
    }
    return head_spec(MTPHeadConfig(**{**config, **changes}), spec)


@cache
def network(family: str) -> Network:
    spec, generator = spec_of(family), torch.Generator().manual_seed(3)
    return Network(
        spec,
        {
            name: torch.randn(shape, generator=generator) * shape[-1] ** -0.5 + (1 if len(shape) == 1 else 0)
            for name, shape in head_tensors(spec).items()
        },
    )


def draft_ids(spec: MTPHeadSpec) -> Tensor | None:
    if not spec.pruned:
        return None
    return torch.randperm(VOCAB, generator=torch.Generator().manual_seed(1))[: spec.text.vocab_size].sort().values


def drafting(family: str) -> MTPHead:
    """The same weights as a drafter runs them."""
    mine = network(family)
    return build_assistant(
        mine.spec,
        StateDictCheckpoint(mine.tensors(), "the head"),
        torch.float32,
        torch.device("cpu"),
        draft_ids=draft_ids(mine.spec),
        vocab=VOCAB,
    )
