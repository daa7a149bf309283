"""Sample and match: whether a guess stands."""

from __future__ import annotations

import random
from collections.abc import Sequence

__all__ = ["Match", "SyntheticMatch"]


class Match:
    """A guess stands where the target draws the same token.

    The draw is the request's own: its sampler, penalties and bans behind the guesses before this one, and the random number
    of this position. So what stands is what plain decoding would have drawn. For one guess per position this is the
    rejection sampling of speculative decoding: a token is accepted with the probability that the target gives it.
    """

    is_synthetic = False

    def accepts(self, drafted: int, drawn: int, i: int) -> bool:
        """Whether the i-th guess of a draft stands."""
        return drafted == drawn


class SyntheticMatch(Match):
    """Accepts guesses with given probabilities, whatever they are: for timing real shapes without a trained draft.

    Args:
        rates: one probability for all positions, or one for each; the last one holds for those beyond. Each is given that
            the guesses before it stand.
    """

    is_synthetic = True

    def __init__(self, rates: float | Sequence[float]) -> None:
        self._rates = [rates] if isinstance(rates, float) else list(rates)
        self._random = random.Random(0)

    def accepts(self, drafted: int, drawn: int, i: int) -> bool:
        """Whether the i-th guess of a draft stands."""
        return self._random.random() < self._rates[min(i, len(self._rates) - 1)]
