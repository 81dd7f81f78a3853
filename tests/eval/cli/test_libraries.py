"""A command that has imported its libraries ends without a word of theirs."""

from __future__ import annotations

import subprocess
import sys


def test_the_libraries_are_imported_and_say_nothing_at_the_end() -> None:
    program = (
        "import gc, sys; from eval.cli.libraries import import_libraries; import_libraries(); "
        "assert 'specdec.load' in sys.modules and gc.get_freeze_count() > 100_000"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
