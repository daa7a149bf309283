"""Faults that tests/sanitize.sh must see reported before it believes a clean run: `python planted.py FAULT`."""

from __future__ import annotations

import sys
import threading

import numpy as np

from pace._ext import _kernels


def overflow() -> None:
    """A kernel reads one float behind what _ext/pages.c gave out: there is a redzone, and kernels look."""
    floats = np.frombuffer(memoryview(_kernels.Memory(4 * 1000)), np.float32)
    _kernels.argmax(np.lib.stride_tricks.as_strided(floats, (1001,)))


def misaligned() -> None:
    """A kernel reads floats one byte off."""
    _kernels.argmax(np.zeros(4 * 5 + 1, np.uint8)[1:].view(np.float32))


def race() -> None:
    """Two threads write one row without a turn; a long one, so that neither ends before the other begins."""
    row = np.zeros(1 << 24, np.float32)
    threads = [threading.Thread(target=_kernels.softmax, args=(row,)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


if __name__ == "__main__":
    {"overflow": overflow, "misaligned": misaligned, "race": race}[sys.argv[1]]()
