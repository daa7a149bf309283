"""What the engine sees of the KV cache: rows of tables that lead from sequences to what they hold.

The layers of a model form groups of one KV shape and one reach, and each group has memory and tables of its own:
`BlockTables` (slab and paged: any block anywhere, shared between rows) or `ExtentTables` (contiguous: consecutive
blocks, never shared). `GroupedTables` makes several of them look like one. All of it is bookkeeping; the memory is
`ops.KVPool`, and what must be copied in it is copied by a callable that is passed in.

One thread at a time calls a `KVTables`; nothing here locks.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pace.models.plan import I32Array

if TYPE_CHECKING:
    from pace.kvcache.group import GroupTables

__all__ = ["CopyBlock", "KVTables", "ReleasedError", "Reuse"]

CopyBlock = Callable[[int, int, int], object]
"""copy(src, dst, n_tokens): the first n_tokens of block src, in all layers, to another block dst.

What lies behind them in their group of 32 must be harmless there (V of 0): attention multiplies it by 0.
"""


class ReleasedError(RuntimeError):
    """A row was to go back to where a query sees what the row has released since."""


@dataclass(frozen=True, slots=True)
class Reuse:
    """Cached content with which a row can begin, as `KVTables.match` and `fork` find it.

    It pins nothing: hand it to `open` before anything else changes the tables, or drop it.

    Attributes:
        n_tokens: tokens of it.
    """

    n_tokens: int


class KVTables(ABC):
    """Rows, one per running sequence, and what they hold of every group of layers.

    A sequence owns its row from `open` to `close`. What is *held* is somebody's; a *cached* block is free, but the prefix
    index knows its content, which lasts until the block is needed; a *promised* one is free, but only for the row that
    `open` promised it to.

    A group with a reach holds no more than a query sees, and the tokens of one step: call `release_before` between two
    steps, and extend a row no further than `step_end`, so that its promise suffices for any length.

    Misuse (a row that is not open, more tokens than max_len) raises RuntimeError.

    Attributes:
        n_rows: rows in all.
        n_blocks: blocks in all.
        block_size: tokens per block, the largest of all groups: what is indexed while a row grows, and how finely.
        has_reach: whether some group has one, so that `release_before` is to be called.
        max_step: tokens by which a row may be extended in any step; max_len where nothing has a reach.
    """

    n_rows: int
    n_blocks: int
    block_size: int
    has_reach: bool
    max_step: int

    @property
    @abstractmethod
    def groups(self) -> tuple[GroupTables, ...]:
        """The tables of each group of layers."""

    @property
    @abstractmethod
    def n_free(self) -> int:
        """Blocks that nobody holds, cached and promised ones included."""

    @property
    @abstractmethod
    def n_available(self) -> int:
        """Blocks that nobody holds and nobody was promised."""

    @property
    @abstractmethod
    def n_open(self) -> int:
        """Rows in use."""

    @property
    def n_used(self) -> int:
        """Blocks that somebody holds."""
        return self.n_blocks - self.n_free

    @property
    def usage(self) -> float:
        """Share of the blocks that somebody holds, 0 .. 1, in the group that is the fullest."""
        return max(1 - group.n_free / group.n_blocks for group in self.groups)

    @property
    @abstractmethod
    def capacity(self) -> int:
        """Tokens of the longest row that fits when there is no other."""

    @abstractmethod
    def open(self, reserve: int, reuse: Reuse | None = None, salt: str | None = None) -> int | None:
        """Take a row.

        Args:
            reserve: tokens in all, `reuse` included, for which blocks are promised: `extend` up to there never fails, with
                `step_end` observed where there is a reach. 0 promises nothing.
            reuse: the row starts with these `reuse.n_tokens` tokens, nothing is to be computed for them. It must come
                from a `match` or `fork` since which nothing was called that changes the tables.
            salt: as in `match`; what this row computes is found under it alone. A `reuse` brings its own, which counts.

        Returns:
            The row; None, and nothing has happened, where rows or blocks are short.

        Raises:
            RuntimeError: `reuse` is out of date.
        """

    @abstractmethod
    def extend(self, row: int, n_tokens: int) -> bool:
        """Let the row hold `n_tokens`, before they are written. Less than it holds already changes nothing.

        Returns:
            False, and nothing has changed, where a block is missing; only beyond what `open` promised.
        """

    @abstractmethod
    def truncate(self, row: int, n_tokens: int) -> None:
        """Let the row hold only its first `n_tokens`: O(dropped blocks).

        The promise stays. Only where a *shared* block is dropped or cut (a matched or forked prefix, or what others have
        matched of this row) and no other is available can growing back fail; never in a group with a reach.

        Raises:
            ReleasedError: a query at `n_tokens` sees what `release_before` has freed; nothing has changed.
        """

    @abstractmethod
    def close(self, row: int, tokens: I32Array | None = None, forget: bool = False) -> None:
        """Free the row, its blocks and the rest of its promise.

        Args:
            tokens: i32 [n], the tokens in the cache: they are indexed, the partly filled last block too.
            forget: un-index whatever this row has added, because its content can't be trusted (NaN); wins over `tokens`.
        """

    @abstractmethod
    def commit(self, row: int, tokens: I32Array, n_valid: int) -> None:
        """The row's first `n_valid` tokens, i32 tokens[:n_valid], are in the cache now: index the blocks that are full.

        O(blocks that became full since the last call), one comparison where none did.
        """

    @abstractmethod
    def remember_tail(self, row: int, tokens: I32Array, n_valid: int) -> None:
        """`commit`, and index the partly filled last block too; for the end of a prompt."""

    @abstractmethod
    def match(self, tokens: I32Array, salt: str | None, limit: int) -> Reuse | None:
        """Find the longest cached prefix: of every group what a query behind it sees.

        Args:
            tokens: i32 [n], n >= limit.
            salt: only content of the same salt is found (None is one of them).
            limit: tokens at most; one less than the prompt has, so that one is left to compute logits from.

        Returns:
            What `open` takes, None where nothing is cached. It is counted in `stats` when the next `open` succeeds.
        """

    @abstractmethod
    def fork(self, row: int, n_tokens: int) -> Reuse | None:
        """The first `n_tokens` of a live row, for `open`: whole blocks are shared and the tail is copied; contiguous copies
        everything. None where a query at `n_tokens` sees what the row has released."""

    @abstractmethod
    def release_before(self, row: int, position: int) -> None:
        """Free what no query at `position` or later can see: in a group with a reach all keys before position - reach + 1,
        in whole groups of 32, because attention reads such groups.

        Their table entries are stale from now on, their content may still be found by `match`. One comparison where
        there is nothing to free.
        """

    @abstractmethod
    def fits(
        self, n_tokens: int, growing: Sequence[tuple[int, int]] = (), reuse: Reuse | None = None
    ) -> bool:
        """Whether `open(n_tokens, reuse)` would succeed now and leave blocks for rows that grow.

        Args:
            growing: (tokens now, tokens in the end) of rows. Each group spares a block for each of them that will take
                another one there, or it would have to give way at once; at most an eighth of the group in all.
        """

    @abstractmethod
    def step_end(self, position: int) -> int:
        """Tokens to which a row may be extended that has just released what nobody sees at `position`: `max_step` more
        or further, as far as what it may hold at once goes."""

    @abstractmethod
    def has_room(self, coming: Iterable[int], leaving: Iterable[int] = ()) -> bool:
        """Whether rows of so many tokens would fit if others of so many were closed, none of which share anything."""

    @abstractmethod
    def stats(self) -> dict[str, int]:
        """Counters since the start.

        queries: rows opened after a `match`; query_tokens: their limits; hit_tokens: what they reused of these;
        evictions: cached blocks whose content was given up for new; copies: blocks copied to be shared or forked;
        moves: blocks copied to grow an extent, or to let it slide; cached_blocks: blocks that the index knows now,
        held or free.
        """
