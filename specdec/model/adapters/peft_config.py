"""`adapter_config.json` of a PEFT folder: which modules it adapts, and by how much.

What: `PeftConfig` checks the file's settings and answers for a module by its name in the model that was trained
(`model.layers.0.self_attn.q_proj`). Settings that change what an adapter computes in ways that are not here (DoRA and
others) are refused by name. Patterns of a file are regular expressions, which can be made to take for ever: all of them
share `_SECONDS`, which `regex` can be told and `re` cannot. Source: PEFT's `LoraConfig` and
`check_target_module_exists`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import regex

from specdec.weights.metadata import Values, naming, quote, read_object

CONFIG = "adapter_config.json"
_ALL = "all-linear"
_MOST = 1 << 16  # ranks
_PATTERN = 2000  # characters of a pattern
_SECONDS = 0.5  # of a core that all matches of an adapter's patterns may take: usual ones take microseconds
# Repeated groups in counted repetitions, which are compiled to copies, and what `re` does not have or a name not need.
_UNUSUAL = regex.compile(r"\)\s*\{|\{(?!\d{0,2}(?:,\d{0,2})?\})|\(\?(?![:=!]|<[=!])")
_MERGE = "merge it into the model with PEFT (merge_and_unload), and load the merged model"
# Settings that change the arithmetic, by what they are called for people.
_REFUSED = {
    "use_dora": "DoRA (use_dora), which rescales the rows of the weights",
    "lora_bias": "biases of its own (lora_bias)",
    "use_qalora": "QALoRA (use_qalora)",
    "use_bdlora": "block-diagonal LoRA (use_bdlora)",
    "layer_replication": "replicated layers (layer_replication)",
    "trainable_token_indices": "trained tokens (trainable_token_indices)",
    "target_parameters": "parameters that are no linear module's (target_parameters), such as experts",
    "alora_invocation_tokens": "activation from given tokens on (aLoRA, alora_invocation_tokens)",
    "arrow_config": "routing between adapters (arrow_config)",
    "kasa_config": "KaSA (kasa_config)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
    "velora_config": "VeLoRA (velora_config)",
}
_CHANGES_BASE = ("pissa", "corda", "olora", "loftq", "lora_ga")  # ways to begin that take a part out of the weights


class PeftConfig:
    """Keep the settings of a PEFT adapter, and answer for the modules of a model by them."""

    def __init__(self, folder: Path) -> None:
        """Read the `adapter_config.json` of `folder`. Raises ValueError, naming the file, for what is damaged or not
        supported."""
        self.path = folder / CONFIG
        with naming(self.path):
            values = Values(read_object(self.path))
            _check_supported(values)
            self._values = values
            self.rank, self.alpha = values.whole("r", 1, _MOST), values.number("lora_alpha", 0, 1e9, default=8)
            self._root = values.flag("use_rslora", default=False)
            self._ranks = _patterns(values, "rank_pattern")
            self._alphas = _patterns(values, "alpha_pattern")
            self._targets = _modules(values, "target_modules")
            self._excluded = _modules(values, "exclude_modules")
            self.saved = tuple(values.texts("modules_to_save")) if values.has("modules_to_save") else ()
            layers = values.find("layers_to_transform")
            self._layers = None if layers in (None, []) else layers if isinstance(layers, list) else [layers]
            of = values.find("layers_pattern")
            self._lists = [of] if isinstance(of, str) and of else [] if not of else values.texts("layers_pattern")
            for pattern in (*self._lists, *self.saved):
                _check_pattern(pattern)
            for modules in (self._targets, self._excluded):
                if isinstance(modules, str):
                    _check_pattern(modules)
            if grouped := [one for one in self._lists if regex.compile(one).groups]:
                raise ValueError(f"layers_pattern {quote(grouped[0])} has a group, of which the layer's number is none")
            self._compiled: dict[str, regex.Pattern[str]] = {}
            self._left = _SECONDS

    def rank_of(self, module: str) -> int:
        """Return the rank of `module`'s low-rank part."""
        return int(self._value_of(module, self._ranks, self.rank))

    def scale_of(self, module: str) -> float:
        """Return what the low-rank part of `module` is multiplied by."""
        alpha, rank = self._value_of(module, self._alphas, self.alpha), self.rank_of(module)
        return alpha / math.sqrt(rank) if self._root else alpha / rank

    def adapts(self, module: str) -> bool:
        """Return whether the settings say that the linear module `module` has a low-rank part."""
        if self._is_among(module, self._excluded):
            return False
        if self._first_match([rf"(^|.*\.){saved}($|\..*)" for saved in self.saved], module):
            return False
        if self._targets == _ALL:
            return not module.endswith("lm_head")
        if isinstance(self._targets, str) or module in self._targets:
            return self._is_among(module, self._targets)
        return self._is_among(module, self._targets) and self._in_layers(module)

    def _in_layers(self, module: str) -> bool:
        if self._layers is None:
            return True
        patterns = [rf"(?:^|.*?\.){one}\.(\d+)\." for one in self._lists] or [r".*?\.[^.]*\.(\d+)\."]
        found = self._first_match(patterns, module)
        return found is not None and int(found[1]) in self._layers

    def _is_among(self, module: str, modules: str | Sequence[str]) -> bool:
        if isinstance(modules, str):
            return self._first_match([rf"(?:{modules})\Z"], module) is not None
        return module in modules or any(module.endswith(f".{one}") for one in modules)

    def _value_of(self, module: str, patterns: dict[str, float], default: float) -> float:
        found = self._first_match((*patterns,), module)
        return default if found is None else patterns[found.re.pattern]

    def _first_match(self, patterns: Sequence[str], module: str) -> Any:
        """Return the match of the first of `patterns` that matches the beginning of `module`; None where none does.
        Raises ValueError where all matches together take too long."""
        began = time.thread_time()
        for pattern in patterns:
            try:
                if pattern not in self._compiled:
                    self._compiled[pattern] = regex.compile(pattern)
                found = self._compiled[pattern].match(module, timeout=self._left)
            except (TimeoutError, MemoryError):
                raise _too_involved(pattern) from None
            if found is not None:
                break
        else:
            found = None
        self._left -= time.thread_time() - began
        if self._left <= 0:
            raise _too_involved(patterns[0])
        return found


