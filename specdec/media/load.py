"""`load_processor`: a name or path in, the processor of a multimodal model out.

The tokenizer, the chat template and the settings come from where the model is: a folder, a hub id, or a .gguf file,
which has no settings of its own.
"""

from __future__ import annotations

import os
from typing import Any

from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from specdec.media.processor import Processor
from specdec.media.settings import from_config
from specdec.media.source import media_library
from specdec.weights.hub.names import HubName
from specdec.weights.hub.paths import NAMED_MODELS, local_path, model_path
from specdec.weights.hub.repository import has_gguf_alone
from specdec.weights.metadata import foreign, naming
from specdec.weights.tokenizer import load_tokenizer

_MODEL_TYPE = "gemma4_unified"


def load_processor(name_or_path: str | os.PathLike[str], tokenizer: PreTrainedTokenizerBase | None = None) -> Processor:
    """Load what turns text, pictures, sound and video into the inputs of a multimodal model.

    `name_or_path` is what `specdec.load` takes; `tokenizer` is the model's, where it has been loaded before. Raises
    ValueError when the model reads text alone, or has a picture encoder of its own, and ImportError without the extra
    `media`.
    """
    media_library("PIL", "picture")
    name = os.fspath(name_or_path)
    found = None if name in NAMED_MODELS else local_path(name)
    hub = HubName.of(name) if found is None else None
    if hub is not None and (not hub.whole or has_gguf_alone(hub.repository)):
        found = model_path(name)  # a .gguf file
    place = name if found is None else str(found)
    config: dict[str, Any] = {}
    if (found is None and name not in NAMED_MODELS) or (found is not None and (found / "config.json").is_file()):
        with foreign(place):
            model_type = PreTrainedConfig.get_config_dict(place)[0].get("model_type")
            config = ProcessorMixin.get_processor_dict(place)[0]
        if model_type != _MODEL_TYPE:
            raise ValueError(f"{place}: a {model_type} model; pictures and sound are read for {_MODEL_TYPE} alone")
    tokenizer = load_tokenizer(name_or_path) if tokenizer is None else tokenizer
    with naming(place):
        return Processor(tokenizer, config.get("chat_template") or tokenizer.chat_template, from_config(config))
