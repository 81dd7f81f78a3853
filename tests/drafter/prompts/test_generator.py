"""Training prompts: the grammar, its tables, and the four sources."""

import json
import random
import re
from collections import Counter
from itertools import islice, repeat

import pytest

from drafter.prompts import generator as prompts
from drafter.prompts.files import TrainingPrompt
from drafter.prompts.generator import document_prompts, generated_prompts, held_out_prompts, mix_prompts, user_prompts
from drafter.prompts.grammar import Grammar, plural, with_article

COUNT = 20_000


@pytest.fixture(scope="module")
def generated():
    return list(islice(generated_prompts(1), COUNT))


def expand(template, seed=0, **tables):
    return Grammar(tables).draw(random.Random(seed)).expand(template)


def strings(value):
    if isinstance(value, str):
        yield value
    elif isinstance(value, (dict, list)):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from strings(inner)


# The grammar


def test_a_tag_keeps_its_item_and_other_tags_differ():
    animals = ["cat", "dog", "owl"]
    for seed in range(20):
        first, again, second, third = expand("{animal:1} {animal:1} {animal:2} {animal}", seed, animal=animals).split()
        assert first == again
        assert sorted({first, second, third}) == animals


def test_a_group_is_chosen_once_for_all_tables_that_ask_for_it():
    tables = {"topic": {"music": ["jazz"], "sport": ["tennis"]}, "job": {"music": ["singer"], "sport": ["coach"]}}
    seen = {expand("{#topic@f}: {job@f}, {topic@f}", seed, **tables) for seed in range(30)}
    assert seen == {"music: singer, jazz", "sport: coach, tennis"}


def test_forms_numbers_and_lists():
    assert expand("{^a animal}, {many animal}", animal=["owl"]) == "An owl, owls"
    assert expand("{2..2 of animal/; }", animal=["owl"]) == "owl; owl"
    assert all(-3 <= int(expand("{-3..5}", seed)) <= 5 for seed in range(50))
    low, same = expand("{1..999:n} {1..999:n}").split()
    assert low == same


def test_alternatives_nest():
    seen = {expand("{no|{yes|a {animal}}}!", seed, animal=["cat"]) for seed in range(50)}
    assert seen == {"no!", "yes!", "a cat!"}


@pytest.mark.parametrize(
    "text",
    ["int f() { return 1; }", "{}", '{ "a": { "b": 1 } }', "f{2}", "if (a | b) {\n  x | y;\n}", "{ unfinished | "],
)
def test_other_braces_are_text(text):
    assert expand(text) == text


def test_an_unknown_table_is_an_error():
    with pytest.raises(ValueError, match=r"\{cat:1\} names no table"):
        expand("a {cat:1}")


@pytest.mark.parametrize(
    ("noun", "article", "many"),
    [
        ("owl", "an", "owls"),
        ("unicorn", "a", "unicorns"),
        ("umbrella", "an", "umbrellas"),
        ("unbreakable lunch box", "an", "unbreakable lunch boxes"),
        ("hourglass", "an", "hourglasses"),
        ("IT support agent", "an", "IT support agents"),
        ("jar of honey", "a", "jars of honey"),
        ("ukulele", "a", "ukuleles"),
        ("fisherman", "a", "fishermen"),
        ("red scarf", "a", "red scarves"),
        ("diary", "a", "diaries"),
        ("key", "a", "keys"),
    ],
)
def test_articles_and_plurals(noun, article, many):
    assert with_article(noun) == f"{article} {noun}"
    assert plural(noun) == many


def test_every_slot_of_the_tables_is_known():
    grammar = prompts._grammar()
    for text in strings([prompts._json("words"), prompts._json("texts"), prompts._json("kinds")]):
        grammar.parts(text)  # raises for a slot without a table


def test_tables_that_share_a_group_tag_have_the_same_groups():
    tables = prompts._grammar().tables
    users: dict[str, set[str]] = {}
    for text in strings([prompts._json("words"), prompts._json("texts"), prompts._json("kinds")]):
        for table, tag in re.findall(r"(?:[{^#]|of |a |many )([a-z_]+)@(\w+)", text):
            users.setdefault(tag, set()).add(table)
    assert {"topic", "expert"} <= users["f"]
    for tag, names in users.items():
        assert len({frozenset(tables[name]) for name in names}) == 1, f"@{tag}: {names}"


