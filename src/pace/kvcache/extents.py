"""Extents of consecutive blocks, one per sequence: the contiguous KV cache.

The kernels need no table to read it, only where the extent begins. The price: nothing is shared, a sequence that outgrows
its place is copied elsewhere, and free blocks between two extents may be too few for a third.

Growth in segments of about the square root of the longest sequence is AMD PACE's idea (BMC, "balanced memory and
compute"): growing token by token would copy a sequence of n tokens O(n) times, allocating the longest at once wastes memory
that is never used, and sqrt(n) segments balance the two. Here a segment costs a copy only where the blocks behind the
extent are taken.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from math import isqrt

import numpy as np

from pace.kvcache.pool import blocks_for, check_sizes
from pace.kvcache.tables import CopyBlock, KVTables, Reuse
from pace.models.plan import I32Array

__all__ = ["ExtentTables", "Holes"]

CLOSED = -1  # in place of a row's capacity: nobody owns the row


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


class ExtentTables(KVTables):
    """One extent per row, `array[row, 0]` being its first block.

    O(1): `extend` within the extent, `commit`. O(rows): `open`, `close`, `truncate`, and `extend` where the blocks behind
    the extent are free; else `extend` moves the row, one copy per block. `fork` copies all of the source when it is opened.
    An extent that was promised is taken whole by `open`: it is never moved, and nothing is available twice.

    Args:
        n_blocks, block_size, max_seqs, max_len, copy: as in `make_tables`.

    Raises:
        ConfigError: a size is out of range.
    """

    def __init__(
        self, n_blocks: int, block_size: int, max_seqs: int, max_len: int, *, copy: CopyBlock
    ) -> None:
        check_sizes(n_blocks, block_size)
        self.n_blocks = n_blocks
        self.block_size = block_size
        self.array: I32Array = np.zeros((max_seqs, 1), dtype=np.int32)
        self._copy = copy
        self._max_blocks = blocks_for(max_len, block_size)
        self._segment = max(1, isqrt(self._max_blocks))  # blocks by which an extent grows
        self._holes = Holes(n_blocks)
        self._free_rows = list(range(max_seqs - 1, -1, -1))
        self._capacity = [CLOSED] * max_seqs  # tokens of the extent
        self._n_tokens = [0] * max_seqs  # tokens of it that may be written: what a move copies
        self._promise = [0] * max_seqs  # blocks that the row keeps when it shrinks
        self._epoch = 0  # of changes; a `fork` is valid for one
        self._n_copies = self._n_moves = 0

    @property
    def n_free(self) -> int:
        """Blocks of no extent."""
        return self._holes.n_free

    @property
    def n_available(self) -> int:
        """As `n_free`: a promise is kept by taking the blocks. No extent can be longer than the longest run of them."""
        return self._holes.n_free

    @property
    def n_open(self) -> int:
        """Rows in use."""
        return len(self._capacity) - len(self._free_rows)

    def open(self, reserve: int, reuse: Reuse | None = None, salt: str | None = None) -> int | None:
        """Take a row; see `KVTables.open`. Nothing is indexed, so the salt has no effect."""
        if reuse is not None and reuse.epoch != self._epoch:
            raise RuntimeError("the tables have changed since this fork; fork again")
        n_tokens = 0 if reuse is None else reuse.n_tokens
        promise = blocks_for(reserve, self.block_size)
        need = max(promise, blocks_for(n_tokens, self.block_size))
        self._check_len(need)
        start = self._holes.take(need) if self._free_rows else None
        if start is None:
            return None
        row = self._free_rows.pop()
        self._epoch += 1
        self.array[row, 0] = start
        self._capacity[row] = need * self.block_size
        self._n_tokens[row] = n_tokens
        self._promise[row] = promise
        if reuse is not None:
            for i, block in enumerate(reuse.blocks):
                self._copy(block, start + i, self.block_size)
            if reuse.n_tail:
                self._copy(reuse.tail, start + len(reuse.blocks), reuse.n_tail)
            self._n_copies += blocks_for(n_tokens, self.block_size)
        return row

    def extend(self, row: int, n_tokens: int) -> bool:
        """Let the row hold `n_tokens`; see `KVTables.extend`."""
        if n_tokens > self._capacity[row] and not self._grow(row, n_tokens):
            return False
        if n_tokens > self._n_tokens[row]:
            self._n_tokens[row] = n_tokens
        return True

    def truncate(self, row: int, n_tokens: int) -> None:
        """Let the row hold only its first `n_tokens`; see `KVTables.truncate`. The extent keeps whole segments."""
        held = self._held(row, n_tokens)
        self._epoch += 1
        keep = max(self._promise[row], min(held, self._in_segments(blocks_for(n_tokens, self.block_size))))
        if keep < held:
            self._holes.give(int(self.array[row, 0]) + keep, held - keep)
            self._capacity[row] = keep * self.block_size
        self._n_tokens[row] = min(self._n_tokens[row], n_tokens)

    def close(self, row: int, tokens: I32Array | None = None, forget: bool = False) -> None:
        """Free the row; see `KVTables.close`. Nothing is remembered, so there is nothing to forget."""
        held = self._held(row, 0)
        self._epoch += 1
        if held:
            self._holes.give(int(self.array[row, 0]), held)
        self._capacity[row] = CLOSED
        self._free_rows.append(row)

    def commit(self, row: int, tokens: I32Array, n_valid: int) -> None:
        """Nothing: extents are not indexed."""

    def remember_tail(self, row: int, tokens: I32Array, n_valid: int) -> None:
        """Nothing: extents are not indexed."""

    def match(self, tokens: I32Array, salt: str | None, limit: int) -> Reuse | None:
        """None: extents are not indexed."""
        return None

    def fork(self, row: int, n_tokens: int) -> Reuse:
        """The first `n_tokens` of a live row, all of which `open` copies; see `KVTables.fork`."""
        self._held(row, n_tokens)
        start = int(self.array[row, 0])
        whole, n_tail = divmod(n_tokens, self.block_size)
        tail = start + whole if n_tail else -1
        return Reuse(n_tokens, tuple(range(start, start + whole)), tail, n_tail, 0, (), self._epoch)

    def release_before(self, row: int, position: int) -> None:
        """Nothing: an extent keeps its head, because its other blocks are counted from there."""

    def fits(self, n_tokens: int, headroom: int = 0, reuse: Reuse | None = None) -> bool:
        """Whether a row of `n_tokens` could be opened now; see `KVTables.fits`."""
        n_tokens = max(n_tokens, 0 if reuse is None else reuse.n_tokens)
        need = blocks_for(n_tokens, self.block_size)
        return bool(self._free_rows) and need <= self._holes.largest and need + headroom <= self._holes.n_free

    def stats(self) -> dict[str, int]:
        """Counters since the start; see `KVTables.stats`."""
        return {
            "queries": 0,
            "query_tokens": 0,
            "hit_tokens": 0,
            "evictions": 0,
            "copies": self._n_copies,
            "moves": self._n_moves,
            "cached_blocks": 0,
        }

    def _held(self, row: int, n_tokens: int) -> int:
        """Blocks of the extent of an open row, which has room for n_tokens."""
        if not 0 <= row < len(self._capacity) or self._capacity[row] == CLOSED:
            raise RuntimeError(f"row {row} is not open")
        if n_tokens > self._capacity[row]:
            raise RuntimeError(f"row {row} has no {n_tokens} tokens, it holds up to {self._capacity[row]}")
        return self._capacity[row] // self.block_size

    def _check_len(self, n_blocks: int) -> None:
        if n_blocks > self._max_blocks:
            raise RuntimeError(f"a row can't hold {n_blocks} blocks, max_len is {self._max_blocks} of them")

    def _in_segments(self, n_blocks: int) -> int:
        """n_blocks, rounded up to whole segments, of which the last one ends at max_len."""
        return min(blocks_for(n_blocks, self._segment) * self._segment, self._max_blocks)

    def _grow(self, row: int, n_tokens: int) -> bool:
        """Extend in place by whole segments, or by what is needed; else move to where either fits."""
        held = self._held(row, 0)
        need = blocks_for(n_tokens, self.block_size)
        self._check_len(need)
        start = int(self.array[row, 0])
        sizes = (self._in_segments(need), need)
        for size in sizes:
            if held and self._holes.take_at(start + held, size - held):
                self._epoch += 1
                self._capacity[row] = size * self.block_size
                return True
        # The old place is given up first: the new one may overlap it.
        if held:
            self._holes.give(start, held)
        for size in sizes:
            place = self._holes.take(size)
            if place is not None:
                self._epoch += 1
                self._move(start, place, self._n_tokens[row])
                self.array[row, 0] = place
                self._capacity[row] = size * self.block_size
                return True
        if held:
            self._holes.take_at(start, held)
        return False

    def _move(self, src: int, dst: int, n_tokens: int) -> None:
        """Copy the blocks of n_tokens in the order in which none is overwritten before it is copied."""
        n_blocks = blocks_for(n_tokens, self.block_size)
        for i in range(n_blocks) if dst < src else range(n_blocks - 1, -1, -1):
            self._copy(src + i, dst + i, min(self.block_size, n_tokens - i * self.block_size))
        self._n_moves += n_blocks
