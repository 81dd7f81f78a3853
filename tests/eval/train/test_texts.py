"""`run.py train --texts`: chats and documents as they are."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

import run
from drafter.data.dataset import read_shard
from drafter.prompts.texts import read_chats
from eval.cli.options import GenerationSettings
from eval.cli.session import Session, open_session
from eval.train.texts import Texts
from tests.support.tiny_folder import make_folder, threads_restored


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with threads_restored():
        yield make_folder(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    path = tmp_path / "chats.jsonl"
    lines = [
        {"messages": [{"role": "user", "content": f"Number {i}?"}, {"role": "assistant", "content": f"It is {i}."}]}
        for i in range(60)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    (made := tmp_path / "documents").mkdir()
    for name in ("apple", "pear", "plum"):
        words = " ".join(f"The {name} number {i} stands in the garden." for i in range(12))
        (made / f"{name}.txt").write_text(words)
    return made


def trained(folder: Path, out: Path, *more: str) -> list[str]:
    """The texts of the set that the command collects, in words."""
    fixed = ["--model", str(folder), "--device", "cpu", "--threads", "1", "--out", str(out), "--steps", "1"]
    sizes = ["--max-new-tokens", "9", "--draft-length", "2", "--draft-vocab", "64", "--json", str(out) + ".json"]
    assert run.main(["train", *fixed, *sizes, *more]) == 0
    tokenizer = session_of(folder).tokenizer
    shards = sorted((out / "training" / "set").glob("*.safetensors"))
    return [tokenizer.decode(text.tokens) for shard in shards for text in read_shard(shard)]


def session_of(folder: Path) -> Session:
    return open_session(GenerationSettings(str(folder), drafter="none", device="cpu", threads=1))


def test_chats_and_documents_are_read_and_held_out_prompts_answered(
    folder: Path, chats: Path, documents: Path, tmp_path: Path
) -> None:
    out = tmp_path / "head"
    texts = trained(folder, out, "--texts", str(chats), f"{documents}=3", "--tokens", "100")
    said = [text for text in texts if text.startswith("<bos>Number")]
    read = [text for text in texts if text.startswith("The ")]
    assert len(said) == 60 and len(read) == 3 and len(texts) == 63
    assert "<bos>Number 7?<eos><bos>It is 7." in said
    assert all("number 0" in text and len(text) > 400 for text in read)
    about = json.loads((out / "training" / "set" / "set.json").read_text())
    assert about["texts"] == [[str(chats), 1.0], [str(documents), 3.0]] and about["asks"] is False
    record = json.loads((tmp_path / "head.json").read_text())
    assert record["best"]["prompts"] == 24, "prompts that the model answers"


def test_texts_among_answered_prompts(folder: Path, chats: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps({"prompt": f"Say the number {i}."}) for i in range(200)))
    texts = trained(folder, tmp_path / "head", "--data", f"{prompts}=2", "--texts", str(chats), "--tokens", "900")
    chatted = sum(text.startswith("<bos>Number") for text in texts)
    assert len(texts) == 128 and 28 < chatted < 58, "a third of a block"
    assert sum(text.startswith("<bos>Say the number") for text in texts) == 128 - chatted


def test_where_answers_begin_and_texts_end(folder: Path, chats: Path, documents: Path) -> None:
    session = session_of(folder)
    texts = Texts([(str(chats), 1.0), (str(documents), 1.0)], 0)
    texts.encode(session, 15)
    (_, spoken), (_, read) = texts.parts(session, 15)
    first = next(spoken)
    assert session.tokenizer.decode(first.tokens[: first.answer]) == "<bos>Number 0?<eos><bos>"
    assert len(first.tokens) == 15
    assert {(len(text.tokens), text.answer) for text in read} == {(15, 1)}


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"prompt": "x"}, r"line 2: a chat .* ends with the assistant's answer.* --data"),
        ({"messages": [{"role": "user", "content": "x"}]}, "line 2: a chat"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"line 2: messages\[0\] must be"),
        ({"text": "x"}, "line 2: expected exactly one of"),
    ],
)
def test_bad_lines_are_named(line: dict[str, object], problem: str, tmp_path: Path) -> None:
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{json.dumps(good)}\n{json.dumps(line)}\n")
    with pytest.raises(ValueError, match=problem):
        read_chats(path)
    path.write_text("")
    with pytest.raises(ValueError, match="holds no chats"):
        read_chats(path)
    with pytest.raises(ValueError, match="no such file or folder"):
        Texts([(str(tmp_path / "nowhere"), 1.0)], 0)


def test_a_chat_that_the_template_refuses_is_named(folder: Path, chats: Path) -> None:
    session = session_of(folder)
    session.tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match=r"chats\.jsonl, line 1: the model's chat template refuses .*alternate"):
        Texts([(str(chats), 1.0)], 0).encode(session, 100)
