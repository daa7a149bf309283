"""What the operating system knows about this process."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

from pace.errors import ConfigError

__all__ = ["age_s", "peak_rss_bytes", "rss_bytes"]


def age_s() -> float:
    """Seconds since this process was started, the interpreter's own start included.

    Raises:
        ConfigError: there is no /proc.
    """
    # The name in field 2 may hold anything, spaces and brackets too; what follows it doesn't.
    fields = _read("/proc/self/stat").rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s


def rss_bytes() -> int:
    """Bytes of memory that are mapped now."""
    return int(_read("/proc/self/statm").split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror or error}; benchmarks need /proc, mount it") from None


def peak_rss_bytes() -> int:
    """The most that was ever mapped."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
