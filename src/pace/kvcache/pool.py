"""Blocks of the KV cache and the block tables of the sequences that hold them.

This is bookkeeping only: which block belongs to whom. The memory itself is `ops.KVPool`, in which one block
index means the same block in every layer, so that one table per sequence serves all layers.

Admission *reserves* a sequence's worst case and blocks are taken from that reservation as the sequence
grows. So the pool never runs out in the middle of a step, and blocks that nobody has reached yet are not
touched: the operating system maps KV memory on first use.
"""

from __future__ import annotations

from array import array

import numpy as np

from pace.errors import ConfigError
from pace.models.plan import I32Array

__all__ = ["DEFAULT_BLOCK_SIZE", "MIN_BLOCK_SIZE", "BlockPool", "BlockTables", "blocks_for", "kv_block_bytes"]

DEFAULT_BLOCK_SIZE = 256
"""Tokens of a slab: K and V of one head (2 x 256 x 128 x 2 B = 128 KiB) fit the L2 of the reading core."""

MIN_BLOCK_SIZE = 16
"""The kernel reads keys in vectors of 16 tokens."""

BF16_BYTES = 2
CLOSED = -1  # in place of a reservation: nobody owns the row


def blocks_for(n_tokens: int, block_size: int) -> int:
    """Blocks that hold `n_tokens`."""
    return -(-n_tokens // block_size)


def kv_block_bytes(n_layers: int, n_kv_heads: int, head_dim: int, block_size: int) -> int:
    """Bytes of one block over all layers: bf16 keys and values."""
    return 2 * n_layers * n_kv_heads * head_dim * block_size * BF16_BYTES


class BlockPool:
    """Blocks with a free list and a reference count each; every operation is O(1).

    Args:
        n_blocks: blocks in all.
        block_size: tokens per block, a power of two of at least 16.

    Raises:
        ConfigError: a size is out of range.
    """

    __slots__ = ("_free", "_refs", "block_size", "n_blocks", "n_reserved")

    def __init__(self, n_blocks: int, block_size: int = DEFAULT_BLOCK_SIZE) -> None:
        if n_blocks < 1:
            raise ConfigError(f"a KV pool of {n_blocks} blocks holds nothing; expected at least 1")
        if block_size < MIN_BLOCK_SIZE or block_size & (block_size - 1):
            raise ConfigError(
                f"block_size is {block_size}, expected a power of two of at least {MIN_BLOCK_SIZE}"
            )
        self.n_blocks = n_blocks
        self.block_size = block_size
        self.n_reserved = 0  # promised by `reserve`, not yet taken
        # A stack: the block freed last is taken first, its pages are mapped and perhaps still cached.
        self._free = array("i", range(n_blocks - 1, -1, -1))
        self._refs = array("i", bytes(4 * n_blocks))

    @property
    def n_free(self) -> int:
        """Blocks that nobody holds, reserved ones included."""
        return len(self._free)

    @property
    def n_available(self) -> int:
        """Blocks that nobody holds and nobody was promised."""
        return len(self._free) - self.n_reserved

    def refcount(self, block: int) -> int:
        """How many holders the block has."""
        return self._refs[block]

    def reserve(self, n_blocks: int) -> bool:
        """Promise `n_blocks` to the caller; False, and nothing happens, where so many are not available."""
        if n_blocks > self.n_available:
            return False
        self.n_reserved += n_blocks
        return True

    def unreserve(self, n_blocks: int) -> None:
        """Give back a promise, or part of it."""
        if not 0 <= n_blocks <= self.n_reserved:
            raise RuntimeError(f"unreserve({n_blocks}) with {self.n_reserved} blocks reserved")
        self.n_reserved -= n_blocks

    def allocate(self) -> int:
        """Take one reserved block; its reference count becomes 1."""
        self.unreserve(1)
        block = self._free.pop()
        self._refs[block] = 1
        return block

    def retain(self, block: int) -> None:
        """Add a holder to a block that has one (a shared prefix, a fork)."""
        if self._refs[block] < 1:
            raise RuntimeError(f"retain of block {block}, which is free")
        self._refs[block] += 1

    def release(self, block: int) -> bool:
        """Remove a holder; True where it was the last, and the block is free now."""
        refs = self._refs[block] - 1
        if refs < 0:
            raise RuntimeError(f"release of block {block}, which is free")
        self._refs[block] = refs
        if refs == 0:
            self._free.append(block)
        return refs == 0


class BlockTables:
    """The block tables of the running sequences: one row each of a single preallocated array.

    A sequence owns its row from `open` to `close`; the runner gathers rows by index, so no list is
    converted in a step. Unused entries are stale, never out of range.

    Args:
        pool: where the blocks come from.
        max_seqs: rows.
        max_len: longest sequence in tokens; fixes the columns.
    """

    __slots__ = ("_free_rows", "_n_blocks", "_reserved", "array", "pool")

    def __init__(self, pool: BlockPool, max_seqs: int, max_len: int) -> None:
        self.pool = pool
        self.array: I32Array = np.zeros((max_seqs, blocks_for(max_len, pool.block_size)), dtype=np.int32)
        self._n_blocks = [0] * max_seqs  # blocks that the row holds
        self._reserved = [CLOSED] * max_seqs  # blocks that the row may hold
        self._free_rows = list(range(max_seqs - 1, -1, -1))

    @property
    def n_open(self) -> int:
        """Rows in use."""
        return len(self._n_blocks) - len(self._free_rows)

    def open(self, max_tokens: int) -> int | None:
        """Take a row and reserve blocks for `max_tokens`; None where rows or blocks are short."""
        need = blocks_for(max_tokens, self.pool.block_size)
        if not self._free_rows or not self.pool.reserve(need):
            return None
        row = self._free_rows.pop()
        self._n_blocks[row], self._reserved[row] = 0, need
        return row

    def capacity(self, row: int) -> int:
        """Tokens that the row's blocks hold now."""
        return self._n_blocks[row] * self.pool.block_size

    def extend(self, row: int, n_tokens: int) -> None:
        """Let the row hold `n_tokens`, which must be within what `open` reserved."""
        need = blocks_for(n_tokens, self.pool.block_size)
        held = self._n_blocks[row]
        if held >= need:
            return
        if need > self._reserved[row]:
            raise RuntimeError(f"row {row} needs {need} blocks, {self._reserved[row]} are reserved for it")
        for i in range(held, need):
            self.array[row, i] = self.pool.allocate()
        self._n_blocks[row] = need

    def truncate(self, row: int, n_tokens: int) -> None:
        """Drop the blocks behind the first `n_tokens`; the row keeps its reservation and may grow again."""
        keep = blocks_for(n_tokens, self.pool.block_size)
        while self._n_blocks[row] > keep:
            self._n_blocks[row] -= 1
            if not self.pool.release(int(self.array[row, self._n_blocks[row]])) or not self.pool.reserve(1):
                # A shared block leaves nothing behind to promise; the row can't count on growing back.
                self._reserved[row] -= 1

    def close(self, row: int) -> None:
        """Free the row, its blocks and the rest of its reservation."""
        if self._reserved[row] == CLOSED:
            raise RuntimeError(f"close of row {row}, which is free")
        self.pool.unreserve(self._reserved[row] - self._n_blocks[row])
        for i in range(self._n_blocks[row] - 1, -1, -1):
            self.pool.release(int(self.array[row, i]))
        self._n_blocks[row], self._reserved[row] = 0, CLOSED
        self._free_rows.append(row)