# Generated and held-out prompts


def test_the_same_seed_gives_the_same_prompts(generated):
    assert list(islice(generated_prompts(1), 300)) == generated[:300]
    assert not set(islice(generated_prompts(2), 300)) & set(generated[:300])


def test_prompts_are_distinct_and_varied(generated):
    assert len(set(generated)) > 0.995 * COUNT
    assert len({prompt.messages[-1][1] for prompt in generated}) > 0.98 * COUNT  # "Continue." may come twice
    kinds = Counter(prompt.kind for prompt in generated)
    assert len(kinds) >= 25
    assert max(kinds.values()) < 0.06 * COUNT
    openings = Counter(tuple(prompt.messages[-1][1].lower().split()[:3]) for prompt in generated)
    assert len(openings) > 4_000
    lengths = sorted(len(prompt.messages[-1][1].split()) for prompt in generated)
    assert lengths[COUNT // 20] < 10 and lengths[-COUNT // 20] > 50


def test_no_prompt_repeats_without_its_system_message(generated):
    assert len({prompts._fingerprint(prompt) for prompt in generated}) == COUNT


def test_conversations_are_well_formed(generated):
    for prompt in generated:
        roles = [role for role, _ in prompt.messages if role != "system"]
        assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
        assert "system" not in [role for role, _ in prompt.messages[1:]]
        assert all(content.strip() for _, content in prompt.messages)
    assert {len(prompt.messages) for prompt in generated} == {1, 2, 3, 4}


def test_no_slot_is_left_over(generated):
    slot = re.compile(r"\{\^?#?(?:a |many )?[a-z]+(?:[@:]\w+)?\}")
    tables = prompts._grammar().tables
    found = {match for prompt in generated for _, text in prompt.messages for match in slot.findall(text)}
    assert not {slot for slot in found if re.split(r"[@:]", slot.strip("{}^#").split()[-1])[0] in tables}


def test_held_out_prompts_are_never_generated(generated):
    held_out = held_out_prompts(40)
    assert len(set(held_out)) == 40
    assert held_out == held_out_prompts(50)[:40]
    assert all(prompts._fingerprint(prompt) % prompts.HELD_OUT_ONE_IN == 0 for prompt in held_out)
    assert all(prompts._fingerprint(prompt) % prompts.HELD_OUT_ONE_IN for prompt in generated)


# Documents


def sentences(count, word):
    return " ".join(f"The {word} number {word}{i} stands here with its {i} friends." for i in range(count))


@pytest.fixture
def folder(tmp_path):
    paragraphs = [sentences(6, word) for word in ("apple", "river", "engine", "window")]
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "prose.md").write_text("\n\n".join(paragraphs), encoding="utf-8")
    code = "\n\n".join(f"def function_{i}(value):\n    return value + other_{i} * third_{i}" for i in range(60))
    (tmp_path / "code.py").write_text(code, encoding="utf-8")
    (tmp_path / "copy.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    (tmp_path / "binary.txt").write_bytes(sentences(30, "binary").encode() + b"\0")
    (tmp_path / "latin.txt").write_bytes(sentences(30, "latin").encode() + "é".encode("latin-1"))
    (tmp_path / "digits.txt").write_text(" ".join(map(str, range(1000))), encoding="utf-8")
    (tmp_path / "short.txt").write_text("Too short.", encoding="utf-8")
    (tmp_path / "link.txt").symlink_to(tmp_path / "code.py")
    return tmp_path


def test_documents_give_passages_with_requests(folder):
    found = list(document_prompts(folder, 3))
    assert found == list(document_prompts(folder, 3))
    contents = [prompt.messages[0][1] for prompt in found]
    assert all(prompt.kind == "document" and prompt.messages[0][0] == "user" for prompt in found)
    assert any("def function_" in content for content in contents)
    assert any("apple" in content for content in contents)
    assert not any(word in content for word in ("binary0", "latin0", "998 999", "Too short") for content in contents)
    assert sum("apple1 " in content for content in contents) == 1  # the copy is known
    assert all(prompts.MIN_WORDS <= len(content.split()) <= prompts.MAX_WORDS + 40 for content in contents)


def test_passages_end_where_a_paragraph_or_sentence_does(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text(sentences(400, "page"), encoding="utf-8")  # one paragraph
    passages = list(prompts._passages(file.read_text(encoding="utf-8"), ".txt", random.Random(0)))
    assert len(passages) > 8
    assert all(passage.startswith("The page") and passage.endswith("friends.") for passage in passages)
    assert all(prompts.MIN_WORDS <= len(passage.split()) <= prompts.MAX_WORDS for passage in passages)
    assert len(list(document_prompts(file, 0))) > 8


def test_requests_vary_and_name_a_word_of_the_passage(tmp_path):
    (tmp_path / "a.txt").write_text("\n\n".join(sentences(20, f"word{i}x") for i in range(300)), encoding="utf-8")
    contents = [prompt.messages[0][1] for prompt in document_prompts(tmp_path, 0)]
    openings = {content.split("\n")[0] for content in contents if not content.startswith("The word")}
    assert len(openings) > 30
    assert any(re.search(r'"(number|stands|friends)"', content) for content in contents)


def test_huge_files_are_skipped(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(sentences(60, "stone"), encoding="utf-8")
    monkeypatch.setattr(prompts, "MAX_BYTES", 1000)
    assert not list(document_prompts(tmp_path, 0))


def test_missing_documents_are_an_error_at_once(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        document_prompts(tmp_path / "nowhere", 0)


# A user's prompts, and mixtures


def write(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines), encoding="utf-8")
    return path


def test_user_prompts_in_three_forms(tmp_path):
    user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
    path = write(
        tmp_path,
        {"prompt": "one", "id": 7},
        "",
        {"turns": ["first", "second"]},
        {"messages": [{"role": "system", "content": "s"}, user, answer]},
        {"messages": [user, answer, user]},
    )
    assert [prompt.messages for prompt in user_prompts(path)] == [
        (("user", "one"),),
        (("user", "first"),),
        (("system", "s"), ("user", "a")),
        (("user", "a"), ("assistant", "b"), ("user", "a")),
    ]


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "nested too deeply"),
        ("[]", "expected an object, one of"),
        ({"text": "x"}, "expected exactly one of"),
        ({"prompt": "x", "turns": ["y"]}, "expected exactly one of"),
        ({"prompt": " "}, "prompt must be text"),
        ({"turns": []}, "turns must be a list"),
        ({"turns": [3]}, r"turns\[0\] must be text"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\] must be"),
        ({"messages": [{"role": "user"}]}, r"messages\[0\].content must be text"),
        ({"messages": [{"role": "assistant", "content": "x"}]}, "must end with the user's"),
    ],
)
def test_bad_lines_are_named(tmp_path, line, problem):
    path = write(tmp_path, {"prompt": "fine"}, line)
    with pytest.raises(ValueError, match=rf"prompts.jsonl, line 2: .*{problem}"):
        user_prompts(path)


