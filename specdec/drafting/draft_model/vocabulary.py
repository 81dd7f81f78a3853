"""Whether two models have one vocabulary: token for token, and not by the number of tokens.

What: `check_vocabulary`. Models of one family often have matrices of different sizes for the same tokens (Qwen's are
padded), and models of different families sometimes have the same number of tokens. A few tokens that were renamed, as
releases of a family do with reserved ones, do not matter: they are drafted wrongly, and checked like any draft.
"""

from __future__ import annotations

from pathlib import Path

from specdec.model.decoder import Decoder
from specdec.weights.gguf.header import read_header
from specdec.weights.gguf.kind import is_gguf
from specdec.weights.gguf.tokenizer import vocabulary
from specdec.weights.metadata import quote
from specdec.weights.tokenizer import load_tokenizer

MOST_DIFFERENT = 0.01  # of the tokens that are compared
_UNUSED = 5  # of tokenizer.ggml.token_type: padding of the matrix, under names that the converter made up


def check_vocabulary(backbone: Decoder, path: Path, size: int) -> None:
    """Raise a ValueError that says how they differ where the model at `path`, whose matrix has `size` tokens, has not
    the vocabulary of `backbone`. Where one of them has no tokenizer, the sizes decide."""
    theirs = None if backbone.path is None else tokens_of(backbone.path)
    mine, most = tokens_of(path), backbone.spec.vocab_size
    if theirs is None or mine is None:
        if size != most:
            whose = "this model's" if theirs is None else "its"
            raise ValueError(
                f"{path}: cannot draft for this model: {size:,} tokens against {most:,}, and there is no tokenizer of "
                f"{whose} own to compare them by; name a model of the same vocabulary"
            )
        return
    both = [i for i in sorted(mine.keys() & theirs.keys()) if i < min(size, most)]
    different = [i for i in both if mine[i] != theirs[i]]
    if not both or len(different) > MOST_DIFFERENT * len(both):
        first = different[0] if different else None
        example = "" if first is None else f" (token {first} is {quote(mine[first])} and {quote(theirs[first])})"
        raise ValueError(
            f"{path}: cannot draft for this model, which has another vocabulary: {size:,} tokens against {most:,}, and "
            f"of the {len(both):,} that both have {len(different):,} differ{example}; name a model of the same family"
        )


def tokens_of(path: Path) -> dict[int, str] | None:
    """Return the tokens of the model at `path` by their ids, without what fills up its matrix; None where it has no
    tokenizer that can be read."""
    try:
        if is_gguf(path):
            tokens, kinds = vocabulary(read_header(path).metadata)
            found = {i: token for i, token in enumerate(tokens) if not kinds or kinds[i] != _UNUSED}
        else:
            found = {i: token for token, i in load_tokenizer(path).get_vocab().items()}
    except ValueError:
        return None
    # Converters to GGUF write sentencepiece's space in tokens of the user as a space.
    return {i: token.replace("\u2581", " ") for i, token in found.items()} or None
