"""The library's logger. Importing it sets nothing up; only the command line calls `configure`."""

from __future__ import annotations

import logging

from pace.config import PACE_LOG_LEVEL
from pace.console import err

__all__ = ["configure", "logger"]

logger = logging.getLogger("pace")
logger.addHandler(logging.NullHandler())  # silent unless the embedding program, or `configure`, asks


class _StderrHandler(logging.Handler):
    """Marks the handler that `configure` owns, so that a second call replaces it rather than adding one."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            err(self.format(record))
        except Exception:  # arguments that don't fit their format; as the standard handlers do
            self.handleError(record)


def configure(level: str | None = None) -> None:
    """Log to stderr at `level`; for programs, never for the library. Calling it again changes the level.

    Args:
        level: debug, info, warning, error or critical; None: what PACE_LOG_LEVEL says, else warning.

    Raises:
        ConfigError: the level isn't one of these.
    """
    name = PACE_LOG_LEVEL.get() if level is None else PACE_LOG_LEVEL.parse(level)
    for handler in [handler for handler in logger.handlers if isinstance(handler, _StderrHandler)]:
        logger.removeHandler(handler)
    handler = _StderrHandler()
    handler.setFormatter(logging.Formatter("pace %(levelname)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(name.upper())
    logger.propagate = False  # the program's own root handler would print every line a second time