def _check_supported(values: Values) -> None:
    kind = values.text("peft_type", default="")
    if kind.upper() != "LORA":
        raise ValueError(f"an adapter of the kind {quote(kind)}; only LoRA is supported: {_MERGE}")
    for name, what in _REFUSED.items():
        if values.find(name) not in (None, False, [], {}, ""):
            raise ValueError(f"an adapter with {what}, which is not supported: {_MERGE}")
    if (bias := values.text("bias", default="none")) != "none":
        raise ValueError(f"an adapter with trained biases (bias={quote(bias)}), which is not supported: {_MERGE}")
    begun = values.find("init_lora_weights")
    if isinstance(begun, str) and begun.lower().startswith(_CHANGES_BASE):
        raise ValueError(
            f"an adapter that changed the weights when it began (init_lora_weights={quote(begun)}): convert it with "
            f"PEFT (save_pretrained(..., path_initial_model_for_weight_conversion=...)), or {_MERGE}"
        )


def _modules(values: Values, name: str) -> str | list[str]:
    found = values.find(name)
    if found is None:
        return []
    return found if isinstance(found, str) else values.texts(name)


def _patterns(values: Values, name: str) -> dict[str, float]:
    """Return numbers by the patterns of the modules that they are for."""
    if not values.has(name):
        return {}
    inner = values.inner(name)
    for pattern in values.mapping(name):
        _check_pattern(pattern)
    low = 0 if name == "alpha_pattern" else 1
    return {rf"(.*\.)?({key})$": inner.number(key, low, 1e9) for key in values.mapping(name)}


def _check_pattern(pattern: str) -> None:
    """Raise a ValueError for a pattern that is none, and before it is compiled for one that could take all memory."""
    if len(pattern) > _PATTERN or _UNUSUAL.search(pattern):
        raise _too_involved(pattern)
    try:
        regex.compile(pattern)
    except (regex.error, RecursionError, OverflowError) as error:
        raise ValueError(f"{quote(pattern)} is no regular expression ({error})") from None


def _too_involved(pattern: str) -> ValueError:
    return ValueError(f"the pattern {quote(pattern)} is too involved: list the names of the modules instead")
