"""What the blocks of the KV cache hold, found by the tokens that lead to it.

The keys of a token depend on all tokens before it, so a block is named by a chain: its digest is a hash of its parent's
digest and its own tokens, and the chain starts at a root made from the salt. The hash is BLAKE2b with 128 bits and a
secret key per index, so that nobody can compute a collision; and tokens and parent are compared on every hit, so that even
a collision would find nothing.

Sharing is finer than blocks: a slab is 256 tokens, and a system prompt of 1000 must be found whole. So the index also
knows partly filled blocks (*tails*), and keeps for every digest the blocks that continue it, sorted by their tokens.
Behind the whole blocks, `best_child` is the one of these that agrees with most of the tokens; the caller copies so much of
it. In sorted order that is one of the two between which the tokens belong, so a search looks at two blocks, however many
users one prompt has; and whoever chooses the tokens makes no search longer, as there is no table of hashes to fill
unevenly.
"""

from __future__ import annotations

import hashlib
import secrets
from bisect import bisect_left
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from pace.kvcache.pool import BlockPool
from pace.models.plan import I32Array

__all__ = ["MIN_TAIL", "Chain", "Entry", "PrefixIndex", "token_bytes"]

MIN_TAIL = 16
"""Tokens that copying a part of a block must save at least. Fewer run in the same step as what follows them."""

DIGEST_BYTES = 16
TOKEN_BYTES = 4

_data = attrgetter("data")


def token_bytes(tokens: I32Array) -> bytes:
    """Tokens as the index compares and hashes them: 4 bytes each."""
    return np.asarray(tokens, dtype=np.int32).tobytes()


@dataclass(frozen=True, slots=True, eq=False)
class Entry:
    """What a block holds: `data` (`token_bytes`) after everything that `parent` stands for. A tail has no digest."""

    block: int
    parent: bytes
    digest: bytes
    data: bytes


@dataclass(frozen=True, slots=True)
class Chain:
    """The whole blocks of some tokens.

    Attributes:
        data: the tokens, in `token_bytes`.
        digests: of the root, then of each block that was looked at.
        blocks: each of these, -1 where the index has none.
        gaps: indices of the latter; of blocks that were not looked at, the first.
    """

    data: bytes
    digests: list[bytes]
    blocks: list[int]
    gaps: list[int]


