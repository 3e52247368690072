"""python -m dfl: the command line."""

import sys

from dfl.cli import main

if __name__ == "__main__":
    sys.exit(main())
