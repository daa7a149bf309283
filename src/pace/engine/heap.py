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

    An item is in the heap once at most; it need not have an order. The entries hold numbers, not items: tuples of numbers
    are nothing that the garbage collector walks.
    """

    __slots__ = ("_heap", "_items", "_next", "_numbers")

    def __init__(self) -> None:
        self._heap: list[tuple[Any, int]] = []  # keys and numbers
        self._items: dict[int, T] = {}  # by number; those of dead entries are not there
        self._numbers: dict[T, int] = {}
        self._next = itertools.count()  # an item that comes back meets its own dead entry

    def __len__(self) -> int:
        """Items, the dead entries not among them."""
        return len(self._items)

    def __contains__(self, item: T) -> bool:
        return item in self._numbers

    def push(self, key: object, item: T) -> None:
        """Add an item that is not in the heap."""
        number = next(self._next)
        self._items[number] = item
        self._numbers[item] = number
        heapq.heappush(self._heap, (key, number))

    def peek(self) -> T | None:
        """The item with the smallest key; None where there is none."""
        heap = self._heap
        while heap:
            item = self._items.get(heap[0][1])
            if item is not None:
                return item
            heapq.heappop(heap)
        return None

    def peek_key(self) -> Any:
        """The smallest key; None where there is none."""
        return None if self.peek() is None else self._heap[0][0]

    def discard(self, item: T) -> None:
        """Take an item out, if it is there."""
        number = self._numbers.pop(item, None)
        if number is None:
            return
        del self._items[number]
        if self._heap[0][1] == number:
            self.peek()  # drops it: who is let go in order leaves nothing that makes a rebuilding necessary
            return
        n_dead = len(self._heap) - len(self._items)
        if n_dead > MIN_DEAD and n_dead > len(self._items):
            self._heap = [entry for entry in self._heap if entry[1] in self._items]
            heapq.heapify(self._heap)
