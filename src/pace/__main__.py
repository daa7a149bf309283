"""`python -m pace`: the command line without its installed script."""

import sys

from pace.cli import main

if __name__ == "__main__":
    sys.exit(main())
