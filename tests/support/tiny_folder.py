"""A tiny model that converses: a folder in the Hugging Face format, for tests of whole commands."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.support.tiny import VOCAB, tiny_model

CONTEXT = 8192
TEMPLATE = (
    "{% for message in messages %}{{ '<bos>' + message['content'] + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>' }}{% endif %}"
)


def make_folder(folder: Path, family: str = "gemma3", chat: bool = True) -> Path:
    """Fill `folder` with a tiny random model (window 16, context 8,192) and a tokenizer of one character a token."""
    tiny_model(family).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    config["max_position_embeddings"] = CONTEXT  # rotary: positions need no weights
    (folder / "config.json").write_text(json.dumps(config))
    tiny_tokenizer(chat).save_pretrained(folder)
    return folder


def tiny_tokenizer(chat: bool = True) -> PreTrainedTokenizerFast:
    characters = ["\n", *(chr(c) for c in range(32, 127)), *(chr(c) for c in range(0x4E00, 0x4E00 + VOCAB - 100))]
    vocab = {token: i for i, token in enumerate(["<unk>", "<eos>", "<bos>", "<pad>", *characters][:VOCAB])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, unk_token="<unk>", eos_token="<eos>", bos_token="<bos>", pad_token="<pad>"
    )
    tokenizer.chat_template = TEMPLATE if chat else None
    return tokenizer


@contextmanager
def threads_restored() -> Iterator[None]:
    """Commands take `--threads 1` in tests, where matrices are too small to share; other tests must not inherit it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def hears_ctrl_c() -> None:
    """For `preexec_fn`: a shell starts what runs in its background deaf to SIGINT, and children would inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
