"""What is planned is what is taken: caches and weights to the byte, and the context that a budget allows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import run
import specdec
from drafter import load_drafter
from eval.synthetic.full_size import full_size_config
from specdec.hf import decoder_of
from specdec.memory.plan import (
    KV_DTYPES,
    LARGEST_PICTURE,
    Planner,
    cache_bytes,
    parse_bytes,
    picture_bytes,
    weight_bytes,
)
from specdec.model.decoder import Decoder
from specdec.model.families import decoder_spec
from specdec.model.names import expected_tensors
from tests.support.media.prompts import media_prompt, picture
from tests.support.media.tiny_media import tiny_media_model
from tests.support.tiny import FAMILIES, prompt, tiny_model
from tests.support.tiny_assistant import save_assistant
from tests.support.tiny_decoder import of


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_the_cache_takes_what_was_planned(family: str, kv_dtype: str) -> None:
    made, kept = decoder_of(tiny_model(family)), KV_DTYPES[kv_dtype]
    decoder = Decoder(made.spec, made.embedding, made.layers, made.norm, made.head, made.per_layer, kept)
    cache = decoder.new_cache()
    for part in prompt(400, seed=1)[0].split(cache.max_rows):
        decoder.forward(part, cache)
        cache.commit(len(part))
        assert cache.nbytes == cache_bytes(decoder.spec, cache.length, kept)


@pytest.mark.parametrize("kept", [torch.float32, torch.int8])
def test_a_picture_takes_no_more_than_what_was_planned(kept: torch.dtype) -> None:
    decoder = of("gemma4_unified", kept, "int8")
    cache, rows = decoder.new_cache(), 300
    given = media_prompt(20, picture(rows), 5)
    before = cache.nbytes
    ids = given.ids[:321]
    decoder.forward(ids, cache, media=given.media)
    grown = cache_bytes(decoder.spec, len(ids), kept) - before
    rings = cache.nbytes - before - grown
    hidden = decoder.spec.hidden_size
    assert picture_bytes(decoder.spec, len(ids), kept, torch.float32) >= rings + 3 * len(ids) * hidden * 4
    cache.commit(len(ids))
    cache.settle()
    assert cache.nbytes == cache_bytes(decoder.spec, len(ids), kept)
    big = decoder_spec(full_size_config("gemma-4-12b"))
    assert 0.2e9 < picture_bytes(big, LARGEST_PICTURE, torch.int8, torch.float32) < 0.3e9
    seeing = Planner(big, 0, picture=LARGEST_PICTURE).needs(8192, "int8")
    assert seeing.media > picture_bytes(big, LARGEST_PICTURE, torch.int8, torch.float32) + 4 * 1120 * 6912
    assert Planner(big, 0).needs(8192, "int8").media == 0


def test_gemma_4_keeps_half_of_its_full_layers_and_an_eighth_of_a_gigabyte_in_rings() -> None:
    spec = decoder_spec(full_size_config("gemma-4-12b"))
    rings = cache_bytes(spec, 1, torch.bfloat16) - 256 * 8 * 512 * 2
    assert rings == 40 * (1023 + 64) * 8 * 256 * 2 * 2
    per_token = (cache_bytes(spec, 32768, torch.bfloat16) - rings) / 32768
    both = 8 * 2 * 512 * 2  # what transformers keeps of its full layers in bfloat16
    assert per_token / both == 0.5
    int8 = cache_bytes(spec, 32768, torch.int8) - 40 * (1023 + 64) * 8 * 2 * (256 + 4)
    assert int8 / 32768 / both < 0.26


def test_the_longest_context_fits_and_one_more_does_not() -> None:
    planner = Planner(decoder_spec(full_size_config("gemma-4-12b")), 7_900_000_000)
    for kv_dtype in KV_DTYPES:
        longest = planner.longest(9_400_000_000, kv_dtype)
        assert planner.needs(longest, kv_dtype).total <= 9_400_000_000
        assert longest == planner.spec.max_positions or planner.needs(longest + 1, kv_dtype).total > 9_400_000_000
    assert planner.longest(7_000_000_000) == 0
    with pytest.raises(ValueError, match="there is no cache of 'int3'"):
        planner.needs(1, "int3")


@pytest.fixture(autouse=True)
def usual_program(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Python takes in a new process: this one has the models of other tests, too."""
    monkeypatch.setattr("eval.plan.program_bytes", lambda device: 400_000_000)


