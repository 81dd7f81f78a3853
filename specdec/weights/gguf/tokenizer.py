"""The tokenizer that a GGUF file describes in its metadata, for the `tokenizers` library.

What: `tokenizer_json` gives the text of a tokenizer.json, `tokenizer_settings` its settings (special tokens, chat
template). Why: a user of llama.cpp has a .gguf alone, and the ids must be those that the model was trained with.
llama.cpp's reading of the metadata is the reference (src/llama-vocab.cpp of ggml-org/llama.cpp): it says what a missing
key means, and which names of `tokenizer.ggml.pre` mean the same. Why a text and not a `Tokenizer`: transformers copies
such an object by writing and parsing it, which takes a second for Gemma's 262,144 tokens. Left out: WordPiece, Unigram
and RWKV vocabularies (no decoder of this project has one).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE

from specdec.weights.metadata import LARGEST, Values, quote

MAX_PIECE = 1024  # characters of a piece; those of sentencepiece have 16 as a rule, and merges are sought at every cut
NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # of tokenizer.ggml.token_type

_GGML = "tokenizer.ggml."
_SPACE = "\u2581"  # how sentencepiece writes a space
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTION}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}"
_QWEN2 = rf"{_CONTRACTION}|{_WORDS}|\p{{N}}|{_REST}"

# tokenizer.ggml.pre -> how a text is cut before byte-level merges, by the tokenizer.json of those models.
_PRE: dict[str, str] = {
    **dict.fromkeys(["gpt-2", "default", "phi-2", "mpt", "olmo"], "gpt2"),
    **dict.fromkeys(["smollm", "starcoder", "refact", "command-r", "codeshell"], "digits"),
    **dict.fromkeys(["llama-bpe", "llama3", "llama-v3"], "llama3"),
    **dict.fromkeys(["qwen2", "deepseek-r1-qwen"], "qwen2"),
}


def tokenizer_json(metadata: dict[str, Any]) -> str:
    """Return a tokenizer.json for the metadata of `read_header`. Raises ValueError for a tokenizer that it cannot
    build."""
    tokens, types = _vocabulary(metadata)
    model = tokenizer_model(metadata)
    if model not in _BUILDERS:
        raise ValueError(
            f"GGUF tokenizer model {quote(model)} is not supported (only {', '.join(_BUILDERS)}); "
            "name a folder with the model's own tokenizer.json instead"
        )
    pieces, merges = _BUILDERS[model](metadata, tokens, types)
    tree = json.loads(pieces.to_str())
    # Merges as "left right", the older spelling, load in half the time of pairs; no piece has a space in it.
    tree["model"].update(vocab={token: number for number, token in enumerate(tokens)}, merges=merges)
    tree["added_tokens"] = [
        _added(number, token, kind)
        for number, (token, kind) in enumerate(zip(tokens, types, strict=True))
        if kind in (UNKNOWN, CONTROL, USER_DEFINED)
    ]
    return json.dumps(tree, ensure_ascii=False)


def tokenizer_model(metadata: dict[str, Any]) -> str:
    """Return `tokenizer.ggml.model`, as llama.cpp's converter names it: Ollama's converter writes "llama" for Gemma 4,
    with merges, and numbers for scores that put the merges into another order."""
    values = Values(metadata, _GGML)
    model = values.text("model", default="")
    return "gemma4" if model == "llama" and values.text("pre", default="") == "gemma4" else model


def tokenizer_settings(metadata: dict[str, Any]) -> dict[str, Any]:
    """Return keyword arguments for PreTrainedTokenizerFast: special tokens, template, sides, limits."""
    tokens, _ = _vocabulary(metadata)
    settings: dict[str, Any] = {"padding_side": "left", "clean_up_tokenization_spaces": False}
    for name, number in special_ids(metadata).items():
        if name in ("bos", "eos", "unk", "pad"):
            settings[f"{name}_token"] = tokens[number]
    # transformers fills a batch with the padding token: without one, batches could not be made at all.
    if "pad_token" not in settings and "eos_token" in settings:
        settings["pad_token"] = settings["eos_token"]
    values = Values(metadata)
    model, pre = tokenizer_model(metadata), values.text(f"{_GGML}pre", default="")
    begins = model in ("llama", "gemma4") or _PRE.get(pre) == "llama3"
    # Files of Gemma 4 say false, and llama.cpp overrides them: the model is lost without it.
    add_bos = True if model == "gemma4" else values.flag(f"{_GGML}add_bos_token", default=begins)
    settings["add_bos_token"] = add_bos and "bos_token" in settings
    settings["add_eos_token"] = values.flag(f"{_GGML}add_eos_token", default=False) and "eos_token" in settings
    architecture = values.text("general.architecture", default="")
    if limit := values.whole(f"{architecture}.context_length", default=0):
        settings["model_max_length"] = limit
    names = values.texts("tokenizer.chat_templates") if values.has("tokenizer.chat_templates") else []
    named = {name: text for name in names if (text := values.text(f"tokenizer.chat_template.{name}", default=""))}
    if template := values.text("tokenizer.chat_template", default=""):
        settings["chat_template"] = {"default": template, **named} if named else template
    return settings


def special_ids(metadata: dict[str, Any]) -> dict[str, int]:
    """Return the ids of bos, eos, unk, pad, eot and eom, as far as the file names them (or sentencepiece has them by
    custom). An id outside of the vocabulary is left out: some files write one for "there is none".

    Raises ValueError for an id that is not a number.
    """
    values = Values(metadata, _GGML)
    ids = {"bos": 1, "eos": 2, "unk": 0} if tokenizer_model(metadata) == "llama" else {}
    keys = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "eot": "eot", "eom": "eom"}
    for name, key in keys.items():
        if values.has(f"{key}_token_id"):
            ids[name] = values.whole(f"{key}_token_id", -LARGEST, 2 * LARGEST)
    size = len(values.texts("tokens")) if values.has("tokens") else 0
    return {name: number for name, number in ids.items() if 0 <= number < size}


def vocabulary(metadata: dict[str, Any]) -> tuple[list[str], list[int]]:
    """Return the tokens and their types, none where the file has no tokenizer. Raises ValueError when they differ in
    number, or are not tokens and types."""
    values = Values(metadata, _GGML)
    tokens = values.texts("tokens") if values.has("tokens") else []
    if not values.has("token_type"):
        return tokens, []
    return tokens, values.wholes("token_type", -LARGEST, length=len(tokens))


def _vocabulary(metadata: dict[str, Any]) -> tuple[list[str], list[int]]:
    tokens, types = vocabulary(metadata)
    if not tokens:
        raise ValueError(
            "the GGUF file has no vocabulary (tokenizer.ggml.tokens); name a folder or hub id "
            "with the model's tokenizer instead"
        )
    return tokens, types or [NORMAL] * len(tokens)


def _added(number: int, token: str, kind: int) -> dict[str, Any]:
    """Return an entry of `added_tokens`: the token is matched whole, before anything else is done to the text."""
    return {
        "id": number,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": kind != USER_DEFINED,
    }


# A Tokenizer without a vocabulary, and the merges as "left right", in the order of their rank.
_Built = tuple[Tokenizer, list[str]]
_Builder = Callable[[dict[str, Any], list[str], list[int]], _Built]


def _byte_level(metadata: dict[str, Any], _tokens: list[str], _types: list[int]) -> _Built:
    """Build GPT-2's tokenizer: merges over bytes, each spelled as one letter."""
    pre = Values(metadata).text(f"{_GGML}pre", default="")
    if not pre:
        warnings.warn(
            "the GGUF file does not say how text is cut (tokenizer.ggml.pre); GPT-2's way is "
            "assumed, which may give other ids than the model was trained with",
            stacklevel=2,
        )
        pre = "default"
    if pre not in _PRE:
        raise ValueError(
            f"GGUF pre-tokenizer {quote(pre)} is not known (only {', '.join(_PRE)}); name a folder "
            "with the model's own tokenizer.json instead"
        )
    kind = _PRE[pre]
    cuts: dict[str, list[Any]] = {
        "gpt2": [],
        "digits": [pre_tokenizers.Digits(individual_digits=True)],
        "llama3": [pre_tokenizers.Split(Regex(_LLAMA3), "isolated")],
        "qwen2": [pre_tokenizers.Split(Regex(_QWEN2), "isolated")],
    }
    own_regex = kind in ("llama3", "qwen2")
    # Llama 3's vocabulary has whole words that no merges lead to.
    tokenizer = Tokenizer(BPE(ignore_merges=kind == "llama3"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [*cuts[kind], pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not own_regex)]
    )
    if kind == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, _listed_merges(metadata)


