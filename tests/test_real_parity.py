"""The two real models against transformers' own loading of the same files.

Apart from `test_real_models.py`, because files run side by side and transformers takes minutes.
"""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

import specdec

TOKENS = 64

pytestmark = pytest.mark.model


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_dequantised_greedy_text_is_transformers_text(name: str) -> None:
    file = specdec.model_path(name)
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    ours = specdec.load(name, quantize="none", device="cpu")
    inputs = specdec.load_tokenizer(name)("The history of the city of Lisbon begins", return_tensors="pt")
    settings = {"max_new_tokens": TOKENS, "do_sample": False, "eos_token_id": None}
    expected = theirs.generate(**inputs, **settings)
    text = ours.generate(**inputs, **settings)
    with torch.inference_mode():
        reference = theirs(expected).logits[0]
    error = float((ours(expected).logits[0] - reference).abs().max() / reference.abs().max())
    print(f"{name}: relative error of the logits over {expected.shape[1]} tokens {error:.1e}")
    assert torch.equal(text, expected)
    assert error < 1e-4
