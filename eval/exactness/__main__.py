"""`python -m eval.exactness`."""

import sys

from eval.exactness.command import main

if __name__ == "__main__":
    sys.exit(main())
