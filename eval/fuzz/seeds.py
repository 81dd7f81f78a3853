"""The tiny whole files that `python -m eval.fuzz` damages copies of: models of each family, and the files beside a
model.

What: `write_seeds`. The weights are random: a text means nothing here. `eval/fuzz/media.py` writes the media.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from drafter.config import TOKEN_ORDERING, MTPHeadConfig, MTPHeadSpec, assistant_spec, extra_tensors, head_spec
from drafter.data.dataset import DatasetWriter
from drafter.data.features import read
from drafter.files.assistant import assistant_config, save_assistant
from drafter.files.gguf import DIALECTS
from drafter.files.gguf_writer import TYPES, write_assistant
from drafter.files.head import save_head
from drafter.use.log import UsedModel, UseLog
from eval.fuzz.adapters import write_adapters
from eval.fuzz.cases import GGUF, QUANTISED, VOCAB, World, generate, no_bar
from eval.fuzz.media import write_media
from eval.synthetic.byte_tokenizer import add_byte_tokenizer
from eval.synthetic.command import write_model
from eval.synthetic.gguf_files import write_gguf
from eval.synthetic.packed.folders import write_packed
from eval.synthetic.random_weights import random_tensor
from specdec.hf import SpecdecForCausalLM
from specdec.model.decoder import Decoder
from specdec.model.names import expected_tensors
from specdec.model.quantized import load_or_quantize
from specdec.open import open_checkpoint
from specdec.weights.safetensors import INDEX

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_KINDS = ["sliding_attention", "full_attention"]
_GEMMA4 = {
    "head_dim": 8,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "attention_k_eq_v": True,
    "sliding_window": 16,
    "layer_types": _KINDS,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
}
_MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", {"head_dim": 8, "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128,
    }}),
    "gemma3": ("Gemma3TextConfig", {
        "head_dim": 8, "query_pre_attn_scalar": 24, "sliding_window": 16, "layer_types": _KINDS,
    }),
    "gemma4": ("Gemma4UnifiedTextConfig", _GEMMA4),
    "gemma4-shared": ("Gemma4TextConfig", {
        **_GEMMA4, "attention_k_eq_v": False, "num_global_key_value_heads": None, "num_hidden_layers": 4,
        "layer_types": _KINDS * 2, "num_kv_shared_layers": 2, "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB,
    }),
}  # fmt: skip


_MEDIA: dict[str, Any] = {  # patches of 6 x 6 pixels, frames of 32 samples
    "vision_config": {"patch_size": 2, "mm_embed_dim": 32, "output_proj_dims": 32, "mm_posemb_size": 8},
    "audio_config": {"audio_embed_dim": 32},
    **{"image_token_id": 10, "audio_token_id": 11, "video_token_id": 12, "boi_token_id": 13, "eoi_token_id": 14},
    **{"boa_token_id": 15, "eoa_token_index": 16},
}


def write_seeds(folder: Path) -> None:
    """Write the whole files that cases are copies of."""
    for name, (kind, arguments) in _MODELS.items():
        config = getattr(transformers, kind)(**{**_SHAPE, **arguments})
        write_model(config, None, folder / f"hf-{name}")
        if f"gguf-{name}" in GGUF:
            _write_gguf(folder / f"gguf-{name}", name, config)
    text = transformers.Gemma4UnifiedTextConfig(**{**_SHAPE, **_GEMMA4})
    write_model(transformers.Gemma4UnifiedConfig(text_config=text, **_MEDIA), None, folder / "gguf-media", gguf="q8_0")
    _write_store(folder / "gguf-llama" / "model.gguf", folder / "ollama")
    world = World(folder)
    _write_sharded(folder / "hf-llama", folder / "sharded")
    for name in QUANTISED:
        write_packed(folder / "hf-llama", folder / f"hf-{name}", name)
    _write_packed(folder)
    _write_conversation(folder / "conversation", world.model("hf-gemma4"))
    _write_head(folder / "head", world.model().decoder)
    _write_assistant(folder / "assistant", world.model("hf-gemma4"))
    _write_shards(folder / "shards", world.model().decoder)
    write_adapters(folder / "adapter", world.model("hf-gemma4").decoder, "gemma4")
    write_media(folder)
    log = UseLog(folder / "logs", UsedModel("tiny", world.model().decoder.fingerprint), 1 << 20)
    log.add(range(2, 60), 20)
    log.place.rename(folder / "use")
    (folder / "prompts").mkdir()
    lines = (
        {"prompt": "Hello", "id": 1, "category": "chat"},
        {"turns": ["One?", "Two?"], "question_id": 7},
        {"messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}], "task": "x"},
    )
    (folder / "prompts" / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n")


def _write_sharded(model: Path, folder: Path) -> None:
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((model / name).read_bytes())
    tensors = load_file(model / "model.safetensors")
    where = {name: f"model-{i % 3 + 1:05d}-of-00003.safetensors" for i, name in enumerate(tensors)}
    for shard in set(where.values()):
        save_file({name: tensors[name] for name in tensors if where[name] == shard}, folder / shard)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))


def _write_packed(folder: Path) -> None:
    (folder / "packed").mkdir()
    spec, source, *_ = open_checkpoint(folder / "hf-llama")
    made = load_or_quantize(folder / "hf-llama", spec, source, "int4", torch.float32, no_bar)
    assert made is not None
    raw = made.path.read_bytes()
    (folder / "packed" / "model.packed").write_bytes(raw)
    length = int.from_bytes(raw[-48:-40], "little")  # of the index, which stands before a footer of 48 bytes
    about = {k: v for k, v in json.loads(raw[-48 - length : -48])["about"].items() if k != "byte_order"}
    (folder / "packed-about.json").write_text(json.dumps(about))


def _write_conversation(folder: Path, model: SpecdecForCausalLM) -> None:
    folder.mkdir()
    model.conversations.limit = 1 << 26
    generate(model, max_new_tokens=40, eos_token_id=None)
    model.save_conversation(folder / "saved.safetensors", notes={"model": "tiny"})


def _tensors(spec: MTPHeadSpec) -> dict[str, Tensor]:
    return {
        name: random_tensor(name, shape).float()
        for name, shape in (expected_tensors(spec.text) | extra_tensors(spec)).items()
    }


def _write_head(folder: Path, backbone: Decoder) -> None:
    config = MTPHeadConfig(32, 64, (1,), 4, draft_vocab=64, bigram=4, aux_layers=(0,))
    ids = torch.arange(100, 164, dtype=torch.int64)
    about = {"backbone_name": "tiny", "steps": 3}
    save_head(folder, config, _tensors(head_spec(config, backbone.spec)), ids, backbone, about)


def _write_assistant(folder: Path, model: SpecdecForCausalLM) -> None:
    backbone, text = model.decoder, model.config.get_text_config()
    config = assistant_config(text, backbone.spec, MTPHeadConfig(32, 64, (0, 1), 4))
    spec = assistant_spec(config, backbone.spec)
    save_assistant(folder, config, spec, _tensors(spec), backbone, {"backbone_name": "tiny"}, 3)
    config.use_ordered_embeddings, config.num_centroids, config.centroid_intermediate_top_k = True, 16, 4
    spec = assistant_spec(config, backbone.spec)
    tensors = {**_tensors(spec), TOKEN_ORDERING: torch.arange(VOCAB, dtype=torch.int64).flip(0)}
    for dialect in DIALECTS:
        path = folder.with_name(f"drafter-{dialect}") / "drafter.gguf"
        clusters = dialect != "gemma4-assistant"
        write_assistant(path, config, spec, tensors.__getitem__, TYPES["q8_0"], {}, dialect=dialect, centroids=clusters)


def _write_shards(folder: Path, backbone: Decoder) -> None:
    texts = [torch.arange(3 + i, 12 + 2 * i, dtype=torch.int64) for i in range(4)]
    features = list(read(backbone, texts, (1,), aux_layers=(0,)))
    DatasetWriter(folder, {"backbone": backbone.fingerprint, "layers": [1]}).add(features, 1.5)


def _write_store(model: Path, folder: Path) -> None:
    """Write what Ollama keeps of a model: its file under its hash, and the manifest."""
    folder.mkdir()
    content = model.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    (folder / f"sha256-{digest}").write_bytes(content)
    kind = "application/vnd.ollama.image.model"
    layers = [{"mediaType": kind, "digest": f"sha256:{digest}", "size": len(content)}]
    (folder / "manifest.json").write_text(json.dumps({"schemaVersion": 2, "layers": layers}))


def _write_gguf(folder: Path, name: str, config: Any) -> None:
    """Write a .gguf file of random weights, with the tokenizer that files of such models have."""
    folder.mkdir()
    architecture = name.partition("-")[0]
    if architecture in ("llama", "qwen3"):
        tokenizer: Callable[[gguf.GGUFWriter], None] = _add_byte_level
    else:
        tokenizer = functools.partial(_add_pieces, model="llama" if architecture == "gemma3" else "gemma4")
    write_gguf(folder / "model.gguf", architecture, config, tokenizer)


def _add_byte_level(writer: gguf.GGUFWriter) -> None:
    add_byte_tokenizer(writer, VOCAB, merges=["h e", "l l"])


def _add_pieces(writer: gguf.GGUFWriter, model: str) -> None:
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["\u2581a", "bc", "ab", "abc", "a", "b", "c", "\u2581"]
    pieces += [f"<unused{i}>" for i in range(VOCAB - len(pieces))]
    writer.add_tokenizer_model(model)
    writer.add_token_list(pieces)
    writer.add_token_scores([-float(i) for i in range(VOCAB)])
    writer.add_token_types([3, 3, 3, 2, *[6] * 256, *[1] * (VOCAB - 260)])
    if model == "gemma4":
        writer.add_token_merges(["\u2581 a", "b c", "a b"])
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_pad_token_id(0)
