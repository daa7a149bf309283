"""A heap from which anything can be taken at any time."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Hashable
from typing import Any, Generic, TypeVar

__all__ = ["LazyHeap"]

T = TypeVar("T", bound=Hashable)

MIN_DEAD = 64  # below so many dead entries nothing is rebuilt


class LazyHeap(Generic[T]):
    """Items by key, the smallest first.

    `discard` lets go of an item at once and leaves its entry behind, which is dropped when it reaches the top, or with
    all the others when they are more than the living: every operation is O(log n), a rebuilding spread over those that
    made it necessary.

    An item is in the heap once at most; it need not have an order.
    """

    __slots__ = ("_entries", "_heap", "_numbers")

    def __init__(self) -> None:
        self._heap: list[list[Any]] = []  # [key, number, item]; the item is None in a dead entry
        self._numbers = itertools.count()  # an item that comes back meets its own dead entry
        self._entries: dict[T, list[Any]] = {}

    def __len__(self) -> int:
        """Items, the dead entries not among them."""
        return len(self._entries)

    def __contains__(self, item: T) -> bool:
        return item in self._entries

    def push(self, key: object, item: T) -> None:
        """Add an item that is not in the heap."""
        entry = [key, next(self._numbers), item]
        self._entries[item] = entry
        heapq.heappush(self._heap, entry)

    def peek(self) -> T | None:
        """The item with the smallest key; None where there is none."""
        heap = self._heap
        while heap:
            item: T | None = heap[0][2]
            if item is not None:
                return item
            heapq.heappop(heap)
        return None

    def peek_key(self) -> Any:
        """The smallest key; None where there is none."""
        return None if self.peek() is None else self._heap[0][0]

    def discard(self, item: T) -> None:
        """Take an item out, if it is there."""
        entry = self._entries.pop(item, None)
        if entry is None:
            return
        entry[2] = None
        n_dead = len(self._heap) - len(self._entries)
        if n_dead > MIN_DEAD and n_dead > len(self._entries):
            self._heap = list(self._entries.values())
            heapq.heapify(self._heap)
