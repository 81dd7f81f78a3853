"""The tensors of an adapter's file, by the canonical names of the matrices that they belong to.

What: `open_adapter` reads headers and settings of a PEFT folder or a GGUF adapter, told apart by what they hold, and
checks every name and shape against the decoder's spec: an adapter of another model is refused before a tensor is read.
Left out: embeddings' low-rank parts, norms and biases, which are refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from specdec.model.adapters.peft_config import CONFIG, PeftConfig
from specdec.model.gguf_config import gguf_architecture
from specdec.model.names import HF_PREFIXES, expected_tensors, gguf_name, ignorable
from specdec.model.spec import DecoderSpec
from specdec.util.atomic import user_path
from specdec.weights.checkpoint import Checkpoint
from specdec.weights.gguf.checkpoint import GGUFCheckpoint
from specdec.weights.gguf.kind import is_gguf
from specdec.weights.metadata import Values, naming, one_line, quote
from specdec.weights.safetensors import SafetensorsCheckpoint

TENSORS = "adapter_model.safetensors"
_PICKLE = "adapter_model.bin"
_LOW_RANK = re.compile(r"^(.*)\.lora_([AB])(?:\.[^.]+)?\.weight$")
_SAVED = re.compile(r"^(.*?)(?:\.modules_to_save|\.base_layer)?(?:\.default)?\.weight$")
_GGUF = re.compile(r"^(.*)\.lora_([ab])$")
_PEFT = "base_model.model."
_LAYER = re.compile(r"^layers\.(\d+)\.")
_LISTED = 4  # names in a message
FIELDS = {
    "self_attn.q_proj": "q",
    "self_attn.k_proj": "k",
    "self_attn.v_proj": "v",
    "self_attn.o_proj": "o",
    "mlp.gate_proj": "gate",
    "mlp.up_proj": "up",
    "mlp.down_proj": "down",
    "per_layer_input_gate": "ple_gate",
    "per_layer_projection": "ple_projection",
}
"""The fields of a `Layer` that can be adapted, by the modules' names in transformers."""


class Pair(NamedTuple):
    """Hold a low-rank part in a file: the names of its tensors, and what it is multiplied by."""

    down: str
    up: str
    scale: float


@dataclass(frozen=True)
class AdapterFile:
    """Say what an adapter's file has: a `Pair` for each matrix that it adapts, and the name of each matrix that it
    replaces, by canonical names."""

    path: Path
    checkpoint: Checkpoint
    parts: Mapping[str, Pair]
    replaced: Mapping[str, str]
    interleaved_rope: bool = False  # rows of q and k are in llama.cpp's order

    @property
    def nbytes(self) -> int:
        """Return the bytes that its parts take in memory, in float32; bfloat16 takes half of it."""
        shapes = self.checkpoint.shapes()
        sizes = [shapes[name] for pair in self.parts.values() for name in pair[:2]]
        sizes += [shapes[name] for name in self.replaced.values()]
        return sum(4 * a * b for a, b in sizes)


def open_adapter(path: str | Path, spec: DecoderSpec) -> AdapterFile:
    """Return what the PEFT folder or GGUF file `path` has for a model of `spec`; its tensors stay unread.

    Raises ValueError, naming the file and the module, for what is damaged, not supported, or of another model.
    """
    path = user_path(path)
    try:
        folder, there = path.is_dir(), path.exists()
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror})") from None
    if not there:
        raise ValueError(
            f"{path}: there is no such file or folder; an adapter is a PEFT folder ({CONFIG} and {TENSORS}), a .gguf "
            "file, or one of the Hugging Face hub, named owner/name"
        )
    with naming(path):
        if not folder and path.name in (TENSORS, CONFIG):
            path, folder = path.parent, True
        if folder and not (path / CONFIG).is_file():
            return _gguf(_only_gguf(path), spec)
        if not folder and not is_gguf(path):
            raise ValueError(f"not an adapter: name a folder with {CONFIG} and {TENSORS}, or a .gguf file")
        return _peft(path, spec) if folder else _gguf(path, spec)


def _only_gguf(folder: Path) -> Path:
    found = sorted(path for path in folder.iterdir() if path.suffix == ".gguf")
    if len(found) != 1:
        raise ValueError(f"not an adapter: it holds neither {CONFIG} nor one .gguf file; name the adapter's own folder")
    return found[0]


