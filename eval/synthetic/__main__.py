"""`python -m eval.synthetic`."""

import sys

from eval.synthetic.command import main

if __name__ == "__main__":
    sys.exit(main())
