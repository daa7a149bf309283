"""ISA tiers and the machine: what runs here, and which kernels are chosen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pace._ext import _kernels
from pace.config import PACE_ISA
from pace.errors import ConfigError


def isas() -> list[str]:
    """ISA tiers that this CPU and operating system execute, best first."""
    return _kernels.runnable()


def tiers() -> list[tuple[str, str | None]]:
    """Every compiled tier, best first, with what is missing here to run it (None: it runs)."""
    return _kernels.tiers()


def isa() -> str:
    """The tier whose kernels run unless an engine chooses others."""
    return _kernels.isa() or ""


def use_isa(name: str | None) -> None:
    """Make `name` the tier of everything built from now on; None: the best that runs.

    Raises:
        ConfigError: the tier is unknown or does not run here; the message lists those that do.
    """
    try:
        _kernels.use_isa(name if name is not None else isas()[0])
    except ValueError as error:
        raise ConfigError(str(error)) from None


@contextmanager
def using_isa(name: str) -> Iterator[None]:
    """`use_isa(name)` for the length of a with block."""
    before = isa()
    use_isa(name)
    try:
        yield
    finally:
        use_isa(before)


def _select() -> None:
    if not isas():
        missing = dict(_kernels.tiers())["avx2"]
        raise ImportError(
            f"pace needs an x86-64 CPU with AVX2, FMA and F16C (Intel Haswell, AMD Zen or newer); this one lacks {missing}"
        )
    try:
        use_isa(PACE_ISA.get())
    except ConfigError as error:
        raise ImportError(str(error)) from None


_select()


def cpu_info() -> dict[str, Any]:
    """What the machine is: vendor, brand, features, caches in bytes, threads and why that many, huge pages, NUMA."""
    return _kernels.cpu()


def default_threads() -> tuple[int, str]:
    """Threads an engine takes by default, and one line that says why."""
    info = _kernels.cpu()
    return info["threads"], info["threads_why"]
