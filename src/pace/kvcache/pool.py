"""Blocks of the KV cache: who holds how many, which are free, and which free ones are still worth something.

This is bookkeeping only. The memory itself is `ops.KVPool`, in which one block index means the same block in every
layer of a group, so that one table per sequence serves all of them. Blocks that nobody has reached yet are not touched: the
operating system maps KV memory on first use.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Callable

from pace.errors import ConfigError, show

__all__ = ["DEFAULT_BLOCK_SIZE", "MIN_BLOCK_SIZE", "BlockPool", "blocks_for", "check_sizes", "kv_block_bytes"]

DEFAULT_BLOCK_SIZE = 256
"""Tokens of a slab: K and V of one head (2 x 256 x 128 x 2 B = 128 KiB) fit the L2 of the reading core."""

MIN_BLOCK_SIZE = 16
"""The kernel reads keys in vectors of 16 tokens."""

KV_DTYPE_BYTES = {"bf16": (2, 0), "int8": (1, 4)}
"""Bytes of an element of K or V, and of the scale (f32) of one token and head."""


def blocks_for(n_tokens: int, block_size: int) -> int:
    """Blocks that hold `n_tokens`."""
    return -(-n_tokens // block_size)


def kv_block_bytes(
    n_layers: int, n_kv_heads: int, head_dim: int, block_size: int, dtype: str = "bf16"
) -> int:
    """Bytes of one block over all layers, keys and values, in "bf16" or "int8".

    Raises:
        ConfigError: another dtype.
    """
    if dtype not in KV_DTYPE_BYTES:
        raise ConfigError(f"the KV dtype is {show(dtype)}, expected one of {', '.join(KV_DTYPE_BYTES)}")
    element_bytes, scale_bytes = KV_DTYPE_BYTES[dtype]
    return n_layers * n_kv_heads * block_size * 2 * (head_dim * element_bytes + scale_bytes)


def check_sizes(n_blocks: int, block_size: int) -> None:
    """Refuse a pool that can't be.

    Raises:
        ConfigError: no blocks, or a block size that is not a power of two of at least 16.
    """
    if n_blocks < 1:
        raise ConfigError(f"a KV pool of {n_blocks} blocks holds nothing; expected at least 1")
    if block_size < MIN_BLOCK_SIZE or block_size & (block_size - 1):
        raise ConfigError(f"block_size is {block_size}, expected a power of two of at least {MIN_BLOCK_SIZE}")


class BlockPool:
    """Blocks with a reference count each; every operation is O(1).

    A block without holders is *fresh*, or *cached* where somebody has marked its content as worth keeping. Fresh ones
    are taken first; then the cached ones, least recently used first, and whoever keeps the index is told.

    Args:
        n_blocks: blocks in all.
        block_size: tokens per block, a power of two of at least 16.
        charge_shared: every further holder of a block counts as if it held one of its own. Where holders let go of blocks
            and take new ones, as windows do, a promise can be kept only so: what the last holder gives back is free.

    Attributes:
        n_reserved: blocks that were promised by `reserve` and not taken yet, and those charged.
        n_evicted: cached blocks that were taken so far.
        on_evict: called with a cached block that is being taken; its mark is gone already.

    Raises:
        ConfigError: a size is out of range.
    """

    __slots__ = (
        "_cached",
        "_charge_shared",
        "_fresh",
        "_marked",
        "_refs",
        "block_size",
        "n_blocks",
        "n_evicted",
        "n_reserved",
        "on_evict",
    )

    def __init__(
        self, n_blocks: int, block_size: int = DEFAULT_BLOCK_SIZE, *, charge_shared: bool = False
    ) -> None:
        check_sizes(n_blocks, block_size)
        self._charge_shared = charge_shared
        self.n_blocks = n_blocks
        self.block_size = block_size
        self.n_reserved = 0
        self.n_evicted = 0
        self.on_evict: Callable[[int], None] | None = None
        # A stack: the block freed last is taken first, its pages are mapped and perhaps still in a cache.
        self._fresh = array("i", range(n_blocks - 1, -1, -1))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._marked = bytearray(n_blocks)
        self._refs = array("i", bytes(4 * n_blocks))

    @property
    def n_free(self) -> int:
        """Blocks that nobody holds, cached and reserved ones included."""
        return len(self._fresh) + len(self._cached)

    @property
    def n_available(self) -> int:
        """Blocks that nobody holds and nobody was promised."""
        return len(self._fresh) + len(self._cached) - self.n_reserved

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
        if self._fresh:
            block = self._fresh.pop()
        else:
            block, _ = self._cached.popitem(last=False)
            self._marked[block] = 0
            self.n_evicted += 1
            if self.on_evict is not None:
                self.on_evict(block)
        self._refs[block] = 1
        return block

    def retain(self, block: int) -> None:
        """Add a holder to a block that has one (a shared prefix, a fork), or take back a cached free one."""
        refs = self._refs[block]
        if refs == 0:
            if block not in self._cached:
                raise RuntimeError(f"retain of block {block}, which is free")
            if self.n_available < 1:
                raise RuntimeError(f"retain of cached block {block}, but every free block is promised")
            del self._cached[block]
        elif self._charge_shared and not self.reserve(1):
            raise RuntimeError(f"retain of block {block}, which is charged, but no block is available")
        self._refs[block] = refs + 1

    def release(self, block: int) -> bool:
        """Remove a holder; True where it was the last, and the block is free now."""
        refs = self._refs[block] - 1
        if refs < 0:
            raise RuntimeError(f"release of block {block}, which is free")
        self._refs[block] = refs
        if refs == 0:
            if self._marked[block]:
                self._cached[block] = None
            else:
                self._fresh.append(block)
        elif self._charge_shared:
            self.n_reserved -= 1
        return refs == 0

    def mark(self, block: int) -> None:
        """The block's content is worth keeping when nobody holds it any more."""
        if self._refs[block] == 0:
            raise RuntimeError(f"mark of block {block}, which is free")
        self._marked[block] = 1

    def unmark(self, block: int) -> None:
        """The block's content is worth nothing now; a cached block becomes a fresh one."""
        self._marked[block] = 0
        if block in self._cached:
            del self._cached[block]
            self._fresh.append(block)

    def touch(self, block: int) -> None:
        """Let the block, if it is a cached free one, be evicted last."""
        if block in self._cached:
            self._cached.move_to_end(block)
