"""What may follow a text of token ids, judged by the text itself."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import Final, NamedTuple

from pace._ext import _kernels
from pace.models.plan import I32Array as I32

SUFFIX_ORDER: Final = _kernels.SUFFIX_ORDER
"""Longest context, in tokens, that a `SuffixIndex` tells apart."""

SUFFIX_BREAK: Final = _kernels.SUFFIX_BREAK
"""In place of a token: a text ends here and another one begins. It is never guessed."""

_SEED: Final = int.from_bytes(os.urandom(8), "little")  # of the hash tables; results don't depend on it


class SuffixGuess(NamedTuple):
    """What probably follows."""

    token_ids: list[int]
    confidences: list[float]  # of each, given that those before it are right
    expected: float  # how many of them will be right
    match: int  # length of the context that they followed last time, in tokens, at most SUFFIX_ORDER


class SuffixIndex:
    """A growing text, and how often each token followed each of its contexts: an incremental suffix automaton.

    Adding a token takes less than a microsecond and costs about 110 bytes, 250 at most. Not for several threads at once.
    """

    def __init__(self) -> None:
        self._suffixes = _kernels.Suffixes(_SEED)

    @property
    def nbytes(self) -> int:
        """Memory that it holds."""
        return self._suffixes.nbytes

    def __len__(self) -> int:
        """Tokens of the text."""
        return self._suffixes.n_tokens

    def add(self, tokens: I32) -> None:
        """Append tokens, i32 [n], to the text.

        Raises:
            ValueError: the text would have more than 2^28.
            MemoryError: there is no memory; the index can't be used any more.
        """
        self._suffixes.add(tokens)

    def propose(
        self,
        max_tokens: int,
        *,
        min_match: int = 1,
        least: float = 0.0,
        context: I32 | None = None,
        past: Iterable[SuffixIndex] = (),
    ) -> SuffixGuess:
        """Guess what follows.

        Args:
            max_tokens: how many tokens at most, 0 .. 256.
            min_match: length of the shortest context that counts, >= 1.
            least: the guess ends before a token that is right, with all before it, with a probability below this.
            context: i32 [n], what the guess shall follow; None: the text. Of a long one the last SUFFIX_ORDER matter.
            past: further indexes that are asked the same; the guess that promises most is taken, of equal ones the first.
        """
        others = tuple([index._suffixes for index in past])
        return SuffixGuess(*self._suffixes.propose(context, min_match, max_tokens, least, others))
