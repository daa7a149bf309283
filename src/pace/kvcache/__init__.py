"""The KV cache: blocks with reference counts, and the tables that lead from a sequence to its blocks."""

from pace.kvcache.make import make_tables
from pace.kvcache.pool import BlockPool, BlockTables, blocks_for, kv_block_bytes
from pace.kvcache.tables import CopyBlock, KVTables, Reuse

__all__ = [
    "BlockPool",
    "BlockTables",
    "CopyBlock",
    "KVTables",
    "Reuse",
    "blocks_for",
    "kv_block_bytes",
    "make_tables",
]
