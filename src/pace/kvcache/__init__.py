"""The KV cache: blocks with reference counts, the tables that lead from a sequence to its blocks, and the index that finds
blocks by what they hold."""

from pace.kvcache.blocks import BlockTables
from pace.kvcache.extents import ExtentTables
from pace.kvcache.group import BlockReuse, GroupTables, Reach, TokenTables
from pace.kvcache.grouped import GroupedTables, join_groups
from pace.kvcache.make import KV_CACHE_TYPES, make_tables
from pace.kvcache.pool import BlockPool, blocks_for, kv_block_bytes
from pace.kvcache.prefix import PrefixIndex
from pace.kvcache.tables import CopyBlock, KVTables, ReleasedError, Reuse

__all__ = [
    "KV_CACHE_TYPES",
    "BlockPool",
    "BlockReuse",
    "BlockTables",
    "CopyBlock",
    "ExtentTables",
    "GroupTables",
    "GroupedTables",
    "KVTables",
    "PrefixIndex",
    "Reach",
    "ReleasedError",
    "Reuse",
    "TokenTables",
    "blocks_for",
    "join_groups",
    "kv_block_bytes",
    "make_tables",
]
