"""`python -m eval.gpu`."""

import sys

from eval.gpu.command import main

if __name__ == "__main__":
    sys.exit(main())
