"""From a log to a training set: what is held out, what is cut, and where the general prompts come."""

from __future__ import annotations

import stat
from array import array
from pathlib import Path

import pytest
import torch

from drafter.data.answering import generate_answers
from drafter.data.given import EncodedPrompt, GivenText, read_given
from drafter.prompts.files import TrainingPrompt
from drafter.use.log import UseLog, UseText
from drafter.use.recorder import UseRecorder, used_model
from drafter.use.texts import UseSplit, check_enough, shorten
from tests.support.serving.served import served
from tests.support.tiny import prompt
from tests.support.tiny_decoder import quantised


def use_text(i: int, length: int = 120) -> UseText:
    return UseText(array("i", [i % 250] * length), 10, f"{(i * 7919) % 1000:012x}", float(i))


def test_a_tenth_is_held_out_and_stays_so_as_texts_come() -> None:
    texts = [use_text(i) for i in range(100)]
    split = UseSplit.of(texts, 1000)
    assert (len(split.held_out), len(split.texts)) == (10, 90)
    more = UseSplit.of([*texts, *(use_text(i) for i in range(100, 110))], 1000)
    before, now = ({int(one.tokens[0]) for one in part.held_out} for part in (split, more))
    assert len(before & now) >= 9
    assert len(UseSplit.of(texts[:20], 1000).held_out) == 4, "so few would judge nothing"
    assert len(UseSplit.of([use_text(i) for i in range(900)], 1000).held_out) == 24


def test_a_long_text_keeps_its_first_token_and_its_end() -> None:
    whole = torch.arange(10, dtype=torch.int64)
    found = shorten(whole, 6, 5)
    assert found.tokens.tolist() == [0, 6, 7, 8, 9] and found.tokens[found.answer :].tolist() == [6, 7, 8, 9]
    assert shorten(whole, 6, 10) == GivenText(whole, 6)
    assert shorten(whole, 2, 5).answer == 1
    split = UseSplit.of([use_text(i) for i in range(30)], 50)
    assert {len(one.tokens) for one in split.texts} == {50}
    assert {len(ids) for ids in UseSplit([shorten(whole, 9, 10)], []).prompts(4)} == {4}


def test_too_few_are_refused_with_what_to_do() -> None:
    check_enough([use_text(i) for i in range(20)], "tiny")
    for few in ([], [use_text(i) for i in range(19)], [use_text(i, 30) for i in range(20)]):
        with pytest.raises(ValueError, match=f"{len(few)} conversations of tiny were kept.*--learn"):
            check_enough(few, "tiny")


def test_a_split_is_written_for_its_owner_and_read_again(tmp_path: Path) -> None:
    split = UseSplit.of([use_text(i) for i in range(30)], 1000)
    split.write(tmp_path / "use.json")
    assert stat.S_IMODE((tmp_path / "use.json").stat().st_mode) == 0o600
    for part, again in zip(split, UseSplit.read(tmp_path / "use.json"), strict=True):
        pairs = zip(part, again, strict=True)
        assert all(torch.equal(a.tokens, b.tokens) and a.answer == b.answer for a, b in pairs)
    (tmp_path / "use.json").write_text('{"held_out": [], "texts": [{"tokens": [1], "answer": 2}]}')
    with pytest.raises(ValueError, match=r"use\.json.*answer"):
        UseSplit.read(tmp_path / "use.json")


def test_a_quarter_is_general() -> None:
    own = [GivenText(torch.tensor([i, i], dtype=torch.int64), 1) for i in range(100)]
    asked = [EncodedPrompt(TrainingPrompt("user", ()), torch.tensor([1000 + i], dtype=torch.int64)) for i in range(40)]
    mixed = list(UseSplit([], own).mixed(iter(asked)))
    assert [text for text in mixed if isinstance(text, GivenText)] == own
    found = [int((one.tokens if isinstance(one, GivenText) else one.ids)[0]) for one in mixed]
    assert found[:9] == [1000, 0, 1, 2, 1001, 3, 4, 5, 1002] and found[-2:] == [1033, 99] and len(found) == 134
    assert len(list(UseSplit([], own).mixed(iter(asked[:2])))) == 102, "where there are few prompts nothing is lost"


def test_read_again_a_kept_text_has_the_states_of_its_decoding(tmp_path: Path) -> None:
    backbone = quantised("llama", "int8")
    recorder = UseRecorder(backbone, "tiny", tmp_path, 10_000)
    tokens = prompt(9, seed=3)[0]
    recorder.add(tokens.tolist(), 4)
    recorder.close()
    (kept,), _ = UseLog(tmp_path, used_model(backbone, "tiny", "")).texts()
    texts = iter([(0, GivenText(torch.tensor(kept.tokens, dtype=torch.int64), kept.answer))])
    ((_, read),) = read_given(backbone, texts, layers=[0], dtype=torch.float32)
    cache = backbone.new_cache()
    states = backbone.forward(tokens[:-1], cache)
    assert torch.equal(read.hidden, states.last) and read.answer == 4


def test_a_full_disk_is_said_once_and_hurts_nobody(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    recorder = UseRecorder(quantised("llama", "int8"), "tiny", tmp_path / "file", 10_000)
    recorder.add([1, 2, 3], 1)
    recorder.add([4, 5, 6], 1)
    recorder.close()
    assert [record.message for record in caplog.records if "not kept" in record.message] == caplog.messages
    assert len(caplog.messages) == 1


@pytest.mark.model
def test_a_real_chats_tokens_are_kept_and_read_to_its_own_states(tmp_path: Path) -> None:
    with served("smollm2-135m-instruct", max_sequences=2) as one, one.client() as client:
        recorder = UseRecorder(one.model.decoder, "smollm2-135m-instruct", tmp_path, 1_000_000)
        one.service.on_text = recorder.add
        messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name three rivers."}]
        body = {"max_tokens": 30, "temperature": 0}
        for question in ("And a lake?", None):
            reply = client.post("/v1/chat/completions", json={"messages": messages, **body}).json()
            said = reply["choices"][0]["message"]["content"]
            messages += [{"role": "assistant", "content": said}, {"role": "user", "content": question or ""}]
        recorder.close()
        decoder = one.model.decoder
        (kept,), _ = UseLog(tmp_path, used_model(decoder, "", "")).texts()
        shown = one.tokenizer.decode(kept.tokens.tolist())
        assert all(part in shown for part in ("Be brief.", "Name three rivers.", "And a lake?", said))
        given = GivenText(torch.tensor(kept.tokens, dtype=torch.int64), kept.answer)
        ((_, read),) = read_given(decoder, iter([(0, given)]), layers=[29], dtype=torch.float32)
        answers = generate_answers(
            decoder, [given.tokens[: kept.answer]], layers=[29], max_new_tokens=30, eos_ids=one.service.ends,
            dtype=torch.float32,
        )  # fmt: skip
        ((_, own),) = answers
        assert torch.equal(own.tokens, read.tokens) and torch.equal(own.hidden, read.hidden)
        assert torch.equal(own.keys[29].k, read.keys[29].k) and torch.equal(own.best, read.best)
