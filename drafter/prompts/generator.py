"""Prompts to train a head on: the backbone answers them, and the head learns the backbone's own words.

What: `generated_prompts` and `held_out_prompts` (from a grammar), `document_prompts` (passages of text files, each with
a request), `user_prompts` (a user's JSON lines), `mix_prompts` (all of these by weight).

Why: a head trained on few templates does poorly on foreign prompts, so the tables buy breadth of topic, task, register,
length and format, and no single phrase is worth polishing. The tables of the grammar (see `grammar.py`) lie beside this
file: `words.json` (topics, names, words), `texts.json` (sentences, facts, code); `kinds.json` has the templates of each
kind of prompt. All tables were written for this project.

Left out: any judgement of a prompt's sense. Some prompts are odd; a model has to answer odd prompts too.
"""

from __future__ import annotations

import json
import random
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import Any, TypeVar

from drafter.prompts.files import FORMS, ROLES, TrainingPrompt, entries_of, parse_file, parse_line
from drafter.prompts.grammar import Grammar

Drawn = TypeVar("Drawn")

HELD_OUT_ONE_IN = 64
MIN_WORDS, MAX_WORDS, MAX_CHARS = 60, 400, 4_000  # of a document's passage
MAX_BYTES = 1_000_000  # of a document

_LEAD, _TAIL, _SYSTEM, _SLOPPY = 0.2, 0.4, 0.2, 0.15  # the share of prompts that get each, where the kind allows it
_FORGET = 1_000_000  # prompts: repetitions further apart than this are let through, so that memory stays bounded
_POOL = 4096  # passages of documents to draw from, so that those of one file are spread out
_SHINGLE = 8  # words in a run; every 16th run or so is kept, to know a passage again
_CODE = ".py .c .h .cc .cpp .hpp .js .ts .java .go .rs .rb .php .pl .pm .sh .lua .sql .css .el .tcl .awk .r"
_DATA = ".json .jsonl .csv .tsv .xml .html .htm .svg .yaml .yml .toml .ini .cfg .conf .desktop"
_SUFFIXES = {**dict.fromkeys(_CODE.split(), "code"), **dict.fromkeys(_DATA.split(), "data")}


def generated_prompts(seed: int) -> Iterator[TrainingPrompt]:
    """Yield prompts without end and without repetitions, the same for the same seed, and none of `held_out_prompts`."""
    rng = random.Random(seed)
    seen: set[int] = set()
    while True:
        prompt = _generate(rng)
        key = _fingerprint(prompt)
        if key % HELD_OUT_ONE_IN and key not in seen:
            if len(seen) >= _FORGET:
                seen.clear()
            seen.add(key)
            yield prompt


def held_out_prompts(count: int) -> list[TrainingPrompt]:
    """Return the first `count` of the prompts that `generated_prompts` never yields; always the same prompts.

    A hash of the letters and digits decides, so prompts that differ only in case, punctuation or the system message are
    on one side. Words and templates are those of the training side: these prompts show how well training went, not how
    well the head does on foreign prompts.
    """
    rng = random.Random("held out")
    found: dict[int, TrainingPrompt] = {}
    while len(found) < count:
        prompt = _generate(rng)
        key = _fingerprint(prompt)
        if key % HELD_OUT_ONE_IN == 0:
            found.setdefault(key, prompt)
    return list(found.values())


def document_prompts(folder_or_file: Path, seed: int) -> Iterator[TrainingPrompt]:
    """Yield every passage of the text files once, in random order, each with a random request.

    Skipped: files that are not UTF-8 text or larger than `MAX_BYTES`, symbolic links inside the folder, passages of
    which more than half was seen before (licences, mostly) and passages that are mostly digits and signs.

    Raises:
        ValueError: there is no such file or folder.
    """
    rng = random.Random(seed)
    return (_document_prompt(*passage, rng) for passage in _document_passages(folder_or_file, rng))


def document_passages(folder_or_file: Path, seed: int) -> Iterator[str]:
    """Yield the passages of `document_prompts`, without a request, in random order.

    Raises:
        ValueError: there is no such file or folder.
    """
    return (passage for _, passage in _document_passages(folder_or_file, random.Random(seed)))


