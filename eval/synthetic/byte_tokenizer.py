"""A tokenizer with one token a byte, for models whose weights are random: any text can be asked, and none was learned.

What: `byte_tokenizer` for a folder, `add_byte_tokenizer` for a GGUF file, and the settings of a processor. Tokens of
media have the texts of the published model, at the ids of the model's config.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gguf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specdec.model.embedder.config import SPELLED
from specdec.model.embedder.spec import MediaTokens
from specdec.weights.gguf.tokenizer import CONTROL, NORMAL

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<start>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<|' + part['type'] + '|>' }}{% endfor %}{% endif %}"
    "{{ '<end>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start>model\n' }}{% endif %}"
)
PROCESSOR: dict[str, Any] = {
    "processor_class": "Gemma4UnifiedProcessor",
    "feature_extractor": {"feature_extractor_type": "Gemma4UnifiedAudioFeatureExtractor"},
    "image_processor": {"image_processor_type": "Gemma4UnifiedImageProcessor"},
    "video_processor": {"video_processor_type": "Gemma4UnifiedVideoProcessor"},
}
"""What the published processor_config.json says besides the defaults of transformers' classes."""
_SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>", "<start>", "<end>"]
_NO_MERGES = ("ÿ þ",)  # of bytes that are in no text: a file without any merges is no model's
_NAMES = {  # of the attributes by which a processor asks a tokenizer
    "image": "image_token",
    "audio": "audio_token",
    "image_begin": "boi_token",
    "image_end": "eoi_token",
    "audio_begin": "boa_token",
    "audio_end": "eoa_token",
}


def byte_tokenizer(vocab: int, media: MediaTokens | None = None) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token a byte, at the end of the vocabulary; most other tokens are in no text.

    Raises ValueError for a vocabulary without room for bytes.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    first = vocab - len(alphabet)
    if first < max([len(_SPECIALS), *(token + 1 for token in _spelled(media).values())]):
        raise ValueError(f"a vocabulary of {vocab} has no room for {len(alphabet)} bytes")
    ids = {token: i for i, token in enumerate(_SPECIALS)} | {byte: first + i for i, byte in enumerate(alphabet)}
    backend = Tokenizer(models.BPE(vocab=ids | _spelled(media), merges=[], unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*_SPECIALS, *_spelled(media)])
    tokens = {} if media is None else {name: SPELLED[kind] for kind, name in _NAMES.items()}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens=tokens,
    )
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def add_byte_tokenizer(
    writer: gguf.GGUFWriter, vocab: int, media: MediaTokens | None = None, merges: Sequence[str] = _NO_MERGES
) -> None:
    """Add the same tokenizer to a GGUF file, with `merges` ("h e") of bytes that are a token together."""
    tokens = [f"<unused{i}>" for i in range(vocab)]
    for token, number in byte_tokenizer(vocab, media).get_vocab().items():
        tokens[number] = token
    for i, merge in enumerate(merges, len(_SPECIALS)):
        tokens[i] = merge.replace(" ", "")
    special = {*_SPECIALS, *_spelled(media)}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([CONTROL if token in special else NORMAL for token in tokens])
    writer.add_token_merges(list(merges))
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(0)
    writer.add_chat_template(TEMPLATE)
    if media is not None:
        writer.add_array("tokenizer.ggml.suppress_tokens", sorted(media.ids))


def _spelled(media: MediaTokens | None) -> dict[str, int]:
    """Return the tokens of media with their ids."""
    if media is None:
        return {}
    found = {text: getattr(media, name) for name, text in SPELLED.items()}
    return {text: token for text, token in found.items() if token is not None}