def _peft(folder: Path, spec: DecoderSpec) -> AdapterFile:
    config = PeftConfig(folder)
    if not (folder / TENSORS).is_file():
        pickled = ", but a pickle, which can run code when read" if (folder / _PICKLE).is_file() else ""
        raise ValueError(f"there is no {TENSORS}{pickled}; save the adapter with PEFT's save_pretrained")
    checkpoint = SafetensorsCheckpoint(folder / TENSORS)
    pairs, replaced, trained = dict[str, dict[str, str]](), dict[str, str](), dict[str, str]()
    copies: dict[str, str] = {}  # of the model's own embedding and head, which PEFT saves beside what adapts them
    for name in checkpoint.shapes():
        short = name.removeprefix(_PEFT)
        if "lora_magnitude_vector" in short:
            raise ValueError(f"{_quoted(name)} is of DoRA, which is not supported: merge it into the model with PEFT")
        if "lora_embedding" in short:
            raise ValueError(f"{_quoted(name)} adapts an embedding, which is not supported: merge it with PEFT")
        low_rank = _LOW_RANK.match(short)
        saved = None if low_rank else _SAVED.match(short)
        module = low_rank[1] if low_rank else saved[1] if saved else ""
        if not module:
            raise ValueError(f"{_quoted(name)} is no part of a LoRA adapter that is supported")
        if (canonical := _canonical(module, spec)) is None:
            continue
        if low_rank:
            pairs.setdefault(canonical, {})[low_rank[2]] = name
            trained[canonical] = module
        else:
            (replaced if module.endswith(config.saved) else copies)[canonical] = name
    _check_shapes(checkpoint, spec, copies)
    _check(checkpoint, spec, pairs, replaced, "lora_A", "lora_B")
    for canonical, module in trained.items():
        _check_settings(config, module, checkpoint.shapes()[pairs[canonical]["A"]][0])
    _check_complete(config, spec, trained, checkpoint.shapes())
    parts = {name: Pair(pair["A"], pair["B"], config.scale_of(trained[name])) for name, pair in pairs.items()}
    return AdapterFile(folder, checkpoint, parts, replaced)


def _check_settings(config: PeftConfig, module: str, rank: int) -> None:
    """Raise a ValueError where the settings say other things of `module` than the file, which has `rank` ranks of
    it."""
    if not config.adapts(module):
        raise ValueError(f"the file adapts {_quoted(module)}, which {CONFIG} does not: are both of one adapter?")
    if rank != config.rank_of(module):
        raise ValueError(
            f"{_quoted(module)} has {rank} ranks in the file and {config.rank_of(module)} by {CONFIG}: are both of "
            "one adapter?"
        )


def _check_complete(config: PeftConfig, spec: DecoderSpec, trained: Mapping[str, str], stored: Iterable[str]) -> None:
    """Raise a ValueError where the file lacks modules that the settings name."""
    first = next(filter(_LAYER.match, trained), None)
    prefix = "model." if first is None else trained[first].removesuffix(first.removesuffix(".weight"))
    modules = {name: prefix + name.removesuffix(".weight") for name in _matrices(spec) if _LAYER.match(name)}
    missing = [module for name, module in modules.items() if name not in trained and config.adapts(module)]
    if missing:
        listed = ", ".join(missing[:_LISTED]) + (f" and {len(missing) - _LISTED} more" if missing[_LISTED:] else "")
        raise ValueError(f"{CONFIG} names modules that {TENSORS} does not have: {listed}; fetch the adapter again")
    kept = " ".join(stored)
    if lost := [name for name in config.saved if name.rpartition(".")[2] not in kept]:
        raise ValueError(f"modules_to_save names {quote(lost[0])}, of which {TENSORS} has nothing for this model")


def _gguf(path: Path, spec: DecoderSpec) -> AdapterFile:
    checkpoint = GGUFCheckpoint(path)
    values = Values(checkpoint.header.metadata)
    if (
        values.text("general.type", default="model") != "adapter"
        or values.text("adapter.type", default="lora") != "lora"
    ):
        raise ValueError("not a LoRA adapter, but a GGUF file of another kind")
    made_for, architecture = values.text("general.architecture"), gguf_architecture(spec)
    if made_for != architecture:
        raise ValueError(f"an adapter for {quote(made_for)}, and the model is {quote(architecture)}")
    if values.has("adapter.alora.invocation_tokens"):
        raise ValueError("an adapter that is active from given tokens on (aLoRA), which is not supported")
    alpha = values.number("adapter.lora.alpha", 0, 1e9, default=0.0)
    known = {gguf_name(spec, name): name for name in _matrices(spec)}
    pairs = dict[str, dict[str, str]]()
    for name in checkpoint.shapes():
        found = _GGUF.match(name)
        if found is None:
            raise ValueError(f"{_quoted(name)} is no low-rank part: norms and whole matrices are not supported")
        if found[1] not in known:
            if not ignorable(spec, found[1]):
                raise ValueError(_foreign(found[1].removesuffix(".weight"), spec))
            continue
        pairs.setdefault(known[found[1]], {})[found[2].upper()] = name
    _check(checkpoint, spec, pairs, {}, "lora_a", "lora_b")
    ranks = {name: checkpoint.shapes()[pair["A"]][0] for name, pair in pairs.items()}
    parts = {n: Pair(pair["A"], pair["B"], alpha / ranks[n] if alpha else 1.0) for n, pair in pairs.items()}
    return AdapterFile(path, checkpoint, parts, {}, spec.model_type == "llama")


