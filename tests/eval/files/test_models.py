"""`run.py models`, `show`, `pull` and `remove`, with stores and a hub made on the spot."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf import GGMLQuantizationType as Type

from eval.files import models
from eval.plan import Asked, plan_memory
from run import main
from specdec.memory.plan import program_bytes
from tests.support.stores.gguf_kinds import MODEL, put_in_store, write_kind
from tests.support.stores.hub import Hub, serving
from tests.support.tiny import tiny_model
from tests.support.tiny_assistant import save_assistant, write_gguf
from tests.support.tiny_gguf import write_model

REPOSITORY = "me/tiny-GGUF"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A repository with a model in two types, its drafter and its embedder; no other models on this disk."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("SPECDEC_CACHE", str(tmp_path / "cache"))
    for name in ("OLLAMA_MODELS", "LLAMA_CACHE", "XDG_CACHE_HOME", "HF_HUB_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    made = tmp_path / "made"
    made.mkdir()
    save_assistant(made / "assistant", "gemma4")
    files = {
        "tiny-Q8_0.gguf": write_model(made / "a", "gemma4", Type.Q8_0),
        "tiny-Q4_0.gguf": write_model(made / "b", "gemma4", Type.Q4_0),
        "mtp-tiny-Q8_0.gguf": write_gguf(made / "c", made / "assistant", "gemma4", Type.Q8_0),
        "mmproj-tiny.gguf": write_kind(made / "d", "clip"),
    }
    contents = {name: path.read_bytes() for name, path in files.items()}
    with serving({REPOSITORY: contents}) as server:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
        yield server


def run(*words: str, capsys: pytest.CaptureFixture[str], code: int = 0) -> str:
    assert main([*words]) == code
    said = capsys.readouterr()
    return said.out + said.err


def listed(capsys: pytest.CaptureFixture[str]) -> dict[str, dict[str, Any]]:
    capsys.readouterr()
    assert main(["models", "--json", "-"]) == 0
    return {entry["name"]: entry for entry in json.loads(capsys.readouterr().out)["models"]}


def test_a_model_is_pulled_shown_and_removed(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no models here yet" in run("models", capsys=capsys)
    said = run("pull", f"{REPOSITORY}:Q8_0", capsys=capsys)
    for name in ("tiny-Q8_0.gguf", "mtp-tiny-Q8_0.gguf", "mmproj-tiny.gguf"):
        assert name in said
    assert "tiny-Q4_0.gguf" not in said
    run("pull", f"{REPOSITORY}/tiny-Q4_0.gguf", capsys=capsys)
    found = listed(capsys)
    drafter = f"{REPOSITORY}/mtp-tiny-Q8_0.gguf"
    assert {*found} == {f"{REPOSITORY}:Q8_0", f"{REPOSITORY}:Q4_0", drafter}
    assert found[drafter]["kind"] == "drafter" and 0 < found[drafter]["memory"] < 1e6
    whole = found[f"{REPOSITORY}:Q8_0"]
    assert whole["bytes"] == len(hub.repositories[REPOSITORY]["tiny-Q8_0.gguf"])
    assert whole["beside"] == ["drafter", "embedder"] and whole["kept_by"] == "hub"
    shown = run("show", f"{REPOSITORY}:Q8_0", capsys=capsys)
    assert "gemma4_text: 6 layers, 256 tokens, 512 positions" in shown
    assert "8 bits; exact" in shown and "mtp-tiny-Q8_0.gguf" in shown and "mmproj-tiny.gguf" in shown
    assert "nobody is there to be asked" in run("remove", f"{REPOSITORY}:Q4_0", capsys=capsys, code=2)
    assert {*listed(capsys)} == {*found}
    assert "deleted 0.00 GB" in run("remove", f"{REPOSITORY}:Q4_0", "--yes", capsys=capsys)
    assert {*listed(capsys)} == {f"{REPOSITORY}:Q8_0", drafter}
    run("remove", REPOSITORY, "--yes", capsys=capsys)
    assert listed(capsys) == {}
    left = [path for path in (tmp_path / "hub").rglob("*") if path.is_file() and path.stat().st_size > 1000]
    assert not left, "the weights themselves are still there"


def test_remove_takes_the_file_of_that_name_and_no_other(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = hub.repositories[REPOSITORY]
    files["A/tiny-Q4_0.gguf"] = files["tiny-Q8_0.gguf"]
    for name in ("A/tiny-Q4_0.gguf", "tiny-Q4_0.gguf"):
        run("pull", f"{REPOSITORY}/{name}", capsys=capsys)
    run("remove", f"{REPOSITORY}/tiny-Q4_0.gguf", "--yes", capsys=capsys)
    left = [path for path in (tmp_path / "hub").rglob("*.gguf") if path.exists()]
    assert [path.parent.name for path in left if path.name == "tiny-Q4_0.gguf"] == ["A"]


def test_the_last_model_of_a_repository_takes_its_drafter_along(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run("pull", f"{REPOSITORY}:Q8_0", capsys=capsys)
    run("pull", f"{REPOSITORY}:Q4_0", capsys=capsys)
    run("remove", f"{REPOSITORY}:Q8_0", "--yes", capsys=capsys)
    assert listed(capsys)[f"{REPOSITORY}:Q4_0"]["beside"] == ["drafter", "embedder"]
    run("remove", f"{REPOSITORY}:Q4_0", "--yes", capsys=capsys)
    assert not [path for path in (tmp_path / "hub").rglob("*.gguf")]


def test_memory_is_that_of_plan(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("pull", f"{REPOSITORY}:Q8_0", capsys=capsys)
    told = listed(capsys)[f"{REPOSITORY}:Q8_0"]
    import torch

    asked = Asked(told["path"], "auto", None, torch.float32, 512, None, "float32")
    expected = plan_memory(asked, program_bytes()).needs(512).total
    assert told["memory"] == pytest.approx(expected, rel=0.02)


def test_show_and_models_count_the_same_program(
    hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    name = f"{REPOSITORY}:Q8_0"
    run("pull", name, capsys=capsys)
    happened, honest = list[str](), models.open_checkpoint

    def program() -> int:
        happened.append("program")
        return 400_000_000

    def header(path: Path) -> Any:
        happened.append("header")
        return honest(path)

    monkeypatch.setattr(models, "program_bytes", program)
    monkeypatch.setattr(models, "open_checkpoint", header)
    assert main(["show", name, "--json", "-"]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert happened == ["program", "header"], "a vocabulary that was read would count as Python's memory"
    assert shown["needs"]["total"] == listed(capsys)[name]["memory"]


def test_other_programs_models_are_listed_and_left_alone(
    hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    home, made = tmp_path / "home", tmp_path / "made"
    name = "registry.ollama.ai/library/gemma4/tiny"
    blob = put_in_store(home / ".ollama" / "models", name, {MODEL: made / "a"})[MODEL]
    studio = home / ".lmstudio" / "models" / "me" / "tiny" / "tiny-Q4_0.gguf"
    studio.parent.mkdir(parents=True)
    studio.write_bytes((made / "b").read_bytes())
    write_kind(studio.with_name("odd.gguf"), "rwkv7")
    found = listed(capsys)
    assert found["ollama:gemma4:tiny"]["path"] == str(blob) and found["ollama:gemma4:tiny"]["memory"] > 0
    assert found["tiny-Q4_0.gguf"]["kept_by"] == "LM Studio"
    assert "'rwkv7' is not supported" in found["odd.gguf"]["reason"] and "memory" not in found["odd.gguf"]
    assert "not supported" in run("models", capsys=capsys)
    assert "`ollama rm gemma4:tiny`" in run("remove", "ollama:gemma4:tiny", "--yes", capsys=capsys, code=2)
    assert "which only you delete" in run("remove", str(studio), "--yes", capsys=capsys, code=2)
    assert "is in no cache here" in run("remove", "tiny-Q4_0.gguf", "--yes", capsys=capsys, code=2)
    assert blob.is_file() and studio.is_file()


def test_folders_of_floats_are_counted_in_four_bits(
    tmp_path: Path, hub: Hub, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_model("gemma3").save_pretrained(tmp_path / "floats")
    shown = run("show", str(tmp_path / "floats"), capsys=capsys)
    assert "gemma3_text: 3 layers" in shown and "with --quantize int4" in shown


@pytest.mark.parametrize("command", ["show", "pull"])
def test_names_that_are_nothing(command: str, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert "Did you mean gemma-3-270m?" in run(command, "gemma-3-270n", capsys=capsys, code=2)
    assert "there are Q4_0, Q8_0" in run(command, f"{REPOSITORY}:Q3_K_M", capsys=capsys, code=2)
    assert "no .gguf" not in run(command, "no/such", capsys=capsys, code=2)
