"""`python -m eval.synthetic`: a checkpoint of full size with random weights, to measure a machine without the real one.

What: config, tokenizer and bfloat16 shards of a published model's shape, in the folder layout and with the tensor names
of the real checkpoint, and its drafter beside it in `assistant/`. Bytes, time and memory are those of the real model;
text and acceptance are not, and no figure pretends that they are. Why rows of a pattern, each scaled by a number of its
own: 12 billion random numbers would take half an hour, and rows must differ for choices not to be ties.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from drafter.config import assistant_spec, extra_tensors
from eval.cli import options as cli
from eval.cli.names import full_size_names
from eval.cli.output import check_writable, file_name, put_record, run_guarded
from eval.synthetic.full_size import full_size_config, full_size_drafter
from specdec.load import progress_bar
from specdec.model.families import decoder_spec
from specdec.model.names import expected_tensors
from specdec.util.atomic import replacing
from specdec.util.terminal import Terminal
from specdec.weights.safetensors import INDEX

SHARD = 2 * 10**9  # bytes; one shard is in memory at a time
PATTERN = 509  # rows that are drawn; a prime, so that blocks of rows do not repeat
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<start>' + message['role'] + '\n' + message['content'] + '<end>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}"
)
Shapes = Mapping[str, tuple[int, ...]]


def write_model(
    config: Any, drafter: Any | None, folder: Path, advance: Callable[[int], None] = lambda done: None
) -> None:
    """Write a model of transformers' text config `config`, and its drafter of the assistant's config `drafter`, to
    `folder`.

    `advance(bytes)` is called as bytes are written. Raises ValueError: a folder with something in it, too little room
    on the disk, a vocabulary without room for bytes.
    """
    spec = decoder_spec(config)
    size = model_bytes(config, drafter)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: is there already; name a new folder, or delete it")
    tokenizer = byte_tokenizer(spec.vocab_size)
    folder.mkdir(parents=True, exist_ok=True)
    if size > (free := shutil.disk_usage(folder).free):
        raise ValueError(f"{folder}: {size / 1e9:.1f} GB are needed, and {free / 1e9:.1f} are free; name another disk")
    tokenizer.save_pretrained(folder)
    prefix, config.architectures = "model.", [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    if config.model_type == "gemma4_unified_text":  # as it is published: a text model inside a multimodal one
        config, prefix = AutoConfig.for_model("gemma4_unified", text_config=config.to_dict()), "model.language_model."
        config.architectures = ["Gemma4UnifiedForConditionalGeneration"]
    config.dtype = torch.bfloat16
    ends = config.get_text_config().eos_token_id
    GenerationConfig(do_sample=False, eos_token_id=ends).save_pretrained(folder)
    named = {prefix + tensor: shape for tensor, shape in expected_tensors(spec).items() if tensor != "lm_head.weight"}
    if not spec.tied_head:
        named["lm_head.weight"] = expected_tensors(spec)["lm_head.weight"]
    write_tensors(folder, named, spec.norm_offset, advance)
    if drafter is not None:
        write_tensors(folder / "assistant", _drafter_tensors(config, drafter), 0.0, advance)
        drafter.save_pretrained(folder / "assistant")
    config.save_pretrained(folder)  # last: a folder without it is not a model


def model_bytes(config: Any, drafter: Any | None) -> int:
    """Return the bytes of weights that `write_model` writes."""
    shapes = [*expected_tensors(decoder_spec(config)).values()]
    shapes += [] if drafter is None else _drafter_tensors(config, drafter).values()
    return sum(map(_bytes, shapes))


def _drafter_tensors(config: Any, drafter: Any) -> dict[str, tuple[int, ...]]:
    head = assistant_spec(drafter, decoder_spec(config))
    return {f"model.{name}": shape for name, shape in expected_tensors(head.text).items()} | extra_tensors(head)


def write_tensors(folder: Path, shapes: Shapes, norm_offset: float, advance: Callable[[int], None]) -> None:
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


def random_tensor(name: str, shape: tuple[int, ...], norm_offset: float = 0.0) -> Tensor:
    """Return a random bfloat16 tensor: a matrix whose products are about as large as its inputs, or a norm or scalar
    that leaves sizes as they are."""
    if len(shape) != 2:
        return torch.full(shape, 0.0 if name.endswith(".bias") else 1.0 - norm_offset, dtype=torch.bfloat16)
    rows, columns = shape
    generator = torch.Generator().manual_seed(sum(name.encode()))
    pattern = torch.randn(min(rows, PATTERN), columns, generator=generator, dtype=torch.float32) / math.sqrt(columns)
    scale = 0.5 + torch.rand(rows, 1, generator=generator, dtype=torch.float32)
    out = torch.empty(shape, dtype=torch.bfloat16)
    for start in range(0, rows, PATTERN):
        part = scale[start : start + PATTERN]
        out[start : start + PATTERN] = pattern[: len(part)] * part
    return out


def byte_tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a byte, at the end of the vocabulary; the other tokens are in no text."""
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<start>", "<end>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    first = vocab - len(alphabet)
    if first < len(specials):
        raise ValueError(f"a vocabulary of {vocab} has no room for {len(alphabet)} bytes")
    ids = {token: i for i, token in enumerate(specials)} | {byte: first + i for i, byte in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(specials)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>", bos_token="<bos>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


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
    parser.add_argument("--out", type=file_name, required=True, metavar="FOLDER", help="a new folder")
    cli.add_json_option(parser, "what was written")
    arguments = parser.parse_args(argv)

    def command() -> int:
        check_writable(arguments.json)
        folder, config, drafter = arguments.out, full_size_config(arguments.config), full_size_drafter(arguments.config)
        size = model_bytes(config, drafter)
        with progress_bar(f"writing {folder.name}", size) as advance:
            write_model(config, drafter, folder, advance)
        console = Terminal(highlight=False)
        console.print(f"{folder}: {size / 1e9:.2f} GB of random weights in the shape of {arguments.config}")
        assistant = folder / "assistant"
        console.print(f"python -m eval.memory --model {folder} --quantize int4 --drafter {assistant}", soft_wrap=True)
        record = {"command": "synthetic", "config": arguments.config, "folder": str(folder), "bytes": size}
        put_record(arguments.json, record)
        return 0

    return run_guarded(command, arguments.json)
