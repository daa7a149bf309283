"""Extents of consecutive blocks, one per sequence: the contiguous KV cache.

The kernels need no table to read it, only where the extent begins. The price: nothing is shared, a sequence that outgrows
its place is copied elsewhere, and free blocks between two extents may be too few for a third.

Growth in segments of about the square root of the longest sequence is AMD PACE's idea (BMC, "balanced memory and
compute"): growing token by token would copy a sequence of n tokens O(n) times, allocating the longest at once wastes memory
that is never used, and sqrt(n) segments balance the two. Here a segment costs a copy only where the blocks behind the
extent are taken.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

import numpy as np

from pace.kvcache.group import BlockReuse, TokenTables
from pace.kvcache.holes import Holes
from pace.kvcache.pool import blocks_for
from pace.kvcache.tables import CopyBlock, ReleasedError, Reuse
from pace.models.plan import I32Array

__all__ = ["ExtentTables"]

CLOSED = -1  # in place of a row's capacity: nobody owns the row
NEVER = sys.maxsize


@dataclass(slots=True)
class Extent:
    """Where a row lies.

    Attributes:
        start: its first block.
        size: its blocks.
        head: entry of the row's imaginary table that lies at `start`: so far has it slid.
        unseen: leading entries of that table that nobody sees any more, >= head.
        promise: blocks that it keeps when it shrinks.
    """

    start: int
    size: int
    head: int
    unseen: int
    promise: int


class ExtentTables(TokenTables):
    """One extent per row; `array[row, 0]` is the block in which its token 0 lies, or would lie if it hadn't slid.

    O(1): `extend` within the extent, `commit`. O(rows): `open`, `close`, `truncate`, and `extend` where the blocks behind
    the extent are free; else `extend` moves the row, one copy per block. `fork` copies all of the source when it is opened.
    An extent that was promised is taken whole by `open`: it is never moved, and nothing is available twice.

    With a reach an extent grows no longer than what a row holds at once, then it slides: what is seen is copied to its
    beginning. It does that once in `max_step` tokens or more, so a token costs `reach / max_step` copies of a token.

    Args:
        n_blocks, block_size, max_seqs, max_len, copy, reach, max_step: as in `make_tables`.

    Raises:
        ConfigError: a size is out of range.
    """

    def __init__(
        self,
        n_blocks: int,
        block_size: int,
        max_seqs: int,
        max_len: int,
        *,
        copy: CopyBlock,
        reach: int | None = None,
        max_step: int | None = None,
    ) -> None:
        super().__init__(n_blocks, block_size, max_seqs, max_len, reach, max_step)
        self.array: I32Array = np.zeros((max_seqs, 1), dtype=np.int32)
        self.column_tokens = 0
        self._copy = copy
        self._segment = max(1, isqrt(self.max_held))  # blocks by which an extent grows
        self._holes = Holes(n_blocks)
        self._free_rows = list(range(max_seqs - 1, -1, -1))
        self._extents: list[Extent | None] = [None] * max_seqs
        self._capacity = [CLOSED] * max_seqs  # tokens up to the extent's end
        self._n_tokens = [0] * max_seqs  # tokens that may be written: what a move copies
        self._release_at = [NEVER] * max_seqs  # position from which on a further block is unseen
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
        return self.n_rows - len(self._free_rows)

    def open(self, reserve: int, reuse: Reuse | None = None, salt: str | None = None) -> int | None:
        """Take a row; see `KVTables.open`. Nothing is indexed, so the salt has no effect."""
        reuse = self._valid(reuse)
        self._check_len(blocks_for(reserve, self.block_size))
        size = self._size(reserve, reuse)
        start = self._holes.take(size) if self._free_rows else None
        if start is None:
            return None
        row = self._free_rows.pop()
        self._epoch += 1
        first = 0 if reuse is None else reuse.n_released
        promise = self._most(reserve)
        self._extents[row] = extent = Extent(start, size, first, first, promise)
        self._n_tokens[row] = 0
        self._place(row, extent)
        if reuse is not None:
            self._n_tokens[row] = reuse.n_tokens
            blocks = reuse.blocks[first:]
            for i, block in enumerate(blocks):
                self._copy(block, start + i, self.block_size)
            if reuse.n_tail:
                self._copy(reuse.tail, start + len(blocks), reuse.n_tail)
            self._n_copies += len(blocks) + int(reuse.n_tail > 0)
        return row

    def extend(self, row: int, n_tokens: int) -> bool:
        """Let the row hold `n_tokens`; see `KVTables.extend`."""
        if n_tokens > self._capacity[row] and not self._grow(row, n_tokens):
            return False
        if n_tokens > self._n_tokens[row]:
            self._n_tokens[row] = n_tokens
        return True

    def room(self, row: int) -> int:
        """Tokens that the row may hold without further ado."""
        self._extent(row, 0)
        return self._capacity[row]

    def can_extend(self, row: int, n_tokens: int) -> bool:
        """Whether `extend` would succeed now."""
        if n_tokens <= self._capacity[row]:
            return True
        extent = self._extent(row, 0)
        end = blocks_for(n_tokens, self.block_size)
        self._check_len(end)
        whole, slid = end - extent.head, end - extent.unseen
        return (
            (whole <= self.max_held and self._has_behind(extent, whole))
            or slid <= extent.size
            or self._holes.largest_with(extent.start, extent.size) >= slid
        )

    def can_truncate(self, row: int, n_tokens: int) -> bool:
        """Whether the row holds what a query at `n_tokens` sees."""
        return self._extent(row, n_tokens).unseen <= self.reach.unseen_blocks(n_tokens)

    def truncate(self, row: int, n_tokens: int) -> None:
        """Let the row hold only its first `n_tokens`; see `KVTables.truncate`. The extent keeps whole segments."""
        extent = self._extent(row, n_tokens)
        if not self.can_truncate(row, n_tokens):
            raise ReleasedError(
                f"truncate of row {row} to {n_tokens} tokens: the first {extent.unseen * self.block_size} are released, "
                "a query there sees some of them"
            )
        self._epoch += 1
        used = blocks_for(n_tokens, self.block_size) - extent.head
        keep = max(extent.promise, min(extent.size, self._in_segments(used)))
        if keep < extent.size:
            self._holes.give(extent.start + keep, extent.size - keep)
            extent.size = keep
            self._place(row, extent)
        self._n_tokens[row] = min(self._n_tokens[row], n_tokens)

    def close(self, row: int, tokens: I32Array | None = None, forget: bool = False) -> None:
        """Free the row; see `KVTables.close`. Nothing is remembered, so there is nothing to forget."""
        extent = self._extent(row, 0)
        self._epoch += 1
        if extent.size:
            self._holes.give(extent.start, extent.size)
        self._extents[row] = None
        self._capacity[row] = CLOSED
        self._release_at[row] = NEVER
        self._free_rows.append(row)

    def commit(self, row: int, tokens: I32Array, n_valid: int) -> None:
        """Nothing: extents are not indexed."""

    def remember_tail(self, row: int, tokens: I32Array, n_valid: int) -> None:
        """Nothing: extents are not indexed."""

    def find(self, tokens: I32Array, salt: str | None, limit: int) -> None:
        """None: extents are not indexed."""
        return

    def match(self, tokens: I32Array, salt: str | None, limit: int) -> Reuse | None:
        """None: extents are not indexed."""
        return None

    def fork(self, row: int, n_tokens: int) -> Reuse | None:
        """The first `n_tokens` of a live row, which `open` copies; see `KVTables.fork`."""
        extent = self._extent(row, n_tokens)
        first = self.reach.unseen_blocks(n_tokens)
        if extent.unseen > first:
            return None
        whole, n_tail = divmod(n_tokens, self.block_size)
        origin = extent.start - extent.head
        blocks = (0,) * first + tuple(range(origin + first, origin + whole))
        return BlockReuse(n_tokens, blocks, origin + whole if n_tail else -1, n_tail, first, (), self._epoch)

    def release_before(self, row: int, position: int) -> None:
        """Let the extent slide when it must grow next; see `KVTables.release_before`."""
        if position >= self._release_at[row]:
            extent = self._extent(row, 0)
            self._epoch += 1
            end = min(self.reach.unseen_blocks(position), self._capacity[row] // self.block_size)
            extent.unseen = max(extent.unseen, end)
            self._place(row, extent)

    def fits(
        self, n_tokens: int, growing: Sequence[tuple[int, int]] = (), reuse: Reuse | None = None
    ) -> bool:
        """Whether a row of `n_tokens` could be opened now; see `KVTables.fits`."""
        need = self._size(n_tokens, self._valid(reuse))
        return (
            bool(self._free_rows)
            and need <= self._holes.largest
            and need + self._spare(growing) <= self._holes.n_free
        )

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

    def _extent(self, row: int, n_tokens: int) -> Extent:
        """The extent of an open row, which has room for n_tokens."""
        extent = self._extents[row] if 0 <= row < self.n_rows else None
        if extent is None:
            raise RuntimeError(f"row {row} is not open")
        if not 0 <= n_tokens <= self._capacity[row]:
            raise RuntimeError(f"row {row} has no {n_tokens} tokens, it holds up to {self._capacity[row]}")
        return extent

    def _size(self, n_tokens: int, reuse: BlockReuse | None) -> int:
        """Blocks of an extent for n_tokens that begins with `reuse`."""
        size = self._most(n_tokens)
        if reuse is None:
            return size
        return max(size, blocks_for(reuse.n_tokens, self.block_size) - reuse.n_released)

    def _check_len(self, n_blocks: int) -> None:
        if n_blocks > self.max_blocks:
            raise RuntimeError(f"a row can't hold {n_blocks} blocks, max_len is {self.max_blocks} of them")

    def _place(self, row: int, extent: Extent) -> None:
        """Note where an extent lies and ends."""
        self.array[row, 0] = extent.start - extent.head
        self._capacity[row] = min(extent.head + extent.size, self.max_blocks) * self.block_size
        self._release_at[row] = self.reach.position_beyond(extent.unseen)

    def _in_segments(self, n_blocks: int) -> int:
        """n_blocks, rounded up to whole segments, of which the last one ends where no extent needs more."""
        return max(n_blocks, min(blocks_for(n_blocks, self._segment) * self._segment, self.max_held))

    def _has_behind(self, extent: Extent, size: int) -> bool:
        """Whether an extent can have `size` blocks where it lies."""
        return extent.size > 0 and self._holes.has(extent.start + extent.size, size - extent.size)

    def _grow(self, row: int, n_tokens: int) -> bool:
        """Extend in place by whole segments, or by what is needed; else slide; else move to where either fits."""
        extent = self._extent(row, 0)
        end = blocks_for(n_tokens, self.block_size)
        self._check_len(end)
        whole, slid = end - extent.head, end - extent.unseen  # sizes without and with letting go of the head
        if whole <= self.max_held:
            for size in (self._in_segments(whole), whole):
                if self._has_behind(extent, size):
                    self._holes.take_at(extent.start + extent.size, size - extent.size)
                    extent.size = size
                    self._epoch += 1
                    self._place(row, extent)
                    return True
        if slid <= extent.size:
            self._move(row, extent, extent.start, extent.size)
            return True
        # The old place is given up first: the new one may overlap it.
        if extent.size:
            self._holes.give(extent.start, extent.size)
        for size in (self._in_segments(slid), slid):
            start = self._holes.take(size)
            if start is not None:
                self._move(row, extent, start, size)
                return True
        if extent.size:
            self._holes.take_at(extent.start, extent.size)
        return False

    def _move(self, row: int, extent: Extent, start: int, size: int) -> None:
        """Let the row lie at `start`, without its unseen head."""
        self._epoch += 1
        n_tokens = self._n_tokens[row] - extent.unseen * self.block_size
        n_blocks = max(0, blocks_for(n_tokens, self.block_size))
        src = extent.start + extent.unseen - extent.head
        # In the order in which none is overwritten before it is copied.
        order = range(n_blocks) if start < src else range(n_blocks - 1, -1, -1)
        for i in order if start != src else ():
            self._copy(src + i, start + i, min(self.block_size, n_tokens - i * self.block_size))
            self._n_moves += 1
        extent.start, extent.size, extent.head = start, size, extent.unseen
        self._place(row, extent)