class PrefixIndex:
    """Digest -> block, and digest -> the blocks that continue it.

    An entry lives until its block is evicted by the pool, dropped by the block's owner, or until a newer entry says all
    that it says; so no tail is the beginning of a sibling, a block with the same parent. There is at most one entry for a
    block, and nothing else grows. Every operation but `chain` hashes and compares one block's tokens, and searches its n
    siblings: O(log n) comparisons, and a move of 8 bytes per sibling.

    Args:
        pool: whose blocks are indexed: they stay cached when they become free.
        key: of the hash, 16 .. 64 bytes; None: a secret one.

    Attributes:
        block_size: tokens of a whole block.
        block_bytes: of a whole block in `token_bytes`.
    """

    def __init__(self, pool: BlockPool, key: bytes | None = None) -> None:
        self._pool = pool
        self._key = secrets.token_bytes(32) if key is None else key
        self.block_size = pool.block_size
        self.block_bytes = pool.block_size * TOKEN_BYTES
        self._entries: dict[int, Entry] = {}  # by block
        self._by_digest: dict[bytes, int] = {}  # whole blocks
        self._children: dict[bytes, list[Entry]] = {}  # by parent, sorted by data
        pool.on_evict = self._remove

    def __len__(self) -> int:
        """Blocks that the index knows."""
        return len(self._entries)

    def root(self, salt: str | None) -> bytes:
        """The digest of no tokens under a salt."""
        # surrogatepass: a salt comes from outside, and any str is one.
        text = b"" if salt is None else b"s" + salt.encode("utf-8", "surrogatepass")
        return hashlib.blake2b(text, digest_size=DIGEST_BYTES, key=self._key, person=b"root").digest()

    def digest(self, parent: bytes, data: bytes) -> bytes:
        """The digest of a whole block `data` behind `parent`."""
        return hashlib.blake2b(
            parent + data, digest_size=DIGEST_BYTES, key=self._key, person=b"block"
        ).digest()

    def entry(self, block: int) -> Entry | None:
        """What the block is known to hold."""
        return self._entries.get(block)

    def n_tokens(self, block: int) -> int:
        """How many tokens the block is known to hold."""
        entry = self._entries.get(block)
        return 0 if entry is None else len(entry.data) // TOKEN_BYTES

    def insert(self, block: int, parent: bytes, digest: bytes, data: bytes) -> bool:
        """Index a whole block that somebody holds.

        Where two rows have computed the same content, the first one's block stays indexed and the second one's is not.

        Returns:
            False where the digest stands for something else, and the chain can't be continued.
        """
        known = self._by_digest.get(digest)
        if known is None:
            self._put(Entry(block, parent, digest, data))
        elif known != block:
            other = self._entries[known]
            if other.parent != parent or other.data != data:
                return False
            self.drop(block)
        return True

    def insert_tail(self, block: int, parent: bytes, data: bytes) -> None:
        """Index a partly filled block that somebody holds and may go on filling, unless another one says as much."""
        if len(data) < MIN_TAIL * TOKEN_BYTES or len(data) <= self.n_tokens(block) * TOKEN_BYTES:
            return
        siblings = self._children.get(parent, [])
        at = bisect_left(siblings, data, key=_data)
        if at == len(siblings) or not siblings[at].data.startswith(data):
            self._put(Entry(block, parent, b"", data))

    def drop(self, block: int) -> None:
        """Forget what a block holds, if anything is known; a cached free block becomes a fresh one."""
        if block in self._entries:
            self._remove(block)
            self._pool.unmark(block)

    def chain(self, tokens: I32Array, root: bytes, limit: int, *, gaps: bool = False) -> Chain:
        """The indexed whole blocks of tokens[:limit], up to the first one that is missing, or all with `gaps`: O(blocks).

        Behind a gap the digests alone vouch for the tokens that lead there.
        """
        data = token_bytes(tokens[:limit])
        step = self.block_bytes
        digests = [root]
        blocks: list[int] = []
        missing: list[int] = []
        for at in range(0, len(data) - step + 1, step):
            piece = data[at : at + step]
            parent = digests[-1]
            digest = self.digest(parent, piece)
            block = self._by_digest.get(digest, -1)
            if block >= 0:
                entry = self._entries[block]
                if entry.data != piece or entry.parent != parent:
                    block = -1
            if block < 0:
                missing.append(at // step)
                if not gaps:
                    break
            digests.append(digest)
            blocks.append(block)
        return Chain(data, digests, blocks, missing)

    def best_child(self, parent: bytes, data: bytes) -> tuple[int, int]:
        """The block behind `parent` that agrees with most of `data`, and the tokens; -1, 0 below `MIN_TAIL`.

        O(log n) comparisons for the n blocks behind it.
        """
        best, n_best = -1, 0
        if len(data) >= MIN_TAIL * TOKEN_BYTES:
            siblings = self._children.get(parent, [])
            at = bisect_left(siblings, data, key=_data)
            for entry in siblings[max(0, at - 1) : at + 1]:
                n_same = _n_common(entry.data, data)
                if n_same > n_best:
                    best, n_best = entry.block, n_same
        return (best, n_best) if n_best >= MIN_TAIL else (-1, 0)

    def _put(self, entry: Entry) -> None:
        """Add an entry, and remove the tail that it makes superfluous."""
        self.drop(entry.block)
        siblings = self._children.setdefault(entry.parent, [])
        at = bisect_left(siblings, entry.data, key=_data)
        # No tail begins a sibling: so one that begins this entry has no other between them.
        before = siblings[at - 1] if at else None
        siblings.insert(at, entry)
        if before is not None and not before.digest and entry.data.startswith(before.data):
            self.drop(before.block)
        self._entries[entry.block] = entry
        if entry.digest:
            self._by_digest[entry.digest] = entry.block
        self._pool.mark(entry.block)

    def _remove(self, block: int) -> None:
        entry = self._entries.pop(block)
        if entry.digest:
            del self._by_digest[entry.digest]
        siblings = self._children[entry.parent]
        del siblings[bisect_left(siblings, entry.data, key=_data)]
        if not siblings:
            del self._children[entry.parent]


def _n_common(a: bytes, b: bytes) -> int:
    """Leading tokens that two pieces share."""
    n = min(len(a), len(b)) // TOKEN_BYTES
    differ = np.frombuffer(a, np.int32, n) != np.frombuffer(b, np.int32, n)
    first = int(differ.argmax())
    return first if differ[first] else n
