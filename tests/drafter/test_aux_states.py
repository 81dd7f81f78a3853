"""States of other layers beside the last: what the decoder hands out, what is learned, what drafts begin with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from drafter import load_drafter
from drafter.config import MTPHeadConfig, MTPHeadSpec, head_spec
from drafter.data.answering import generate_answers
from drafter.data.dataset import DatasetWriter, read_shard
from drafter.data.features import Features, read
from drafter.files.head import save_head
from drafter.inference import best
from drafter.settings import Recipe
from drafter.train.initial import fitted_projections, initial_tensors
from drafter.train.loss import Candidates, unrolled_loss
from drafter.train.model import Network
from eval.acceptance import WithoutNoise
from eval.bench.modes import Wrong
from eval.synthetic.acceptance import SyntheticAcceptance
from specdec.drafting.composite import CompositeDrafter
from specdec.drafting.protocol import Drafter, FixedLength, NoDraft
from specdec.drafting.suffix import SuffixDrafter
from specdec.engine.sampling import Sampler
from specdec.engine.sequence import Request
from specdec.engine.stats import GenerationStats
from specdec.hf import decoder_of
from specdec.model.decoder import Decoder
from specdec.model.states import States
from tests.support.decoding import decode, never
from tests.support.tiny import FAMILIES, VOCAB, WINDOW, prompt, tiny_model
from tests.support.tiny_assistant import backbone
from tests.support.tiny_decoder import quantised

RECIPE = Recipe(steps=3, deeper=1.0, soft=False)
AUX = (2, 0)  # not in order: a head's order is its own
LENGTH = 3 * WINDOW + 5
IDS = torch.arange(0, VOCAB, 2)


def config_of(decoder: Decoder) -> MTPHeadConfig:
    return replace(MTPHeadConfig.like(decoder.spec, draft_vocab=len(IDS)), aux_layers=AUX)


def spec_of(decoder: Decoder) -> MTPHeadSpec:
    return head_spec(config_of(decoder), decoder.spec)


def network(decoder: Decoder) -> Network:
    spec = spec_of(decoder)
    tensors = initial_tensors(spec, decoder, IDS)
    tensors["fuse.weight"].normal_(generator=torch.Generator().manual_seed(1)).mul_(0.1)
    return Network(spec, tensors)


def saved(folder: Path, decoder: Decoder) -> Network:
    made = network(decoder)
    save_head(folder, config_of(decoder), made.tensors(), IDS, decoder, {})
    return made


def text_of(decoder: Decoder, length: int = 40, aux: tuple[int, ...] = AUX) -> Features:
    layers = range(len(decoder.spec.layers)) if decoder.spec.model_type == "llama" else spec_of(decoder).reads
    (text,) = read(decoder, [prompt(length, seed=2)[0]], tuple(layers), torch.float32, aux)
    return text


def passes(decoder: Decoder, ids: Tensor, rows: int, aux: tuple[int, ...] = ()) -> States:
    cache, parts = decoder.new_cache(), []
    for chunk in ids.split(rows):
        parts.append(decoder.forward(chunk, cache, aux))
        cache.commit(len(chunk))
    return States.cat(parts)


def same(first: States, second: States) -> bool:
    pairs = zip((first.last, *first.aux), (second.last, *second.aux), strict=True)
    return all(torch.equal(one, other) for one, other in pairs)


@pytest.mark.parametrize("family", FAMILIES)
def test_states_have_what_leaves_the_layers(family: str) -> None:
    decoder, ids = quantised(family, "int8"), prompt(LENGTH, seed=4)[0]
    decoder = Decoder(decoder.spec, decoder.embedding, decoder.layers, decoder.norm, decoder.head, decoder.per_layer)
    last = len(decoder.layers) - 1
    alone = passes(decoder, ids, 16)
    found = passes(decoder, ids, 16, (last, 0))
    assert alone.aux == () and torch.equal(found.last, alone.last) and len(found) == LENGTH
    outputs, _ = found.aux
    normed = outputs * (outputs.square().mean(dim=1, keepdim=True) + decoder.spec.norm_eps).rsqrt() * decoder.norm
    torch.testing.assert_close(normed, alone.last, rtol=1e-3, atol=1e-4)  # what the last norm makes states of
    for rows in (1, 3, 7, 64):
        assert same(passes(decoder, ids, rows, (last, 0)), found), f"{rows} rows in a pass"
    assert torch.equal(passes(decoder, ids, 16, (0,)).aux[0], found.aux[1])
    decoder.stack._fused = None
    assert same(passes(decoder, ids, 16, (last, 0)), found), "one call has the bits of op by op"


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_answers_and_their_aux_states_are_what_reading_them_gives(family: str, tmp_path: Path) -> None:
    decoder, layers = decoder_of(tiny_model(family)), spec_of(decoder_of(tiny_model(family))).reads
    asked = [prompt(length, seed=length)[0] for length in (3, 9, 1)]
    how = {"layers": layers, "max_new_tokens": 20, "eos_ids": frozenset[int](), "max_batch": 2}
    found, plain = (
        dict(generate_answers(decoder, asked, aux_layers=AUX, **how)),
        dict(generate_answers(decoder, asked, **how)),
    )
    DatasetWriter(tmp_path, {}).add([found[i] for i in range(3)])
    for i, stored in enumerate(read_shard(tmp_path / "00000.safetensors")):
        (again,) = read(decoder, [found[i].tokens], layers, aux_layers=AUX)
        for text in (found[i], stored):
            assert set(text.aux) == set(AUX)
            assert same(text.states(AUX), again.states(AUX))
            assert {each.shape for each in text.aux.values()} == {(len(text), decoder.spec.hidden_size)}
        assert torch.equal(found[i].hidden, plain[i].hidden) and torch.equal(found[i].tokens, plain[i].tokens)


@pytest.mark.parametrize("family", ["llama", "gemma3", "qwen3"])
def test_the_unrolled_steps_are_the_drafting_loop(family: str, tmp_path: Path) -> None:
    decoder = backbone(family)
    mine, text = saved(tmp_path, decoder), text_of(decoder)
    drafter = load_drafter(tmp_path)
    drafter.bind(decoder)
    theirs = drafter._assistant
    assert theirs is not None and drafter.aux_layers == AUX
    with torch.no_grad():  # what 8 bits made of it
        rounded = Network(mine.spec, mine.tensors())
        rounded["fuse.weight"].copy_(theirs.fuse.weight.dequantize())
    found = unrolled_loss(
        mine,
        lambda ids: decoder.embed(ids).clone(),
        [text],
        1.0,
        Candidates.of(IDS, VOCAB),
        RECIPE,
    )
    without = replace(text, aux={layer: torch.zeros_like(state) for layer, state in text.aux.items()})
    other = unrolled_loss(
        mine,
        lambda ids: decoder.embed(ids).clone(),
        [without],
        1.0,
        Candidates.of(IDS, VOCAB),
        RECIPE,
    )
    assert found.loss != other.loss
    agreed = rows = 0
    cache = decoder.new_cache()
    with torch.inference_mode():
        for p in range(1, len(text) - 2):
            states = decoder.forward(text.tokens[p - 1 : p], cache, AUX)
            cache.commit(1)
            torch.testing.assert_close(states.last[0], text.hidden[p - 1])
            first = theirs.first(states)
            expected = rounded.first(text.states(AUX)[p - 1 : p])
            torch.testing.assert_close(first, expected, rtol=2e-2, atol=2e-2)
            state, alive = first, True
            drafts = drafter_tokens(drafter, cache, text.tokens[: p + 1].tolist(), states[0])
            for step in range(3):
                newest = text.tokens[p + step : p + step + 1]
                x, state = theirs.step(decoder.embed(newest), state, theirs.spans(p), cache)
                token, _ = best(theirs.head, x, newest)
                if step == 0:
                    assert drafts[0] == int(token)
                alive = alive and bool(token == text.best[p + step])
                agreed += alive == bool(found.right[p - 1, step])
                rows += 1
    assert agreed > 0.9 * rows  # 8 bits may turn a near tie


def drafter_tokens(drafter: Drafter, cache: object, tokens: list[int], states: States) -> tuple[int, ...]:
    return drafter.start(cache).propose(tokens, states, 3).tokens


@pytest.mark.parametrize("temperature", [0.0, 0.9])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_whoever_stands_around_the_head_passes_its_wishes_on(family: str, temperature: float, tmp_path: Path) -> None:
    decoder = backbone(family)
    saved(tmp_path, decoder)

    def text(drafter: Drafter) -> tuple[list[int], GenerationStats]:
        ids, stats = prompt(20)[0], GenerationStats()
        request = Request(ids, LENGTH, Sampler.at_temperature(temperature, 3), never)
        drafter.bind(decoder)
        ((_, row, _),) = decode(decoder, drafter, FixedLength(3), [request], stats)
        return row.tolist(), stats

    plain, _ = text(NoDraft())
    assert text(SuffixDrafter())[0] == plain and SuffixDrafter().aux_layers == ()
    head = load_drafter(tmp_path)
    assert head.aux_layers == ()  # known when it is bound
    made_up = SyntheticAcceptance(head, plain, [0.5], VOCAB)
    for drafter in (head, CompositeDrafter(head), WithoutNoise(head), Wrong(head), made_up):
        row, stats = text(drafter)
        assert row == plain and stats.drafted > 30
        assert drafter.aux_layers == AUX


def test_the_fit_explains_more_with_more_states() -> None:
    decoder = backbone("llama")
    spec, text = spec_of(decoder), text_of(decoder, 300)
    fitted = fitted_projections(spec, decoder, [text])
    assert {name: tuple(matrix.shape) for name, matrix in fitted.items()} == {
        "pre_projection.weight": (spec.text.hidden_size, 2 * spec.backbone_hidden_size),
        "fuse.weight": (spec.backbone_hidden_size, 2 * spec.backbone_hidden_size),
    }
    network = Network(spec, initial_tensors(spec, decoder, IDS, [text]))
    source = len(decoder.layers) - len(spec.text.layers)  # the head's first layer is a copy of this one
    wanted = passes(decoder, text.tokens, 16, (source - 1,)).aux[0][1:]
    wanted = wanted / wanted.square().mean(dim=1, keepdim=True).sqrt()

    def error(state: Tensor) -> float:
        joined = torch.cat((decoder.embed(text.tokens[1:]), state), dim=1)
        made = joined @ network["pre_projection.weight"].t()
        stream = passes(decoder, text.tokens, 16, (source - 1,)).aux[0][1:]
        size = stream.square().mean(dim=1, keepdim=True).sqrt()
        return float((made / size - wanted).square().sum())

    with torch.no_grad():
        alone = error(text.hidden[:-1])
        fused = error(network.first(text.states(AUX)[:-1]))
    assert fused < 0.95 * alone


def test_layers_that_are_not_there_are_refused() -> None:
    decoder = backbone("llama")
    for aux in ((9,), (1, 1)):
        with pytest.raises(ValueError, match="fuses the states of layers"):
            head_spec(replace(config_of(decoder), aux_layers=aux), decoder.spec)
    old = {key: value for key, value in config_of(decoder).to_dict().items() if key != "aux_layers"}
    assert MTPHeadConfig.from_dict(old).aux_layers == ()  # heads from before there was such a thing
