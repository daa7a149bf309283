"""What the prefix index knows of a prompt, and where a row of blocks can begin with it."""

from __future__ import annotations

from bisect import bisect_left

from pace.kvcache.group import KEY_GROUP, BlockReuse, Reach
from pace.kvcache.pool import BlockPool
from pace.kvcache.prefix import PrefixIndex
from pace.models.plan import I32Array

__all__ = ["FoundBlocks"]


class FoundBlocks:
    """See `group.Found`. A row can begin with n tokens where the index knows every block that a query behind them sees,
    the last one as far as they go.

    Args:
        index, pool, reach: of the group.
        tokens, root, limit: what is looked for, and behind which digest.
        epoch: of the tables.
    """

    def __init__(
        self,
        index: PrefixIndex,
        pool: BlockPool,
        reach: Reach,
        tokens: I32Array,
        root: bytes,
        limit: int,
        epoch: int,
    ) -> None:
        self._index = index
        self._pool = pool
        self._reach = reach
        self._epoch = epoch
        # Without a reach nothing behind a gap is of use.
        self._chain = index.chain(tokens, root, limit, gaps=reach.n_tokens is not None)
        self._tails: dict[int, tuple[int, int]] = {}

    def longest(self, n_tokens: int) -> int:
        """The longest beginning up to `n_tokens`, which the limit bounds: O(1) for each gap that it goes back over."""
        size = self._pool.block_size
        gaps = self._chain.gaps
        while n_tokens > 0:
            whole, n_tail = divmod(n_tokens, size)
            first = self._reach.unseen_blocks(n_tokens)
            at = bisect_left(gaps, whole) - 1
            if at >= 0 and gaps[at] >= first:
                n_tokens = gaps[at] * size + self._tail(gaps[at])[1]
                continue
            if n_tail:
                block, n_found = self._tail(whole)
                n_fit = min(n_tail, n_found)
                if self._is_last(block, whole, first):
                    # `open` can't copy it, there is no other block; it takes the block itself. That may hold anything
                    # behind the n_fit tokens, so whole groups alone are of use.
                    n_fit = n_fit // KEY_GROUP * KEY_GROUP
                if n_fit < n_tail:
                    n_tokens = whole * size + n_fit
                    continue
            return n_tokens
        return 0

    def reuse(self, n_tokens: int) -> BlockReuse:
        """What `open` takes for a length that `longest` has named."""
        whole, n_tail = divmod(n_tokens, self._pool.block_size)
        first = self._reach.unseen_blocks(n_tokens)
        blocks = (0,) * first + tuple(self._chain.blocks[first:whole])
        tail = self._tail(whole)[0] if n_tail else -1
        return BlockReuse(
            n_tokens, blocks, tail, n_tail, first, tuple(self._chain.digests[: whole + 1]), self._epoch
        )

    def _tail(self, at: int) -> tuple[int, int]:
        """The block that begins like the at-th one, and how many of its tokens agree."""
        chain = self._chain
        if at < len(chain.blocks) and chain.blocks[at] >= 0:
            return chain.blocks[at], self._pool.block_size
        if at not in self._tails:
            step = self._index.block_bytes
            data = chain.data[at * step : (at + 1) * step]
            self._tails[at] = self._index.best_child(chain.digests[at], data)
        return self._tails[at]

    def _is_last(self, tail: int, whole: int, first: int) -> bool:
        """Whether `tail` is the only free block beside those that the row takes back."""
        refcount = self._pool.refcount
        if tail < 0 or refcount(tail) > 0:
            return False
        n_cached = sum(refcount(block) == 0 for block in self._chain.blocks[first:whole])
        return self._pool.n_free - n_cached == 1
