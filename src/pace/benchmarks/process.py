"""What the operating system knows about this process."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path

__all__ = ["age_s", "peak_rss_bytes", "rss_bytes"]


def age_s() -> float:
    """Seconds since this process was started, the interpreter's own start included."""
    # The name in field 2 may hold anything, spaces and brackets too; what follows it doesn't.
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    started_s = int(fields[19]) / os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - started_s


def rss_bytes() -> int:
    """Bytes of memory that are mapped now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_rss_bytes() -> int:
    """The most that was ever mapped."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