def _sentencepiece(metadata: dict[str, Any], tokens: list[str], types: list[int]) -> _Built:
    """Build Llama 2's and Gemma 3's tokenizer: merges over characters, in the order of the scores of their results."""
    values = Values(metadata, _GGML)
    scores = values.sequence("scores", len(tokens))
    if not all(isinstance(score, (int, float)) and math.isfinite(score) for score in scores):
        raise ValueError("the GGUF file's scores (tokenizer.ggml.scores) are not all numbers; fetch it again")
    prefix = values.flag("add_space_prefix", default=True)
    return _characters(metadata, tokens, prefix), _merges_of_scores(tokens, types, scores)


def _gemma4(metadata: dict[str, Any], tokens: list[str], _types: list[int]) -> _Built:
    """Build Gemma 4's tokenizer: as Gemma 3's, with the merges listed."""
    return _characters(metadata, tokens, prefix=False), _listed_merges(metadata)


_BUILDERS: dict[str, _Builder] = {"gpt2": _byte_level, "llama": _sentencepiece, "gemma4": _gemma4}


def _characters(metadata: dict[str, Any], tokens: list[str], prefix: bool) -> Tokenizer:
    """Build merges over characters, on the whole text at once; characters without a token fall back to bytes."""
    unknown = special_ids(metadata).get("unk")
    tokenizer = Tokenizer(BPE(byte_fallback=True, fuse_unk=True))
    if unknown is not None:
        tokenizer.model.unk_token = tokens[unknown]
    space = normalizers.Replace(" ", _SPACE)
    # A stretch of text begins as if a space stood before it, after every special token, too.
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), space]) if prefix else space
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return tokenizer


