"""Which library serves a device: Triton's kernels where they passed their check, torch where not, and what is said."""

from __future__ import annotations

import os
import subprocess
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor

from specdec import kernels
from specdec.kernels import DraftParts, KVView, Matrix, libraries, pack_low_rank, reference
from specdec.kernels.forms import BlockForm, table_numbers
from specdec.load import _warn_of_slowness
from tests.support.native.kernel_paths import Kind, packed, partitions
from tests.support.triton.here import (
    DEVICE,
    EXPANDED,
    READ,
    Triton,
    attention,
    check,
    norm,
    normal,
    product,
    rows,
    same,
)

pytestmark = pytest.mark.gpu


def test_every_op_of_the_seam_goes_through_the_kernels(chosen: Triton, monkeypatch: pytest.MonkeyPatch) -> None:
    assert chosen.refused == {}
    assert kernels.missing(DEVICE) is None and kernels.invariant(DEVICE)
    assert kernels.active(DEVICE) == kernels.arithmetic(DEVICE)
    assert kernels.active(DEVICE).startswith("triton 3.")
    heard = []
    for module, name in ((product, "block_linear"), (rows, "block_rows")):
        real = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, real=real, name=name: heard.append(name) or real(*a))
    for name in ("rms_norm", "rope", "gated", "attention", "_dense_linear", "_low_rank"):
        real = getattr(chosen, name)
        monkeypatch.setattr(chosen, name, lambda *a, real=real, name=name: heard.append(name) or real(*a))
    w = packed(20, 64, Kind(4))
    x, there = normal(3, 64), w.to(DEVICE)
    here = x.to(DEVICE)
    assert same(kernels.block_linear(here, there), reference.block_linear(x, w))
    ids = torch.tensor([19, 0], dtype=torch.int64)
    assert same(kernels.block_rows(ids.to(DEVICE), there, torch.float32), reference.block_rows(ids, w, torch.float32))
    assert same(kernels.rms_norm(here, None, 1e-6), reference.rms_norm(x, None, 1e-6))
    cos, sin = normal(3, 64), normal(3, 64)
    turned = kernels.rope(here[:, None], cos.to(DEVICE), sin.to(DEVICE))
    assert same(turned, reference.rope(x[:, None], cos, sin))
    assert kernels.gated(here, here, "silu").shape == x.shape
    assert kernels.dense_linear(here, here).shape == (3, 3)
    part = pack_low_rank(normal(4, 64), normal(20, 4), 0.5)
    assert kernels.low_rank(here, part.to(DEVICE)).shape == (3, 20)
    kernels.attention(here[:, None], KVView(here[None], here[None]), [0] * 3, [1, 2, 3], 0.125)
    assert {*heard} == {
        "block_linear", "block_rows", "rms_norm", "rope", "gated", "attention", "_dense_linear", "_low_rank"
    }  # fmt: skip


@pytest.mark.parametrize("bad", [-1, 20])
def test_an_id_that_is_no_row_is_an_error_at_the_seam(chosen: Triton, bad: int) -> None:
    w = packed(20, 64, Kind(4)).to(DEVICE)
    with pytest.raises(IndexError, match="from 0 to 19"):
        kernels.block_rows(torch.tensor([3, bad], dtype=torch.int64).to(DEVICE), w, torch.float32)


@pytest.mark.parametrize("kind", EXPANDED, ids=str)
def test_blocks_without_a_kernel_are_expanded_and_their_rows_do_not_see_each_other(chosen: Triton, kind: Kind) -> None:
    w = packed(37, 96, kind)
    x, there = normal(9, 96), w.to(DEVICE)
    whole = kernels.block_linear(x.to(DEVICE), there)
    exact = x.double() @ reference.block_rows(torch.arange(37, dtype=torch.int64), w, torch.float32).double().T
    assert (whole.cpu().double() - exact).norm() < 1e-5 * exact.norm()
    for cut in partitions(9):
        assert torch.equal(torch.cat([kernels.block_linear(x[part].to(DEVICE), there) for part in cut]), whole)


def test_gradients_are_torchs(chosen: Triton) -> None:
    x, weight = normal(3, 64), normal(64)
    leaves = [part.to(DEVICE).requires_grad_() for part in (x, weight)]
    y = kernels.gated(kernels.rms_norm(*leaves, 1e-6), leaves[0], "gelu_tanh")
    wide = kernels.block_linear(y, packed(16, 64, Kind(8)).to(DEVICE))
    kernels.dense_linear(wide, normal(5, 16).to(DEVICE)).square().sum().backward()
    for leaf in leaves:
        assert leaf.grad is not None and leaf.grad.abs().sum() > 0


