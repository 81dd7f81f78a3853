"""English prose that every machine has: the text of Python's own manual, out of the standard library.

What: `manual_prose`, the paragraphs of `pydoc_data.topics` (the text of `help("exceptions")`) without titles, code and
grammar. Why: perplexity needs real text, a few hundred kilobytes of it, whose licence is nobody's concern and that need
not be fetched. The text differs a little from one version of Python to the next, so figures compare within a version.
Left out: the texts that models are usually ranked by.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

SHORTEST = 80  # characters of a paragraph; below that are list items and lead-ins to code
_EMPHASIS = re.compile(r"(?<![\w*])\*{1,2}(?=\w)|(?<=\w)\*{1,2}(?![\w*])")
_RULE = re.compile(r"([*=\-~^])\1{3,}")
_GRAMMAR = re.compile(r"::=|>>>|\|\s*\"")


def manual_prose() -> str:
    """Return paragraphs of prose, each on one line, with an empty line between them.

    Raises ValueError where the standard library was packaged without the manual.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise ValueError(
            "this Python was packaged without the text of its manual (pydoc_data.topics); name a text with --text FILE"
        ) from None
    return "\n\n".join(prose(topics.values()))


def prose(pages: Iterable[str]) -> list[str]:
    """Return the paragraphs of `pages` that are prose, unwrapped and without markup; a repeated one counts once."""
    seen: dict[str, None] = {}
    for page in pages:
        for paragraph in re.split(r"\n\s*\n", page):
            if _is_prose(paragraph):
                text = " ".join(paragraph.split())
                seen.setdefault(_EMPHASIS.sub("", text))
    return list(seen)


def _is_prose(paragraph: str) -> bool:
    """Tell whether a paragraph is sentences: neither indented (code), nor underlined (titles), nor grammar, nor
    signatures."""
    paragraph = paragraph.strip("\n")
    return (
        len(paragraph) >= SHORTEST
        and paragraph.rstrip().endswith((".", ":", "?"))
        and not paragraph.startswith("  ")
        and not _RULE.search(paragraph)
        and not _GRAMMAR.search(paragraph)
    )
