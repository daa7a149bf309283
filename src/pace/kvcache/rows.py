"""One row of a block table: what it holds, and what it has told the prefix index."""

from __future__ import annotations

from dataclasses import dataclass, field

from pace.kvcache.prefix import Entry, PrefixIndex, token_bytes
from pace.models.plan import I32Array

__all__ = ["Row"]


@dataclass(slots=True)
class Row:
    """What is known of an open row besides its table.

    Attributes:
        promise: entries that its table may have for certain, shared ones included.
        owed: blocks for these that it does not hold yet, and may hold at once; the pool has them reserved.
        n_blocks: entries of its table, released ones included.
        n_released: of these, the leading ones that nobody sees any more; they are not the row's.
        n_reused: the leading ones that somebody else has filled.
        chain: digests of the whole blocks that are committed, behind the root; empty without an index.
        left: what the row has indexed in blocks that it doesn't hold any more.
    """

    promise: int
    owed: int = 0
    n_blocks: int = 0
    n_released: int = 0
    n_reused: int = 0
    chain: list[bytes] = field(default_factory=list)
    left: list[Entry] = field(default_factory=list)

    def index_whole(self, index: PrefixIndex, table: I32Array, tokens: I32Array, n_valid: int) -> bool:
        """Continue the chain over the blocks that are full now; False where that meets a collision and ends."""
        step = index.block_bytes
        size = index.block_size
        first = len(self.chain) - 1
        whole = n_valid // size
        data = token_bytes(tokens[first * size : whole * size])
        blocks: list[int] = table[first:whole].tolist()
        for i, block in enumerate(blocks):
            piece = data[i * step : (i + 1) * step]
            parent = self.chain[-1]
            digest = index.digest(parent, piece)
            if first + i >= self.n_released and not index.insert(block, parent, digest, piece):
                return False
            self.chain.append(digest)
        return True

    def index_tail(self, index: PrefixIndex, table: I32Array, tokens: I32Array, n_valid: int) -> None:
        """Index the partly filled last block, behind whole ones that are indexed."""
        start = n_valid // index.block_size * index.block_size
        block = int(table[n_valid // index.block_size])
        index.insert_tail(block, self.chain[-1], token_bytes(tokens[start:n_valid]))

    def own_last(self, index: PrefixIndex | None, table: I32Array, n_valid: int) -> None:
        """The last block is the row's alone, and what follows its first n_valid tokens will be overwritten."""
        self.n_reused = min(self.n_reused, self.n_blocks - 1)
        block = int(table[self.n_blocks - 1])
        if index is not None and index.n_tokens(block) > n_valid:
            index.drop(block)

    def note_left(self, index: PrefixIndex, i: int, block: int) -> None:
        """The row lets go of its i-th block."""
        entry = index.entry(block) if i >= self.n_reused else None
        if entry is not None:
            self.left.append(entry)

    def forget(self, index: PrefixIndex, table: I32Array) -> None:
        """Un-index what the row has added, where that is still what the index says."""
        for block in table[self.n_reused : self.n_blocks].tolist():
            index.drop(block)
        for entry in self.left:
            if index.entry(entry.block) is entry:
                index.drop(entry.block)
