"""Prompt sets and the loader of anyone's file."""

from __future__ import annotations

from pathlib import Path

import pytest

from eval.prompts.sets import default_prompts, exactness_prompts, load_prompts, long_prompts


def write(folder: Path, text: str | bytes, name: str = "mine.jsonl") -> Path:
    path = folder / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_the_default_prompts_cover_eight_kinds_of_work() -> None:
    tasks = [prompt.task for prompt in default_prompts()]
    assert tasks == ["chat", "code editing", "summary", "json", "maths", "translation", "rewriting", "list"]


def test_the_exactness_set_is_40_different_prompts_with_long_ones_throughout() -> None:
    prompts = exactness_prompts()
    assert len({prompt.turns for prompt in prompts}) == len({prompt.name for prompt in prompts}) == 40
    assert [i for i, prompt in enumerate(prompts) if prompt.task == "long"] == list(range(4, 40, 5))
    assert exactness_prompts(5) == prompts[:5]
    with pytest.raises(ValueError, match="1 to 40, not 41"):
        exactness_prompts(41)


def test_long_prompts_are_long_and_do_not_repeat_themselves() -> None:
    for prompt in long_prompts():
        paragraphs = prompt.turns[0].split("\n\n")
        assert len(set(paragraphs)) == len(paragraphs)
        assert len(prompt.turns[0]) > 3000
    titles = [tuple(p for p in prompt.turns[0].split("\n\n") if p.startswith("## ")) for prompt in long_prompts()]
    assert len(set(titles)) == len(titles)


@pytest.mark.model
@pytest.mark.parametrize("model", ["smollm2-135m-instruct", "gemma-3-270m"])
def test_long_prompts_pass_1024_tokens_with_256_more(model: str) -> None:
    import specdec

    tokenizer = specdec.load_tokenizer(model)
    assert all(len(tokenizer(prompt.turns[0])["input_ids"]) + 256 > 1024 for prompt in long_prompts())


def test_every_format_of_json_lines(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        '{"prompt": "one"}\n\n'
        '{"question_id": 81, "category": "writing", "turns": ["two", "three"], "reference": []}\n'
        '{"id": "c", "messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "four"}]}\n',
    )
    one, two, three = load_prompts(path)
    assert (one.name, one.turns, one.history()) == ("line-1", ("one",), [])
    assert (two.name, two.task, two.turns) == ("81", "writing", ("two", "three"))
    assert (three.name, three.turns) == ("c", ("four",))
    assert three.history() == [{"role": "system", "content": "be brief"}]


def test_json_lines_end_at_newlines_alone(tmp_path: Path) -> None:
    path = write(tmp_path, '\ufeff{"prompt": "a\u2028b"}\r\n{"prompt": "c"}')
    assert [prompt.turns[0] for prompt in load_prompts(path)] == ["a\u2028b", "c"]


def test_plain_text_is_one_prompt_a_line(tmp_path: Path) -> None:
    path = write(tmp_path, "first\n\n  second  \n", "mine.txt")
    assert [(prompt.name, prompt.turns) for prompt in load_prompts(path)] == [
        ("line-1", ("first",)),
        ("line-3", ("second",)),
    ]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "line 2: not JSON .* column 2"),
        ("[" * 100_000, "line 2: not a prompt: nested too deeply"),
        ("3", "line 2: expected an object"),
        ('{"text": "x"}', "line 2: expected exactly one of prompt, turns and messages, found none"),
        ('{"prompt": "x", "turns": ["y"]}', "found .'prompt', 'turns'."),
        ('{"prompt": " "}', "line 2: prompt must be text that is not empty"),
        ('{"prompt": null}', "line 2: prompt must be text .* got null"),
        ('{"turns": []}', "line 2: turns must be a list with at least one entry"),
        ('{"turns": "x"}', "line 2: turns must be a list"),
        ('{"turns": ["x", 5]}', r"line 2: turns\[1\] must be text .* got 5"),
        ('{"messages": [{"role": "robot", "content": "x"}]}', r"line 2: messages\[0\] must be"),
        ('{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', r"messages\[0\].content must be text"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "line 2: the last message must be the user's"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, complaint: str) -> None:
    path = write(tmp_path, '{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=complaint):
        load_prompts(path)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"gone\.jsonl: No such file"):
        load_prompts(tmp_path / "gone.jsonl")
    with pytest.raises(ValueError, match=r"prompts come as \.jsonl"):
        load_prompts(write(tmp_path, "a,b", "mine.csv"))
    with pytest.raises(ValueError, match="holds no prompts"):
        load_prompts(write(tmp_path, "\n \n"))
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        load_prompts(write(tmp_path, b'{"prompt": "x"}\n{"prompt": "\xff"}\n'))
