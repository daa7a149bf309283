"""From the name of a KV cache type to its tables."""

from __future__ import annotations

from pace.errors import ConfigError, show
from pace.kvcache.blocks import BlockTables
from pace.kvcache.extents import ExtentTables
from pace.kvcache.group import TokenTables
from pace.kvcache.tables import CopyBlock

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
    reach: int | None = None,
    max_step: int | None = None,
) -> TokenTables:
    """The tables of one group of layers; see `join_groups`.

    Args:
        kv_cache_type: "slab" and "paged" differ in the block size alone; "contiguous" gives every sequence one extent.
        n_blocks: blocks of the pool.
        block_size: tokens per block, a power of two of at least 16.
        max_seqs: rows.
        max_len: longest sequence in tokens.
        copy: copies within the pool, as `ops.KVPool.copy`.
        prefix_caching: keep an index of what the blocks hold; contiguous, which can't share, ignores it.
        reach: tokens that a query sees at most, its own included; None: all.
        max_step: tokens that a step adds to a row at most, which counts where there is a reach; None: max_len.

    Raises:
        ConfigError: a value is out of range.
    """
    if kv_cache_type not in KV_CACHE_TYPES:
        raise ConfigError(
            f"kv_cache_type is {show(kv_cache_type)}, expected one of {', '.join(KV_CACHE_TYPES)}"
        )
    sizes = {"max_seqs": max_seqs, "max_len": max_len, "reach": reach, "max_step": max_step}
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ConfigError(f"{name} is {size}, expected at least 1")
    if kv_cache_type == "contiguous":
        return ExtentTables(
            n_blocks, block_size, max_seqs, max_len, copy=copy, reach=reach, max_step=max_step
        )
    return BlockTables(
        n_blocks,
        block_size,
        max_seqs,
        max_len,
        copy=copy,
        prefix_caching=prefix_caching,
        reach=reach,
        max_step=max_step,
    )
