"""What steps of the target and passes of the draft cost, learnt from those that run."""

from __future__ import annotations

import functools
from collections import defaultdict
from typing import Any

import numpy as np
import numpy.typing as npt

from pace.speculative.drafter import Passes

__all__ = ["DraftCost", "F64Array", "StepCost"]

F64Array = npt.NDArray[np.float64]

WEIGHT, WEIGHT_SLOW = 0.15, 0.5
"""Of the newest time in an average, and in that of how slow the machine is."""

FREE_ROWS, ROW_SHARE = 16, 0.02
"""What is believed of a model before it has run: so many rows wait for its weights alone, each costing this much of the
first one's time; beyond, a step takes as long as it has rows."""

FIRST_TIMES, TABLE_EVERY = 16, 4
"""Estimates are made anew after each of the first times, then after every fourth: to ask for one costs 5 us then, not 50,
and a step of the embedded model takes 400."""


class _Steady:
    """A moving average of times that a single one out of line does not move: each is the median of the newest three, to
    begin with the least.

    A machine that stands still for 0.1 s makes one plain step look ten times as dear, and drafting seem to pay until the
    next plain step, 64 rounds later: with averages of the times themselves, runs of 400 steps with a draft that is never
    right, one step in a hundred stalled, came to 0.85 of plain decoding in the median and 0.59 at worst where a row costs
    0.28 steps, now 0.99 and 0.98. (Plain steps also after 4 and 16 rounds brought nothing more.)
    """

    __slots__ = ("_newest", "n", "value")

    def __init__(self) -> None:
        self._newest: list[float] = []
        self.n = 0
        self.value = 0.0

    def add(self, time: float, weight: float = WEIGHT) -> None:
        """One more."""
        self._newest = [*self._newest[-2:], time]
        self.n += 1
        if self.n <= 3:  # the first of its kind finds nothing in the caches
            self.value = min(self._newest)
        else:
            self.value += max(weight, 1 / (self.n - 2)) * (sorted(self._newest)[1] - self.value)


class _RowCost:
    """Seconds by rows on a machine that is not slow: what was believed before, times what was measured near it."""

    def __init__(self) -> None:
        self._ratios: defaultdict[int, _Steady] = defaultdict(_Steady)  # by rows: seconds / believed
        self._n = self._n_then = 0  # times added, and when the table was made
        self._table: F64Array = np.zeros(0)  # by rows

    def __bool__(self) -> bool:
        return bool(self._ratios)

    def ratio(self, n_rows: int) -> _Steady:
        """Of steps with about so many rows."""
        return self._ratios[n_rows if n_rows <= 2 * FREE_ROWS else n_rows // 8 * 8]

    def add(self, n_rows: int, seconds: float) -> None:
        """n_rows took so long."""
        self.ratio(n_rows).add(seconds / _believed_of(n_rows))
        self._n += 1

    def seconds(self, n_rows: npt.NDArray[np.floating | np.integer]) -> F64Array:
        """Estimates for the nearest whole numbers of rows, f64 [n]."""
        at = np.rint(n_rows).astype(np.intp)
        most = int(at.max())
        if most >= len(self._table) or self._n - self._n_then >= (
            1 if self._n <= FIRST_TIMES else TABLE_EVERY
        ):
            self._n_then = self._n
            self._table = self._estimates(np.arange(max(1 << most.bit_length(), len(self._table))))
        estimates: F64Array = self._table[at]
        return estimates

    def _estimates(self, n_rows: npt.NDArray[np.integer]) -> F64Array:
        rows = sorted(self._ratios)
        ratios = [self._ratios[row].value for row in rows]
        n_rows = np.maximum(n_rows, 1)
        estimates: F64Array = _believed(n_rows) * np.interp(np.log(n_rows), np.log(rows), ratios)
        return estimates


class StepCost:
    """Seconds of a step of the target by its rows, as slow as the machine is now.

    That is known from any step, so that times of different moments can be compared: while speculation runs, a plain step
    is one of 64, and what others cost changes by the minute where a VM's neighbours work. In simulated runs of 1000 steps
    on a machine that becomes up to 2 or 4 times as slow for some 30 or 300 of them, in the whole or for few rows more than
    for many, the worst of 240 came to 0.71 to 0.93 of plain decoding without, now to 0.86 to 0.95; the median stayed.
    (Weights of 0.15, 0.3 and 1 instead of 0.5 and medians of the newest five: worse at worst, to 0.77.)
    """

    def __init__(self) -> None:
        self._slow = _Steady()  # seconds / what they should have been
        self._rows = _RowCost()
        self.n_steps = 0

    def observe(self, n_rows: int, seconds: float) -> None:
        """A step of n_rows took so long."""
        self.n_steps += 1
        ratio = self._rows.ratio(n_rows)
        if ratio.n > 1:
            self._slow.add(seconds / (_believed_of(n_rows) * ratio.value), WEIGHT_SLOW)
        self._rows.add(n_rows, seconds / self.slow)

    @property
    def slow(self) -> float:
        """How slow the machine is now: times of one moment by this compare with those of another."""
        return self._slow.value if self._slow.n else 1.0

    def seconds(self, n_rows: npt.NDArray[Any]) -> F64Array:
        """Estimates for steps of so many rows each, f64 [n]."""
        return self.slow * self._rows.seconds(n_rows)


class DraftCost:
    """Seconds of a drafter by what it guesses, as slow as the target's machine is now.

    Args:
        target: knows how slow.
        passes: of the drafter, see `Drafter`.
    """

    def __init__(self, target: StepCost, passes: Passes) -> None:
        self._passes = passes
        self._target = target
        self._rows = _RowCost()  # of a pass
        self._is_cold = True

    @property
    def is_known(self) -> bool:
        """Whether it has guessed."""
        return bool(self._rows)

    @property
    def depends_on_guesses(self) -> bool:
        """Whether more of them cost more."""
        return self._passes != "none"

    def observe(self, n_seqs: int, n_passes: int, n_rows: int, seconds: float) -> None:
        """Guesses of n_seqs sequences took so long, in so many passes and rows, those of prompts included.

        Without a model the very first do not count: they find nothing in the caches, take two to ten times as long, and
        whole runs of the embedded model were decoded plainly for that. A model's count, as one trial more of it is dear.
        """
        if self._passes == "none":
            if self._is_cold:
                self._is_cold = False
                return
            n_passes, n_rows = 1, n_seqs
        self._rows.add(n_rows // n_passes, seconds / n_passes / self._target.slow)

    def seconds(self, n_seqs: int, n_guesses: npt.NDArray[np.integer], n_tokens: F64Array) -> F64Array:
        """Estimates, f64 [n]; 0 until it has guessed.

        Args:
            n_seqs: sequences that get guesses.
            n_guesses: of each of them, [n].
            n_tokens: that each of them has grown by since the last pass, [n].
        """
        if not self.is_known:
            return np.zeros(len(n_guesses))
        if self._passes == "one":
            return self._target.slow * self._rows.seconds(n_seqs * (n_guesses - 1 + n_tokens))
        each = self._target.slow * self._rows.seconds(np.array([n_seqs]))
        return each * (n_guesses if self._passes == "many" else np.ones(len(n_guesses)))


def _believed(n_rows: npt.NDArray[Any]) -> F64Array:
    free = 1 + ROW_SHARE * (np.minimum(n_rows, FREE_ROWS) - 1)
    cost: F64Array = free * np.maximum(1.0, n_rows / FREE_ROWS)
    return cost


@functools.lru_cache(4096)
def _believed_of(n_rows: int) -> float:
    return float(_believed(np.array([n_rows]))[0])
