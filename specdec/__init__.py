"""specdec: multi-token-prediction speculative decoding, with the plain model's own output.

The public names are imported when somebody first asks for one: `import specdec` and the modules that need no tensors
(`atomic`, `terminal`, `text`, `weights.hub`) load neither torch nor transformers, so that a mistyped name is told at
once.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from specdec.lazy import lazy

if TYPE_CHECKING:
    from specdec.drafting import Draft, Drafter, NoDraft, SuffixDrafter
    from specdec.hf import SpecdecForCausalLM, speculative
    from specdec.load import load
    from specdec.stats import GenerationStats, Round
    from specdec.weights.hub import model_path
    from specdec.weights.tokenizer import load_tokenizer

__all__ = [
    "Draft",
    "Drafter",
    "GenerationStats",
    "NoDraft",
    "Round",
    "SpecdecForCausalLM",
    "SuffixDrafter",
    "load",
    "load_tokenizer",
    "model_path",
    "speculative",
]

__getattr__ = lazy(
    __name__,
    {
        "drafting": ("Draft", "Drafter", "NoDraft", "SuffixDrafter"),
        "hf": ("SpecdecForCausalLM", "speculative"),
        "load": ("load",),
        "stats": ("GenerationStats", "Round"),
        "weights.hub": ("model_path",),
        "weights.tokenizer": ("load_tokenizer",),
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """The type of this package. Importing a submodule binds its name here: for `specdec.load` to stay the function,
    whoever imports the module of that name, the function is bound in the module's place."""

    def __setattr__(self, name: str, value: Any) -> None:
        shadowed = name in __all__ and isinstance(value, ModuleType)
        super().__setattr__(name, getattr(value, name) if shadowed else value)


sys.modules[__name__].__class__ = _Package
