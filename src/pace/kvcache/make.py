"""From the name of a KV cache type to its tables."""

from __future__ import annotations

from pace.errors import ConfigError, show
from pace.kvcache.blocks import BlockTables
from pace.kvcache.extents import ExtentTables
from pace.kvcache.tables import CopyBlock, KVTables

__all__ = ["KV_CACHE_TYPES", "make_tables"]

KV_CACHE_TYPES = ("slab", "paged", "contiguous")


def make_tables(
    kv_cache_type: str,
    n_blocks: int,
    block_size: int,
    max_seqs: int,
    max_len: int,
    *,
    copy: CopyBlock,
    prefix_caching: bool,
    max_window: int | None = None,
) -> KVTables:
    """The tables of one engine.

    Args:
        kv_cache_type: "slab" and "paged" differ in the block size alone; "contiguous" gives every sequence one extent.
        n_blocks: blocks of the pool.
        block_size: tokens per block, a power of two of at least 16.
        max_seqs: rows.
        max_len: longest sequence in tokens.
        copy: copies within the pool, as `ops.KVPool.copy`.
        prefix_caching: keep an index of what the blocks hold; contiguous, which can't share, ignores it.
        max_window: tokens that the widest sliding window sees, its own included; None where a layer sees everything.

    Raises:
        ConfigError: a value is out of range.
    """
    if kv_cache_type not in KV_CACHE_TYPES:
        raise ConfigError(
            f"kv_cache_type is {show(kv_cache_type)}, expected one of {', '.join(KV_CACHE_TYPES)}"
        )
    if max_seqs < 1 or max_len < 1 or (max_window is not None and max_window < 1):
        raise ConfigError(
            f"max_seqs is {max_seqs}, max_len {max_len}, max_window {max_window}; expected at least 1 of each"
        )
    if kv_cache_type == "contiguous":
        return ExtentTables(n_blocks, block_size, max_seqs, max_len, copy=copy)
    return BlockTables(
        n_blocks,
        block_size,
        max_seqs,
        max_len,
        copy=copy,
        prefix_caching=prefix_caching,
        max_window=max_window,
    )
