"""Ten turns of an agent through real clients, each against a server that is a process.

`openai` is a part of every run. The others: pip install -c constraints.txt -e '.[test,agents]', npm install --prefix
tests/server/clients, and pytest -m agents tests/server/endpoints/test_agents.py.
"""

from __future__ import annotations

import http.client
import json
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.serving.process import serving
from tests.support.serving.served import events, streamed_text
from tests.support.serving.table_model import ANSWER, make_table_folder
from tests.support.serving.turns import TURNS, check_turns, go_through

SCRIPTS = Path(__file__).parent.parent / "clients"
KEEP_ALIVE = 0.01  # seconds: comments stand between the events of every stream

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT to send")


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = make_table_folder(tmp_path_factory.mktemp("table"))
    log = tmp_path_factory.mktemp("log") / "log"
    with serving(folder, log, "--keep-alive", str(KEEP_ALIVE)) as (_, address):
        yield address
    assert "Traceback" not in log.read_text()


def python(script: str, package: str) -> list[str]:
    if find_spec(package) is None:
        pytest.skip(f"{package} is not installed: pip install -c constraints.txt -e '.[test,agents]'")
    return [sys.executable, str(SCRIPTS / script)]


def node(script: str, package: str) -> list[str]:
    program = shutil.which("node")
    if program is None or not (SCRIPTS / "node_modules" / package).exists():
        pytest.skip(f"{package} is not installed: npm install --prefix tests/server/clients, with Node 20 or newer")
    return [program, str(SCRIPTS / script)]


@pytest.mark.parametrize("script", ["openai_chat.py", "openai_responses.py"])
def test_openai(address: str, tmp_path: Path, script: str) -> None:
    check_turns(go_through(python(script, "openai"), address, tmp_path))


@pytest.mark.agents
@pytest.mark.parametrize(
    ("script", "package"),
    [
        ("anthropic_messages.py", "anthropic"),
        ("langchain_chat.py", "langchain_openai"),
        ("litellm_chat.py", "litellm"),
    ],
)
def test_other_python_clients(address: str, tmp_path: Path, script: str, package: str) -> None:
    found = go_through(python(script, package), address, tmp_path)
    check_turns(found, drops_thoughts=package == "langchain_openai")


@pytest.mark.agents
@pytest.mark.parametrize(
    ("script", "package"),
    [
        ("openai_node.mjs", "openai"),
        ("ai_sdk.mjs", "@ai-sdk/openai-compatible"),
        ("pi_ai.mjs", "@earendil-works/pi-ai"),
    ],
)
def test_clients_on_node(address: str, tmp_path: Path, script: str, package: str) -> None:
    check_turns(go_through(node(script, package), address, tmp_path))


def test_comments_stand_in_the_streams_that_clients_read(address: str) -> None:
    connection = http.client.HTTPConnection(address, timeout=60)
    body = {"messages": [{"role": "user", "content": "Not cached: " + TURNS["long"]}], "temperature": 0, "stream": True}
    connection.request("POST", "/v1/chat/completions", json.dumps(body), {"Content-Type": "application/json"})
    text = connection.getresponse().read().decode()
    connection.close()
    assert ": keep-alive\n\n" in text and streamed_text(events(text)) == ANSWER
