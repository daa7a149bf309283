"""The thread team, and the roofs that it measures."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from pace._ext import _kernels
from pace.errors import ConfigError


class Team:
    """Persistent threads that run a plan's steps; the caller is one of them.

    Args:
        n_threads: workers, the caller included.
        cpus: one CPU number per worker to pin them, or None.
    """

    def __init__(self, n_threads: int, cpus: Sequence[int] | None = None) -> None:
        try:
            self._team = _kernels.Team(n_threads, None if cpus is None else list(cpus))
        except (ValueError, OSError) as error:
            raise ConfigError(str(error)) from None
        self.n_threads = n_threads

    def close(self) -> None:
        """End the threads. A later step on this team raises RuntimeError."""
        self._team.close()


def roof_read(team: Team, n_bytes: int, repeat: int = 1) -> float:
    """Memory-read roof of the team in bytes/s: `repeat` passes over `n_bytes` of fresh memory, best vectors."""
    return team._team.roof_read(_read_buffer(n_bytes), repeat)


_buffers: dict[int, _kernels.Memory] = {}


def _read_buffer(n_bytes: int) -> _kernels.Memory:
    if n_bytes not in _buffers:
        _buffers.clear()
        _buffers[n_bytes] = memory = _kernels.Memory(n_bytes)
        # Untouched pages all read one shared zero page, from the cache.
        np.frombuffer(memoryview(memory), np.uint8)[:] = 1
    return _buffers[n_bytes]


def roof_dot(team: Team, kind: str, isa: str | None = None, iterations: int = 2_000_000) -> float:
    """Dot-product roof of the team in operations/s (2 per multiply-add), from registers only.

    Args:
        kind: "bf16", "int8" or "f32".
        isa: the tier whose best instruction is used; None: the chosen one.
    """
    return team._team.roof_dot(kind, isa, iterations)
