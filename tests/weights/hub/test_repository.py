"""Models of the hub, from one on this machine: which files are fetched, checked, gone on with; what goes wrong."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

import specdec
from eval.plan import Asked, plan_memory
from specdec import load_processor
from specdec.model.adapters.build import check_adapters
from specdec.weights.hub.folder import companions
from specdec.weights.hub.names import HubName
from specdec.weights.hub.paths import FetchError, adapter_path, model_path, settings_path
from specdec.weights.hub.repository import cached_repositories
from specdec.weights.tokenizer import load_tokenizer
from tests.support.adapters.tiny_adapter import make_peft
from tests.support.processes.pseudo_terminal import PseudoTerminal
from tests.support.stores.hub import COMMIT, Hub
from tests.support.stores.models import SAFE, TWO, UNSLOTH, fetched
from tests.support.tiny import prompt, tiny_model
from tests.support.tiny_gguf import gemma4_tokens


@pytest.mark.parametrize("tag", ["Q4_0", "q4_0"])
def test_a_tag_brings_the_model_its_drafter_and_its_embedder(hub: Hub, tag: str) -> None:
    path = model_path(f"{UNSLOTH}:{tag}")
    assert path.name == "gemma-4-12b-it-Q4_0.gguf"
    assert path.read_bytes() == hub.repositories[UNSLOTH][path.name]
    assert fetched(hub) == {path.name, "mmproj-BF16.gguf", "MTP/mtp-gemma-4-12b-it-Q8_0.gguf"}
    beside = companions(path)
    assert [file.name for file in beside.drafters] == ["mtp-gemma-4-12b-it-Q8_0.gguf"]
    assert [file.name for file in beside.embedders] == ["mmproj-BF16.gguf"]
    before = len(hub.asked)
    assert model_path(f"{UNSLOTH}:{tag}") == path
    assert not any(asked.startswith("GET") and "/resolve/" in asked for asked in hub.asked[before:])  # it is here


def test_a_name_of_a_file(hub: Hub) -> None:
    assert model_path(f"{UNSLOTH}/mmproj-F32.gguf").name == "mmproj-F32.gguf"
    assert fetched(hub) == {"mmproj-F32.gguf"}
    part = model_path(f"{UNSLOTH}/BF16/gemma-4-12b-it-BF16-00002-of-00002.gguf")
    assert part.name == "gemma-4-12b-it-BF16-00001-of-00002.gguf"
    assert {file.name for file in part.parent.iterdir()} == {
        f"gemma-4-12b-it-BF16-0000{i}-of-00002.gguf" for i in (1, 2)
    }


def test_without_a_tag_one_of_four_bits(hub: Hub) -> None:
    assert model_path(UNSLOTH).name == "gemma-4-12b-it-Q4_0.gguf"
    assert model_path(f"{UNSLOTH}:UD-Q4_K_XL").name == "gemma-4-12b-it-UD-Q4_K_XL.gguf"
    assert model_path(f"{UNSLOTH}:Q4_K_XL").name == "gemma-4-12b-it-UD-Q4_K_XL.gguf"
    beside = companions(model_path(f"{UNSLOTH}:BF16"))  # in a folder of its own
    assert [file.name for file in beside.drafters] == ["mtp-gemma-4-12b-it-Q8_0.gguf"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"{UNSLOTH}:Q5_K_M", r"no \.gguf file of 'Q5_K_M'; there are BF16, Q4_0, UD-Q4_K_XL"),
        (f"{UNSLOTH}/other.gguf", r"there is no other\.gguf; there are BF16/gemma"),
        (TWO, r"me/two: 2 \.gguf files: a\.gguf, b\.gguf; name one of them"),
        ("no/such", "check the spelling"),
        (f"{SAFE}:Q4_0", r"neither safetensors nor \.gguf files"),
    ],
)
def test_names_that_are_none_of_its_files(hub: Hub, name: str, message: str) -> None:
    with pytest.raises(FetchError, match=message):
        model_path(name)
    assert not fetched(hub)


def test_adapters(hub: Hub, tmp_path: Path) -> None:
    """A PEFT folder without what lies beside it, a file by its name and by its type; a path that is here goes first."""
    peft = {
        "adapter_config.json": b"{}",
        "adapter_model.safetensors": b"weights",
        "README.md": b"",
        "optimizer.pt": b"",
    }
    hub.repositories["me/lora"] = peft
    hub.repositories["me/lora-GGUF"] = {"lora-Q8_0.gguf": b"GGUF", "lora-F16.gguf": b"GGUF!"}
    hub.repositories["me/pickled"] = {"adapter_config.json": b"{}", "adapter_model.bin": b"\x80"}
    folder = adapter_path("me/lora")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == {name: peft[name] for name in [*peft][:2]}
    assert fetched(hub) == {"adapter_config.json", "adapter_model.safetensors"}
    assert adapter_path("me/lora") == folder
    assert adapter_path("me/lora-GGUF/lora-F16.gguf").read_bytes() == b"GGUF!"
    assert adapter_path("me/lora-GGUF:q8_0").name == "lora-Q8_0.gguf"
    with pytest.raises(FetchError, match=r"me/pickled: no adapter of the hub .* neither adapter_config\.json with"):
        adapter_path("me/pickled")
    with pytest.raises(FetchError, match=r"no/such: neither a folder here nor a model of the hub [^:]*spelling\Z"):
        adapter_path("no/such")
    (tmp_path / "me" / "lora").mkdir(parents=True)
    assert adapter_path("me/lora") == Path("me/lora") and adapter_path(tmp_path / "nowhere") == tmp_path / "nowhere"


def test_an_adapter_of_the_hub_is_loaded_by_its_id(hub: Hub, tmp_path: Path) -> None:
    made = make_peft(tmp_path / "made", "gemma3")
    hub.repositories["me/terse"] = {file.name: file.read_bytes() for file in made.iterdir()}
    folder = tmp_path / "model"
    tiny_model("gemma3").save_pretrained(folder)
    model = specdec.load(folder, drafter=None, device="cpu", adapter={"x": "me/terse"})
    model.load_adapter("me/terse")
    here = specdec.load(folder, drafter=None, device="cpu", adapter=made)
    names = [*model.decoder.adapters.names]
    assert names == ["x", "terse"]
    ids = prompt(12)
    logits = here(ids).logits
    assert torch.equal(model(ids).logits, logits)
    model.set_adapter("none")
    assert not torch.equal(model(ids).logits, logits)
    asked = Asked(str(folder), "none", None, torch.float32, 64, None, "none", adapters=("me/terse",))
    planned = plan_memory(asked, 0)
    assert planned.adapters == check_adapters({"x": made}, here.decoder.spec) > 0


def test_without_the_hub_what_is_here_is_found(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model_path(f"{UNSLOTH}:Q4_0")
    safe = model_path(SAFE)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert model_path(f"{UNSLOTH}:Q4_0") == model_path(UNSLOTH) == path
    assert model_path(SAFE) == safe
    with pytest.raises(FetchError, match=r"no \.gguf file of 'UD-Q4_K_XL'; there are Q4_0"):
        model_path(f"{UNSLOTH}:UD-Q4_K_XL")
    with pytest.raises(FetchError, match=r"nobody/nothing: .*HF_HUB_OFFLINE is set.*smollm2-135m-instruct"):
        model_path("nobody/nothing")
    names = {name: [file.name for file in files] for name, files in cached_repositories()}
    assert {*names} == {UNSLOTH, SAFE} and "gemma-4-12b-it-Q4_0.gguf" in names[UNSLOTH]


def test_the_tokenizer_of_a_repository_of_gguf_files(hub: Hub, tmp_path: Path) -> None:
    model = gemma4_tokens(tmp_path / "m").read_bytes()
    hub.repositories["me/tokens"] = {"m-Q4_0.gguf": model}
    for name in ("me/tokens", "me/tokens:Q4_0", "me/tokens/m-Q4_0.gguf"):
        assert load_tokenizer(name)("abc").input_ids == load_tokenizer(tmp_path / "m")("abc").input_ids
    hub.sent.clear()
    with pytest.raises(ValueError, match=r"google/gemma-4-12B-it: its tokenizer could not be loaded"):
        load_tokenizer(SAFE)  # which is damaged
    assert not any(name.endswith(".safetensors") for name in fetched(hub)), "24 GB for nothing"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        # Made without __init__, which wants a response of the transport, and that differs between versions.
        (GatedRepoError.__new__(GatedRepoError), "accept the model's terms"),
        (RepositoryNotFoundError.__new__(RepositoryNotFoundError), "check the spelling"),
        (ConnectionError("no route"), r"could not be reached: no route\. Name a local folder"),
        (ConnectionError("try later."), r"could not be reached: try later\. Name a local folder"),
    ],
)
def test_errors_of_the_hub_say_what_to_do(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", fail)
    for load in (model_path, settings_path, load_tokenizer, load_processor):
        with pytest.raises(FetchError, match=f"owner/name: .*{message}"):
            load("owner/name")


def test_settings_come_without_weights(hub: Hub) -> None:
    folder = settings_path(SAFE)
    assert {file.name for file in folder.iterdir()} == {"config.json", "tokenizer.json", "merges.txt"}
    assert settings_path(f"{UNSLOTH}:Q4_0").name == "gemma-4-12b-it-Q4_0.gguf"  # which has them in itself
    with pytest.raises(ValueError, match=r"google/gemma-4-12B-it"):
        load_processor(SAFE)  # its config names no model
    assert not any(name.endswith(".safetensors") for name in fetched(hub))


def test_a_hub_elsewhere_with_its_progress(hub: Hub, tmp_path: Path) -> None:
    code = f"from specdec.weights.hub.paths import model_path; print('path', model_path({UNSLOTH + ':Q4_0'!r}))"
    environment = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hf")}
    with PseudoTerminal([sys.executable, "-c", code], environment, columns=250) as terminal:
        shown = terminal.until(f"snapshots/{COMMIT}/gemma-4-12b-it-Q4_0.gguf")
    assert "100%" in shown
    (path,) = (tmp_path / "hf").rglob("gemma-4-12b-it-Q4_0.gguf")
    assert path.read_bytes() == hub.repositories[UNSLOTH][path.name]


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("owner/name", HubName("owner/name")),
        ("owner/name:Q4_K_M", HubName("owner/name", "Q4_K_M")),
        ("hf.co/owner/name:Q4_0", HubName("owner/name", "Q4_0")),
        ("owner/name/a/b-Q4_0.gguf", HubName("owner/name", None, "a/b-Q4_0.gguf")),
        ("https://huggingface.co/owner/name/resolve/main/b.gguf", HubName("owner/name", None, "b.gguf")),
        ("owner/name.gguf", None),
        ("owner/name/other", None),
        ("owner/../x.gguf", None),
        ("./owner/name", None),
        ("name", None),
    ],
)
def test_names_of_the_hub(name: str, found: HubName | None) -> None:
    assert HubName.of(name) == found
