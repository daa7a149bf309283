"""All that pace writes to the terminal: `out` for what was asked for, `err` for what is said beside it.

A service, a notebook or a GUI may have no stderr, one that is full, or one that is no file at all; a shell may close it; a
locale may lack the characters. None of that may end a generation or lose its text.
"""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from typing import Any

from pace.errors import PaceError

__all__ = [
    "OutputError",
    "abandon_stdout",
    "err",
    "is_terminal",
    "open_missing",
    "out",
    "progress_bar",
    "settle_stderr",
]


class OutputError(PaceError):
    """What was asked for can't be written."""


def out(text: str, end: str = "\n") -> None:
    """Write to stdout, at once; characters that its encoding lacks come as \\xNN, \\uNNNN or \\UNNNNNNNN.

    Raises:
        BrokenPipeError: nobody reads any more.
        OutputError: it is closed, or its disk is full.
    """
    try:
        if sys.stdout is None:
            raise ValueError
        _write(sys.stdout, text + end)
    except BrokenPipeError:
        raise
    except ValueError:  # what a closed file raises, too
        raise OutputError("stdout is closed; the output has no place to go") from None
    except OSError as error:
        raise OutputError(f"stdout: {error.strerror or error}; the output is incomplete") from None


def err(text: str, end: str = "\n") -> None:
    """Write to stderr what may be lost where there is none, or none that takes it; never fails."""
    with suppress(OSError, ValueError, AttributeError):  # full, closed; or None, or an object that can't
        _write(sys.stderr, text + end)


def _write(stream: Any, text: str) -> None:
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = getattr(stream, "encoding", None) or "ascii"
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
    if hasattr(stream, "flush"):
        stream.flush()


def is_terminal(stream: object) -> bool:
    """Whether somebody sits before `stream`, which may be None, closed, or without an `isatty`."""
    try:
        return bool(stream.isatty())  # type: ignore[attr-defined]  # the except clause takes the rest
    except (AttributeError, ValueError, OSError):
        return False


def progress_bar(show: object, **options: Any) -> Any:
    """A tqdm bar on stderr, or None where none is wanted.

    Args:
        show: True, False, None (where stderr is a terminal), or what makes the bar in tqdm's place.
        options: tqdm's.
    """
    if callable(show):
        return show(**options)
    if not (is_terminal(sys.stderr) if show is None else show) or sys.stderr is None:
        return None
    # It comes with tokenizers' huggingface_hub; 20 ms that most imports of pace need not pay.
    from tqdm import tqdm

    return tqdm(file=_Stderr(), **options)


class _Stderr:
    """stderr as a file that takes everything."""

    def __getattr__(self, name: str) -> Any:
        return getattr(sys.stderr, name)

    def write(self, text: str) -> None:
        err(text, end="")

    def flush(self) -> None:
        pass


def open_missing() -> None:
    """Give a program whose shell closed standard descriptors (`2>&-`) the null device in their place.

    The next file that it opens would become the descriptor 2 otherwise, and take what libraries print to stderr.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)
            if null != number:
                os.dup2(null, number)
                os.close(null)
    if sys.stderr is None:  # argparse would print usage errors to stdout instead
        sys.stderr = open(2, "w", errors="backslashreplace", closefd=False)  # noqa: SIM115  # for the whole run


def abandon_stdout() -> None:
    """Write no more to stdout: Python flushes it once more at exit, and would complain."""
    with suppress(OSError, ValueError, AttributeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def settle_stderr() -> None:
    """Lose what a full stderr would not take: Python flushes it once more at exit, and would end with status 120."""
    try:
        sys.stderr.flush()
    except OSError:
        with suppress(OSError, ValueError, AttributeError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
    except (ValueError, AttributeError):  # closed, None, or no file
        pass
