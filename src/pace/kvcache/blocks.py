"""Tables of blocks that lie anywhere and may be shared: the slab and the paged KV cache."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence

import numpy as np

from pace.kvcache.found import FoundBlocks
from pace.kvcache.group import BlockReuse, TokenTables
from pace.kvcache.pool import BlockPool, blocks_for
from pace.kvcache.prefix import PrefixIndex
from pace.kvcache.rows import Row
from pace.kvcache.tables import CopyBlock, ReleasedError, Reuse
from pace.models.plan import I32Array

__all__ = ["BlockTables"]

CLOSED = -1  # in place of a row's capacity and next commit: nobody owns the row
NEVER = sys.maxsize


class BlockTables(TokenTables):
    """Rows of a single preallocated array of block indices; no list is converted in a step.

    A block with several holders is never written. Prefixes are shared in whole blocks, which are full, and what follows
    them is copied; so a row can only come to write a shared block after `truncate` into it, and then the next `extend`
    copies it first. All operations are O(blocks that change hands), `open` and `close` of a row thus O(its blocks).

    With a reach a row lets go of blocks at one end and takes others at the other, so a shared block saves it no memory: the
    pool charges every holder, and a promise of what a row holds at once is good for any length.

    Args:
        n_blocks, block_size, max_seqs, max_len, copy, prefix_caching, reach, max_step: as in `make_tables`.

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
        prefix_caching: bool = False,
        reach: int | None = None,
        max_step: int | None = None,
    ) -> None:
        super().__init__(n_blocks, block_size, max_seqs, max_len, reach, max_step)
        self.pool = BlockPool(n_blocks, block_size, charge_shared=reach is not None)
        self.index = PrefixIndex(self.pool) if prefix_caching else None
        self.array: I32Array = np.zeros((max_seqs, self.max_blocks), dtype=np.int32)
        self.column_tokens = block_size
        self._copy = copy
        self._free_rows = list(range(max_seqs - 1, -1, -1))
        self._rows: list[Row | None] = [None] * max_seqs
        # Beside the rows, because every step looks at these: a list costs half as much as an attribute.
        self._capacity = [CLOSED] * max_seqs  # tokens that the row may hold without further ado
        self._commit_at = [CLOSED] * max_seqs  # tokens with which the next block is full
        self._release_at = [NEVER] * max_seqs  # position from which on a further block is unseen
        self._query = 0  # limit of the last match, until it is counted
        self._n_queries = self._n_query_tokens = self._n_hit_tokens = self._n_copies = 0

    @property
    def n_free(self) -> int:
        """Blocks that nobody holds, cached and promised ones included."""
        return self.pool.n_free

    @property
    def n_available(self) -> int:
        """Blocks that nobody holds and nobody was promised."""
        return self.pool.n_available

    @property
    def n_open(self) -> int:
        """Rows in use."""
        return len(self._rows) - len(self._free_rows)

    def open(self, reserve: int, reuse: Reuse | None = None, salt: str | None = None) -> int | None:
        """Take a row; see `KVTables.open`."""
        query, self._query = self._query, 0
        reuse = self._valid(reuse)
        promise = blocks_for(reserve, self.block_size)
        if promise > self.max_blocks:
            raise RuntimeError(f"can't promise {reserve} tokens; a table has {self.max_blocks} blocks")
        need = self._need(promise, reuse)
        if not self._free_rows or need > self.n_available:
            return None
        number = self._free_rows.pop()
        row = Row(promise, chain=[] if self.index is None else [self.index.root(salt)])
        if reuse is not None:
            self._start_with(reuse, row, self.array[number])
            if query:
                self._n_hit_tokens += reuse.n_tokens
        if query:
            self._n_queries += 1
            self._n_query_tokens += query
        self._rows[number] = row
        self._settle(row, 0)
        self._refresh(number, row)
        return number

    def extend(self, row: int, n_tokens: int) -> bool:
        """Let the row hold `n_tokens`; see `KVTables.extend`."""
        if n_tokens <= self._capacity[row]:
            return True
        return self._grow(row, n_tokens)

    def room(self, row: int) -> int:
        """Tokens that the row may hold without further ado."""
        self._row(row)
        return self._capacity[row]

    def can_extend(self, row: int, n_tokens: int) -> bool:
        """Whether `extend` would succeed now."""
        if n_tokens <= self._capacity[row]:
            return True
        state = self._row(row)
        return self._n_missing(row, state, n_tokens) - state.owed <= self.n_available

    def can_truncate(self, row: int, n_tokens: int) -> bool:
        """Whether the row holds what a query at `n_tokens` sees."""
        return self._row(row).n_released <= self.reach.unseen_blocks(n_tokens)

    def truncate(self, row: int, n_tokens: int) -> None:
        """Let the row hold only its first `n_tokens`; see `KVTables.truncate`."""
        state = self._row(row)
        if not 0 <= n_tokens <= self._capacity[row]:
            raise RuntimeError(
                f"truncate of row {row} to {n_tokens} tokens, which holds up to {self._capacity[row]}"
            )
        if not self.can_truncate(row, n_tokens):
            raise ReleasedError(
                f"truncate of row {row} to {n_tokens} tokens: the first {state.n_released * self.block_size} are released, "
                "a query there sees some of them"
            )
        self._epoch += 1
        keep = blocks_for(n_tokens, self.block_size)
        self._release(state, row, keep, state.n_blocks)
        state.n_blocks = keep
        state.n_reused = min(state.n_reused, keep)
        del state.chain[n_tokens // self.block_size + 1 :]
        self._refresh(row, state)
        n_cut = n_tokens % self.block_size
        shared = 0
        if n_cut:
            if self.pool.refcount(int(self.array[row, keep - 1])) > 1:
                self._capacity[row] = n_tokens
                shared = int(self.reach.n_tokens is None)  # else the row has been charged for it
            else:
                state.own_last(self.index, self.array[row], n_cut)
        self._settle(state, shared)

    def close(self, row: int, tokens: I32Array | None = None, forget: bool = False) -> None:
        """Free the row; see `KVTables.close`."""
        state = self._row(row)
        if forget:
            if self.index is not None:
                state.forget(self.index, self.array[row])
        elif tokens is not None:
            self.remember_tail(row, tokens, len(tokens))
        self._epoch += 1
        self.pool.unreserve(state.owed)
        self._release(state, row, state.n_released, state.n_blocks)
        self._rows[row] = None
        self._capacity[row] = self._commit_at[row] = CLOSED
        self._release_at[row] = NEVER
        self._free_rows.append(row)

    def commit(self, row: int, tokens: I32Array, n_valid: int) -> None:
        """Index the blocks that have become full; see `KVTables.commit`."""
        if n_valid >= self._commit_at[row]:
            self._index_full(row, tokens, n_valid)

    def remember_tail(self, row: int, tokens: I32Array, n_valid: int) -> None:
        """Index the partly filled last block too; see `KVTables.remember_tail`."""
        state = self._row(row)
        self.commit(row, tokens, n_valid)
        whole = n_valid // self.block_size
        # The chain is shorter where it met a collision, and longer where the caller looks back: nothing to add then.
        if self.index is None or len(state.chain) != whole + 1 or whole < state.n_released:
            return
        if n_valid > whole * self.block_size:
            self._check_valid(row, tokens, n_valid)
            self._epoch += 1
            state.index_tail(self.index, self.array[row], tokens, n_valid)

    def find(self, tokens: I32Array, salt: str | None, limit: int) -> FoundBlocks | None:
        """What is cached of tokens[:limit]; see `GroupTables.find`. O(limit)."""
        if self.index is None:
            return None
        if len(tokens) < limit:
            raise RuntimeError(f"match of {limit} tokens, {len(tokens)} were given")
        root = self.index.root(salt)
        return FoundBlocks(self.index, self.pool, self.reach, tokens, root, limit, self._epoch)

    def match(self, tokens: I32Array, salt: str | None, limit: int) -> Reuse | None:
        """Find the longest cached prefix; see `KVTables.match`. O(limit)."""
        found = self.find(tokens, salt, limit)
        if found is None:
            return None
        self._query = limit
        n_tokens = found.longest(limit)
        return found.reuse(n_tokens) if n_tokens else None

    def fork(self, row: int, n_tokens: int) -> Reuse | None:
        """The first `n_tokens` of a live row; see `KVTables.fork`."""
        state = self._row(row)
        if not 0 <= n_tokens <= self._capacity[row]:
            raise RuntimeError(
                f"fork of row {row} at {n_tokens} tokens, which holds up to {self._capacity[row]}"
            )
        first = self.reach.unseen_blocks(n_tokens)
        if state.n_released > first:
            return None
        self._query = 0
        whole, n_tail = divmod(n_tokens, self.block_size)
        blocks: list[int] = self.array[row, : whole + 1].tolist()
        tail = blocks[whole] if n_tail else -1
        digests = tuple(state.chain[: whole + 1])
        return BlockReuse(n_tokens, tuple(blocks[:whole]), tail, n_tail, first, digests, self._epoch)

    def release_before(self, row: int, position: int) -> None:
        """Free the blocks that nobody sees any more; see `KVTables.release_before`."""
        if position >= self._release_at[row]:
            self._let_go(row, position)

    def fits(
        self, n_tokens: int, growing: Sequence[tuple[int, int]] = (), reuse: Reuse | None = None
    ) -> bool:
        """Whether a row of `n_tokens` could be opened now; see `KVTables.fits`."""
        need = self._need(blocks_for(n_tokens, self.block_size), self._valid(reuse))
        return bool(self._free_rows) and need + self._spare(growing) <= self.n_available

    def stats(self) -> dict[str, int]:
        """Counters since the start; see `KVTables.stats`."""
        return {
            "queries": self._n_queries,
            "query_tokens": self._n_query_tokens,
            "hit_tokens": self._n_hit_tokens,
            "evictions": self.pool.n_evicted,
            "copies": self._n_copies,
            "moves": 0,
            "cached_blocks": 0 if self.index is None else len(self.index),
        }

    def _row(self, row: int) -> Row:
        state = self._rows[row] if 0 <= row < len(self._rows) else None
        if state is None:
            raise RuntimeError(f"row {row} is not open")
        return state

    def _need(self, n_blocks: int, reuse: BlockReuse | None) -> int:
        """Available blocks that a row of n_blocks takes: new ones, cached ones that it takes back, and charged ones."""
        if reuse is None:
            return self.reach.blocks_at_once(n_blocks)
        n_begun = len(reuse.blocks) + int(reuse.n_tail > 0)
        if self.reach.n_tokens is None:
            return max(n_blocks, n_begun) - len(reuse.blocks) + self._n_cached(reuse.blocks)
        n_held = n_begun - reuse.n_released
        return n_held + self._n_owed(n_blocks, n_begun, n_held)

    def _n_owed(self, promise: int, n_blocks: int, n_held: int) -> int:
        """Blocks that a row with n_blocks entries, of which it holds n_held, must still be able to take."""
        return max(0, min(promise - n_blocks, self.reach.blocks_at_once(promise) - n_held))

    def _n_cached(self, blocks: Iterable[int]) -> int:
        """How many of the blocks nobody holds."""
        refcount = self.pool.refcount
        return sum(refcount(block) == 0 for block in blocks)

    def _start_with(self, reuse: BlockReuse, row: Row, table: I32Array) -> None:
        """Share and copy what `reuse` names; there are free blocks enough."""
        blocks = list(reuse.blocks)
        for block in blocks[reuse.n_released :]:
            self.pool.retain(block)
        if reuse.n_tail:
            # Evicted last: it is taken itself, and its content with it, only where `match` has foreseen it.
            self.pool.touch(reuse.tail)
            self.pool.reserve(1)
            block = self.pool.allocate()
            if block != reuse.tail:
                self._copy(reuse.tail, block, reuse.n_tail)
                self._n_copies += 1
            blocks.append(block)
        table[: len(blocks)] = blocks
        row.n_blocks = len(blocks)
        row.n_reused = len(reuse.blocks)
        row.n_released = reuse.n_released
        row.chain = list(reuse.digests)

    def _refresh(self, number: int, row: Row) -> None:
        """Recompute what every step looks at."""
        self._capacity[number] = row.n_blocks * self.block_size
        self._commit_at[number] = NEVER if self.index is None else len(row.chain) * self.block_size
        self._release_at[number] = self.reach.position_beyond(row.n_released)

    def _let_go(self, row: int, position: int) -> None:
        state = self._row(row)
        end = min(self.reach.unseen_blocks(position), self._capacity[row] // self.block_size)
        self._epoch += 1
        self._release(state, row, state.n_released, end)
        state.n_released = end
        state.n_reused = max(state.n_reused, end)
        self._release_at[row] = self.reach.position_beyond(end)
        self._settle(state, 0)

    def _settle(self, row: Row, n_more: int) -> None:
        """Reserve what of the promise the row does not hold, and `n_more` blocks; less where others hold them."""
        n_held = row.n_blocks - row.n_released
        want = max(0, self._n_owed(row.promise, row.n_blocks, n_held) + n_more)
        if want < row.owed:
            self.pool.unreserve(row.owed - want)
        else:
            want = min(want, row.owed + self.n_available)
            self.pool.reserve(want - row.owed)
        row.owed = want

    def _grow(self, row: int, n_tokens: int) -> bool:
        state = self._row(row)
        need = blocks_for(n_tokens, self.block_size)
        held = state.n_blocks
        n_new = self._n_missing(row, state, n_tokens)
        n_extra = max(0, n_new - state.owed)
        if not self.pool.reserve(n_extra):
            return False
        self._epoch += 1
        state.owed += n_extra - n_new
        n_cut = self._capacity[row] % self.block_size
        if n_cut:
            self._unshare_last(row, state, n_cut)
        if need > held:
            self.array[row, held:need] = [self.pool.allocate() for _ in range(need - held)]
        state.n_blocks = need
        self._capacity[row] = need * self.block_size
        self._settle(state, 0)
        return True

    def _n_missing(self, row: int, state: Row, n_tokens: int) -> int:
        """Blocks that the row takes to hold n_tokens: new ones, and one for a copy of its last one."""
        need = blocks_for(n_tokens, self.block_size)
        if need > self.max_blocks:
            raise RuntimeError(
                f"row {row} can't hold {n_tokens} tokens; a table has {self.max_blocks} blocks"
            )
        copies = self.reach.n_tokens is None and self._is_cut(row, state)  # else charged already
        return need - state.n_blocks + copies

    def _is_cut(self, row: int, state: Row) -> bool:
        """Whether `truncate` has cut the last block while others held it, and they still do."""
        return self._capacity[row] % self.block_size > 0 and (
            self.pool.refcount(int(self.array[row, state.n_blocks - 1])) > 1
        )

    def _unshare_last(self, row: int, state: Row, n_cut: int) -> None:
        """The last block was cut after n_cut tokens: copy it where others hold it too."""
        last = int(self.array[row, state.n_blocks - 1])
        if self.pool.refcount(last) > 1:
            self.pool.release(last)
            if self.reach.n_tokens is not None:
                self.pool.reserve(1)  # what the row was charged for the other
            block = self.pool.allocate()
            self._copy(last, block, n_cut)
            self._n_copies += 1
            self.array[row, state.n_blocks - 1] = block
        state.own_last(self.index, self.array[row], n_cut)

    def _release(self, state: Row, row: int, start: int, end: int) -> None:
        """Release entries [start, end), the last first: so the tail of a chain is evicted before its head."""
        for i in range(end - 1, start - 1, -1):
            block = int(self.array[row, i])
            if self.index is not None:
                state.note_left(self.index, i, block)
            self.pool.release(block)

    def _check_valid(self, row: int, tokens: I32Array, n_valid: int) -> None:
        if n_valid > min(self._capacity[row], len(tokens)):
            raise RuntimeError(
                f"row {row} can't have {n_valid} valid tokens: it holds up to {self._capacity[row]}, "
                f"{len(tokens)} were given"
            )

    def _index_full(self, row: int, tokens: I32Array, n_valid: int) -> None:
        """Continue the chain over the blocks that are full now."""
        state = self._row(row)
        if self.index is None:
            return
        self._check_valid(row, tokens, n_valid)
        self._epoch += 1
        goes_on = state.index_whole(self.index, self.array[row], tokens, n_valid)
        self._commit_at[row] = len(state.chain) * self.block_size if goes_on else NEVER
