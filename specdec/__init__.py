"""specdec: multi-token-prediction speculative decoding, with the plain model's own output.

The public names are imported at their first use. `import specdec` and the modules that need no tensors (`util.atomic`,
`util.terminal`, `util.text`, `weights.hub`) load neither torch nor transformers, so that a mistyped name is told at
once.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from specdec.util.lazy import lazy

if TYPE_CHECKING:
    from specdec.cache.kv_cache import KVCache
    from specdec.drafting.draft_length import AdaptiveLength
    from specdec.drafting.protocol import Composite, Draft, Drafter, FixedLength, NoDraft, Proposer
    from specdec.drafting.suffix import SuffixDrafter
    from specdec.engine.sampling import Noise
    from specdec.engine.stats import GenerationStats, Round
    from specdec.hf import SpecdecForCausalLM, speculative
    from specdec.load import load
    from specdec.media.load import load_processor
    from specdec.model.decoder import Decoder
    from specdec.model.states import States
    from specdec.weights.hub.paths import model_path
    from specdec.weights.tokenizer import load_tokenizer

__version__ = "0.1.0"

__all__ = [
    "AdaptiveLength",
    "Composite",
    "Decoder",
    "Draft",
    "Drafter",
    "FixedLength",
    "GenerationStats",
    "KVCache",
    "NoDraft",
    "Noise",
    "Proposer",
    "Round",
    "SpecdecForCausalLM",
    "States",
    "SuffixDrafter",
    "__version__",
    "load",
    "load_processor",
    "load_tokenizer",
    "model_path",
    "speculative",
]

__getattr__ = lazy(
    __name__,
    {
        "cache.kv_cache": ("KVCache",),
        "drafting.draft_length": ("AdaptiveLength",),
        "drafting.protocol": ("Composite", "Draft", "Drafter", "FixedLength", "NoDraft", "Proposer"),
        "drafting.suffix": ("SuffixDrafter",),
        "engine.sampling": ("Noise",),
        "hf": ("SpecdecForCausalLM", "speculative"),
        "load": ("load",),
        "media.load": ("load_processor",),
        "model.decoder": ("Decoder",),
        "model.states": ("States",),
        "engine.stats": ("GenerationStats", "Round"),
        "weights.hub.paths": ("model_path",),
        "weights.tokenizer": ("load_tokenizer",),
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Bind a public function where Python would bind the submodule of the same name: `specdec.load` has to stay the
    function when somebody imports the module. It is the type of this package, because only a module's type can say what
    setting a name does."""

    def __setattr__(self, name: str, value: Any) -> None:
        shadowed = name in __all__ and isinstance(value, ModuleType)
        super().__setattr__(name, getattr(value, name) if shadowed else value)


sys.modules[__name__].__class__ = _Package
