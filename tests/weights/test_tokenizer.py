"""Tokenizers from GGUF metadata: tiny vocabularies by hand, and llama.cpp's ids for the two real models."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from specdec.weights.gguf.header import read_header
from specdec.weights.hub.paths import model_path
from specdec.weights.tokenizer import generation_config_from_gguf, load_tokenizer
from tests.support.tiny_gguf import byte_level, sentencepiece


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Path:
    """A cache of its own for each test, except for those that need the real models."""
    if not request.node.get_closest_marker("model"):
        monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pieces(tokenizer: Any, text: str) -> list[str]:
    return list(tokenizer.convert_ids_to_tokens(tokenizer(text)["input_ids"]))


def test_byte_level(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path / "m.gguf"))
    assert pieces(tokenizer, "hello 12") == ["hell", "o", "Ġ", "1", "2"]  # digits stand alone, for this `pre`
    assert pieces(tokenizer, "<|im_start|>he<think>ll") == ["<|im_start|>", "he", "<think>", "ll"]
    text = "naïve 模型 😀\n\t  <think> don't\x00"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.decode([1, 259, 2], skip_special_tokens=True) == "he"
    assert tokenizer.decode(tokenizer("<think>")["input_ids"], skip_special_tokens=True) == "<think>"


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["a", "Ġ", "Ġ", "12", "3", "4", "'", "S"]),
        ("smollm", ["a", "Ġ", "Ġ", "1", "2", "3", "4", "'", "S"]),
        ("llama-bpe", ["a", "Ġ", "Ġ", "12", "3", "4", "'", "S"]),
        ("qwen2", ["a", "Ġ", "Ġ", "1", "2", "3", "4", "'", "S"]),
    ],
)
def test_digits_by_pre_tokenizer(tmp_path: Path, pre: str, expected: list[str]) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path / "m.gguf", pre=pre))
    found = pieces(tokenizer, "a  1234'S")
    assert [piece for piece in found if piece != "<|im_start|>"] == expected


def cuts(path: Path, pre: str, text: str) -> list[str]:
    backend = load_tokenizer(byte_level(path, pre=pre)).backend_tokenizer
    normal = backend.normalizer.normalize_str(text) if backend.normalizer else text
    return [piece for piece, _ in backend.pre_tokenizer.pre_tokenize_str(normal)]


def test_cuts_by_pre_tokenizer(tmp_path: Path) -> None:
    text = "a12345 (x)\n\n  I'LL"
    assert cuts(tmp_path / "a.gguf", "gpt-2", text) == ["a", "12345", "Ġ(", "x", ")", "ĊĊĠ", "ĠI", "'", "LL"]
    assert cuts(tmp_path / "b.gguf", "smollm", text) == [
        "a",
        "1",
        "2",
        "3",
        "4",
        "5",
        "Ġ(",
        "x",
        ")",
        "ĊĊĠ",
        "ĠI",
        "'",
        "LL",
    ]
    assert cuts(tmp_path / "c.gguf", "llama-bpe", text) == ["a", "123", "45", "Ġ(", "x", ")ĊĊ", "Ġ", "ĠI", "'LL"]
    assert cuts(tmp_path / "d.gguf", "qwen2", text) == [
        "a",
        "1",
        "2",
        "3",
        "4",
        "5",
        "Ġ(",
        "x",
        ")ĊĊ",
        "Ġ",
        "ĠI",
        "'LL",
    ]
    assert cuts(tmp_path / "e.gguf", "qwen2", "e\u0301") == cuts(tmp_path / "f.gguf", "qwen2", "\u00e9")


def test_llama3_takes_whole_words_and_begins_with_bos(tmp_path: Path) -> None:
    merges = ["h e", "l l"]  # nothing leads to "hell"
    tokenizer = load_tokenizer(byte_level(tmp_path / "m.gguf", pre="llama-bpe", merges=merges))
    assert pieces(tokenizer, "hell") == ["<|im_start|>", "hell"]
    tokenizer = load_tokenizer(byte_level(tmp_path / "n.gguf", pre="qwen2", merges=merges))
    assert pieces(tokenizer, "hell") == ["he", "ll"]


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"pre": "tekken-9"}, r"m\.gguf: GGUF pre-tokenizer 'tekken-9' is not known \(only gpt-2, .*smollm.*qwen2"),
        ({"model": "bert"}, r"'bert' is not supported \(only gpt2, llama, gemma4\)"),
        ({"merges": None}, "lists no merges"),
        ({"merges": ["h xyz"]}, r"m\.gguf: .*xyz"),
        ({"tokens": None, "token_type": None}, "no vocabulary"),
        ({"token_type": [1, 1]}, "lists 2 values where 264 are due"),
    ],
)
def test_what_cannot_be_built(tmp_path: Path, extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_tokenizer(byte_level(tmp_path / "m.gguf", **extra))


def test_a_missing_pre_tokenizer_is_a_warning(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"tokenizer\.ggml\.pre"):
        tokenizer = load_tokenizer(byte_level(tmp_path / "m.gguf", pre=None))
    assert pieces(tokenizer, "123") == ["12", "3"]


def test_sentencepiece_merges_the_best_result_first(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece(tmp_path / "m.gguf"))
    # "▁abc": "▁a" (0) is the best result, then "bc" (-1) of what is left: not "▁ab", nor "abc".
    assert pieces(tokenizer, "abc") == ["<s>", "▁a", "bc"]
    assert pieces(tokenizer, "cab") == ["<s>", "▁", "c", "ab"]


def test_sentencepiece_spaces_and_bytes(tmp_path: Path) -> None:
    prefixed = load_tokenizer(sentencepiece(tmp_path / "m.gguf"))
    bare = load_tokenizer(sentencepiece(tmp_path / "n.gguf", add_space_prefix=False))
    assert pieces(prefixed, "a</s>a") == ["<s>", "▁a", "</s>", "▁a"]  # each stretch of text gets the space
    assert pieces(bare, "a</s>a") == ["<s>", "a", "</s>", "a"]
    assert pieces(bare, "a é") == ["<s>", "a", "▁", "<0xC3>", "<0xA9>"]
    assert pieces(bare, "a  b") == ["<s>", "a", "  ", "b"]  # user-defined: before any merge
    for text in ("abc é 模 b", " ab", "a\n\tb"):
        assert bare.decode(bare(text)["input_ids"], skip_special_tokens=True) == text
        assert prefixed.decode(prefixed(text)["input_ids"], skip_special_tokens=True) == text


def test_sentencepiece_needs_scores(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no .tokenizer.ggml.scores"):
        load_tokenizer(sentencepiece(tmp_path / "m.gguf", scores=None))


def test_sentencepiece_special_tokens_by_custom(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece(tmp_path / "m.gguf"))
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.pad_token_id == 2  # none in the file: eos, so that batches can be padded


def test_gemma4_lists_its_merges_and_always_begins_with_bos(tmp_path: Path) -> None:
    path = sentencepiece(
        tmp_path / "m.gguf",
        model="gemma4",
        scores=None,
        merges=["a b", "b c", "▁ ab"],
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
        add_bos_token=False,
    )
    tokenizer = load_tokenizer(path)
    assert pieces(tokenizer, "abc ab\né") == ["<s>", "ab", "c", "▁ab", "<0x0A>", "<0xC3>", "<0xA9>"]


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True])
def test_bos_and_eos_as_the_file_says(tmp_path: Path, bos: bool, eos: bool) -> None:
    path = byte_level(tmp_path / "m.gguf", add_bos_token=bos, add_eos_token=eos)
    expected = [1] * bos + [259] + [2] * eos
    for tokenizer in (load_tokenizer(path), load_tokenizer(path)):  # converted, then from the cache
        assert tokenizer("he")["input_ids"] == expected
        assert tokenizer("he", add_special_tokens=False)["input_ids"] == [259]
        assert (tokenizer.add_bos_token, tokenizer.add_eos_token) == (bos, eos)


def test_settings(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path / "m.gguf", padding_token_id=0))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id) == (1, 2, 0)
    assert tokenizer.model_max_length == 77
    assert len(tokenizer) == tokenizer.vocab_size == 264
    assert tokenizer(["he", "hello"], padding=True)["input_ids"] == [[0, 259], tokenizer("hello")["input_ids"]]
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "he"}], return_dict=False)
    assert chat == [1, 259, 2]


def test_named_chat_templates(tmp_path: Path) -> None:
    extra = {"tokenizer.chat_templates": ["rag"], "tokenizer.chat_template.rag": "R{{ messages[0]['content'] }}"}
    tokenizer = load_tokenizer(byte_level(tmp_path / "m.gguf", **extra))
    talk = [{"role": "user", "content": "x"}]
    assert tokenizer.apply_chat_template(talk, tokenize=False, chat_template="rag") == "Rx"
    assert tokenizer.apply_chat_template(talk, tokenize=False) == "<|im_start|>x<|im_end|>"


def test_ids_outside_the_vocabulary_are_ignored(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(byte_level(tmp_path / "m.gguf", padding_token_id=9999))
    assert tokenizer.pad_token_id == 2


def test_generation_config(tmp_path: Path) -> None:
    config = generation_config_from_gguf(read_header(byte_level(tmp_path / "m.gguf")).metadata)
    assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == (1, [2, 0], 2)
    extra = {"padding_token_id": 0, "eot_token_id": 5, "eos_token_id": 7}
    config = generation_config_from_gguf(read_header(byte_level(tmp_path / "n.gguf", **extra)).metadata)
    assert (config.eos_token_id, config.pad_token_id) == ([7, 5, 0, 2], 0)
    config = generation_config_from_gguf(read_header(sentencepiece(tmp_path / "o.gguf")).metadata)
    assert (config.bos_token_id, config.eos_token_id) == (1, 2)


def test_an_ordinary_piece_ends_nothing(tmp_path: Path) -> None:
    kinds = [3, 3, 1] + [1] * 261  # "<|im_end|>" as plain text
    path = byte_level(tmp_path / "m.gguf", token_type=kinds, eos_token_id=0)
    assert generation_config_from_gguf(read_header(path).metadata).eos_token_id == 0


# Ids by llama.cpp's server (/tokenize, add_special), which agreed on 164 texts, two of them Python modules.
SMOLLM2 = {
    "Hello  world 123\n\n\tx": [19556, 216, 905, 216, 33, 34, 35, 1116, 197, 104],
    "12345 67": [33, 34, 35, 36, 37, 216, 38, 39],
    "def f(x):\n    return x**2": [1604, 275, 24, 104, 727, 472, 1003, 1792, 828, 34],
    "café 日本語 😀": [83, 1939, 2756, 17097, 241, 115, 40993, 179, 120, 248, 40303, 218],
    "don't we'll": [12420, 982, 392, 3060],
    "<|im_start|>user\nHi<|im_end|>\n": [1, 4093, 198, 26843, 2, 198],
    "<table> [multimodal]   end": [44, 6413, 46, 933, 10593, 306, 32058, 77, 256, 1112],
}
GEMMA3 = {
    "Hello  world 123\n\n\tx": [2, 9259, 138, 12392, 236743, 236770, 236778, 236800, 108, 255968, 236781],
    "12345 67": [2, 236770, 236778, 236800, 236812, 236810, 236743, 236825, 236832],
    "def f(x):\n    return x**2": [2, 2063, 517, 236769, 236781, 1473, 107, 140, 2060, 1123, 1018, 236778],
    "café 日本語 😀": [2, 123125, 236859, 33375, 238582, 163543],
    "don't we'll": [2, 13246, 236789, 236745, 692, 236789, 859],
    "<start_of_turn>user\nHi<end_of_turn>\n": [2, 105, 2364, 107, 10979, 106, 107],
    "<table> [multimodal]   end": [2, 168, 236743, 5, 139, 643],
}


@pytest.mark.model
@pytest.mark.parametrize(("name", "golden"), [("smollm2-135m-instruct", SMOLLM2), ("gemma-3-270m", GEMMA3)])
def test_real_models(name: str, golden: dict[str, list[int]]) -> None:
    tokenizer = load_tokenizer(name)
    for text, ids in golden.items():
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids[tokenizer.add_bos_token :]) == text
    source = Path(os.__file__).read_text(encoding="utf-8")
    ids = tokenizer(source, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == source


@pytest.mark.model
def test_real_ends() -> None:
    smollm2 = generation_config_from_gguf(read_header(model_path("smollm2-135m-instruct")).metadata)
    assert (smollm2.bos_token_id, smollm2.eos_token_id, smollm2.pad_token_id) == (1, [2, 0], 2)
    gemma = generation_config_from_gguf(read_header(model_path("gemma-3-270m")).metadata)
    assert (gemma.bos_token_id, gemma.eos_token_id, gemma.pad_token_id) == (2, [1, 106], 0)
    talk = [{"role": "user", "content": "Hi"}]
    text = load_tokenizer("smollm2-135m-instruct").apply_chat_template(talk, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
