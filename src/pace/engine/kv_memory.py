"""How the memory of the KV cache is divided among the groups of layers, and of what blocks each part is made.

Every group must hold the same sequences, and needs all their tokens for it, or what its queries see.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pace.kvcache import Reach, blocks_for, kv_block_bytes
from pace.models.plan import Plan

__all__ = ["GroupMemory", "KVMemory", "default_block_size", "plan_groups"]

MAX_SLAB, PAGE, MIN_BLOCK_SIZE = 256, 16, 16
"""Tokens of a block: of the largest slab (the piece that attention works in), of a page, of the smallest."""

L2_SHARE = 4
"""A slab's K and V of one head take at most this part of the L2 of the core that reads them: the rest of a work item (its
queries, scores and results) is of the same size."""

REACH_SHARE = 16
"""Of a reach that a block takes at most: a row holds up to one block more than it sees."""

STEP_SHARE, MIN_STEP = 4, 256
"""A chunk of a prompt takes at most this part of a reach, but no less than these tokens: a row holds that much more than it
sees. Reading the weights takes a 25th of the arithmetic of 256 rows on Zen 4 (470 GFLOP/s, 50 GB/s); where tiles multiply
ten times as fast it is a third, and a larger part of the reach would pay. The first chunk is longer: it keeps nothing."""


@dataclass(frozen=True)
class GroupMemory:
    """KV memory of one group of layers.

    Attributes:
        n_layers, n_kv_heads, head_dim: of the group.
        reach: tokens that a query sees; None: all that there can be.
        block_size: tokens of a block.
        block_bytes: of a block over all layers of the group.
        n_blocks: blocks of the pool.
    """

    n_layers: int
    n_kv_heads: int
    head_dim: int
    reach: int | None
    block_size: int
    block_bytes: int
    n_blocks: int = 0

    @property
    def n_bytes(self) -> int:
        """Of the pool."""
        return self.n_blocks * self.block_bytes


@dataclass(frozen=True)
class KVMemory:
    """The KV cache of a model.

    Attributes:
        groups: as `Plan.groups()`.
        max_step: tokens of a prompt that run in one step at most.
    """

    groups: tuple[GroupMemory, ...]
    max_step: int

    @property
    def n_bytes(self) -> int:
        """Of all pools."""
        return sum(group.n_bytes for group in self.groups)

    def blocks(self, n_tokens: int) -> list[int]:
        """Blocks of each group that a sequence of n_tokens holds at most at one time."""
        return [
            Reach(group.reach, group.block_size, self.max_step).blocks_at_once(
                blocks_for(n_tokens, group.block_size)
            )
            for group in self.groups
        ]

    def bytes_for(self, n_tokens: int) -> int:
        """Bytes of a sequence of n_tokens."""
        return sum(n * group.block_bytes for n, group in zip(self.blocks(n_tokens), self.groups, strict=True))

    def longest(self, n_bytes: int, most: int) -> int:
        """Tokens of the longest sequence of up to `most` that n_bytes hold."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.bytes_for(middle) <= n_bytes else (low, middle - 1)
        return low

    def divided(self, n_bytes: int, n_tokens: int, n_seqs: int) -> KVMemory:
        """With pools of n_bytes together, for n_seqs sequences that run at once.

        One of n_tokens, the longest, must fit, and n_bytes suffice for it. What is left is divided so that the others fit
        with the greatest length that all of them can have: windows for 9 of full length would let 9 run, however short.
        """
        rest = n_bytes - self.bytes_for(n_tokens)
        length = self.longest(rest // max(1, n_seqs - 1), n_tokens) or n_tokens
        total = self.bytes_for(length)
        groups = (
            replace(group, n_blocks=longest + n * rest // total)
            for longest, n, group in zip(self.blocks(n_tokens), self.blocks(length), self.groups, strict=True)
        )
        return replace(self, groups=tuple(groups))


def plan_groups(
    plan: Plan,
    max_model_len: int,
    max_num_batched_tokens: int,
    kv_cache_type: str,
    kv_cache_dtype: str,
    block_size: int | None,
    l2_bytes: int,
) -> KVMemory:
    """The groups of a plan, without blocks yet.

    Args:
        max_model_len: longest sequence; a reach that is no shorter is none.
        block_size: tokens of every group's blocks; None: see `default_block_size`.
        l2_bytes: L2 of one core.
    """
    groups = []
    max_step = max_num_batched_tokens
    for group in plan.groups():
        heads, width, reach = group.layer.n_kv_heads, group.layer.head_dim, group.layer.reach
        if reach is not None and reach >= max_model_len:
            reach = None
        if reach is not None:
            max_step = min(max_step, max(MIN_STEP, reach // STEP_SHARE))
        size = block_size
        if size is None:
            size = default_block_size(kv_cache_type, kv_cache_dtype, width, l2_bytes, max_model_len, reach)
        n_layers = len(group.layers)
        block_bytes = kv_block_bytes(n_layers, heads, width, size, kv_cache_dtype)
        groups.append(GroupMemory(n_layers, heads, width, reach, size, block_bytes))
    return KVMemory(tuple(groups), max_step)


def default_block_size(
    kv_cache_type: str,
    kv_cache_dtype: str,
    head_dim: int,
    l2_bytes: int,
    max_model_len: int,
    reach: int | None = None,
) -> int:
    """Tokens of a block: 16 of a page; of a slab as many as a quarter of the L2 holds keys and values of one head for, at
    most 256, or less where no sequence fills that, or where a sixteenth of the reach is less.
    """
    if kv_cache_type == "paged":
        return PAGE
    token_bytes = kv_block_bytes(1, 1, head_dim, 1, kv_cache_dtype)
    size = MIN_BLOCK_SIZE
    while (
        size < min(max_model_len, MAX_SLAB)
        and 2 * size * token_bytes * L2_SHARE <= l2_bytes
        and (reach is None or 2 * size * REACH_SHARE <= reach)
    ):
        size *= 2
    return size
