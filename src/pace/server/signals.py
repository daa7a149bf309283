"""SIGINT and SIGTERM of a running loop."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["on_signals"]


@contextmanager
def on_signals(call: Callable[[], None]) -> Iterator[None]:
    """The running loop calls `call` at every SIGINT and SIGTERM; behind it, handlers are as they were.

    A loop that closes leaves its own in place (uvloop), so that a program which goes on could not be interrupted.
    """
    loop = asyncio.get_running_loop()
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in before:
        loop.add_signal_handler(number, call)
    try:
        yield
    finally:
        for number, handler in before.items():
            loop.remove_signal_handler(number)
            if handler is not None:  # None: not Python's
                signal.signal(number, handler)
