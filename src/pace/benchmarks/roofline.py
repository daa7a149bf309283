"""The machine's roofs: memory-read bandwidth and dot-product peaks, for each thread count."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any, NamedTuple

from pace import ops
from pace.benchmarks.cost import Cost

__all__ = [
    "DOT_KINDS",
    "READ_BYTES",
    "Roofs",
    "StepRoofs",
    "format_roofs",
    "measure",
    "measure_dot",
    "measure_read",
    "measure_step",
]

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


class StepRoofs(NamedTuple):
    """What a step can be held against.

    Args:
        read: bytes/s.
        bf16, int8: operations/s of either dot product.
    """

    read: float
    bf16: float
    int8: float

    def dot_s(self, cost: Cost) -> float:
        """Seconds of the products, each at the roof of the rows that its matrix meets."""
        return (cost.n_flops - cost.n_int8) / self.bf16 + cost.n_int8 / self.int8

    def dot(self, cost: Cost) -> float:
        """Operations/s that this makes of them together."""
        return cost.n_flops / self.dot_s(cost) if cost.n_flops else self.bf16

    def mean(self, other: StepRoofs) -> StepRoofs:
        """Of two measurements."""
        return StepRoofs(*((a + b) / 2 for a, b in zip(self, other, strict=True)))


def measure_step(team: ops.Team) -> StepRoofs:
    """All of them, once."""
    return StepRoofs(measure_read(team), measure_dot(team, "bf16"), measure_dot(team, "int8"))


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
