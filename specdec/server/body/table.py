"""The table of fields in docs/serve.md."""

from __future__ import annotations

from collections.abc import Mapping

from specdec.server.body.bodies import CHAT, COMPLETION, COUNT, DETOKENIZE, RESPONSE, TOKENIZE, TURN
from specdec.server.body.objects import Field, Object

WHERE: Mapping[str, Object] = {
    "chat": CHAT,
    "completions": COMPLETION,
    "responses": RESPONSE,
    "messages": TURN,
    "count_tokens": COUNT,
    "tokenize": TOKENIZE,
    "detokenize": DETOKENIZE,
}


def markdown() -> str:
    """Return the table: a row for every field that is declared, with the endpoints that have it."""
    where: dict[Field, list[str]] = {}
    for name, body in WHERE.items():
        for field in body.fields.values():
            where.setdefault(field, []).append(name)
    rows = ["| field | value | endpoints | meaning |", "|---|---|---|---|"]
    for field, names in where.items():
        rows.append(f"| `{field.name}` | {field.kind.words} | {', '.join(names)} | {field.about} |")
    return "\n".join(rows)
