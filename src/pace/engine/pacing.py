"""How many prompt tokens a step may read while others wait for their next token."""

from __future__ import annotations

__all__ = ["Pacer"]

STRETCH = 1.8
"""A step that also reads a prompt may take this many times as long as a plain decode step. No gap should exceed 2.5 times
one, and steps on a shared machine vary by a third: at 2.0 the longest gap of a prompt was 2.2 to 2.9 times."""

MAX_READERS = 5
"""Prompts that stretch a step, each by as much as one alone does. Where they share what one gets, a burst of
prompts waits for streams that it outnumbers. `pace serve demo` at 0.8 of its capacity, one thread of Zen 3, first
tokens p50 and p99: shared 29 and 152 ms, so 30 and 105 (in a slower minute 595 and 2302, 53 and 259); a token of a
stream takes 7.6 ms at p99 in place of 4.1. (Runs of 25 s, one of each in either minute.) Four times the stretch for
any two prompts: 39 and 174 ms, and 21.6 ms a token."""

MIN_ROWS = 8
"""Prompt rows of a step at least, so that a prompt always moves on. About as many are free: a decode step waits for
the weights, not for the multipliers. (16 made steps 2.6 times as long on a Zen 4 at the end of a long prompt.)"""

FIRST_ROWS = 32
"""Prompt rows while nothing has been measured."""

WEIGHT = 0.3
"""Of the newest measurement in a moving average."""


class Pacer:
    """Learns what steps cost, and bounds prompt chunks so that the gap between two tokens stays short.

    Two numbers are learnt: how long a step of n decoding rows takes, and what a row costs in steps that are bound by
    arithmetic. How a prompt is cut changes no result (law 1), so wall time may decide it.
    """

    def __init__(self) -> None:
        self._decode_s: dict[int, float] = {}  # seconds of a plain decode step, by the bit length of its rows
        self._row_s: float | None = None  # seconds of a row where rows are what a step waits for

    def observe(self, n_decode: int, n_prompt: int, seconds: float) -> None:
        """A step of `n_decode` decoding and `n_prompt` prompt rows took so long."""
        if n_prompt == 0:
            size = n_decode.bit_length()
            self._decode_s[size] = _average(self._decode_s.get(size), seconds)
            return
        plain_s = self._plain_s(n_decode)
        row_s = seconds / (n_decode + n_prompt)
        if plain_s is None or seconds > 1.2 * plain_s:
            self._row_s = _average(self._row_s, row_s)
        else:  # some of the rows were free: what one costs is no more than this
            self._row_s = row_s if self._row_s is None else min(self._row_s, row_s)

    def allowance(self, n_decode: int, n_waiting: int = 1) -> int:
        """Prompt rows that may run beside `n_decode` decoding ones, while `n_waiting` prompts are read or wait for it."""
        plain_s = self._plain_s(n_decode)
        if plain_s is None or self._row_s is None:
            return FIRST_ROWS
        stretch = 1 + (STRETCH - 1) * min(max(1, n_waiting), MAX_READERS)
        return max(MIN_ROWS, int(stretch * plain_s / self._row_s) - n_decode)

    def _plain_s(self, n_decode: int) -> float | None:
        """Seconds of a decode step of about this many rows; the nearest size that was seen stands in."""
        if not self._decode_s or not n_decode:
            return None
        size = n_decode.bit_length()
        return self._decode_s[min(self._decode_s, key=lambda seen: (abs(seen - size), seen))]


def _average(old: float | None, new: float) -> float:
    return new if old is None else old + WEIGHT * (new - old)
