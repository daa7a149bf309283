"""Sequences that wait to run."""

from __future__ import annotations

from pace.engine.heap import LazyHeap
from pace.engine.sequence import Sequence

__all__ = ["WaitingQueue"]

MAX_SKIPPED = 16
"""Cancelled sequences that one look passes over: 20 000 of them would take 100 ms of a step. Behind more of them nobody
starts before the next step, which finds fewer."""


class WaitingQueue:
    """Sequences by (priority, arrival), and by (priority, length) for those that may go first because they are short.

    A sequence that was cancelled is not given out any more.
    """

    def __init__(self) -> None:
        self._by_key: LazyHeap[Sequence] = LazyHeap()
        self._by_length: LazyHeap[Sequence] = LazyHeap()

    def __len__(self) -> int:
        return len(self._by_key)

    def add(self, seq: Sequence) -> None:
        """Add a sequence that is not in the queue."""
        self._by_key.push(seq.key, seq)
        self._by_length.push((seq.priority, seq.n_tokens, seq.key), seq)

    def discard(self, seq: Sequence) -> None:
        """Take a sequence out, if it is there."""
        self._by_key.discard(seq)
        self._by_length.discard(seq)

    def head(self) -> Sequence | None:
        """Who is next."""
        return self._first(self._by_key)

    def shortest(self) -> Sequence | None:
        """Who has the fewest tokens to run, of those with the best priority."""
        return self._first(self._by_length)

    def _first(self, heap: LazyHeap[Sequence]) -> Sequence | None:
        for _ in range(MAX_SKIPPED):
            seq = heap.peek()
            if seq is None or not seq.cancelled:
                return seq
            self.discard(seq)
        return None
