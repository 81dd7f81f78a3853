"""`python -m eval.server`."""

import sys

from eval.server.command import main

if __name__ == "__main__":
    sys.exit(main())