def user_prompts(path: Path) -> Iterator[TrainingPrompt]:
    """Read the prompts of a `.jsonl` file, one object per line: `prompt`, `turns` (the first is taken) or `messages`.

    Messages that end with the assistant's answer are cut before it. The whole file is read first, so that a bad line
    does not come to light after hours of training.

    Raises:
        ValueError: the file cannot be read, holds no prompts, or has a line that is no prompt; the message names the
            line.
    """
    prompts = parse_file(path, lambda line, number: TrainingPrompt("user", _parse_line(line)))
    if not prompts:
        raise ValueError(f"{path}: holds no prompts; each line is one of {FORMS}")
    return iter(prompts)


def mix_prompts(parts: Sequence[tuple[float, Iterator[Drawn]]], seed: int) -> Iterator[Drawn]:
    """Draw prompts, or texts, from the sources in proportion to their weights; end when every source has run dry.

    Raises:
        ValueError: a weight is not positive.
    """
    for weight, _ in parts:
        if not weight > 0:
            raise ValueError(f"the weight of a source of prompts must be positive, not {weight}")
    return _mixed(list(parts), random.Random(seed))


def _mixed(parts: list[tuple[float, Iterator[Drawn]]], rng: random.Random) -> Iterator[Drawn]:
    while parts:
        number = rng.choices(range(len(parts)), [weight for weight, _ in parts])[0]
        prompt = next(parts[number][1], None)
        if prompt is None:
            del parts[number]
        else:
            yield prompt


@dataclass(frozen=True)
class _Kind:
    """Describe a kind of prompt. `templates`: a text, or turns of user and assistant that end with the user's.

    `lead` and `tail` are tables of sentences that may go before and after; `sloppy` prompts may be typed carelessly.
    """

    templates: list[str | list[str]]
    weight: float = 1.0
    lead: str = ""
    tail: str = ""
    sloppy: bool = False


def _json(name: str) -> Any:
    return json.loads(resources.files("drafter.prompts").joinpath(f"{name}.json").read_text(encoding="utf-8"))


@cache
def _grammar() -> Grammar:
    return Grammar({**_json("words"), **_json("texts")})


@cache
def _kinds() -> tuple[list[str], list[_Kind], list[float]]:
    """Return the names of the kinds of prompts, the kinds, and their weights summed up."""
    kinds = {name: _Kind(**kind) for name, kind in _json("kinds").items()}
    return list(kinds), list(kinds.values()), list(accumulate(kind.weight for kind in kinds.values()))


def _generate(rng: random.Random) -> TrainingPrompt:
    names, kinds, cumulative = _kinds()
    number = rng.choices(range(len(names)), cum_weights=cumulative)[0]
    kind = kinds[number]
    draw = _grammar().draw(rng)
    template = rng.choice(kind.templates)
    turns = [draw.expand(turn) for turn in ([template] if isinstance(template, str) else template)]
    last = turns[-1]
    if kind.lead and len(turns) == 1 and rng.random() < _LEAD:
        lead = draw.expand(f"{{{kind.lead}}}")
        last = lead + (" " if len(lead) < 60 else rng.choice((" ", "\n\n"))) + last
    if kind.tail and last[-1] not in ":,({>" and rng.random() < _TAIL:
        joint = "\n\n" if "\n" in last else rng.choice(("\n", " ", " "))
        last += ("." if joint == " " and last[-1].isalnum() else "") + joint + draw.expand(f"{{{kind.tail}}}")
    if kind.sloppy and "\n" not in last and "`" not in last and rng.random() < _SLOPPY:
        last = _sloppy(last, rng)
    system = [("system", draw.expand("{system}"))] if rng.random() < _SYSTEM else []
    spoken = [(ROLES[1 + i % 2], turn) for i, turn in enumerate([*turns[:-1], last])]
    return TrainingPrompt(names[number], (*system, *spoken))


def _sloppy(text: str, rng: random.Random) -> str:
    """Return `text` as typed in a hurry: without capitals and end, perhaps without commas or with two letters the wrong
    way round."""
    text = text.lower().rstrip(".?! ")
    if rng.random() < 0.5:
        text = text.replace(",", "").replace("'", "")
    if rng.random() < 0.3 and (words := re.findall(r"[a-z]{4,}", text)):
        word = rng.choice(words)
        text = text.replace(word, word[:-3] + word[-2] + word[-3] + word[-1], 1)
    return text


def _fingerprint(prompt: TrainingPrompt) -> int:
    spoken = " ".join(text for role, text in prompt.messages if role != "system")
    return zlib.crc32(re.sub(r"[\W_]+", "", spoken.lower()).encode())


