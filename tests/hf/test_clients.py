"""Libraries that people call a model through: what each gets with a batch is what it gets from transformers' own loop.

Optional: pip install -c constraints.txt -e '.[test,clients]'. Tiny float models, so that texts can be compared to the
letter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast, pipeline

import specdec
from tests.support.tiny import VOCAB
from tests.support.tiny_folder import make_folder

QUESTIONS = ["Give me a name.", "Describe a cat as JSON, and be brief."]
SCHEMA = {"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("llama"), "llama")


@pytest.fixture(scope="module")
def words(files: Path) -> PreTrainedTokenizerBase:
    tokenizer = specdec.load_tokenizer(files)
    tokenizer.padding_side = "left"
    return tokenizer


@pytest.fixture(scope="module")
def both(files: Path, words: PreTrainedTokenizerBase) -> tuple[Any, Any]:
    """The model as transformers decodes it, and as we do."""
    pair = AutoModelForCausalLM.from_pretrained(files), specdec.load(files, device="cpu")
    for model in pair:
        model.generation_config.pad_token_id = words.pad_token_id
        model.generation_config.eos_token_id = words.eos_token_id
    return pair


def test_lm_eval(both: tuple[Any, Any], words: PreTrainedTokenizerBase) -> None:
    pytest.importorskip("lm_eval")
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    def found(model: Any) -> Any:
        client = HFLM(pretrained=model, tokenizer=words, batch_size=2, backend="causal")
        until = {"until": ["\n", "ab"], "max_gen_toks": 16, "do_sample": False}
        texts = ["Q: What is 2+2?\nA:", "The capital of Spain is", "x"]
        asked = [Instance("generate_until", {}, (text, until), i, ("t", i, 1)) for i, text in enumerate(texts)]
        scored = [Instance("loglikelihood", {}, (text, " yes"), i, ("t", i, 1)) for i, text in enumerate(texts)]
        scores = client.loglikelihood(scored, disable_tqdm=True)
        return client.generate_until(asked, disable_tqdm=True), [(round(score, 2), greedy) for score, greedy in scores]

    theirs, ours = map(found, both)
    assert ours == theirs


@pytest.mark.parametrize("kind", ["json", "regex"])
def test_outlines(both: tuple[Any, Any], words: PreTrainedTokenizerFast, kind: str) -> None:
    outlines = pytest.importorskip("outlines")
    from outlines.types import JsonSchema, Regex

    wanted = JsonSchema(SCHEMA) if kind == "json" else Regex("[a-c]{3,9}d")
    theirs, ours = (
        outlines.from_transformers(model, words).batch(QUESTIONS, wanted, max_new_tokens=30, do_sample=False)
        for model in both
    )
    assert ours == theirs
    if kind == "regex":
        assert all(text.endswith("d") and set(text) <= set("abcd") for text in ours)


def test_xgrammar(both: tuple[Any, Any], words: PreTrainedTokenizerBase) -> None:
    xgrammar = pytest.importorskip("xgrammar")
    from xgrammar.contrib.hf import LogitsProcessor

    known = xgrammar.TokenizerInfo.from_huggingface(words, vocab_size=VOCAB)
    grammar = xgrammar.GrammarCompiler(known).compile_json_schema(json.dumps(SCHEMA))
    inputs = words(QUESTIONS, return_tensors="pt", padding=True, return_token_type_ids=False)
    settings = {"max_new_tokens": 30, "do_sample": False}
    expected = both[0].generate(**inputs, **settings, logits_processor=[LogitsProcessor(grammar)])
    for model, more in ((both[1], {}), (both[0], {"custom_generate": specdec.speculative, "drafter": "suffix"})):
        got = model.generate(**inputs, **settings, logits_processor=[LogitsProcessor(grammar)], **more)
        assert got.tolist() == expected.tolist()
    one = {name: tensor[1:] for name, tensor in inputs.items()}  # drafted for, token by token through the grammar
    alone = both[1].generate(**one, **settings, logits_processor=[LogitsProcessor(grammar)], drafter="suffix")
    assert alone.tolist() == expected[1:].tolist()


def test_langchain(both: tuple[Any, Any], words: PreTrainedTokenizerBase) -> None:
    langchain = pytest.importorskip("langchain_huggingface")

    def answers(model: Any) -> list[str]:
        asked = {"max_new_tokens": 12, "do_sample": False, "return_full_text": False}
        pipe = pipeline("text-generation", model=model, tokenizer=words, **asked)
        return langchain.HuggingFacePipeline(pipeline=pipe, batch_size=2).batch(QUESTIONS)

    theirs, ours = map(answers, both)
    assert ours == theirs


def test_smolagents(both: tuple[Any, Any], files: Path) -> None:
    smolagents = pytest.importorskip("smolagents")
    client = smolagents.TransformersModel(str(files), device_map="cpu", max_new_tokens=12, do_sample=False)
    client.tokenizer = specdec.load_tokenizer(files)
    message = [smolagents.ChatMessage(role="user", content=[{"type": "text", "text": QUESTIONS[1]}])]

    def answer(model: Any) -> tuple[Any, str]:
        client.model = model
        streamed = "".join(part.content or "" for part in client.generate_stream(message, stop_sequences=["zz"]))
        return client.generate(message, stop_sequences=["zz"]).content, streamed

    theirs, ours = map(answer, both)
    assert ours == theirs


def test_guidance(both: tuple[Any, Any]) -> None:
    guidance = pytest.importorskip("guidance")
    # It wants a tokenizer of bytes; four that no prompt has make room for the special tokens.
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[: VOCAB - 4]
    vocabulary = {piece: i for i, piece in enumerate(["<unk>", "<eos>", "<bos>", "<pad>", *letters])}
    backend = Tokenizer(models.BPE(vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", bos_token="<bos>")

    def texts(model: Any) -> list[str]:
        start = guidance.models.Transformers(model, tokenizer, echo=False)
        made = [start + text + guidance.gen(regex="[a-c]{3,9}d", max_tokens=12, temperature=0.0) for text in QUESTIONS]
        return [str(text) for text in made]

    try:
        theirs = texts(both[0])
    except ValueError as error:
        pytest.skip(f"this guidance cannot use this transformers' own caches: {error}")
    assert texts(both[1]) == theirs
