"""The machine's roofs: memory-read bandwidth and dot-product peaks, for each thread count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from pace import ops

__all__ = ["DOT_KINDS", "READ_BYTES", "Roofs", "format_roofs", "measure", "measure_dot", "measure_read"]

DOT_KINDS = ("bf16", "int8", "f32")

READ_BYTES = 512 << 20
"""Far beyond any L3, and read in 10 ms: short enough to stand between two steps of a benchmark."""


@dataclass(frozen=True)
class Roofs:
    """Medians for one team.

    Attributes:
        read: bytes/s.
        dot: operations/s (2 per multiply-add) by kind of dot product.
    """

    n_threads: int
    isa: str
    read: float
    dot: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        """As a plain dict."""
        return asdict(self)


def measure_read(team: ops.Team) -> float:
    """Bytes/s that the team reads from memory, once."""
    return ops.roof_read(team, READ_BYTES)


def measure_dot(team: ops.Team, kind: str = "bf16") -> float:
    """Operations/s of the chosen tier's dot product, once."""
    return ops.roof_dot(team, kind)


def measure(n_threads: Sequence[int], cpus: Sequence[int] | None = None, repeat: int = 5) -> list[Roofs]:
    """Measure every thread count; medians of `repeat` runs.

    Raises:
        ConfigError: more threads than `cpus`, or threads that can't be started.
    """
    results = []
    for n in n_threads:
        team = ops.Team(n, None if cpus is None else cpus[:n])
        try:
            read = median(measure_read(team) for _ in range(repeat))
            dot = {kind: median(measure_dot(team, kind) for _ in range(repeat)) for kind in DOT_KINDS}
        finally:
            team.close()
        results.append(Roofs(n, ops.isa(), read, dot))
    return results


def format_roofs(results: Sequence[Roofs]) -> str:
    """A table for people."""
    lines = [f"{'threads':>7} {'read GB/s':>10} " + " ".join(f"{kind + ' GOP/s':>12}" for kind in DOT_KINDS)]
    for roofs in results:
        dots = " ".join(f"{roofs.dot[kind] / 1e9:12.0f}" for kind in DOT_KINDS)
        lines.append(f"{roofs.n_threads:7d} {roofs.read / 1e9:10.1f} {dots}")
    return "\n".join([f"tier {results[0].isa}" if results else "", *lines])