def test_attention_is_the_reference_within_rounding(chosen: Triton) -> None:
    q, k = normal(2, 4, 16), normal(2, 9, 16)
    found = kernels.attention(q.to(DEVICE), KVView(k.to(DEVICE), k.to(DEVICE)), [0, 2], [9, 8], 0.25)
    torch.testing.assert_close(
        found.cpu(), reference.attention(q, KVView(k, k), [0, 2], [9, 8], 0.25), rtol=2e-5, atol=2e-5
    )


@pytest.mark.parametrize(
    ("broken", "why"),
    [
        (lambda x, weight, eps: x * 1.0001, "other bits than the reference"),
        (lambda x, weight, eps: (_ for _ in ()).throw(RuntimeError("no such\ninstruction")), "RuntimeError: no such"),
    ],
)
def test_an_op_whose_kernel_fails_its_check_is_torchs(monkeypatch: pytest.MonkeyPatch, broken, why: str) -> None:
    monkeypatch.setattr(norm, "rms_norm", broken)
    library = Triton(DEVICE)
    assert list(library.refused) == ["rms_norm"]
    assert why in library.refused["rms_norm"] and "instruction" not in library.refused["rms_norm"]
    assert library.rms_norm is reference.rms_norm and library.rope is rows.rope
    assert "rms_norm" in library.sentence() and library.sentence() in library.describe()
    assert library.arithmetic.endswith(" without rms_norm")


def test_a_form_whose_kernel_fails_its_check_is_expanded_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    real, w = product.block_linear, packed(20, 64, Kind(5, True))
    monkeypatch.setattr(product, "block_linear", lambda x, w: real(x, w) + (w.form == BlockForm(5, minimum=True)))
    library = Triton(DEVICE)
    assert library.reads(BlockForm(4)) and library.refused == {}
    x = normal(3, 64)
    with pytest.warns(RuntimeWarning, match=r"5-bit blocks with a minimum \(a product has other bits"):
        found = library.block_linear(x.to(DEVICE), w.to(DEVICE))
    exact = x.double() @ reference.block_rows(torch.arange(20, dtype=torch.int64), w, torch.float32).double().T
    assert (found.cpu().double() - exact).norm() < 1e-5 * exact.norm()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        library.block_linear(x.to(DEVICE), w.to(DEVICE))


def test_a_check_tells_bits_that_depend_on_other_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    real = product.dense_linear
    monkeypatch.setattr(
        product, "dense_linear", lambda x, w, bias=None: real(x, w, bias) * (1 + 1e-7 * (x.shape[0] > 1))
    )
    assert "other bits beside other rows" in check.failure(check.check_dense, DEVICE)


def test_every_form_passes() -> None:
    for form in {packed(16, 32, kind).form for kind in READ}:
        assert check.failure(lambda device, form=form: check.check_form(form, device), DEVICE) == "", form


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"SPECDEC_KERNELS": "triton", "TRITON_INTERPRET": "1"}, "triton 3."),
        ({"SPECDEC_KERNELS": "triton", "TRITON_INTERPRET": "0"}, "TRITON_INTERPRET=1"),
    ],
)
def test_the_environment_chooses_triton_only_with_a_gpu_or_the_interpreter(variables: dict, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", "from specdec import kernels; print(kernels.active())"],
        capture_output=True,
        text=True,
        env=os.environ | variables | {"CUDA_VISIBLE_DEVICES": ""},
    )
    assert done.returncode == 0, done.stderr
    assert said in done.stdout + done.stderr
    assert done.stdout.startswith("triton") is (variables["TRITON_INTERPRET"] == "1")


def test_nothing_imports_triton_where_nobody_wants_it() -> None:
    code = "import sys, specdec.kernels; print(specdec.kernels.active()); sys.exit('triton' in sys.modules)"
    environment = {name: value for name, value in os.environ.items() if name != "SPECDEC_KERNELS"}
    assert subprocess.run([sys.executable, "-c", code], env=environment).returncode == 0


def test_a_triton_of_another_time_leaves_torch() -> None:
    code = (
        "import sys, types; old = types.ModuleType('triton'); old.language = types.ModuleType('triton.language');"
        "sys.modules |= {'triton': old, 'triton.language': old.language};"
        "from specdec import kernels; print(kernels.active('cuda'))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.startswith(
        "torch reference: Triton is missing, too old or broken (module 'triton' has no attrib"
    )


def test_two_threads_that_meet_a_device_open_one_library(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = list[object]()

    def slow(device: torch.device, choice: str) -> object:
        opened.append(object())
        time.sleep(0.05)
        return opened[-1]

    monkeypatch.setattr(libraries, "_open", slow)
    monkeypatch.setattr(libraries, "_libraries", {})
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(libraries._library_on, ["cuda"] * 4))
    assert found == opened * 4 and len(opened) == 1


