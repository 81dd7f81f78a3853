"""`python -m specdec`: what the console script `specdec` does, and `run.py` in a clone.

The command is found through its entry point, because imports point down and the commands stand above this package.
"""

from __future__ import annotations

import sys
from importlib.metadata import entry_points


def main() -> int:
    """Run the installed command and return its exit code."""
    for found in entry_points(group="console_scripts", name="specdec"):
        code: int = found.load()()
        return code
    print("error: specdec is not installed here; run: pip install -c constraints.txt -e .", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
