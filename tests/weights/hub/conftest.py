"""A hub on this machine, with the repositories of `tests/support/stores/models.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.stores.hub import Hub, serving
from tests.support.stores.models import SAFE, TWO, UNSLOTH, small


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    model = [small(tmp_path, "gemma4", i) for i in range(4)]
    drafter, embedder = small(tmp_path, "gemma4-assistant"), small(tmp_path, "clip")
    files = {
        "README.md": b"# a model",
        "gemma-4-12b-it-Q4_0.gguf": model[0],
        "gemma-4-12b-it-UD-Q4_K_XL.gguf": model[1],
        "BF16/gemma-4-12b-it-BF16-00001-of-00002.gguf": model[2],
        "BF16/gemma-4-12b-it-BF16-00002-of-00002.gguf": model[3],
        "MTP/mtp-gemma-4-12b-it-BF16.gguf": drafter + b"more",
        "MTP/mtp-gemma-4-12b-it-Q8_0.gguf": drafter,
        "mmproj-BF16.gguf": embedder,
        "mmproj-F32.gguf": embedder + b"more",
        "imatrix_unsloth.gguf": b"GGUF",
    }
    safe = {
        "config.json": b"{}",
        "model-00001-of-00001.safetensors": b"weights",
        "tokenizer.json": b"{}",
        "merges.txt": b"",
        "pytorch_model.bin": b"\x80",
        "original/model.safetensors": b"weights",
        "code.py": b"",
    }
    two = {"a.gguf": model[0], "b.gguf": model[1]}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for name in ("OLLAMA_MODELS", "LLAMA_CACHE", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    with serving({UNSLOTH: files, SAFE: safe, TWO: two}) as made:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", made.url)
        template = made.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_PROGRESS_BARS", True)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        yield made
