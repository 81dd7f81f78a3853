"""`python -m eval.from_use`."""

import sys

from eval.from_use.command import main

if __name__ == "__main__":
    sys.exit(main())
