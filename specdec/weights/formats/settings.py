"""What a folder's config.json says of its quantisation.

What: `Settings` has the object `quantization_config` or `compression_config`, of the model or of its text part, or
MLX's `quantization`. It is read where a file holds tensors that need it, and not before. An object that names no method
says nothing: Google's unquantised checkpoints have one.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from specdec.weights.metadata import Values, naming, quote, read_object

KEYS = ("quantization_config", "compression_config", "quantization")
_CONFIG = "config.json"

Small = Callable[[str], Tensor]
"""The name of a small tensor -> the tensor."""


class Settings:
    """Describe the quantisation that the config beside a checkpoint tells of; empty where there is none.

    Each access raises ValueError, naming the file, when the config is damaged.
    """

    def __init__(self, path: Path) -> None:
        """Keep the place: a folder, or a file in it."""
        self.path = (path if path.is_dir() else path.parent) / _CONFIG

    @cached_property
    def _config(self) -> dict[str, Any]:
        return read_object(self.path) if self.path.is_file() else {}

    def _object(self, *keys: str) -> dict[str, Any]:
        with naming(self.path):
            text = Values(self._config)
            for values in (text, text.inner("text_config") if text.has("text_config") else Values({})):
                for key in keys:
                    if values.has(key):
                        return values.mapping(key)
        return {}

    @cached_property
    def values(self) -> Values:
        """Return the values of the quantisation."""
        return Values(self._object(*KEYS))

    @cached_property
    def mlx(self) -> Values:
        """Return what MLX says: its own key first."""
        return Values(self._object("quantization", "quantization_config"))

    @property
    def method(self) -> str:
        """Return the name of the method in lower case; empty where none is named."""
        with naming(self.path):
            return self.values.text("quant_method", default="").lower()

    def whole(self, name: str, low: int, high: int, default: int) -> int:
        """Return a whole number of the quantisation."""
        with naming(self.path):
            return self.values.whole(name, low, high, default)

    def flag(self, name: str, default: bool) -> bool:
        """Return a flag of the quantisation."""
        with naming(self.path):
            return self.values.flag(name, default)

    def text(self, name: str, default: str) -> str:
        """Return a text of the quantisation, in lower case."""
        with naming(self.path):
            return self.values.text(name, default).lower()

    def must_be(self, *methods: str) -> None:
        """Raise ValueError where the config names another method than `methods`."""
        if self.method and not any(self.method.endswith(method) for method in methods):
            raise ValueError(
                f"{self.path}: says {quote(self.method)}, and the tensors are those of {' or '.join(methods)}; fetch "
                "config and weights again, from the same repository"
            )