def test_unreadable_files_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"none.jsonl: No such file"):
        user_prompts(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="holds no prompts"):
        user_prompts(write(tmp_path, ""))
    (tmp_path / "latin.jsonl").write_bytes('{"prompt": "a"}\n{"prompt": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match="line 2: not UTF-8"):
        user_prompts(tmp_path / "latin.jsonl")


def test_mixed_draws_by_weight():
    a, b = (TrainingPrompt(kind, (("user", kind),)) for kind in "ab")
    drawn = Counter(prompt.kind for prompt in islice(mix_prompts([(3.0, repeat(a)), (1.0, repeat(b))], 0), 4000))
    assert 2850 < drawn["a"] < 3150


def test_mixed_ends_when_all_have_ended():
    a, b = (TrainingPrompt(kind, (("user", kind),)) for kind in "ab")
    drawn = list(mix_prompts([(100.0, repeat(a, 5)), (0.1, repeat(b, 30))], 0))
    assert Counter(drawn) == {a: 5, b: 30}
    assert drawn == list(mix_prompts([(100.0, repeat(a, 5)), (0.1, repeat(b, 30))], 0))
    assert list(mix_prompts([], 0)) == []
    with pytest.raises(ValueError, match="must be positive"):
        mix_prompts([(0.0, repeat(a, 5))], 0)
