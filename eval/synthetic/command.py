"""`python -m eval.synthetic`: a checkpoint of full size with random weights, to measure a machine without the real one.

What: config, tokenizer, processor and bfloat16 shards of a published model's shape, in the folder layout and with the
tensor names of the real checkpoint, and its drafter beside it in `assistant/`; or a .gguf file with its mmproj file.
`gemma-4-tiny` is of the same kind, and is written in a second. Bytes, time and memory are those of the real model;
text and acceptance are not, and no figure pretends that they are. Why rows of a pattern, each scaled by a number of its
own: 12 billion random numbers would take half an hour, and rows must differ for choices not to be ties.
"""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType
from safetensors.torch import save_file
from transformers import AutoConfig, GenerationConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from drafter.config import assistant_spec, extra_tensors
from eval.cli import options as cli
from eval.cli.names import full_size_names
from eval.cli.output import check_writable, file_name, put_record, run_guarded
from eval.cli.words import byte_size
from eval.synthetic.byte_tokenizer import PROCESSOR, add_byte_tokenizer, byte_tokenizer
from eval.synthetic.full_size import full_size_config, full_size_drafter
from eval.synthetic.gguf_files import gguf_bytes, write_gguf, write_mmproj
from eval.synthetic.random_weights import random_tensor
from specdec.model.embedder.spec import is_media
from specdec.model.families import decoder_spec
from specdec.model.names import expected_tensors
from specdec.model.spec import DecoderSpec
from specdec.util.atomic import replacing
from specdec.util.progress import progress_bar
from specdec.util.terminal import Terminal
from specdec.weights.safetensors import INDEX

SHARD = 2 * 10**9  # bytes; one shard is in memory at a time
GGUF_TYPES = {"q4_0": GGMLQuantizationType.Q4_0, "q8_0": GGMLQuantizationType.Q8_0}
Advance = Callable[[int], None]
Shapes = Mapping[str, tuple[int, ...]]


def write_model(
    config: Any, drafter: Any | None, folder: Path, advance: Advance = lambda done: None, gguf: str | None = None
) -> None:
    """Write a model of transformers' config `config`, of text alone or with media, and its drafter of the assistant's
    config `drafter`, to `folder`.

    `gguf`: one of GGUF_TYPES, for a .gguf file instead of safetensors. `advance(bytes)` is called as bytes are written.
    Raises ValueError: a folder with something in it, too little room on the disk, a vocabulary without room for bytes.
    """
    spec = decoder_spec(config)
    size = model_bytes(config, drafter) if gguf is None else gguf_bytes(config, GGUF_TYPES[gguf])
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: is there already; name a new folder, or delete it")
    tokens = None if spec.media is None else spec.media.tokens
    tokenizer = byte_tokenizer(spec.vocab_size, tokens)
    folder.mkdir(parents=True, exist_ok=True)
    if size > (free := shutil.disk_usage(folder).free):
        raise ValueError(f"{folder}: {byte_size(size)} are needed, and {byte_size(free)} are free; name another disk")
    if spec.media is not None:
        (folder / "processor_config.json").write_text(json.dumps(PROCESSOR, indent=1) + "\n", encoding="utf-8")
    if drafter is not None:
        write_tensors(folder / "assistant", _drafter_tensors(config, drafter), 0.0, advance)
        drafter.save_pretrained(folder / "assistant")
    if gguf is not None:
        kind = GGUF_TYPES[gguf]
        if spec.media is not None:
            write_mmproj(folder / "mmproj-model.gguf", spec.media, advance=advance)
        add = functools.partial(add_byte_tokenizer, vocab=spec.vocab_size, media=tokens)
        with replacing(folder / "model.gguf") as temporary:
            write_gguf(temporary, "gemma4", config, add, kind, advance)
        return
    tokenizer.save_pretrained(folder)
    config = _published(config)
    # Soft tokens are no answers: weights that were not trained would choose them.
    never = None if tokens is None else sorted(tokens.ids)
    ends = config.get_text_config().eos_token_id
    GenerationConfig(do_sample=False, eos_token_id=ends, suppress_tokens=never).save_pretrained(folder)
    write_tensors(folder, _named(spec, config), spec.norm_offset, advance)
    config.save_pretrained(folder)  # last: a folder without it is not a model