def _document_passages(root: Path, rng: random.Random) -> Iterator[tuple[str, str]]:
    """Return the (suffix of the file, passage) of the text files at `root`. Raises ValueError: nothing is there."""
    if not root.exists():
        raise ValueError(f"{root}: no such file or folder; name a text file, or a folder that holds some")
    return _drawn_passages(root, rng)


def _drawn_passages(root: Path, rng: random.Random) -> Iterator[tuple[str, str]]:
    files = [root] if root.is_file() else sorted(p for p in root.rglob("*") if p.is_file() and not p.is_symlink())
    rng.shuffle(files)
    pool: list[tuple[str, str]] = []  # (suffix, passage)
    seen: set[int] = set()
    for file in files:
        for passage in _passages(_read(file), file.suffix, rng):
            keys = _shingles(passage)
            if 2 * len(keys & seen) <= len(keys):
                pool.append((file.suffix, passage))
            seen |= keys
        while len(pool) > _POOL:
            yield pool.pop(rng.randrange(len(pool)))
    rng.shuffle(pool)
    yield from pool


def _shingles(passage: str) -> set[int]:
    """Return hashes of runs of words; the hash itself says which runs count, so that they are found wherever a passage
    is cut."""
    words = re.findall(r"\w+", passage.lower())
    runs = zip(*(words[i:] for i in range(_SHINGLE)), strict=False)
    return {key for run in runs if (key := zlib.crc32(" ".join(run).encode())) % (2 * _SHINGLE) == 0}


def _read(file: Path) -> str:
    """Return the text of a file; empty if the file is too large, not UTF-8, binary or not readable."""
    try:
        data = file.read_bytes() if file.stat().st_size <= MAX_BYTES else b""
        return "" if b"\0" in data else data.decode("utf-8-sig").replace("\r\n", "\n")
    except (OSError, UnicodeDecodeError):
        return ""


def _passages(text: str, suffix: str, rng: random.Random) -> Iterator[str]:
    """Yield passages of 60 to 400 words that end with a paragraph or, in a long paragraph, with a sentence or a
    line."""
    passage, words, target = "", 0, rng.randint(MIN_WORDS, MAX_WORDS)
    for piece in [*_pieces(text, prose=suffix.lower() not in _SUFFIXES), None]:
        count = len(piece.split()) if piece else 0
        if piece is None or words >= target or words + count > MAX_WORDS:
            solid = re.sub(r"\s+", "", passage)
            if words >= MIN_WORDS and len(passage) <= MAX_CHARS and 2 * sum(map(str.isalpha, solid)) > len(solid):
                yield passage.strip("\n").rstrip()
            passage, words, target = "", 0, rng.randint(MIN_WORDS, MAX_WORDS)
        if piece and count <= MAX_WORDS:
            passage, words = passage + piece, words + count


def _pieces(text: str, prose: bool) -> Iterator[str]:
    """Yield paragraphs, or the sentences or lines of those that are too long, each with the white space that follows
    it."""
    for block in re.split(r"(?<=\n)[ \t]*\n", text):
        if len(block.split()) <= MAX_WORDS // 2:
            yield block + "\n"
        else:
            yield from re.split(r"(?<=[.!?]\s)" if prose else r"(?<=\n)", block + "\n")


def _document_prompt(suffix: str, passage: str, rng: random.Random) -> TrainingPrompt:
    kind = _SUFFIXES.get(suffix.lower(), "prose")
    long_words: list[str] = re.findall(r"[^\W\d_]{6,}", passage) or ["text"]
    draw = _grammar().draw(rng, keyword=rng.choice(long_words))
    draw.kept["@kind"] = kind
    request = draw.expand("{request@kind}")
    if kind != "prose" and rng.random() < 0.5:
        passage = f"```{suffix[1:]}\n{passage}\n```"
    content = f"{request[:-1]}:\n\n{passage}" if request.endswith(".") else f"{request}\n\n{passage}"
    return TrainingPrompt("document", (("user", rng.choice((content, f"{passage}\n\n{request}"))),))


def _parse_line(line: str) -> tuple[tuple[str, str], ...]:
    form, messages = entries_of(parse_line(line))
    if form == "turns":
        return (messages[0],)
    if messages[-1][0] == "assistant":
        messages.pop()
    if not messages or messages[-1][0] != "user":
        raise ValueError("messages must end with the user's, or with the assistant's answer to it")
    return tuple(messages)
