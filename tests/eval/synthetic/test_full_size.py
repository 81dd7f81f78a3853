"""Random weights of full size: the shapes that were published, blocks as quantising makes them, and nothing else."""

from __future__ import annotations

import math

import pytest
import torch

from eval.synthetic.full_size import check_memory, full_size_config
from eval.synthetic.random_weights import RandomCheckpoint, copies, random_blocks
from specdec import kernels
from specdec.memory.plan import weight_bytes
from specdec.model.build import Source, build_decoder
from specdec.model.families import decoder_spec
from specdec.model.names import expected_tensors
from specdec.weights.tensors import BlockWeight
from tests.support.tiny import prompt, tiny_model


@pytest.mark.parametrize(("bits", "minimum"), [(4, False), (4, True), (5, False), (5, True), (8, False)])
@pytest.mark.parametrize("rows", [5, 96, 1000])
def test_random_blocks_keep_the_size_of_what_they_multiply(rows: int, bits: int, minimum: bool) -> None:
    w = random_blocks(rows, 512, bits, minimum)
    assert (w.rows, w.columns, w.bits, w.minimum is not None) == (rows, 512, bits, minimum)
    dense = BlockWeight(w).dequantize()  # [rows, 512]
    assert float(dense.mean().abs()) < 0.01
    assert float(dense.std()) == pytest.approx(1 / math.sqrt(512), rel=0.15)
    assert torch.equal(dense[256:512], dense[: len(dense[256:512])])
    assert dense[:256].unique(dim=0).shape[0] == min(rows, 256)  # no other repetition
    out = kernels.block_linear(torch.randn(3, 512, generator=torch.Generator().manual_seed(1)), w)
    assert out.shape == (3, rows) and 0.5 < float(out.std()) < 2


def test_copies_are_equal_and_apart() -> None:
    w = random_blocks(64, 64, 4, minimum=True)
    made = copies(w, 5 * w.nbytes - 1)
    assert len(made) == 5 and len(copies(w, 1)) == 2
    assert len({copy.q.data_ptr() for copy in made}) == len({copy.scale.data_ptr() for copy in made}) == 5
    x = torch.randn(2, 64)
    assert all(torch.equal(kernels.block_linear(x, copy), kernels.block_linear(x, w)) for copy in made)


def test_gemma_4_12b_has_its_published_shape() -> None:
    spec = decoder_spec(full_size_config("gemma-4-12b"))
    assert [i for i, window in enumerate(spec.windows) if window is None] == [5, 11, 17, 23, 29, 35, 41, 47]
    assert {layer.window for layer in spec.layers if layer.window} == {1024}
    weights = sum(math.prod(shape) for shape in expected_tensors(spec).values())
    assert weights == 11_959_730_224  # of which 52,379,904 see pictures and hear sound
    assert 7.8e9 < weight_bytes(expected_tensors(spec), "int4", torch.float32) < 8.0e9


def test_a_shape_that_does_not_fit_is_refused_before_it_is_built() -> None:
    check_memory("small", 1 << 30, 4 << 30)
    with pytest.raises(ValueError, match=r"huge needs 10\.7 GB of memory and 4\.3 GB are free"):
        check_memory("huge", 8_000_000_000, 4_300_000_000)
    with pytest.raises(
        ValueError,
        match="there is no shape 'gemma-9'; there are: gemma-4-12b, gemma-4-26b-a4b, gemma-4-e4b, gemma-4-tiny",
    ):
        full_size_config("gemma-9")


def test_random_weights_have_every_tensor_and_no_other() -> None:
    spec = decoder_spec(tiny_model("llama-bias-untied").config)
    checkpoint = RandomCheckpoint(spec, "random")
    assert checkpoint.shapes() == expected_tensors(spec)
    assert not bool(checkpoint.tensor("layers.0.self_attn.q_proj.bias").any())
    assert bool((checkpoint.tensor("norm.weight") == 1).all())
    with pytest.raises(ValueError, match=r"there is no tensor 'norm\.wait'"):
        checkpoint.tensor("norm.wait")


def test_random_experts_lie_one_below_the_other() -> None:
    spec = decoder_spec(tiny_model("gemma4-moe").config)
    checkpoint = RandomCheckpoint(spec, "random")
    source = Source.huggingface(checkpoint, spec)
    decoder = build_decoder(spec, source, dtype=torch.float32, device=torch.device("cpu"), quantize="int4")
    experts = decoder.layers[0].experts
    assert experts is not None
    assert (experts.gate_up.shape, experts.down.shape) == ((8 * 2 * 32, 64), (8 * 64, 32))
    with torch.inference_mode():
        states = decoder.forward(prompt(5)[0], decoder.new_cache()).last
    assert states.isfinite().all() and float(states.std()) > 0.1
