"""A saved head drafts what the trained one would, and knows whose it is; a damaged one is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gguf import quants

from drafter import load_drafter
from drafter.config import MTPHeadConfig, head_spec
from drafter.files.formats import read_start
from drafter.files.head import HEAD_FILE, STORED, as_stored, save_head
from drafter.train.evaluate import measure_drafts
from drafter.train.initial import initial_tensors
from drafter.train.model import Network
from specdec.drafting.protocol import Drafter, FixedLength, NoDraft
from specdec.drafting.suffix import SuffixDrafter
from specdec.engine.sampling import Sampler
from specdec.engine.sequence import Request
from specdec.engine.stats import GenerationStats
from specdec.hf import decoder_of
from specdec.model.decoder import Decoder
from tests.support.decoding import decode, never
from tests.support.tiny import VOCAB, prompt, tiny_model
from tests.support.tiny_assistant import backbone

IDS = torch.arange(0, VOCAB, 2)


def saved(folder: Path, family: str, bigram: int = 32, draft_vocab: int = len(IDS), bits: int = 8) -> Network:
    decoder = backbone(family)
    base = MTPHeadConfig.like(decoder.spec, draft_vocab=draft_vocab or VOCAB)
    config = MTPHeadConfig(base.hidden_size, base.intermediate_size, base.reads, base.heads, base.draft_vocab, bigram)
    spec = head_spec(config, decoder.spec)
    network = Network(spec, initial_tensors(spec, decoder, IDS if draft_vocab else torch.arange(VOCAB)))
    if bigram:
        with torch.no_grad():
            network["bigram.left.weight"].normal_(generator=torch.Generator().manual_seed(0))
    about = {"backbone_name": family, "data": "made up", "scores": {"acceptance_length": 1.5}}
    save_head(folder, config, network.tensors(), IDS, decoder, about, bits)
    return network


@pytest.mark.parametrize("bits", sorted(STORED))
def test_the_weights_of_a_file_are_known_before_it_is_written(bits: int, tmp_path: Path) -> None:
    network = saved(tmp_path, "llama", bits=bits)
    read = read_start(tmp_path, backbone("llama"), bits).tensors
    off = 0.0
    for name, tensor in network.tensors().items():
        assert torch.equal(as_stored(name, tensor, bits), read[name]), name
        off += float(torch.dist(tensor, read[name]))
    assert off > 0


def generated(decoder: Decoder, drafter: Drafter) -> tuple[list[int], GenerationStats]:
    ids, stats = prompt(20)[0], GenerationStats()
    request = Request(ids, 80, Sampler(), never)
    drafter.bind(decoder)
    ((_, row, _),) = decode(decoder, drafter, FixedLength(3), [request], stats)
    return row.tolist(), stats


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3"])
@pytest.mark.parametrize(("bigram", "draft_vocab"), [(0, 0), (0, len(IDS)), (32, len(IDS))])
def test_a_saved_head_is_the_trained_one_in_8_bits(family: str, bigram: int, draft_vocab: int, tmp_path: Path) -> None:
    decoder, network = backbone(family), saved(tmp_path, family, bigram, draft_vocab)
    drafter = load_drafter(tmp_path)
    drafter.bind(decoder)
    assert drafter._assistant is not None
    for name, mine in network.tensors().items():
        if name == "pre_projection.weight":
            theirs = drafter._assistant.pre.weight.dequantize()
            assert (mine - theirs).abs().max() <= mine.abs().max() / 127
    text, stats = generated(decoder, drafter)
    assert stats.drafted > 30
    assert text == generated(decoder, NoDraft())[0]
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["provenance"] == {"data": "made up", "scores": {"acceptance_length": 1.5}}
    assert config["backbone"] == {"fingerprint": decoder.fingerprint, "name": family}


@pytest.mark.parametrize(("bits", "bytes_of_32"), [(8, 34), (5, 24), (4, 20)])
def test_fewer_bits_make_a_smaller_file_and_the_same_text(bits: int, bytes_of_32: int, tmp_path: Path) -> None:
    decoder, network = backbone("llama"), saved(tmp_path, "llama", bits=bits)
    drafter = load_drafter(tmp_path)
    text, stats = generated(decoder, drafter)
    assert stats.drafted > 30 and text == generated(decoder, NoDraft())[0]
    assert drafter._assistant is not None
    blocks = drafter._assistant.stack.layers[0].down.weight
    mine = network["layers.0.mlp.down_proj.weight"].detach()
    assert blocks.nbytes == mine.numel() // 32 * bytes_of_32
    step = (mine.max() - mine.min()) / 2**bits
    error = (mine - blocks.dequantize()).abs()
    assert error.max() <= step
    if bits < 8:  # as the format's own rounding would have it
        kind = STORED[bits]
        theirs = torch.from_numpy(quants.dequantize(quants.quantize(mine.numpy(), kind), kind))
        assert error.square().mean() < 0.95 * (mine - theirs).square().mean()


def test_a_head_of_another_model_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    stranger = decoder_of(tiny_model("llama", seed=1))
    stranger.norm.add_(0.5)
    drafter = load_drafter(tmp_path)
    with pytest.raises(ValueError, match=r"trained for another model \(llama\).*strict=False"):
        drafter.bind(stranger)
    with pytest.warns(UserWarning, match="trained for another model"):
        text, _ = generated(stranger, load_drafter(tmp_path, strict=False))
    assert text == generated(stranger, NoDraft())[0]
    with pytest.raises(ValueError, match=r"draft vocabulary|another model|and the backbone stores none there|evenly"):
        load_drafter(tmp_path).bind(backbone("gemma3"))


def test_the_fingerprint_is_the_models_whatever_its_storage(tmp_path: Path) -> None:
    import specdec

    tiny_model("llama").save_pretrained(tmp_path)
    names = {specdec.load(tmp_path, quantize=q, device="cpu").decoder.fingerprint for q in (None, "int4", "int8")}
    names.add(specdec.load(tmp_path, dtype="bfloat16", device="cpu").decoder.fingerprint)
    assert len(names) == 1
    assert backbone("qwen3").fingerprint not in names


def test_a_damaged_head_is_refused(tmp_path: Path) -> None:
    saved(tmp_path, "llama")
    weights, config = tmp_path / HEAD_FILE, tmp_path / "config.json"
    whole, values = weights.read_bytes(), json.loads(config.read_text())
    weights.write_bytes(whole[:-64])
    with pytest.raises(ValueError, match=r"not the one that config\.json was written for"):
        load_drafter(tmp_path)
    weights.unlink()
    with pytest.raises(ValueError, match="not a complete head"):
        load_drafter(tmp_path)
    weights.write_bytes(whole)
    for key in ("hidden_size", "backbone", "weights"):
        config.write_text(json.dumps({k: v for k, v in values.items() if k != key}))
        with pytest.raises(ValueError, match="not a complete head"):
            load_drafter(tmp_path)
    config.write_text(json.dumps({**values, "heads": 0}))
    with pytest.raises(ValueError, match="'heads' must be a whole number from 1"):
        load_drafter(tmp_path)


def test_a_head_is_judged_by_decoding_with_it(tmp_path: Path) -> None:
    decoder = backbone("llama")
    saved(tmp_path, "llama")
    prompts = [prompt(n, seed=n)[0] for n in (5, 30)]
    settings = {"draft_length": 3, "max_new_tokens": 40, "eos_ids": frozenset[int]()}
    for temperature in (0.0, 0.7):
        found = measure_drafts(decoder, load_drafter(tmp_path), prompts, temperature=temperature, **settings)
        assert found.prompts == 2 and found.emitted == 80
        assert found.drafted > found.rounds and found.mean_acceptance_length == 1 + found.accepted / found.rounds
    right = measure_drafts(decoder, SuffixDrafter(), [prompt(9)[0].repeat(9)], **settings)
    assert right.draft_sources.keys() <= {"suffix"}