def _canonical(module: str, spec: DecoderSpec) -> str | None:
    """Return the canonical name of the weight of `module`, named as in transformers' models of text or of more; None
    for a part that a text decoder does not use. Raises ValueError for a module that the model does not have."""
    expected = _matrices(spec)
    for prefix in HF_PREFIXES:
        name = f"{module.removeprefix(prefix)}.weight"
        if module.startswith(prefix) and name in expected:
            return name
    if module.endswith("lm_head"):
        return "lm_head.weight"
    text = module.rpartition("language_model.")[2].removeprefix("model.")
    if not ignorable(spec, f"{text}.weight"):
        raise ValueError(_foreign(module, spec))
    if spec.media is not None and not _LAYER.match(text):
        raise ValueError(f"adapts {_quoted(module)}, of the part for pictures and sound, which is not supported")
    return None


def _matrices(spec: DecoderSpec) -> dict[str, tuple[int, ...]]:
    """Return the shapes of the matrices that an adapter may be about: those of the layers, embedding and head."""
    shapes = {name: shape for name, shape in expected_tensors(spec).items() if len(shape) == 2 and _is_adaptable(name)}
    return {**shapes, "lm_head.weight": (spec.vocab_size, spec.hidden_size)}


def _is_adaptable(name: str) -> bool:
    if _LAYER.match(name):
        return name.split(".", 2)[2].removesuffix(".weight") in FIELDS
    return name in ("embed_tokens.weight", "per_layer_model_projection.weight")


def _check(
    checkpoint: Checkpoint,
    spec: DecoderSpec,
    pairs: Mapping[str, Mapping[str, str]],
    replaced: Mapping[str, str],
    a: str,
    b: str,
) -> None:
    """Raise a ValueError for parts that are not whole, or have other shapes than the model's matrices."""
    shapes, expected = checkpoint.shapes(), _matrices(spec)
    if not pairs and not replaced:
        raise ValueError(f"adapts nothing of this model ({spec.model_type}): none of its modules is one of the model's")
    for name, pair in pairs.items():
        module, (outputs, inputs) = name.removesuffix(".weight"), expected[name]
        if name == "embed_tokens.weight":
            raise ValueError("adapts the embedding, which is not supported: merge it into the model with PEFT")
        if len(pair) < 2:
            raise ValueError(f"{module} has {a if 'A' in pair else b} and no {b if 'A' in pair else a}; fetch it again")
        down, up = shapes[pair["A"]], shapes[pair["B"]]
        if len(down) != 2 or len(up) != 2 or down[0] != up[1] or not down[0]:
            raise ValueError(f"{module}: {a} is {list(down)} and {b} {list(up)}, which do not belong together")
        if (up[0], down[1]) != (outputs, inputs):
            raise ValueError(
                f"does not fit the model: {module} is [{outputs}, {inputs}], and the adapter's is [{up[0]}, {down[1]}]"
            )
    _check_shapes(checkpoint, spec, replaced)


def _check_shapes(checkpoint: Checkpoint, spec: DecoderSpec, whole: Mapping[str, str]) -> None:
    """Raise a ValueError for a whole matrix of another shape than the model's: a vocabulary that grew, say."""
    shapes, expected = checkpoint.shapes(), _matrices(spec)
    for name, stored in whole.items():
        if tuple(shapes[stored]) != expected[name]:
            raise ValueError(
                f"does not fit the model: {name.removesuffix('.weight')} is {list(expected[name])}, and the adapter's "
                f"is {list(shapes[stored])}"
            )


def _foreign(module: str, spec: DecoderSpec) -> str:
    return (
        f"adapts {_quoted(module)}, which is none of the matrices of this model ({spec.model_type}, {len(spec.layers)} "
        "layers) that can be adapted: is the adapter of another model?"
    )


def _quoted(name: str) -> str:
    return one_line(name)[:200]


def undo_interleaving(up: Tensor, head_dim: int) -> Tensor:
    """Return up [N, r] of a q or k matrix, whose rows llama.cpp stores as pairs (i, i + D / 2), in the usual order."""
    order = torch.arange(up.shape[0], dtype=torch.int64).view(-1, head_dim // 2, 2)  # [heads, D / 2, 2]
    return up[order.transpose(1, 2).reshape(-1)]  # [heads, 2, D / 2] -> [N]
