"""The README's headline: Gemma 4 12B and its assistant by their names on the hub, as chat and as a program.

Tiny ones stand for both: in the layout of the released checkpoints, in a folder as the hub's own client keeps them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import Gemma4UnifiedConfig, Gemma4UnifiedForConditionalGeneration, GenerationConfig

from tests.support.tiny import tiny_model
from tests.support.tiny_assistant import save_assistant
from tests.support.tiny_folder import tiny_tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
MODEL, DRAFTER = "google/gemma-4-12B-it", "google/gemma-4-12B-it-assistant"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def kept(cache: Path, name: str) -> Path:
    """An empty snapshot of the model `name`, as `huggingface_hub` keeps it."""
    repository = cache / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    return snapshot


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache with both: pictures and sound in the model's config and tensors, several ends, shards with an index."""
    cache, text = tmp_path_factory.mktemp("hub"), tiny_model("gemma4_unified")
    config = Gemma4UnifiedConfig(
        text_config={**text.config.to_dict(), "max_position_embeddings": 512},
        vision_config={"mm_embed_dim": 64, "mm_posemb_size": 20, "output_proj_dims": 64},
        audio_config={"audio_embed_dim": 16},
    )
    whole = Gemma4UnifiedForConditionalGeneration(config).float()
    whole.model.language_model.load_state_dict(text.model.state_dict())
    whole.tie_weights()
    whole.generation_config = GenerationConfig(
        bos_token_id=2, eos_token_id=[1, 90], pad_token_id=0, do_sample=True, temperature=1.0, top_k=64, top_p=0.95
    )
    folder = kept(cache, MODEL)
    whole.bfloat16().save_pretrained(folder, max_shard_size="200KB")
    tiny_tokenizer().save_pretrained(folder)
    (folder / "processor_config.json").write_text(json.dumps({"processor_class": "Gemma4UnifiedProcessor"}))
    save_assistant(kept(cache, DRAFTER), "gemma4_unified")
    return cache


def started(command: list[str], hub: Path, cache: Path, typed: str = "") -> str:
    """Run `command` where no hub can be reached; returns what it shows."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub), "SPECDEC_CACHE": str(cache)}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, cwd=ROOT, input=typed, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_chat_command_of_the_readme(hub: Path, tmp_path: Path) -> None:
    command = next(
        line for line in re.sub(r"\\\n\s*", "", README).splitlines() if f"run.py chat --model {MODEL}" in line
    )
    words = shlex.split(command, comments=True)
    assert words[:2] == ["python", "run.py"] and DRAFTER in words
    fast = ["--max-new-tokens", "12", "--device", "cpu", "--threads", "1", "--no-history"]
    shown = started([sys.executable, *words[1:], *fast], hub, tmp_path, "Name three rivers.\n/stats\n/quit\n")
    # So short a text may end before a draft is worth its cost: /stats then has no table of positions.
    assert "last answer: 12 tokens in" in shown


def test_the_program_of_the_readme(hub: Path, tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    program = next(block for block in blocks if f'specdec.load("{MODEL}"' in block.replace("\n    ", ""))
    # So short a text may end before a draft is worth its cost: it is asked for again with drafts whatever they cost.
    check = """
model.generate(**inputs, max_new_tokens=64, draft_length=2)
assert model.last_stats.draft_sources["mtp"][0] > 0
print("drafted")
"""
    assert "drafted" in started([sys.executable, "-c", program + check], hub, tmp_path)
