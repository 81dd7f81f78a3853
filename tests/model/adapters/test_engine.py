"""Texts with adapters in the engine: each is the text that it is alone, whoever is beside it and however it is drafted;
caches are never shared across adapters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from specdec.cache import Conversations
from specdec.cache.conversation_file import load_conversation, save_conversation
from specdec.drafting.protocol import FixedLength, NoDraft
from specdec.drafting.suffix import SuffixDrafter
from specdec.engine.engine import Engine
from specdec.engine.sampling import Sampler
from specdec.engine.sequence import Request
from specdec.model.adapters.build import add_adapters
from specdec.model.decoder import Decoder
from tests.support.adapters.tiny_adapter import make_peft, modules, parts
from tests.support.decoding import alone, decode, never, to_end
from tests.support.scripted import SCRIPTS, ScriptedDrafter
from tests.support.tiny import VOCAB, WINDOW, prompt
from tests.support.tiny_decoder import of

NEW = 3 * WINDOW
PLENTY = 1 << 28
NAMES = ("one", "none", "two", "one")


def adapted(family: str, folder: Path, storage: str | None = "int4", kept: torch.dtype | None = None) -> Decoder:
    decoder = of(family, kept, storage)
    some = {name: shape for name, shape in modules(family).items() if "mlp" in name}
    two = make_peft(folder / "two", family, low_rank=parts(some, 2, rank=6), r=6)
    add_adapters(decoder, {"one": make_peft(folder / "one", family, seed=1), "two": two})
    return decoder


def asking(ids: Tensor, adapter: str | None, seed: int | None = None) -> Request:
    return Request(ids, len(ids) + NEW, Sampler(seed=seed), never, adapter=adapter)


@pytest.mark.parametrize("seed", [None, 5], ids=["greedy", "sampled"])
@pytest.mark.parametrize(("storage", "kept"), [("int4", torch.int8), ("int4", None), (None, None)])
@pytest.mark.parametrize("family", ["gemma3", "gemma4", "gemma4-e2b"])
def test_drafted_beside_others_a_text_is_the_plain_one_alone(
    family: str, storage: str | None, kept: torch.dtype | None, seed: int | None, tmp_path: Path
) -> None:
    decoder = adapted(family, tmp_path, storage, kept)
    ids = [prompt(20, seed=3)[0]] * 3 + [prompt(37, seed=4)[0]]
    expected = [alone(decoder, asking(one, name, seed)) for one, name in zip(ids, NAMES, strict=True)]
    assert expected[0] != expected[1] != expected[2] != expected[0], "an adapter that does nothing shows nothing"
    together = [asking(one, name, seed) for one, name in zip(ids, NAMES, strict=True)]
    ended = decode(decoder, SuffixDrafter(), FixedLength(5), together, max_batch=4)
    found = {number: row.tolist() for number, row, _ in ended}
    assert [found[i] for i in range(len(NAMES))] == expected
    for right in ("half right", "in turn"):
        drafter = ScriptedDrafter(expected[0], SCRIPTS[right], VOCAB)
        ((_, row, cache),) = decode(decoder, drafter, FixedLength(6), [asking(ids[0], "one", seed)])
        assert row.tolist() == expected[0] and cache.adapter == "one"


def test_the_first_adapter_is_the_default_and_others_are_named(tmp_path: Path) -> None:
    decoder, ids = adapted("gemma3", tmp_path), prompt(20)[0]
    assert alone(decoder, asking(ids, None)) == alone(decoder, asking(ids, "one"))
    with pytest.raises(ValueError, match=r"there is no adapter 'three'; there are: one, two, none"):
        Engine(decoder, NoDraft()).add(asking(ids, "three"))
    with pytest.raises(ValueError, match="there is no adapter 'one'; the model has none"):
        Engine(of("gemma3", None), NoDraft()).add(asking(ids, "one"))


def test_a_prompt_is_read_anew_with_another_adapter(tmp_path: Path) -> None:
    decoder, ids = adapted("gemma4", tmp_path), prompt(30)[0]
    expected = {name: alone(decoder, asking(ids, name)) for name in {*NAMES}}
    kept = Conversations(decoder.new_cache, PLENTY)
    for name in ("one", "two", "none", "two", "one", "none"):
        engine = Engine(decoder, NoDraft(), FixedLength(0), kept)
        seen = name in {one.cache.adapter or "none" for one in kept.kept}
        sequence = engine.add(asking(ids, name))
        to_end(engine)
        assert sequence.row.tolist() == expected[name]
        assert sequence.reused == (len(ids) - 1 if seen else 0), name
    assert sorted(one.cache.adapter for one in kept.kept) == ["", "one", "two"]
    with kept.lent(ids, adapter="two") as lent:
        assert lent.cache.adapter == "two"
    longest = torch.tensor(expected["two"])
    assert kept.nearest(longest, adapter="two")[0] == len(longest) - 1
    assert kept.nearest(longest, adapter="one")[0] < len(longest) - 1


def test_a_saved_conversation_is_of_its_adapter(tmp_path: Path) -> None:
    decoder, ids = adapted("gemma3", tmp_path), prompt(30)[0]
    kept = Conversations(decoder.new_cache, PLENTY)
    engine = Engine(decoder, NoDraft(), FixedLength(0), kept)
    engine.add(asking(ids, "two"))
    to_end(engine)
    identity = decoder.identity_of("two")
    assert len({identity, decoder.identity_of("one"), decoder.identity}) == 3
    with kept.lent() as conversation:
        save_conversation(conversation, tmp_path / "saved", identity, {})
    with pytest.raises(ValueError, match="another model, or with other weights, adapter"):
        load_conversation(tmp_path / "saved", decoder.identity, decoder.new_cache)
    others = {decoder.identity_of(name): lambda name=name: decoder.new_cache(adapter=name) for name in ("one", "two")}
    found = load_conversation(tmp_path / "saved", decoder.identity, decoder.new_cache, others)
    assert found.cache.adapter == "two" and found.cache.fork(10).adapter == "two"
