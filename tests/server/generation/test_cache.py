"""The cache as agents meet it: exact counts, side requests, a warm start, and the view of where prompts part."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.testclient import TestClient

from specdec.server.app import create_app
from specdec.server.guard import Access
from specdec.server.state import ServerState
from tests.support.serving.served import Served, served


def ask(client: TestClient, messages: list[dict[str, str]], new: int = 8) -> tuple[int, int, str]:
    """Prompt tokens, those of them that were cached, and the text."""
    body: dict[str, Any] = {"messages": messages, "max_tokens": new, "temperature": 0}
    done = client.post("/v1/chat/completions", json=body).json()
    usage, text = done["usage"], done["choices"][0]["message"]["content"]
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"], text


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def test_a_second_turn_is_cached_past_the_window(tiny: Served, client: TestClient) -> None:
    tiny.model.conversations.forget()
    chat = [{"role": "system", "content": "s" * 300}, user("one " * 400)]
    prompt, cached, text = ask(client, chat)
    assert (prompt, cached) == (300 + 1600 + 2 * 2 + 1, 0)
    _, cached, _ = ask(client, [*chat, {"role": "assistant", "content": text}, user("two")])
    assert cached == prompt + 8 - 1, "all but the newest token, which no pass had read"


def test_a_title_request_does_not_end_the_chat(tiny: Served, client: TestClient) -> None:
    conversations = tiny.model.conversations
    conversations.forget()
    chat = [user("x" * 500)]
    _, _, text = ask(client, chat)
    chat += [{"role": "assistant", "content": text}, user("and?")]
    prompt, _, text = ask(client, chat)
    limit, conversations.limit = conversations.limit, conversations.nbytes + 1000
    try:
        for topic in ("title", "tags", "follow-ups"):
            ask(client, [user(f"{topic}: " + "y" * 300)])
        _, cached, _ = ask(client, [*chat, {"role": "assistant", "content": text}, user("more")])
    finally:
        conversations.limit = limit
    assert cached >= prompt


def test_a_restart_goes_on_with_saved_conversations(folder: Path, tmp_path: Path) -> None:
    chat = [user("z" * 400)]
    with served(folder, drafter=None, kept_in=tmp_path) as one, one.client() as client:
        prompt, cached, text = ask(client, chat)
        assert cached == 0
    assert len(list(tmp_path.iterdir())) == 1
    (tmp_path / "other.txt").write_text("stays")
    with served(folder, drafter=None, kept_in=tmp_path) as one, one.client() as client:
        again, cached, _ = ask(client, [*chat, {"role": "assistant", "content": text}, user("go on")])
        assert again > cached >= prompt
    assert len(list(tmp_path.glob("*.conversation"))) == 1, "in place of the one that was gone on from"
    for file in tmp_path.glob("*.conversation"):
        file.write_bytes(file.read_bytes()[:-100])
    with served(folder, drafter=None, kept_in=tmp_path) as one, one.client() as client:
        assert ask(client, chat) == (prompt, 0, text), "damaged files are passed over"
    assert (tmp_path / "other.txt").exists()


def test_servers_that_share_a_folder_keep_each_others_conversations(folder: Path, tmp_path: Path) -> None:
    with served(folder, drafter=None, kept_in=tmp_path) as last, last.client() as one:
        with served(folder, drafter=None, kept_in=tmp_path) as first, first.client() as other:
            ask(other, [user("y" * 400)])
        kept = {file.name for file in tmp_path.iterdir()}
        assert len(kept) == 1
        ask(one, [user("z" * 400)])
    assert kept < {file.name for file in tmp_path.iterdir()}, "the server that ended last deleted it"
    with served(folder, drafter=None, kept_in=tmp_path) as both, both.client() as client:
        for letter in "yz":
            prompt, cached, _ = ask(client, [user(letter * 400)])
            assert cached == prompt - 1
        for number in range(12):
            ask(client, [user(f"{number} " + "x" * 300)])
    assert len(list(tmp_path.glob("*.conversation"))) <= 8


def test_the_view_says_where_a_prompt_parted(tiny: Served, client: TestClient) -> None:
    tiny.model.conversations.forget()
    ask(client, [user("the year is 1911, and it rains")])
    ask(client, [user("the year is 1912, and it rains")])
    assert client.get("/debug/cache").status_code == 404, "texts of other clients are shown with --debug alone"
    app = create_app(ServerState(tiny.service, debug=True), Access())
    with TestClient(app, base_url="http://localhost") as open_one:
        found = open_one.get("/debug/cache").json()
    newest = found["prompts"][-1]
    assert newest["before"].endswith("the year is 191") and newest["was"].startswith("1,") and newest["is"][0] == "2"
    assert newest["shared"] == 1 + len("the year is 191") and newest["cached"] <= newest["shared"]
    assert found["conversations"][-1]["tokens"] > 30
