"""transformers' own processors, where torchvision is there, and what they gave where it is not.

`python -m tests.support.media.reference` writes tests/media/expected.json: hashes of the pixel values and positions
that transformers' image processor gives for each picture at each budget, and of all that its processor gives for whole
conversations. `operators.py` says how to get torchvision.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from tests.support.media.conversations import conversations
from tests.support.media.operators import HAS_TORCHVISION  # before transformers looks for it
from tests.support.media.pictures import odd_pictures, picture_files
from tests.support.media.tokenizer import MEDIA_TEMPLATE, media_tokenizer

EXPECTED = Path(__file__).parents[2] / "media" / "expected.json"


def image_processor() -> Any:
    from transformers.models.gemma4_unified.image_processing_gemma4_unified import Gemma4UnifiedImageProcessor

    return Gemma4UnifiedImageProcessor()


def transformers_processor() -> Any:
    from transformers.models.gemma4_unified.feature_extraction_gemma4_unified import Gemma4UnifiedAudioFeatureExtractor
    from transformers.models.gemma4_unified.processing_gemma4_unified import Gemma4UnifiedProcessor
    from transformers.models.gemma4_unified.video_processing_gemma4_unified import Gemma4UnifiedVideoProcessor

    return Gemma4UnifiedProcessor(
        feature_extractor=Gemma4UnifiedAudioFeatureExtractor(),
        image_processor=image_processor(),
        tokenizer=media_tokenizer(),
        video_processor=Gemma4UnifiedVideoProcessor(),
        chat_template=MEDIA_TEMPLATE,
    )


def digest(values: Tensor, positions: Tensor) -> str:
    both = hashlib.sha256(values.contiguous().numpy())
    both.update(positions.contiguous().numpy())
    return both.hexdigest()[:16]


def inputs_of(processor: Any, conversation: Any) -> dict[str, str]:
    """Return a hash of each input that a processor makes of a conversation, and of the text that its ids spell."""
    inputs = processor.apply_chat_template(
        conversation, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    text = "".join(processor.tokenizer.batch_decode(inputs["input_ids"]))
    found = {"text": hashlib.sha256(text.encode()).hexdigest()[:16]}
    for name, value in inputs.items():
        about = hashlib.sha256(f"{value.dtype} {list(value.shape)}".encode())
        about.update(value.contiguous().numpy())
        found[name] = about.hexdigest()[:16]
    return found


def all_pictures() -> dict[str, Image.Image]:
    return {**{name: Image.open(path) for name, path in picture_files().items()}, **odd_pictures()}


def main() -> None:
    assert HAS_TORCHVISION, "torchvision is missing"
    from specdec.media.pictures import BUDGETS

    processor, expected = image_processor(), {}
    for name, picture in all_pictures().items():
        given = [processor(picture, max_soft_tokens=budget, return_tensors="pt") for budget in BUDGETS]
        expected[name] = " ".join(digest(each.pixel_values[0], each.image_position_ids[0]) for each in given)
    processor = transformers_processor()
    inputs = {name: inputs_of(processor, given) for name, given in conversations().items()}
    EXPECTED.write_text(json.dumps({"pictures": expected, "conversations": inputs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
