"""`python -m eval.serve.fuzz`."""

import sys

from eval.serve.fuzz.command import main

if __name__ == "__main__":
    sys.exit(main())