def test_each_gpu_has_a_library_of_its_own_and_a_cpu_has_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libraries, "_open", lambda device, choice: [str(device)])
    monkeypatch.setattr(libraries, "_libraries", {})
    first, second, again = (libraries._library_on(name) for name in ("cuda:0", "cuda:1", "cuda:0"))
    assert (first, second) == (["cuda:0"], ["cuda:1"]) and again is first
    assert libraries._library_on("cpu") is libraries._library_on("cpu:0")


def test_stores_whose_kernels_fail_their_check_are_torchs_and_said_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def small(q: Tensor, view: KVView, *bounds: Any) -> Tensor:
        if view.value_width > 64:
            raise RuntimeError("out of resource: shared memory")
        return attention(q, view, *bounds)

    monkeypatch.setattr("specdec.kernels.triton.passes.check.attention", small)
    library = Triton(DEVICE)
    assert library.refused == {}
    q, k = normal(2, 4, 80), normal(2, 9, 80)
    here, there = q.to(DEVICE), KVView(k.to(DEVICE), k.to(DEVICE))
    with pytest.warns(
        RuntimeWarning, match=r"float32 stores of 80 columns for float32 rows \(RuntimeError: out of resource"
    ):
        found = library.attention(here, there, [0, 2], [9, 8], 0.25)
    assert torch.equal(found, reference.attention(here, there, [0, 2], [9, 8], 0.25))
    monkeypatch.setitem(libraries._libraries, DEVICE, library)
    assert kernels.invariant(DEVICE) is False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kernels.meet_stores(DEVICE, lambda: (there, None), torch.float32)
        small = KVView(there.values[..., :64], there.values[..., :64])
        assert not library.keeps(there, torch.float32) and library.keeps(small, torch.float32)
    assert library.arithmetic.endswith(" without float32 stores of 80 columns for float32 rows")


def test_the_interpreter_says_what_it_is(chosen: Triton) -> None:
    assert kernels.interpreted("cpu") is (DEVICE.type == "cpu") and not kernels.interpreted("mps")
    kernels.choose("native")
    assert not kernels.interpreted("cpu")


def test_numbers_of_a_table_are_copied_to_a_device_once() -> None:
    there = torch.device("meta")
    assert table_numbers("iq4", there) is table_numbers("iq4", there), "a captured pass reads them there"
    assert table_numbers("iq4", there).device.type == "meta"


def test_drafts_go_step_by_step_where_a_choice_fails_its_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(device: torch.device) -> None:
        raise RuntimeError("no float64")

    monkeypatch.setattr("specdec.kernels.triton.check_choice", fail)
    package = import_module("specdec.kernels.triton")
    unchecked = {name: (*ops, lambda device: None) for name, (*ops, _) in package._OPS.items()}
    monkeypatch.setattr(package, "_OPS", unchecked)
    library, w = Triton(DEVICE), packed(20, 64, Kind(4))
    layers: Any = None
    matrix = Matrix(w)
    parts = DraftParts(pre=matrix, post=matrix, head=matrix, embedding=w, embed_scale=1.0, ids=None, fuse=None, eps=0.0)
    with pytest.warns(RuntimeWarning, match=r"failed its check \(RuntimeError: no float64\)"):
        assert library.fuse_draft(layers, parts) is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert library.fuse_draft(layers, parts) is None, "checked and said once"
    assert library.refused == {}, "no text depends on it"


def test_a_number_that_is_none_is_another(monkeypatch: pytest.MonkeyPatch) -> None:
    real = rows.rope
    monkeypatch.setattr(rows, "rope", lambda x, *turns: torch.where((y := real(x, *turns)) == 0, torch.nan, y))
    monkeypatch.setattr(check._Random, "normal", lambda self, *shape, dtype=torch.float32: torch.zeros(shape).to(dtype))
    assert check.failure(check.check_rope, DEVICE) == "a rotation has other bits than the reference"


def test_without_triton_a_gpu_computes_with_torch_and_the_reason_names_the_extra(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "specdec.kernels.triton", None)
    try:
        kernels.choose("native")
        assert "specdec-mtp[gpu]" in str(kernels.missing("cuda"))
        assert kernels.active("cuda").startswith("torch reference: Triton is missing")
        assert kernels.arithmetic("cuda") == "torch on cuda" and not kernels.invariant("cuda")
        with pytest.raises(ValueError, match="triton cannot be used"):
            kernels.choose("triton")
        with pytest.warns(UserWarning, match=r"plain torch computes on cuda: .* nearly tie: Triton is missing"):
            _warn_of_slowness(str(kernels.missing("cuda")), "cuda")
        assert (
            kernels.missing("mps") is None and kernels.active("mps") == "torch reference: there are no kernels for mps"
        )
        kernels.choose("reference")
        assert kernels.missing("cuda") is None
    finally:
        kernels.choose(os.environ.get("SPECDEC_KERNELS", "native"))
