"""Which CPUs each engine gets: whole NUMA nodes where they suffice, else equal shares of cores that nobody else uses."""

from __future__ import annotations

import os
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from pace.config import parse_cpus
from pace.errors import ConfigError

__all__ = ["nodes_of", "place"]

SYSTEM = Path("/sys/devices/system")


def nodes_of(cpus: Sequence[int], system: Path = SYSTEM) -> list[list[int]]:
    """The given CPUs by NUMA node; one list where the machine does not say."""
    nodes = []
    for folder in sorted((system / "node").glob("node[0-9]*"), key=lambda path: int(path.name[4:])):
        listed = _read(folder / "cpulist")
        members = set(parse_cpus(listed)) & set(cpus) if listed else set()
        if members:
            nodes.append(sorted(members))
    return nodes if nodes and sum(map(len, nodes)) == len(set(cpus)) else [sorted(cpus)]


def place(
    n_engines: int | None, cpus: Sequence[int] | None, n_threads: int, system: Path = SYSTEM
) -> list[tuple[list[int], int]]:
    """Divide the machine.

    Args:
        n_engines: how many; None: one per NUMA node.
        cpus: that may be used; None: those of this process.
        n_threads: of all engines together, at most; respects the cgroup's quota.

    Returns:
        For each engine its CPUs ([]: any, where one engine has them all) and its threads.

    Raises:
        ConfigError: fewer cores than engines.
    """
    allowed = sorted(os.sched_getaffinity(0) if cpus is None else cpus)
    nodes = nodes_of(allowed, system)
    n = len(nodes) if n_engines is None else n_engines
    if n == 1:
        return [([], n_threads)]
    if n != len(nodes):
        cores = [core for node in nodes for core in _cores(node, system)]
        if len(cores) < n:
            raise ConfigError(f"data_parallel is {n}, but there are {len(cores)} cores; give each engine one")
        bounds = [i * len(cores) // n for i in range(n + 1)]
        nodes = [[cpu for core in cores[a:b] for cpu in core] for a, b in pairwise(bounds)]
    return [(node, max(1, min(n_threads // n, len(_cores(node, system))))) for node in nodes]


def _cores(cpus: Sequence[int], system: Path) -> list[list[int]]:
    """CPUs that share a core, together."""
    cores: dict[str, list[int]] = {}
    for cpu in cpus:
        topology = system / "cpu" / f"cpu{cpu}" / "topology"
        core = _read(topology / "core_id")
        name = f"{_read(topology / 'physical_package_id')}/{core}" if core else f"cpu {cpu}"
        cores.setdefault(name, []).append(cpu)
    return list(cores.values())


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