@pytest.mark.parametrize("storage", [None, "int4", "int8"])
def test_weights_and_drafter_of_a_folder(storage: str | None, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    tiny_model("gemma4_unified").save_pretrained(tmp_path / "model")
    head = save_assistant(tmp_path / "head", "gemma4_unified")
    options = [] if storage is None else ["--quantize", storage]
    arguments = ["--model", str(tmp_path / "model"), "--drafter", str(head), "--context", "300", "--budget", "2GB"]
    assert run.main(["plan", *arguments, *options, "--json", "-"]) == 0
    planned = json.loads(capsys.readouterr().out)
    model = specdec.load(tmp_path / "model", drafter=None, quantize=storage, device="cpu")
    assert planned["weights"] == model.decoder.nbytes
    drafter = load_drafter(head)
    drafter.bind(model.decoder)
    assert drafter._assistant is not None
    assert abs(planned["drafter"] - drafter._assistant.nbytes) < 0.05 * planned["drafter"]
    assert planned["fits"] and set(planned["longest_context"].values()) == {512}


def test_what_does_not_fit_is_an_exit_code(capsys: pytest.CaptureFixture) -> None:
    assert run.main(["plan", "--model", "gemma-4-12b", "--context", "32768", "--budget", "8GB"]) == 1
    out = capsys.readouterr().out
    assert "does not fit into the budget, 8.00 GB" in out and "whatever the cache keeps: none" in out
    assert run.main(["plan", "--model", "gemma-4-12b", "--context", "32768", "--budget", "16GB"]) == 0
    assert "all that the model has" in " ".join(capsys.readouterr().out.split())
    assert run.main(["plan", "--model", "gemma-4-12b", "--context", "999999"]) == 2
    assert "has a context of 262,144" in capsys.readouterr().err


def test_a_budget_is_kept_at_load_and_at_prefill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_model("gemma4_unified").save_pretrained(tmp_path)
    monkeypatch.setattr(sys.modules["specdec.load"], "program_bytes", lambda device: 0)
    whole = specdec.load(tmp_path, device="cpu").decoder
    planner = Planner(whole.spec, whole.nbytes, 0, 0)
    budget = planner.needs(100).total
    monkeypatch.setattr("specdec.memory.plan.LEAST", 64)
    model = specdec.load(tmp_path, drafter="suffix", device="cpu", memory_budget=budget)
    room = model.decoder.room
    assert room is not None and model.decoder.context == room.positions == planner.longest(budget) >= 100
    assert room.cache >= cache_bytes(whole.spec, room.positions, torch.float32)
    with pytest.raises(ValueError, match="memory budget leaves room for; shorten it"):
        model.generate(prompt(room.positions)[:1], max_new_tokens=5)
    short, long = prompt(20)[:1], prompt(room.positions - 10)[:1]
    unlimited = specdec.load(tmp_path, drafter="suffix", device="cpu")
    settings = {"do_sample": False, "eos_token_id": None}
    assert torch.equal(
        model.generate(short, max_new_tokens=30, **settings), unlimited.generate(short, max_new_tokens=30, **settings)
    )
    with pytest.warns(UserWarning, match="memory budget"):
        assert model.generate(long, max_new_tokens=30, **settings).shape[1] == room.positions
    several = prompt(20, seed=1).expand(6, -1)
    assert torch.equal(
        model.generate(several, max_new_tokens=9, **settings), unlimited.generate(several, max_new_tokens=9, **settings)
    )
    for small in (planner.needs(30).total, "1KB"):
        with pytest.raises(ValueError, match="is too small: weights"):
            specdec.load(tmp_path, device="cpu", memory_budget=small)
    with pytest.raises(ValueError, match="not an amount of memory"):
        specdec.load(tmp_path, device="cpu", memory_budget="lots")


def test_amounts_of_memory() -> None:
    assert parse_bytes("16GB") == parse_bytes("16 g") == 16 * 10**9 and parse_bytes("1.5MB") == 1_500_000
    assert parse_bytes("16GiB") == parse_bytes("16 gib") == 16 * 2**30 and parse_bytes("1Ki") == 1024
    assert parse_bytes(12) == 12 and parse_bytes("12B") == 12 and parse_bytes("9000000000") == 9 * 10**9
    with pytest.raises(ValueError, match="'16' is 16 bytes; write it with a unit, like '16GB'"):
        parse_bytes("16")
    with pytest.raises(ValueError, match=r"'16\.5' is 16\.5 bytes; write it with a unit, like '16\.5GB'"):
        parse_bytes("16.5")
    for word in ("-3GB", "50%", "iB", "GiB", "1.G"):
        with pytest.raises(ValueError, match="not an amount of memory"):
            parse_bytes(word)


def test_a_picture_and_a_video_of_12b_take_what_their_pixels_and_rows_take() -> None:
    spec = decoder_spec(full_size_config("gemma-4-12b"))
    text, picture, video = (
        Planner(spec, 7_900_000_000, picture=tokens, frames=frames).needs(32768, "int8")
        for tokens, frames in ((0, 0), (1120, 0), (0, 300))
    )
    assert text.media == 0 and text.total == picture.total - picture.media
    rings = 40 * (1120 - 64) * 8 * 2 * (256 + 4)
    pixels = 1120 * 6912 * 4
    assert rings + pixels < picture.media < rings + pixels + 250_000_000
    assert 300 * 70 * 6912 * 4 < video.media < 300 * 70 * 6912 * 4 + 40_000_000
    longest = Planner(spec, 7_900_000_000, picture=1120).longest(9_500_000_000, "int8")
    assert 0 < longest < Planner(spec, 7_900_000_000).longest(9_500_000_000, "int8")


def test_the_plan_command_counts_media(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["plan", "--model", "gemma-4-tiny", "--quantize", "int8", "--budget", "2GB"]
    assert run.main([*words, "--picture", "280", "--frames", "4", "--json", "-"]) == 0
    planned = json.loads(capsys.readouterr().out)
    assert planned["media"] > (280 + 4 * 70) * 6912 * 4
    assert planned["total"] == sum(
        planned[part] for part in ("weights", "drafter", "cache", "workspace", "program", "media")
    )
    assert run.main([*words, "--picture", "280"]) == 0
    assert "pictures and video" in capsys.readouterr().out
    assert run.main(words) == 0
    assert "pictures and video" not in capsys.readouterr().out


def test_a_budget_leaves_room_for_a_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_media_model().save_pretrained(tmp_path)
    monkeypatch.setattr(sys.modules["specdec.load"], "program_bytes", lambda device: 0)
    monkeypatch.setattr("specdec.memory.plan.LEAST", 64)
    whole = specdec.load(tmp_path, device="cpu").decoder
    planner = Planner(whole.spec, whole.nbytes, 0, 0, picture=LARGEST_PICTURE)
    budget = planner.needs(100).total
    room = specdec.load(tmp_path, drafter="suffix", device="cpu", memory_budget=budget).decoder.room
    assert room is not None and room.positions == planner.longest(budget) < Planner(whole.spec, whole.nbytes).longest(
        budget
    )
    with pytest.raises(ValueError, match=r"workspace [\d.]+, a picture [\d.]+ and Python"):
        specdec.load(tmp_path, device="cpu", memory_budget="1KB")


def test_a_model_of_text_has_no_plan_for_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_model("llama").save_pretrained(tmp_path)
    assert run.main(["plan", "--model", str(tmp_path), "--picture", "280", "--context", "100"]) == 2
    assert "takes no pictures" in capsys.readouterr().err


def test_the_plan_command_counts_a_model_that_drafts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for family in ("gemma3", "llama"):
        tiny_model(family).save_pretrained(tmp_path / family)
    out = tmp_path / "plan.json"
    asked = ["plan", "--model", str(tmp_path / "gemma3"), "--context", "300", "--json", str(out)]
    assert run.main([*asked, "--drafter", str(tmp_path / "llama")]) == 0
    assert "the drafter's cache" in capsys.readouterr().out
    found = json.loads(out.read_text())
    spec = decoder_of(tiny_model("llama")).spec
    assert found["draft_cache"] == cache_bytes(spec, 300, torch.float32)
    assert found["drafter"] == decoder_of(tiny_model("llama")).nbytes
    assert run.main([*asked, "--drafter", "suffix"]) == 0
    assert "the drafter's cache" not in capsys.readouterr().out
    assert json.loads(out.read_text())["draft_cache"] == 0


def test_experts_take_what_a_budget_leaves_and_never_less_than_half_of_it() -> None:
    spec = decoder_spec(full_size_config("gemma-4-26b-a4b"))
    shapes = expected_tensors(spec)
    experts = weight_bytes({name: shape for name, shape in shapes.items() if "experts" in name}, "int4", torch.float32)
    planner = Planner(spec, weight_bytes(shapes, "int4", torch.float32), experts=experts)
    assert 14e9 < experts < 14.3e9  # 5 bits each
    whole = planner.needs(4096, "int8")
    assert whole.experts == experts and planner.needs(4096, "int8", 20 * 10**9) == whole
    assert planner.room(20 * 10**9, "int8").experts is None
    for kv_dtype in ("int8", "float32"):
        found, room = planner.needs(4096, kv_dtype, 12 * 10**9), planner.room(12 * 10**9, kv_dtype)
        assert room.experts == found.experts < experts
        rest = planner.needs(512, kv_dtype).total - experts
        assert found.experts >= (12 * 10**9 - rest) // 2
        at_its_longest = planner.needs(room.positions, kv_dtype, 12 * 10**9)
        assert at_its_longest.total <= 12 * 10**9 < at_its_longest.total + 3 * room.cache
    with pytest.raises(ValueError, match=r"too small: weights 1\.\d+, the least share of its experts 0\.9\d, drafter"):
        planner.room(2 * 10**9, "int8")
