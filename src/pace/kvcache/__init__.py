"""The KV cache: blocks with reference counts, and the tables that lead from a sequence to its blocks."""

from pace.kvcache.pool import BlockPool, BlockTables, blocks_for, kv_block_bytes

__all__ = ["BlockPool", "BlockTables", "blocks_for", "kv_block_bytes"]
