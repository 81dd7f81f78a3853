"""The exactness check passes where it should, and fails where it must."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from eval.cli.options import KV_DTYPES
from eval.exactness.checker import ScriptedDrafter
from eval.exactness.command import main
from eval.synthetic.command import write_model
from eval.synthetic.full_size import full_size_config, full_size_drafter
from specdec.engine.verify import Choice, Verdict, verify
from specdec.model.embedder import inputs
from specdec.model.states import States

STATES = States(torch.empty(0, dtype=torch.float32))


def check(folder: Path, *arguments: str) -> int:
    fixed = ["--model", str(folder), "--device", "cpu", "--threads", "1", "--prompts", "2", "--tokens", "40"]
    json_file = [] if "--json" in arguments else ["--json", "-"]
    return main([*fixed, *json_file, *arguments])


def recorded(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    return json.loads(capsys.readouterr().out)


def test_identical_texts_pass(folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert check(folder, "--json", str(tmp_path / "out.json")) == 0
    output = capsys.readouterr().out
    assert "12/12 identical, token for token. 4 plain texts of up to 40 new tokens" in output
    record = json.loads((tmp_path / "out.json").read_text())
    assert [(c["sampling"], c["drafter"], c["identical"], c["total"]) for c in record["configurations"]] == [
        ("greedy", "auto", 2, 2),
        ("greedy", "suffix", 2, 2),
        ("greedy", "scripted", 2, 2),
        ("temperature 0.8, top-p 0.95", "auto", 2, 2),
        ("temperature 0.8, top-p 0.95", "suffix", 2, 2),
        ("temperature 0.8, top-p 0.95", "scripted", 2, 2),
    ]
    scripted = record["configurations"][2]
    assert 0 < scripted["accepted"] < scripted["drafted"]


@pytest.mark.parametrize("kept", ["float32", "bfloat16", "int8"])
def test_texts_that_go_on_from_a_saved_cache_pass(folder: Path, kept: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(folder, "--reuse", "--kv-dtype", kept) == 0
    record = recorded(capsys)
    assert (record["identical"], record["total"], record["reuse"]) == (12, 12, True)
    for tally in record["configurations"]:
        assert tally["reused"] >= sum(prompt_lengths(folder)) + 2 * (20 - 1)


def prompt_lengths(folder: Path) -> list[int]:
    from eval.prompts.sets import exactness_prompts
    from specdec import load_tokenizer

    tokenizer = load_tokenizer(folder)
    return [len(tokenizer(prompt.turns[0])["input_ids"]) + 3 for prompt in exactness_prompts(2)]  # bos, eos, bos


def test_texts_go_on_past_eos(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((folder / "generation_config.json").read_text())
    config["eos_token_id"] = list(range(128))  # half of the vocabulary ends a text
    ends = folder.parent / "ends"
    ends.mkdir(exist_ok=True)
    for file in folder.iterdir():
        (ends / file.name).write_bytes(file.read_bytes())
    (ends / "generation_config.json").write_text(json.dumps(config))
    assert check(ends, "--temperature", "0", "--drafter", "scripted") == 0
    record = recorded(capsys)
    assert record["total"] == 2
    shorter, longer = sorted(prompt_lengths(ends))
    assert (record["shortest_text"], record["longest_text"]) == (shorter + 40, longer + 40)


def test_an_engine_that_accepts_a_wrong_draft_is_caught(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def gullible(
        draft: Sequence[int],
        logits: Tensor,
        text: Tensor,
        choose: Callable[[Tensor, Tensor], Choice],
        stop: Callable[[Tensor, Choice], bool],
    ) -> Verdict:
        verdict = verify(draft, logits, text, choose, stop)
        if draft and verdict.tokens[0] != draft[0]:
            text[-len(draft) - 1] = draft[0]
            return Verdict((Choice(draft[0], verdict.choices[0].process),))
        return verdict

    monkeypatch.setattr("specdec.engine.sequence.verify", gullible)
    assert check(folder, "--drafter", "scripted", "--temperature", "0") == 1
    written, output = capsys.readouterr()
    assert "first difference, greedy, scripted: prompt tea, new token" in output
    assert "gap" in output
    record = json.loads(written)
    assert (record["identical"], record["total"]) == (0, 2)
    first = record["configurations"][0]["first"]
    # The plain run's token is its top logit, and the scripted drafter's wrong token is that plus one.
    assert first["top"][0][0] == first["plain"]
    assert first["other"] == (first["plain"] + 1) % 256
    assert first["gap"] == pytest.approx(first["top"][0][1] - first["top"][1][1])


def test_arithmetic_that_depends_on_the_row_count_is_caught(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from specdec.model.decoder import Decoder

    honest = Decoder.logits

    def sloppy(self: Decoder, hidden: Tensor, *more: object) -> Tensor:
        logits = honest(self, hidden, *more)
        return logits if len(hidden) == 1 else logits + 0.5 * torch.sin(37 * logits)

    monkeypatch.setattr(Decoder, "logits", sloppy)
    assert check(folder, "--drafter", "scripted", "--temperature", "0") == 1
    assert recorded(capsys)["identical"] != 2


def test_ctrl_c_keeps_what_was_compared(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from eval.cli.session import Session

    honest, runs = Session.run, []

    def impatient(self: Session, *arguments: object, **options: object) -> object:
        runs.append(1)
        if len(runs) == 4:
            raise KeyboardInterrupt
        return honest(self, *arguments, **options)

    monkeypatch.setattr(Session, "run", impatient)
    assert check(folder, "--temperature", "0") == 130
    record = recorded(capsys)
    assert (record["interrupted"], record["identical"], record["total"]) == (True, 2, 2)


def test_user_errors_are_one_line(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--model", str(folder), "--prompts", "41"]) == 2
    assert main(["--model", str(folder / "gone")]) == 2
    assert main(["--model", str(folder), "--device", "cpu", "--tokens", "9000"]) == 2
    errors = capsys.readouterr().err.strip().splitlines()
    assert errors[0] == "error: there are 40 prompts; ask for 1 to 40, not 41"
    assert "exceed the model's context of 8192: ask for fewer --tokens" in errors[-1]


def test_the_scripted_drafter_meets_every_length_in_every_kind() -> None:
    answer = list(range(100, 200))
    drafter, seen = ScriptedDrafter(answer, vocabulary=1000), set()
    for _ in range(24):
        draft = drafter.propose(answer[:10], STATES, 8).tokens
        wrong = [i for i, (token, right) in enumerate(zip(draft, answer[10:], strict=False)) if token != right]
        right = wrong[0] if wrong else len(draft)
        assert wrong == list(range(right, len(draft)))  # right up to somewhere, then all wrong
        seen.add((len(draft), right))
    for length in range(1, 9):
        assert {(length, length), (length, 0), (length, length // 2)} <= seen


def test_the_scripted_drafter_ends_with_the_answer() -> None:
    drafter = ScriptedDrafter([1, 2, 3], vocabulary=4)
    assert drafter.propose([1, 2, 3], STATES, 8).tokens == ()
    assert drafter.propose([1, 2], STATES, 8).tokens == (0,)  # its second turn is all wrong, and no longer


@pytest.fixture(scope="module")
def seeing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model that sees and hears, with its assistant."""
    made = tmp_path_factory.mktemp("seeing") / "model"
    write_model(full_size_config("gemma-4-tiny"), full_size_drafter("gemma-4-tiny"), made)
    return made


