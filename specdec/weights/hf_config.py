"""config.json and generation_config.json of a folder, as transformers' objects.

What: `read_config`, `read_generation_config`, and `tokenizer_config`, by which transformers picks a tokenizer. Why not
`AutoConfig.from_pretrained`: a config can ask for code (`auto_map` names a module beside it, `attn_implementation` a
kernel of the hub), and transformers then asks on stdin or fetches the code. It also builds lists as long as a number in
the file says. Here the file is read as JSON, keys that could run code are refused or left out, and numbers are bounded
by the tensors that are there; only then transformers makes its object of the rest. Left out: versions of a config for
older transformers, and configs inside GGUF files (`specdec/model/gguf_config.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import CONFIG_MAPPING, GenerationConfig, PretrainedConfig

from specdec.weights.metadata import Values, check_texts, foreign, naming, quote, read_object

CONFIG, GENERATION = "config.json", "generation_config.json"
_TOKENIZER_SETTINGS = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_CONTROL = re.compile(rb"\\u|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\xc2[\x80-\x9f]")  # may stand for what a terminal obeys
# Keys by which a config picks code that runs: modules beside it, kernels of the hub.
_CODE = ("auto_map", "attn_implementation", "experts_implementation", "custom_generate", "trust_remote_code")
# What the files hold of a quantisation (`formats/settings.py`). A model here is not what transformers would make of it.
_QUANTISED = ("quantization_config", "compression_config", "quantization")
_COUNTED = ("num_hidden_layers", "num_labels")  # transformers makes lists as long as these say
_MOST = 1 << 12  # labels, and layers of parts that are not read (vision, audio); copied several times over
_ID = (-(1 << 31), 1 << 32)  # -1 and 2**32 - 1 stand for "none" in some files

# Settings of generation_config.json: bounds of whole numbers and of numbers, then the settings of other types.
_WHOLE = dict.fromkeys(
    (
        "max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "top_k", "no_repeat_ngram_size",
        "encoder_no_repeat_ngram_size", "num_return_sequences", "num_assistant_tokens", "prompt_lookup_num_tokens",
        "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind", "target_lookbehind", "max_cache_len",
        "num_beam_groups", "prefill_chunk_size",
    ),
    (0, 1 << 31),
)  # fmt: skip
_NUMBERS = dict.fromkeys(
    (
        "max_time", "temperature", "top_p", "min_p", "top_h", "typical_p", "epsilon_cutoff", "eta_cutoff",
        "repetition_penalty", "encoder_repetition_penalty", "length_penalty", "guidance_scale", "penalty_alpha",
        "diversity_penalty", "assistant_confidence_threshold", "assistant_ensemble_weight",
    ),
    (-1e9, 1e9),
)  # fmt: skip
_FLAGS = (
    "do_sample", "use_mtp", "use_cache", "renormalize_logits", "remove_invalid_values", "token_healing",
    "output_attentions", "output_hidden_states", "output_scores", "output_logits", "return_dict_in_generate",
    "is_assistant", "disable_compile", "low_memory",
)  # fmt: skip
_TEXTS = ("cache_implementation", "num_assistant_tokens_schedule", "speculation_type", "transformers_version")
_IDS = ("pad_token_id", "bos_token_id", "forced_bos_token_id", "decoder_start_token_id")
_ID_LISTS = ("eos_token_id", "forced_eos_token_id", "suppress_tokens", "begin_suppress_tokens")  # or one id
_OBJECTS = ("cache_config", "watermarking_config", "compile_config", "continuous_batching_config")


def read_config(folder: Path, tensors: int, supported: Sequence[str]) -> Any:
    """Return transformers' config of the model in `folder`, which has so many `tensors`. `supported`: model types for
    errors to name.

    Raises:
        ValueError: there is no config.json, it is damaged, transformers does not know its model type, or it needs code
            of its own.
    """
    path = folder / CONFIG
    if not path.is_file():
        if (folder / "adapter_config.json").is_file():
            raise ValueError(
                f"{folder}: an adapter (LoRA), which goes with a model: load the model, with adapter= (--adapter) this "
                "folder"
            )
        raise ValueError(f"{folder}: no {CONFIG}; a Hugging Face folder holds {CONFIG} and *.safetensors")
    values = read_object(path)
    with naming(path):
        kind = Values(values).text("model_type", default="")
        if kind not in CONFIG_MAPPING:
            needs = "needs code of its own (auto_map), which is never run" if "auto_map" in values else "is not known"
            raise ValueError(
                f"model type {quote(kind)} {needs}; supported text architectures are: {', '.join(supported)}"
            )
    return _made(path, kind, values, tensors)


def tokenizer_config(folder: Path) -> Any:
    """Return the config of the model in `folder`; an empty one without config.json or for a type unknown to
    transformers.

    Raises ValueError, naming the file, when config.json or the settings of the tokenizer are damaged.
    """
    _check_tokenizer(folder)
    path = folder / CONFIG
    values = read_object(path) if path.is_file() else {}
    with naming(path):
        kind = Values(values).text("model_type", default="")
    return _made(path, kind, values, _MOST) if kind in CONFIG_MAPPING else PretrainedConfig()


def _check_tokenizer(folder: Path) -> None:
    """Refuse files with keys that a terminal would obey: `tokenizers` prints the keys that it does not know."""
    for name in _TOKENIZER_SETTINGS:
        path = folder / name
        if not path.is_file() or not _CONTROL.search(
            path.read_bytes()
        ):  # a large vocabulary takes long to look through
            continue
        with naming(path):
            values = read_object(path)
            if isinstance(model := values.get("model"), dict):  # its vocabulary has texts for keys
                values["model"] = {key: value for key, value in model.items() if key not in ("vocab", "merges")}
            check_texts(values, keys_only=True)


def _made(path: Path, kind: str, values: Mapping[str, Any], tensors: int) -> Any:
    with naming(path):
        check_texts(values)
        _bound(values, tensors)
    with foreign(path):
        return _checked(CONFIG_MAPPING[kind].from_dict(_harmless(values, CONFIG_MAPPING[kind])), path.parent)


def read_generation_config(folder: Path, config: Any) -> GenerationConfig:
    """Return the generation settings of the model in `folder`: its file's, else those that `config` implies.

    Raises ValueError, naming the file, when a value is of another kind than it must be.
    """
    path = folder / GENERATION
    if not path.is_file():
        with foreign(folder / CONFIG):
            made = GenerationConfig.from_model_config(config)
        with naming(folder / CONFIG):
            _check_settings(made.to_dict())
        return made
    values = read_object(path)
    with naming(path):
        _check_settings(values)
    with foreign(path):
        return GenerationConfig.from_dict(_harmless(values, GenerationConfig))


def _checked(config: Any, folder: Path) -> Any:
    """Return `config` after trying all its later uses: transformers checks some values only at their use."""
    config.name_or_path = str(folder)
    for part in (config, config.get_text_config(decoder=True)):
        part.to_dict()
        part._attn_implementation = None
    GenerationConfig.from_model_config(config)
    return config


def _bound(values: Mapping[str, Any], tensors: int) -> None:
    """Refuse counts that transformers would make lists of, and that these tensors cannot bear out."""
    for where, part in _objects(values):
        for name in _COUNTED:
            text = where in ("", "text_config.") and name == "num_hidden_layers"
            most = tensors if text else _MOST
            if name in part and part[name] is not None and (text or isinstance(part[name], (int, float))):
                Values({where + name: part[name]}).whole(where + name, 0, most)


def _objects(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield every object inside `values`, itself included, and the prefix of the names in it."""
    yield where, values
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _objects(value, f"{where}{name}.")