def _listed_merges(metadata: dict[str, Any]) -> list[str]:
    values = Values(metadata, _GGML)
    if not values.has("merges"):
        raise ValueError(
            "the GGUF file lists no merges (tokenizer.ggml.merges); name a folder with the "
            "model's own tokenizer.json instead"
        )
    return values.texts("merges")


def _merges_of_scores(tokens: list[str], types: list[int], scores: list[float]) -> list[str]:
    """Return every way to make a token out of two, best score first.

    Sentencepiece merges the neighbours whose *result* scores best, the leftmost ones of equals. Several pairs may spell
    one result, but only one of them ever comes up: a stretch that becomes a token was merged with nothing outside it
    before, so its merges are the same everywhere. Hence their order among themselves does not matter.
    """
    pieces = {token for token, kind in zip(tokens, types, strict=True) if kind == NORMAL}
    if longest := max((piece for piece in pieces if len(piece) > MAX_PIECE), key=len, default=""):
        raise ValueError(f"the GGUF file has a token of {len(longest)} characters: {quote(longest)}; fetch it again")
    found = []
    for token, kind, score in zip(tokens, types, scores, strict=True):
        if kind != NORMAL:
            continue
        for cut in range(1, len(token)):
            if token[:cut] in pieces and token[cut:] in pieces:
                found.append((score, f"{token[:cut]} {token[cut:]}"))
    found.sort(key=lambda entry: -entry[0])
    return [merge for _, merge in found]
