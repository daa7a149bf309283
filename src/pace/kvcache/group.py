"""One group of layers: what all of them see, and the tables of what a sequence holds of them.

A group is whatever a sequence holds as one: here blocks of tokens. What `GroupedTables` asks of it says nothing of blocks:
to find the lengths at which a sequence can begin (`find`), to open, extend, cut and close. A recurrent layer's group
would hold one state per row, and find the lengths at which a state was kept.
"""

from __future__ import annotations

import sys
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from pace.kvcache.pool import blocks_for, check_sizes
from pace.kvcache.tables import KVTables, Reuse
from pace.models.plan import I32Array

__all__ = ["KEY_GROUP", "BlockReuse", "Found", "GroupTables", "Reach", "TokenTables"]

KEY_GROUP = 32
"""Keys that attention reads together; whoever writes the first one of them clears their V."""


@dataclass(frozen=True, slots=True)
class Reach:
    """How far back the queries of a group see, and what a row holds therefore.

    Args:
        n_tokens: that a query sees at most, its own included; None: all.
        block_size: tokens of a block.
        max_step: tokens that one step adds to a row at most.
    """

    n_tokens: int | None
    block_size: int
    max_step: int

    def unseen_blocks(self, position: int) -> int:
        """Leading blocks of which no query at `position` or later sees anything, nor reads any."""
        if self.n_tokens is None:
            return 0
        return max(0, position - self.n_tokens + 1) // KEY_GROUP * KEY_GROUP // self.block_size

    def position_beyond(self, n_blocks: int) -> int:
        """The first position at which more than n_blocks leading blocks are unseen."""
        if self.n_tokens is None:
            return sys.maxsize
        return blocks_for((n_blocks + 1) * self.block_size, KEY_GROUP) * KEY_GROUP + self.n_tokens - 1

    def blocks_at_once(self, n_blocks: int) -> int:
        """Blocks that a row of `n_blocks` holds at most at one time.

        Of the tokens before a step a query sees n_tokens - 1, and whole blocks and groups of them are kept.
        """
        if self.n_tokens is None:
            return n_blocks
        ragged = max(self.block_size, KEY_GROUP) - 1
        return min(n_blocks, blocks_for(ragged + self.n_tokens - 1 + self.max_step, self.block_size))


@dataclass(frozen=True, slots=True)
class BlockReuse(Reuse):
    """Content of blocks with which a row of one group can begin.

    Attributes:
        blocks: the blocks that its tokens fill whole.
        tail: the block whose first `n_tail` tokens follow, which are copied; -1 where n_tail is 0.
        n_tail: n_tokens - len(blocks) * block_size.
        n_released: leading entries of `blocks` that are stale, because no query reaches them.
        digests: the chain of the prefix index, its root first; empty without an index.
        epoch: state of the tables for which it was made.
    """

    blocks: tuple[int, ...]
    tail: int
    n_tail: int
    n_released: int
    digests: tuple[bytes, ...]
    epoch: int


class Found(Protocol):
    """Lengths at which a sequence can begin, by what one group has cached of it. Valid until the tables change."""

    def longest(self, n_tokens: int) -> int:
        """The longest of them up to `n_tokens`, 0 where there is none."""
        ...

    def reuse(self, n_tokens: int) -> Reuse:
        """What `open` takes for one of them, > 0."""
        ...


class GroupTables(KVTables):
    """Rows of one group.

    Attributes:
        array: i32 [n_rows, columns], gathered by the runner: where the kernels find what a row holds.
        column_tokens: tokens that a column stands for; 0 where there is one column, which stands for all.
    """

    array: I32Array
    column_tokens: int

    @property
    def groups(self) -> tuple[GroupTables, ...]:
        """Itself."""
        return (self,)

    @abstractmethod
    def room(self, row: int) -> int:
        """Tokens that the row may hold without further ado."""

    @abstractmethod
    def can_extend(self, row: int, n_tokens: int) -> bool:
        """Whether `extend` would succeed now."""

    @abstractmethod
    def can_truncate(self, row: int, n_tokens: int) -> bool:
        """Whether the row holds what a query at `n_tokens`, which it holds, sees."""

    @abstractmethod
    def find(self, tokens: I32Array, salt: str | None, limit: int) -> Found | None:
        """What is cached of tokens[:limit]; None where nothing ever is."""


class TokenTables(GroupTables):
    """Rows of a group that holds keys and values of tokens, in blocks. Token p of row r lies at p % block_size in block
    `array[r, p // block_size]` (contiguous: `array[r, 0] + p // block_size`). Unused and stale entries are somebody else's,
    never out of range (contiguous: the entry of an extent that has slid may be negative).

    Args:
        n_blocks, block_size, max_seqs, max_len, reach, max_step: as in `make_tables`.

    Attributes:
        reach: what its queries see.
        max_blocks: entries of the longest row.
        max_held: blocks that it holds at most at one time.

    Raises:
        ConfigError: a size is out of range.
    """

    def __init__(
        self,
        n_blocks: int,
        block_size: int,
        max_seqs: int,
        max_len: int,
        reach: int | None,
        max_step: int | None,
    ) -> None:
        check_sizes(n_blocks, block_size)
        self.n_rows = max_seqs
        self.n_blocks = n_blocks
        self.block_size = block_size
        self.has_reach = reach is not None
        self.max_step = max_len if max_step is None or reach is None else max_step
        self.reach = Reach(reach, block_size, self.max_step)
        self.max_blocks = blocks_for(max_len, block_size)
        self.max_held = self.reach.blocks_at_once(self.max_blocks)
        self._max_len = max_len
        self._epoch = 0  # of changes; what `match` and `fork` found is valid for one

    @property
    def capacity(self) -> int:
        """Tokens of the longest row that fits when there is no other."""
        return (self.max_blocks if self.max_held <= self.n_blocks else self.n_blocks) * self.block_size

    def step_end(self, position: int) -> int:
        """Tokens to which a row may be extended in a step; see `KVTables.step_end`."""
        if self.reach.n_tokens is None:
            return self._max_len
        return (self.reach.unseen_blocks(position) + self.max_held) * self.block_size

    def has_room(self, coming: Iterable[int], leaving: Iterable[int] = ()) -> bool:
        """Whether rows would fit if others were closed; see `KVTables.has_room`."""
        return sum(map(self._most, coming)) <= self.n_available + sum(map(self._most, leaving))

    def _spare(self, growing: Sequence[tuple[int, int]]) -> int:
        """Blocks to leave for rows that grow; see `KVTables.fits`."""
        most, size = self.max_held, self.block_size
        n_growing = sum(blocks_for(now, size) < min(most, blocks_for(end, size)) for now, end in growing)
        return min(n_growing, self.n_blocks // 8)

    def _most(self, n_tokens: int) -> int:
        """Blocks that a row of n_tokens holds at most at one time."""
        return self.reach.blocks_at_once(blocks_for(n_tokens, self.block_size))

    def _valid(self, reuse: Reuse | None) -> BlockReuse | None:
        if reuse is None:
            return None
        if not isinstance(reuse, BlockReuse) or reuse.epoch != self._epoch:
            raise RuntimeError("the tables have changed since this prefix was found; match or fork again")
        return reuse
