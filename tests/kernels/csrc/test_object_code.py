"""What the compiler made of the AVX2 and AVX-VNNI products: sums in registers, not on the stack.

A result does not show it: a compiler that moves sums to the stack and back keeps the bits and takes twice the time, as
g++ did before `pin` of product_avx2.inl. Times of a shared machine cannot tell either, so the instructions are counted.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess

import pytest

from specdec.kernels import native
from specdec.kernels.forms import FORMS
from tests.support.native.needs_native import needs_library

_FUNCTION = re.compile(r"^[0-9a-f]+ <(.*)>:$")
_PRODUCT = re.compile(
    r"(?:avx2|avx_vnni)::gemm_tile<(\d), \w+::Form<(\d), (?:true|false), (true|false), (true|false)> ?>"
)
_MOVE = re.compile(r"\tvmov\w+ +(%ymm\d+,-?[0-9a-fx]*\(%r[sb]p|-?[0-9a-fx]*\(%r[sb]p[^)]*\),%ymm)")


def stack_moves(disassembly: str) -> dict[str, int]:
    """Count the moves of whole registers to and from the stack, by function."""
    counts: dict[str, int] = {}
    name = ""
    for line in disassembly.splitlines():
        if found := _FUNCTION.match(line):
            name = found[1]
            counts[name] = 0
        elif _MOVE.search(line):
            counts[name] += 1
    return counts


def test_moves_are_counted_by_function() -> None:
    text = """
0000000000001000 <void avx2::gemm_tile<8, avx2::Form<4, true, false, false> >(long)>:
    1000:\tvmovdqa %ymm5,0x20(%rsp)
    1006:\tvmovups -0x40(%rbp,%rax,1),%ymm5
    100c:\tvmovdqu (%rdi,%r9,1),%ymm0
    1012:\tvpaddw 0x20(%rsp),%ymm0,%ymm0
    1018:\tvmovaps %ymm2,(%rsp)

0000000000002000 <other>:
    2000:\tvmovdqa %ymm8,%ymm13
    2006:\tmovq   %xmm0,0x8(%rsp)
"""
    assert stack_moves(text) == {"void avx2::gemm_tile<8, avx2::Form<4, true, false, false> >(long)": 3, "other": 0}


@needs_library
@pytest.mark.skipif(platform.machine().lower() not in ("x86_64", "amd64"), reason="AVX2 is of x86-64 alone")
def test_sums_stay_in_registers() -> None:
    library = native.load()
    assert isinstance(library, native.Native), library
    if shutil.which("objdump") is None:
        assert not native.is_required(), "objdump, which shows the instructions, is not installed"
        pytest.skip("objdump, which shows the instructions, is not installed")
    done = subprocess.run(
        ["objdump", "-d", "-C", "--no-show-raw-insn", str(library.path)], capture_output=True, text=True, check=True
    )
    products = {
        (int(found[1]), int(found[2]), found[3] == "true", found[4] == "true", name): count
        for name, count in stack_moves(done.stdout).items()
        if (found := _PRODUCT.search(name))
    }
    for set_name in ("avx2", *(["avx_vnni"] if "avx-vnni" in library.available else [])):
        seen = {(rows, bits, table, sub) for rows, bits, table, sub, name in products if f"{set_name}::" in name}
        forms = {(form.bits, form.table, form.sub) for form in FORMS}
        assert {(rows, *form) for rows in range(1, 9) for form in forms} <= seen
    # A row's totals are two registers, and lie on the stack on purpose: they are set, added to and returned.
    too_many = {name: count for (rows, *_, name), count in products.items() if count > 20 * rows + 20}
    assert not too_many
