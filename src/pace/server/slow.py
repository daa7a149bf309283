"""Clients that take nothing of what they have asked for."""

from __future__ import annotations

import time
from typing import Protocol

__all__ = ["SlowClients"]


class Stream(Protocol):
    """What is watched."""

    sending_since: float | None

    def drop(self) -> None:
        """End it."""


class SlowClients:
    """Ends streams whose clients have taken nothing for a while; memory and a sequence's KV cache wait for them.

    Args:
        timeout_s: how long a client may take nothing.
    """

    def __init__(self, timeout_s: float) -> None:
        self.timeout_s = timeout_s
        self.streams: set[Stream] = set()

    def end_slow(self) -> None:
        """Look at all streams; called every second or so."""
        too_old = time.monotonic() - self.timeout_s
        for stream in list(self.streams):
            if stream.sending_since is not None and stream.sending_since < too_old:
                stream.drop()