def model_bytes(config: Any, drafter: Any | None) -> int:
    """Return the bytes of weights that `write_model` writes as safetensors; as GGUF it writes fewer."""
    shapes = [*expected_tensors(decoder_spec(config)).values()]
    shapes += [] if drafter is None else _drafter_tensors(config, drafter).values()
    return sum(map(_bytes, shapes))


def _published(config: Any) -> Any:
    """Return the config as such models are published: Gemma 4's unified text models inside a multimodal one."""
    if config.model_type == "gemma4_unified_text":
        config = AutoConfig.for_model("gemma4_unified", text_config=config.to_dict())
    text = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    whole = config.model_type == "gemma4_unified"
    config.architectures = ["Gemma4UnifiedForConditionalGeneration" if whole else text]
    config.dtype = torch.bfloat16
    return config


def _named(spec: DecoderSpec, config: Any) -> dict[str, tuple[int, ...]]:
    """Return the tensors of a checkpoint by the names that transformers gives them."""
    text = "model.language_model." if config.model_type == "gemma4_unified" else "model."

    def name(canonical: str) -> str:
        prefix = "" if canonical == "lm_head.weight" else "model." if is_media(canonical) else text
        return prefix + canonical

    return {name(canonical): shape for canonical, shape in expected_tensors(spec).items()}


def _drafter_tensors(config: Any, drafter: Any) -> dict[str, tuple[int, ...]]:
    head = assistant_spec(drafter, decoder_spec(config))
    return {f"model.{name}": shape for name, shape in expected_tensors(head.text).items()} | extra_tensors(head)


def write_tensors(folder: Path, shapes: Shapes, norm_offset: float, advance: Advance) -> None:
    """Write random bfloat16 tensors in shards, with their index. `norm_offset`: what the family adds to a norm's
    weight."""
    shards = list(_shards(shapes))
    where: dict[str, str] = {}
    for i, names in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {name: random_tensor(name, shapes[name], norm_offset) for name in names}
        with replacing(folder / file) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
        where |= dict.fromkeys(names, file)
        advance(sum(tensor.nbytes for tensor in tensors.values()))
    if len(shards) > 1:
        index = {"metadata": {"total_size": sum(map(_bytes, shapes.values()))}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")


def _shards(shapes: Shapes) -> Iterator[list[str]]:
    names: list[str] = []
    size = 0
    for name, shape in shapes.items():
        if names and size + _bytes(shape) > SHARD:
            yield names
            names, size = [], 0
        names.append(name)
        size += _bytes(shape)
    yield names


def _bytes(shape: tuple[int, ...]) -> int:
    return 2 * math.prod(shape)


def main(argv: list[str] | None = None) -> int:
    """Run `python -m eval.synthetic` with the words `argv` (None: the process's own); return its exit code."""
    parser = cli.module_parser("synthetic", __doc__)
    parser.add_argument("--config", choices=full_size_names(), default="gemma-4-12b", help="default gemma-4-12b")
    parser.add_argument(
        "--gguf", choices=sorted(GGUF_TYPES), help="a .gguf file with matrices of this type, instead of safetensors"
    )
    parser.add_argument("--out", type=file_name, required=True, metavar="FOLDER", help="a new folder")
    cli.add_json_option(parser, "what was written")
    arguments = parser.parse_args(argv)

    def command() -> int:
        check_writable(arguments.json)
        folder, config, drafter = arguments.out, full_size_config(arguments.config), full_size_drafter(arguments.config)
        size = model_bytes(config, drafter)
        written = list[int]()
        with progress_bar(f"writing {folder.name}", size) as advance:

            def count(done: int) -> None:
                written.append(done)
                advance(done)

            write_model(config, drafter, folder, count, arguments.gguf)
        size = sum(written)
        console = Terminal(highlight=False)
        console.print(f"{folder}: {byte_size(size)} of random weights in the shape of {arguments.config}")
        assistant, how = folder / "assistant", "" if arguments.gguf else " --quantize int4"
        console.print(f"python -m eval.memory --model {folder}{how} --drafter {assistant}", soft_wrap=True)
        console.print(f'python run.py generate "Hello" --model {folder}{how} --max-new-tokens 20', soft_wrap=True)
        record = {"command": "synthetic", "config": arguments.config, "folder": str(folder), "bytes": size}
        put_record(arguments.json, record)
        return 0

    return run_guarded(command, arguments.json)