def _harmless(values: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Return a copy without the keys that pick code or tell of a quantisation, and without those that would replace a
    method."""
    return {
        name: _harmless(value, type(None)) if isinstance(value, Mapping) else value
        for name, value in values.items()
        if name not in (*_CODE, *_QUANTISED) and not name.startswith("__") and not callable(getattr(kind, name, None))
    }


def _check_settings(source: Mapping[str, Any]) -> None:
    values = Values(source)
    check_texts({name: value for name, value in source.items() if name != "stop_strings"})
    for name, value in source.items():
        if value is None:
            continue
        if name in _WHOLE:
            values.whole(name, *_WHOLE[name])
        elif name in _NUMBERS:
            values.number(name, *_NUMBERS[name])
        elif name in _FLAGS:
            values.flag(name)
        elif name in _TEXTS:
            values.text(name)
        elif name in _IDS or (name in _ID_LISTS and not isinstance(value, list)):
            values.whole(name, *_ID)
        elif name in _ID_LISTS:
            if not values.wholes(name, *_ID):
                raise values.wrong(name, "a list with an id in it", value)
        elif name in _OBJECTS:
            values.inner(name)
        elif name == "stop_strings" and not isinstance(value, str):
            values.texts(name)
        elif name == "bad_words_ids":
            for row in values.sequence(name):
                Values({name: row}).wholes(name, *_ID)
