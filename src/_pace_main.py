"""Entry point of the `pace` script, outside the package so that a failed import ends in one line, not a traceback."""

from __future__ import annotations

import sys
from contextlib import suppress


def main() -> int:
    """Run the command line; 2 if pace can't be imported on this CPU or with this PACE_ISA."""
    try:
        from pace.cli import main as run
    except ImportError as error:
        if sys.stderr is not None:  # print would take stdout in its place
            with suppress(OSError):
                print(f"pace: error: {error}", file=sys.stderr)
        return 2
    return run()
