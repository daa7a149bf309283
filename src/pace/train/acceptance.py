"""What a draft would have had accepted: counted on the target's own outputs, without running the target again.

Speculation never changes an output, so the output is known beforehand. A round at a place of it accepts the leading guesses
that equal what follows, and the target adds one token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Acceptance", "count"]


@dataclass(frozen=True)
class Acceptance:
    """Counts over all rounds.

    Attributes:
        n_tokens: tokens committed.
        n_rounds: passes of the target that they took.
        accepted: i64[K]: rounds that accepted at least 1, 2, ... K guesses.
        proposed: i64[K]: rounds that had so many tokens before the end of the output.
    """

    n_tokens: int
    n_rounds: int
    accepted: npt.NDArray[np.int64]
    proposed: npt.NDArray[np.int64]

    @property
    def length(self) -> float:
        """Mean tokens committed per round, the target's own one included."""
        return self.n_tokens / max(1, self.n_rounds)

    @property
    def by_depth(self) -> list[float]:
        """For each depth the share of rounds whose guesses were right up to it."""
        return [float(a / max(1, p)) for a, p in zip(self.accepted, self.proposed, strict=True)]

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "acceptance_length": self.length,
            "accepted_by_position": self.by_depth,
            "n_tokens": self.n_tokens,
            "n_rounds": self.n_rounds,
        }


def count(outputs: Sequence[npt.NDArray[np.bool_]], k: int) -> Acceptance:
    """Walk over outputs as decoding does.

    Args:
        outputs: for each one bool[n, K]: whether guess j made at place i, from the tokens before i, equals token i + j.
            Guesses beyond the end count as wrong.
        k: guesses of a round, at most K.
    """
    n_tokens = n_rounds = 0
    accepted, proposed = np.zeros(k, np.int64), np.zeros(k, np.int64)
    for right in outputs:
        n = len(right)
        runs = np.logical_and.accumulate(right[:, :k], axis=1).sum(1)  # i64[n]: leading right guesses
        at = 0
        while at < n:
            run = min(int(runs[at]), n - at)
            accepted[:run] += 1
            proposed[: n - at] += 1
            n_rounds += 1
            at += run + 1
        n_tokens += n
    return Acceptance(n_tokens, n_rounds, accepted, proposed)
