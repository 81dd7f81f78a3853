"""The `tokenizer.*` keys of a GGUF file for a Gemma 4 model, from the model's own files.

What: `tokenizer_keys` copies them from a .gguf file, or makes them of a tokenizer.json as llama.cpp's converter does: a
drafter's file needs the vocabulary of its backbone. Left out: vocabularies of other families.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from specdec.weights.gguf.header import read_header
from specdec.weights.gguf.tokenizer import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, tokenizer_model
from specdec.weights.metadata import foreign
from specdec.weights.tokenizer import load_tokenizer

_BYTE = 6
_SCORE = -1000.0  # llama.cpp's: merges are in the order of their list


def tokenizer_keys(path: Path) -> dict[str, Any]:
    """Return the keys for the model at `path`, a .gguf file or a folder with tokenizer.json.

    Raises ValueError when there is no such tokenizer.
    """
    if path.is_file():
        metadata = read_header(path).metadata
        keys = {name: value for name, value in metadata.items() if name.startswith("tokenizer.")}
        return {**keys, "tokenizer.ggml.model": tokenizer_model(metadata)} if keys else {}
    return _of(load_tokenizer(path), path)


def _of(tokenizer: PreTrainedTokenizerBase, path: Path) -> dict[str, Any]:
    with foreign(path, "name a folder with the model's own tokenizer.json"):
        tree = json.loads(tokenizer.backend_tokenizer.to_str())
        added = {entry["id"]: entry for entry in tree["added_tokens"]}
        ids: dict[str, int] = tokenizer.get_vocab()
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tree["model"].get("merges", [])]
    tokens = [f"<unused-{i}>" for i in range(max(ids.values()) + 1)]
    for token, number in ids.items():
        tokens[number] = token
    keys: dict[str, Any] = {
        "tokenizer.ggml.model": "gemma4",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [_SCORE] * len(tokens),
        "tokenizer.ggml.token_type": [_kind(i, token, added, tokenizer) for i, token in enumerate(tokens)],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.add_bos_token": True,
    }
    for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (special := getattr(tokenizer, f"{name}_token_id", None)) is not None:
            keys[f"tokenizer.ggml.{key}_token_id"] = int(special)
    if isinstance(tokenizer.chat_template, str):
        keys["tokenizer.chat_template"] = tokenizer.chat_template
    return {key: value for key, value in keys.items() if value != []}


def _kind(number: int, token: str, added: dict[int, dict[str, Any]], tokenizer: PreTrainedTokenizerBase) -> int:
    if number == tokenizer.unk_token_id:
        return UNKNOWN
    if number in added:
        return CONTROL if added[number]["special"] else USER_DEFINED
    return _BYTE if len(token) == 6 and token.startswith("<0x") and token.endswith(">") else NORMAL
