"""`python -m pace`: the command line without its installed script."""

import sys

from _pace_main import main

if __name__ == "__main__":
    sys.exit(main())
