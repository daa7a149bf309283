"""Free blocks as runs: where the extents of the contiguous KV cache find their places."""

from __future__ import annotations

from bisect import bisect_left, bisect_right

__all__ = ["Holes"]


class Holes:
    """The free blocks as maximal runs, in ascending order. Every operation is O(runs), at most one more than extents.

    Args:
        n_blocks: all of them free at first.
    """

    def __init__(self, n_blocks: int) -> None:
        self.n_free = n_blocks
        self._starts = [0]
        self._sizes = [n_blocks]

    @property
    def largest(self) -> int:
        """Blocks of the largest run."""
        return max(self._sizes, default=0)

    def largest_with(self, start: int, size: int) -> int:
        """Blocks of the largest run, if the `size` blocks from `start` on, which are taken, were free."""
        i = bisect_left(self._starts, start)
        joined = size
        if i > 0 and self._starts[i - 1] + self._sizes[i - 1] == start:
            joined += self._sizes[i - 1]
        if i < len(self._starts) and self._starts[i] == start + size:
            joined += self._sizes[i]
        return max(joined, self.largest)

    def has(self, start: int, size: int) -> bool:
        """Whether the `size` blocks from `start` on are all free."""
        i = bisect_right(self._starts, start) - 1
        return size == 0 or (i >= 0 and self._starts[i] + self._sizes[i] >= start + size)

    def take(self, size: int) -> int | None:
        """Take `size` consecutive blocks from the first run that has them; the first of them (0 for a size of 0), None
        where no run is that long."""
        if size == 0:
            return 0
        for i, run in enumerate(self._sizes):
            if run >= size:
                start = self._starts[i]
                self._shorten(i, size)
                return start
        return None

    def take_at(self, start: int, size: int) -> bool:
        """Take the `size` blocks from `start` on; False, and nothing happens, where they aren't all free."""
        i = bisect_right(self._starts, start) - 1
        if i < 0 or self._starts[i] + self._sizes[i] < start + size:
            return False
        before = start - self._starts[i]
        if before:
            self._starts.insert(i, self._starts[i])
            self._sizes.insert(i, before)
            i += 1
            self._starts[i] = start
            self._sizes[i] -= before
        self._shorten(i, size)
        return True

    def give(self, start: int, size: int) -> None:
        """Free the `size` blocks from `start` on, and join them with the runs before and behind."""
        i = bisect_left(self._starts, start)
        overlaps = (i > 0 and self._starts[i - 1] + self._sizes[i - 1] > start) or (
            i < len(self._starts) and start + size > self._starts[i]
        )
        if overlaps:
            raise RuntimeError(f"blocks {start} .. {start + size - 1} are freed, some of which are free")
        self._starts.insert(i, start)
        self._sizes.insert(i, size)
        self.n_free += size
        for left in (i, i - 1):
            if 0 <= left < len(self._starts) - 1 and (
                self._starts[left] + self._sizes[left] == self._starts[left + 1]
            ):
                self._sizes[left] += self._sizes.pop(left + 1)
                del self._starts[left + 1]

    def _shorten(self, i: int, size: int) -> None:
        self.n_free -= size
        if self._sizes[i] == size:
            del self._starts[i], self._sizes[i]
        else:
            self._starts[i] += size
            self._sizes[i] -= size
