"""`python -m eval.kernels`."""

import sys

from eval.kernels.command import main

if __name__ == "__main__":
    sys.exit(main())