@pytest.mark.parametrize(
    ("kept", "options"),
    [("int8", ["--quantize", "int4"]), *((kept, ["--reuse"]) for kept in KV_DTYPES)],
)
def test_texts_with_media_pass(kept: str, options: list[str], seeing: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two pictures in turn, from the other one's cache, and with --reuse from a file: by every drafter and store."""
    drafters = ["suffix", "scripted", str(seeing / "assistant")]
    words = ["--media", "--prompts", "3", "--tokens", "8", "--kv-dtype", kept, "--drafter", *drafters, *options]
    assert check(seeing, *words) == 0
    record = recorded(capsys)
    assert record["media"] and (record["identical"], record["total"]) == (21, 21)  # 3 prompts x 2 x 3 drafters, a batch
    *each, batch = record["configurations"]
    assert batch["drafter"] == "one batch" and [c["drafter"] for c in each] == 2 * drafters
    halves = 3 * (345 - 1) if options == ["--reuse"] else 0  # of each prompt the second half goes on from a file
    for tally in each:
        assert tally["drafter"] == "suffix" or tally["drafted"] > 0
        assert tally["drafter"] != "scripted" or tally["accepted"] > 0
        assert tally["reused"] > max(300, halves)  # the first picture, asked about again


def test_a_picture_that_answers_for_another_is_caught(
    seeing: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inputs, "hash_of", lambda identity, *tensors: b"all alike")
    words = ["--media", "--prompts", "2", "--tokens", "6", "--temperature", "0", "--drafter", "suffix"]
    assert check(seeing, *words) == 1
    record = recorded(capsys)
    assert record["configurations"][0]["first"]["prompt"] == "picture, another"


def test_a_model_without_an_embedder_is_told(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert check(folder, "--media") == 2
    assert ": the model takes no pictures and no sound; name one that does" in capsys.readouterr().err
