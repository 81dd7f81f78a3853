"""The tokenizer and the generation settings that belong to a model.

What: `load_tokenizer` for everything that `model_path` understands, and `generation_config_from_gguf`. Why a cache:
converting Gemma's vocabulary takes seconds, reading the result less than one, so the converted tokenizer.json is kept
in the cache folder under a hash of the file's header. Left out: tokenizers that need code from the model's own
repository.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import tokenizers
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from specdec.util.atomic import replacing
from specdec.weights.gguf.header import GGUFHeader, read_header
from specdec.weights.gguf.tokenizer import (
    CONTROL,
    USER_DEFINED,
    special_ids,
    tokenizer_json,
    tokenizer_settings,
    vocabulary,
)
from specdec.weights.hf_config import tokenizer_config
from specdec.weights.hub.paths import NAMED_MODELS, cache_folder, local_path, model_path, settings_path
from specdec.weights.metadata import Values, foreign, naming

_CONVERTER = 2  # raised when gguf/tokenizer.py writes something else: older cache entries are void then
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")

_TRIAL = "Hello, 1 + 1!\n"

# Texts of tokens that end a turn or a document, as llama.cpp knows them: files often name only one of them.
_ENDS = {
    "<|im_end|>",
    "<|endoftext|>",
    "<|end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<|end_of_text|>",
    "<end_of_turn>",
    "<eos>",
    "<turn|>",
    "<|tool_response>",
    "<EOT>",
    "[EOT]",
    "<|return|>",
    "<|call|>",
    "<end_of_utterance>",
}


def load_tokenizer(name_or_path: str | os.PathLike[str]) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a named model, a .gguf file, a folder or a hub id; it pads on the left.

    A folder's own tokenizer files come before the tokenizer of a .gguf beside them. Raises ValueError when there is no
    tokenizer, or one that cannot be built.
    """
    name = os.fspath(name_or_path)
    found = local_path(name)
    if found is None and name not in NAMED_MODELS:
        found = settings_path(name)  # its weights are not needed here
        return _from_gguf(found) if found.is_file() else _from_pretrained(found, name)
    if found is not None and any((found / file).is_file() for file in _TOKENIZER_FILES):
        return _from_pretrained(found, str(found), config=tokenizer_config(found))
    path = model_path(name)
    if path.is_dir():
        raise ValueError(
            f"{path}: no tokenizer here; put the model's tokenizer.json and tokenizer_config.json into the folder"
        )
    return _from_gguf(path)


def generation_config_from_gguf(metadata: dict[str, Any]) -> GenerationConfig:
    """Return the generation config of the metadata of `read_header`: bos, pad, every token that ends a turn, and the
    tokens that are never chosen.

    `eos_token_id` is an int, or a list when several tokens end the text: the file's own eos first.
    """
    tokens, types = vocabulary(metadata)  # a file may come without a tokenizer
    ids = special_ids(metadata)
    named = [ids[name] for name in ("eos", "eot", "eom") if name in ids]
    # An ordinary piece of text that happens to spell such a token does not end anything.
    spelled = [
        number
        for number, (token, kind) in enumerate(zip(tokens, types or [CONTROL] * len(tokens), strict=True))
        if kind in (CONTROL, USER_DEFINED) and token in _ENDS
    ]
    ends = list(dict.fromkeys([*named, *spelled]))
    pad = ids.get("pad", ends[0] if ends else None)
    eos = ends if len(ends) > 1 else (ends[0] if ends else None)
    values = Values(metadata, "tokenizer.ggml.")
    never = values.wholes("suppress_tokens", 0, len(tokens) - 1) if values.has("suppress_tokens") else None
    return GenerationConfig(
        bos_token_id=ids.get("bos"), pad_token_id=pad, eos_token_id=eos, suppress_tokens=never or None
    )


def _from_pretrained(folder: Path, name: str, **options: Any) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a folder, called `name` in messages, after a trial; code that it may need is refused."""
    advice = f"name a folder with tokenizer.json, a .gguf file, or one of {', '.join(NAMED_MODELS)}"
    with foreign(name, advice, "its tokenizer could not be loaded"):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            str(folder), padding_side="left", trust_remote_code=False, **options
        )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return _tried(tokenizer)


def _tried(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Return `tokenizer` after a trial: some parts are read only when a text is cut and put together again."""
    tokenizer.decode(tokenizer(_TRIAL).input_ids, skip_special_tokens=True)
    return tokenizer


def _from_gguf(path: Path) -> PreTrainedTokenizerBase:
    header = read_header(path)
    with naming(path):
        settings = {**tokenizer_settings(header.metadata), "name_or_path": str(path)}
    cached = _cached(header)
    if cached is None or not _intact(cached):
        with naming(path):
            text = tokenizer_json(header.metadata)
        with foreign(path):
            content = text.encode()
        if cached is None or not _keep(content, cached):
            with foreign(path):
                made = tokenizers.Tokenizer.from_buffer(content)
                return _tried(PreTrainedTokenizerFast(tokenizer_object=made, **settings))
    with foreign(path):  # `tokenizers` raises plain Exception, for a merge of unknown pieces say
        return _tried(PreTrainedTokenizerFast(tokenizer_file=str(cached), **settings))


def _cached(header: GGUFHeader) -> Path | None:
    """Return the path at which the conversion of this header is kept; None where there is no cache folder."""
    key = _key(header)
    try:
        return cache_folder() / "tokenizers" / f"{key}.json"
    except OSError:
        return None


def _key(header: GGUFHeader) -> str:
    """Return a name for the conversion of this header by this version of the code."""
    end = min((tensor.offset for tensor in header.tensors.values()), default=header.path.stat().st_size)
    with header.path.open("rb") as stream:
        digest = hashlib.sha256(stream.read(end))
    digest.update(f"{_CONVERTER} {tokenizers.__version__}".encode())
    return digest.hexdigest()[:32]


def _checksum(file: Path) -> Path:
    return file.with_suffix(".sha256")


def _intact(file: Path) -> bool:
    """Return whether the cache entry is there and has the written content."""
    try:
        return _checksum(file).read_text() == hashlib.sha256(file.read_bytes()).hexdigest()
    except (OSError, UnicodeDecodeError):
        return False


def _keep(content: bytes, file: Path) -> bool:
    """Write a cache entry, each of its two files at once; return False when the folder cannot be written."""
    try:
        checksum = hashlib.sha256(content).hexdigest().encode()
        for target, data in ((file, content), (_checksum(file), checksum)):
            with replacing(target) as temporary:
                temporary.write_bytes(data)
    except OSError:
        return False
    return True
