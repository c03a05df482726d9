"""`python -m recallzoo`."""

import sys

from recallzoo.cli import main

if __name__ == "__main__":
    sys.exit(main())
