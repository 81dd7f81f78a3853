"""The kinds of files that `python -m eval.fuzz` damages, and how each kind is read.

What: `KINDS` names the whole files (`eval/fuzz/seeds.py`) that a case of a kind copies, the files of the copy that are
damaged, and the way in which the copy is then used: loaded, and where it loads, decoded with.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig

import specdec
from drafter import load_drafter
from drafter.data.dataset import Dataset, frequent, size
from drafter.files.checkpoint import provenance_of
from drafter.files.gguf import DIALECTS
from drafter.files.head import HEAD_FILE
from drafter.prompts.generator import user_prompts
from drafter.use.log import ABOUT, model_of, read_text
from eval.fuzz.adapters import read_adapter
from eval.fuzz.media import PICTURES, SOUNDS, VIDEOS, read_picture, read_sounds, read_video
from eval.prompts.sets import load_prompts
from specdec.drafting.registry import resolve_drafter
from specdec.hf import SpecdecForCausalLM
from specdec.load import load_decoder
from specdec.model.build import assemble
from specdec.model.decoder import Decoder
from specdec.model.names import expected_tensors
from specdec.model.quantized import PackedReader, open_packed
from specdec.open import open_checkpoint
from specdec.weights.hub.folder import companions
from specdec.weights.hub.ollama import models_in_store
from specdec.weights.hub.paths import model_path
from specdec.weights.safetensors import INDEX

VOCAB = 320
_PROMPT = [5, 6, 7]


class World:
    """Keep the folder of whole files, and a whole model, which some damaged files need to be read."""

    def __init__(self, seeds: Path) -> None:
        self.seeds = seeds

    def model(self, name: str = "hf-llama") -> SpecdecForCausalLM:
        """Return a model around the decoder of `name`, without anything that earlier cases left in it."""
        decoder, config, settings = self._loaded[name]
        return SpecdecForCausalLM(decoder, config, settings, resolve_drafter(None))

    @cached_property
    def _loaded(self) -> dict[str, tuple[Decoder, Any, GenerationConfig]]:
        names = ("hf-llama", "hf-gemma4")
        return {name: load_decoder(self.seeds / name, torch.float32, torch.device("cpu")) for name in names}

    def warm(self) -> None:
        """Load what is loaded once only: a case is a copy of this process, and would load it again."""
        self.model()


@dataclass(frozen=True)
class Kind:
    """Describe a kind of file.

    A case copies one of the folders `seeds`, and damages one of the files `files` (patterns of names) in the copy.
    `read` reads the copy, and raises what reading raises.
    """

    seeds: tuple[str, ...]
    files: tuple[str, ...]
    read: Callable[[Path, World], None]
    mend: Callable[[Path], None] = lambda folder: None


def generate(model: SpecdecForCausalLM, **options: Any) -> None:
    """Decode after a fixed prompt, two tokens unless `options` of `generate` say otherwise; the text is dropped."""
    ids = torch.tensor([_PROMPT], dtype=torch.int64)
    model.generate(ids, attention_mask=torch.ones_like(ids), **{"max_new_tokens": 2, **options})


def _read_model(folder: Path, world: World) -> None:
    path = next(folder.glob("*.gguf"), folder)
    model = specdec.load(path, drafter=None, device="cpu")
    try:
        generate(model)
    except ValueError as error:  # the settings may ask for what this engine does not do; no file is at fault
        raise UnsupportedError(str(error)) from error


def _read_embedder(folder: Path, world: World) -> None:
    decoder, *_ = load_decoder(folder / "model.gguf", torch.float32, torch.device("cpu"))
    if (media := decoder.media) is None:
        return  # the file no longer says that it is an embedder
    if (vision := media.spec.vision) is not None:
        media.patches(torch.ones(2, vision.patch, dtype=torch.float32), torch.zeros(2, 2, dtype=torch.int64))
    if (audio := media.spec.audio) is not None:
        media.frames(torch.ones(2, audio.frame, dtype=torch.float32))


class UnsupportedError(Exception):
    """Tell that a whole file asked for something that the engine does not do; the message need not name the file."""


def _read_both(folder: Path, world: World) -> None:
    """Read a .gguf file as a model and as a tokenizer; both are tried, and the first error counts."""
    found: list[ValueError | UnsupportedError] = []
    for call in (_read_model, _read_tokenizer):
        try:
            call(folder, world)
        except (ValueError, UnsupportedError) as error:
            found.append(error)
    if found:
        raise found[0]


def _read_tokenizer(folder: Path, world: World) -> None:
    tokenizer = specdec.load_tokenizer(next(folder.glob("*.gguf"), folder))
    tokenizer.decode(tokenizer("abc").input_ids)


def _read_packed(folder: Path, world: World) -> None:
    spec, *_ = open_checkpoint(world.seeds / "hf-llama")
    about = json.loads((world.seeds / "packed-about.json").read_text())
    file = open_packed(folder / "model.packed", about, expected_tensors(spec), no_bar)
    decoder = assemble(spec, PackedReader(file, torch.float32, torch.device("cpu")))
    _, config, settings = world._loaded["hf-llama"]
    generate(SpecdecForCausalLM(decoder, config, settings, resolve_drafter(None)))


def _read_conversation(folder: Path, world: World) -> None:
    model = world.model("hf-gemma4")
    model.conversations.limit = 1 << 26
    found = model.load_conversation(folder / "saved.safetensors")
    ids = torch.cat([found.tokens, torch.tensor(_PROMPT, dtype=torch.int64)])[None]
    if int(ids.max()) < VOCAB:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2)


def _drafter(backbone: str) -> Callable[[Path, World], None]:
    def read_drafter(folder: Path, world: World) -> None:
        model = world.model(backbone)
        drafter = load_drafter(folder)
        provenance_of(folder)
        drafter.bind(model.decoder)
        generate(model, drafter=drafter, draft_length=2, max_new_tokens=3)

    return read_drafter


def _read_adapter(folder: Path, world: World) -> None:
    read_adapter(folder, world.model("hf-gemma4").decoder)


def _read_store(folder: Path, world: World) -> None:
    """Find a model in Ollama's store, whose manifest is damaged, and the files beside the model."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        store = Path(temporary)
        manifest = store / "manifests" / "registry.ollama.ai" / "library" / "tiny" / "latest"
        (store / "blobs").mkdir()
        manifest.parent.mkdir(parents=True)
        manifest.write_bytes((folder / "manifest.json").read_bytes())
        for blob in folder.glob("sha256-*"):
            (store / "blobs" / blob.name).symlink_to(blob)
        os.environ["OLLAMA_MODELS"] = str(store)
        try:
            models_in_store()
            companions(model_path("ollama:tiny"))
        finally:
            del os.environ["OLLAMA_MODELS"]


