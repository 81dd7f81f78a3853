"""The two real models against transformers' own loading of the same files, but for their vocabularies.

Apart from `test_real_models.py`, because files run side by side and these take the longest.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

import specdec
from eval.fuzz.damage_gguf import read_gguf, write_gguf

TOKENS = 32

pytestmark = pytest.mark.model


def without_vocabulary(file: Path, copy: Path) -> Path:
    """Copy `file` with the number of its tokens in place of the tokens, which no logit depends on: transformers reads a
    hundred thousand strings one at a time, and twice."""
    data = file.read_bytes()
    version, fields, tensors, end = read_gguf(data)
    values = {key: value for key, _, value in fields}
    kept = [field for field in fields if not (field[0].startswith("tokenizer.") and isinstance(field[2], list))]
    size = f"{values['general.architecture']}.vocab_size"
    if size not in values:
        kept.append([size, None, len(values["tokenizer.ggml.tokens"])])
    copy.write_bytes(write_gguf(version, kept, tensors, data[end:]))
    return copy


@pytest.mark.parametrize("name", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_dequantised_greedy_text_is_transformers_text(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # transformers asks for the same table once for each of its hundreds of modules.
    monkeypatch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
    file = without_vocabulary(specdec.model_path(name), tmp_path / "model.gguf")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=file.name, dtype=torch.float32)
    ours = specdec.load(name, quantize="none", device="cpu")
    assert theirs.config.vocab_size == ours.config.vocab_size
    inputs = specdec.load_tokenizer(name)("The history of the city of Lisbon begins", return_tensors="pt")
    text = ours.generate(**inputs, max_new_tokens=TOKENS, do_sample=False, eos_token_id=None, speculation=False)
    with torch.inference_mode():
        reference = theirs(text).logits[0]  # [n, vocab]
    error = float((ours(text).logits[0] - reference).abs().max() / reference.abs().max())
    print(f"{name}: relative error of the logits over {text.shape[1]} tokens {error:.1e}")
    # What transformers would write: its choice after each token of the text is the text's next token.
    assert torch.equal(reference[-TOKENS - 1 : -1].argmax(dim=-1), text[0, -TOKENS:])
    assert error < 1e-4
