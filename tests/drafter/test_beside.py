"""`drafter="auto"`: the drafter that lies beside the model, where it fits; by the API and on the command line."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
from gguf import GGMLQuantizationType as Type

import specdec
from drafter.files.find import find_drafter, heads_in
from eval.synthetic.command import write_model as write_synthetic
from eval.synthetic.full_size import full_size_config, full_size_drafter
from run import main
from specdec.drafting.registry import drafter_bytes, drafter_identity
from tests.support.stores.gguf_kinds import MODEL, put_in_store
from tests.support.tiny import WINDOW, prompt
from tests.support.tiny_assistant import save_assistant, write_gguf
from tests.support.tiny_gguf import write_model


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = tmp_path / "gemma"
    made.mkdir()
    write_model(made / "gemma-Q8_0.gguf", "gemma4", Type.Q8_0)
    save_assistant(tmp_path / "assistant", "gemma4")
    write_gguf(made / "mtp-gemma.gguf", tmp_path / "assistant", "gemma4", Type.Q8_0)
    return made


def texts(model: specdec.SpecdecForCausalLM) -> bool:
    """Whether drafts of the trained head leave the text as it is, past the window."""
    settings = {"max_new_tokens": 4 * WINDOW, "do_sample": False, "reuse": False}
    plain = model.generate(prompt(9), speculation=False, **settings)
    drafted = model.generate(prompt(9), draft_length=2, **settings)
    return torch.equal(plain, drafted) and model.last_stats.draft_sources["mtp"][0] > 10


def test_the_drafter_beside_the_model_drafts(folder: Path) -> None:
    model = specdec.load(folder, device="cpu")
    assert model.drafter.name == "suffix+mtp" and texts(model)
    assert model.decoder.path == folder / "gemma-Q8_0.gguf"
    assert find_drafter(folder) == folder / "mtp-gemma.gguf"
    beside = drafter_identity("auto", model.decoder)
    assert "mtp-gemma.gguf" in beside
    assert drafter_bytes("auto", torch.float32, True, model.decoder.path) >= drafter_bytes("auto", torch.float32, True)
    named = specdec.load(folder / "gemma-Q8_0.gguf", drafter=folder, device="cpu")  # the drafter in a model's folder
    assert named.drafter.name == "mtp"
    assert specdec.load(folder, drafter="suffix", device="cpu").drafter.name == "suffix"


def test_of_several_the_one_that_fits(folder: Path, tmp_path: Path) -> None:
    save_assistant(tmp_path / "other", "gemma4-e2b")
    write_gguf(folder / "mtp-another-Q8_0.gguf", tmp_path / "other", "gemma4-e2b", Type.Q8_0)
    with pytest.warns(UserWarning, match=r"cannot be used: .*mtp-another-Q8_0\.gguf: .*another backbone"):
        model = specdec.load(folder, device="cpu")
    assert model.drafter.name == "suffix+mtp"
    (folder / "mtp-gemma.gguf").unlink()
    with pytest.warns(UserWarning, match="another backbone"):
        model = specdec.load(folder, device="cpu")
    assert model.drafter.name == "suffix"
    for word in ("auto", "suffix"):
        assert drafter_identity(word, model.decoder)


def test_a_damaged_drafter_is_named(folder: Path) -> None:
    """What it is cannot be known: the folder is refused, and the model's own file goes without a drafter."""
    (folder / "mtp-gemma.gguf").write_bytes(b"GGUF")  # a download that broke off
    with pytest.raises(ValueError, match=r"mtp-gemma\.gguf: the download is incomplete: 4 bytes.*fetch it again"):
        specdec.load(folder, device="cpu")
    with pytest.warns(UserWarning, match=r"cannot be used: .*mtp-gemma\.gguf: the download is incomplete: 4 bytes"):
        model = specdec.load(folder / "gemma-Q8_0.gguf", device="cpu")
    assert model.drafter.name == "suffix"


def test_without_a_drafter_nothing_is_said(folder: Path) -> None:
    (folder / "mtp-gemma.gguf").unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert specdec.load(folder, device="cpu").drafter.name == "suffix"


def test_a_folder_of_safetensors_has_it_in_a_folder(tmp_path: Path) -> None:
    made = tmp_path / "model"
    write_synthetic(full_size_config("gemma-4-tiny"), full_size_drafter("gemma-4-tiny"), made)
    assert heads_in(made) == [made / "assistant"]
    assert specdec.load(made, device="cpu").drafter.name == "suffix+mtp"


def test_ollamas_model_does_not_take_the_files_of_others(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = folder.parent / "store"
    monkeypatch.setenv("OLLAMA_MODELS", str(store))
    put_in_store(store, "registry.ollama.ai/library/other/latest", {MODEL: folder / "mtp-gemma.gguf"})
    put_in_store(store, "registry.ollama.ai/library/gemma4/12b", {MODEL: folder / "gemma-Q8_0.gguf"})
    assert specdec.load("ollama:gemma4:12b", device="cpu").drafter.name == "suffix"
    draft = {MODEL: folder / "gemma-Q8_0.gguf", "application/vnd.ollama.image.draft": folder / "mtp-gemma.gguf"}
    put_in_store(store, "registry.ollama.ai/library/gemma4/12b", draft)
    assert specdec.load("ollama:gemma4:12b", device="cpu").drafter.name == "suffix+mtp"


def test_on_the_command_line_all_three_are_found(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made, record = tmp_path / "model", tmp_path / "out.json"
    write_synthetic(full_size_config("gemma-4-tiny"), full_size_drafter("gemma-4-tiny"), made, gguf="q8_0")
    assert main(["export", str(made / "assistant"), "--model", str(made), "--out", str(made / "mtp-tiny.gguf")]) == 0
    words = ["generate", "Hello", "--model", str(made), "--draft-length", "2", "--max-new-tokens", "20"]
    assert main([*words, "--threads", "1", "--json", str(record)]) == 0
    told = json.loads(record.read_text())
    assert told["figures"]["draft_sources"]["mtp"][0] > 0
    assert specdec.load(made, device="cpu").decoder.spec.media is not None, "the embedder was not found"