def _rehash(folder: Path) -> None:
    """Say in a head's config.json that the weights are the damaged ones: the hash is no secret."""
    config = folder / "config.json"
    try:
        values = json.loads(config.read_bytes())
        values["weights"] = hashlib.sha256((folder / HEAD_FILE).read_bytes()).hexdigest()
    except (ValueError, TypeError):
        return
    config.unlink()
    config.write_text(json.dumps(values))


def _read_shards(folder: Path, world: World) -> None:
    dataset = Dataset(folder)
    size(dataset.shards)
    frequent(dataset, VOCAB, 16)
    for _, text in dataset.texts(0, epochs=1):
        assert len(text) == len(text.hidden)


def _read_prompts(folder: Path, world: World) -> None:
    for call in (load_prompts, user_prompts):
        call(folder / "prompts.jsonl")


def _read_use(folder: Path, world: World) -> None:
    """Read the text of a log, and the model that it is of; both are tried, and the first error counts."""
    found: list[ValueError] = []
    for path in folder.glob("*.json"):
        try:
            model_of(folder) if path.name == ABOUT else read_text(path)
        except ValueError as error:
            found.append(error)
    if found:
        raise found[0]


@contextmanager
def no_bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """Make a progress bar that nobody sees."""
    yield lambda done: None


HF = ("hf-llama", "hf-qwen3", "hf-gemma3", "hf-gemma4", "hf-gemma4-shared")
QUANTISED = ("ct-asymmetric", "mlx-5", "awq", "gptq-v2", "nf4-double", "fp8-row", "mlx-mxfp4", "ct-nvfp4")  # by others
GGUF = ("gguf-llama", "gguf-qwen3", "gguf-gemma3", "gguf-gemma4-shared")
KINDS: dict[str, Kind] = {
    "gguf": Kind(GGUF, ("model.gguf",), _read_both),
    "manifest": Kind(("ollama",), ("manifest.json",), _read_store),
    "mmproj": Kind(("gguf-media",), ("mmproj-model.gguf",), _read_embedder),
    "config": Kind(HF, ("config.json",), _read_model),
    "generation": Kind(HF[:1], ("generation_config.json",), _read_model),
    "tokenizer": Kind(HF[:1], ("tokenizer.json", "tokenizer_config.json", "config.json"), _read_tokenizer),
    "index": Kind(("sharded",), (INDEX,), _read_model),
    "safetensors": Kind(HF, ("model.safetensors",), _read_model),
    "quantised": Kind(tuple(f"hf-{name}" for name in QUANTISED), ("model.safetensors", "config.json"), _read_model),
    "packed": Kind(("packed",), ("model.packed",), _read_packed),
    "conversation": Kind(("conversation",), ("saved.safetensors",), _read_conversation),
    "head": Kind(("head",), ("config.json", HEAD_FILE), _drafter("hf-llama"), _rehash),
    "assistant": Kind(("assistant",), ("config.json", "model.safetensors", "specdec.json"), _drafter("hf-gemma4")),
    "drafter": Kind(tuple(f"drafter-{dialect}" for dialect in DIALECTS), ("drafter.gguf",), _drafter("hf-gemma4")),
    "adapter": Kind(("adapter-peft",), ("adapter_config.json", "adapter_model.safetensors"), _read_adapter),
    "gguf-adapter": Kind(("adapter-gguf",), ("adapter.gguf",), _read_adapter),
    "shards": Kind(("shards",), ("set.json", "00000.safetensors"), _read_shards),
    "use": Kind(("use",), ("*.json",), _read_use),
    "prompts": Kind(("prompts",), ("prompts.jsonl",), _read_prompts),
    "picture": Kind(tuple(f"picture-{name}" for name in PICTURES), ("file.*",), lambda folder, _: read_picture(folder)),
    "sound": Kind(tuple(f"sound-{name}" for name in SOUNDS), ("file.*",), lambda folder, _: read_sounds(folder)),
    "video": Kind(tuple(f"video-{name}" for name in VIDEOS), ("file.*",), lambda folder, _: read_video(folder)),
}
