"""What the index finds, and what it must not."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace.kvcache import BlockPool, PrefixIndex, prefix
from pace.kvcache.prefix import MIN_TAIL, token_bytes
from pace.models.plan import I32Array

SIZE = 32


def some_tokens(seed: int, n: int = 4 * SIZE) -> I32Array:
    return np.random.default_rng(seed).integers(0, 32000, n).astype(np.int32)


class Held:
    """An index over blocks that are all held."""

    def __init__(self, n_blocks: int = 32) -> None:
        self.pool = BlockPool(n_blocks, SIZE)
        self.pool.reserve(n_blocks)
        self.index = PrefixIndex(self.pool)

    def add(self, tokens: I32Array, salt: str | None = None, tail: bool = True) -> list[int]:
        """Index tokens in fresh blocks, as one row does."""
        parent = self.index.root(salt)
        blocks = []
        for at in range(0, len(tokens), SIZE):
            data = token_bytes(tokens[at : at + SIZE])
            blocks.append(self.pool.allocate())
            if len(data) == self.index.block_bytes:
                digest = self.index.digest(parent, data)
                assert self.index.insert(blocks[-1], parent, digest, data)
                parent = digest
            elif tail:
                self.index.insert_tail(blocks[-1], parent, data)
        return blocks

    def find(
        self, tokens: I32Array, salt: str | None = None, limit: int | None = None
    ) -> tuple[list[int], int, int]:
        chain = self.index.chain(tokens, self.index.root(salt), len(tokens) if limit is None else limit)
        assert len(chain.digests) == len(chain.blocks) + 1
        n_bytes = len(chain.blocks) * self.index.block_bytes
        return chain.blocks, *self.index.best_child(chain.digests[-1], chain.data[n_bytes:])


def test_whole_blocks_then_the_best_partial_one() -> None:
    held = Held()
    tokens = some_tokens(0, 3 * SIZE + 20)
    blocks = held.add(tokens)
    assert held.find(tokens) == (blocks[:3], blocks[3], 20)
    assert held.find(tokens, limit=3 * SIZE) == (blocks[:3], -1, 0)
    assert held.find(tokens, limit=3 * SIZE - 1) == (blocks[:2], blocks[2], SIZE - 1)
    other = some_tokens(1)
    other[: 2 * SIZE + 18] = tokens[: 2 * SIZE + 18]
    assert held.find(other) == (blocks[:2], blocks[2], 18)
    for n_common in (MIN_TAIL - 1, MIN_TAIL):
        other = some_tokens(2)
        other[:n_common] = tokens[:n_common]
        expected: tuple[list[int], int, int] = (
            ([], blocks[0], MIN_TAIL) if n_common == MIN_TAIL else ([], -1, 0)
        )
        assert held.find(other) == expected


def test_a_block_is_found_behind_its_own_parents_only() -> None:
    held = Held()
    tokens = some_tokens(0)
    held.add(tokens)
    assert held.find(tokens[SIZE:]) == ([], -1, 0)
    swapped = np.concatenate([tokens[SIZE : 2 * SIZE], tokens[:SIZE]])
    assert held.find(swapped) == ([], -1, 0)


def test_salts_do_not_mix() -> None:
    held = Held()
    tokens = some_tokens(0, SIZE)
    blocks = {salt: held.add(tokens, salt) for salt in (None, "", "a", "\ud800")}
    for salt, expected in blocks.items():
        assert held.find(tokens, salt) == (expected, -1, 0)
    assert held.find(tokens, "b") == ([], -1, 0)


def test_keys_are_secret_and_differ() -> None:
    first, second = PrefixIndex(BlockPool(1, SIZE)), PrefixIndex(BlockPool(1, SIZE))
    assert first.root(None) != second.root(None)
    pool = BlockPool(1, SIZE)
    assert PrefixIndex(pool, b"k" * 16).root("a") == PrefixIndex(pool, b"k" * 16).root("a")


class Colliding(PrefixIndex):
    """Every whole block has the same digest."""

    def digest(self, parent: bytes, data: bytes) -> bytes:
        return b"same digest"


def test_a_collision_finds_nothing() -> None:
    pool = BlockPool(4, SIZE)
    pool.reserve(4)
    index = Colliding(pool)
    mine, yours = some_tokens(0, 2 * SIZE), some_tokens(1, 2 * SIZE)
    root = index.root(None)
    block = pool.allocate()
    assert index.insert(block, root, index.digest(root, b""), token_bytes(mine[:SIZE]))
    assert index.chain(yours, root, SIZE).blocks == []
    assert index.chain(mine, root, SIZE).blocks == [block]
    assert index.chain(mine, index.root("other"), SIZE).blocks == [], "the parent is compared too"
    assert not index.insert(pool.allocate(), root, index.digest(root, b""), token_bytes(yours[:SIZE]))
    assert len(index) == 1


def test_the_first_of_two_equal_blocks_stays() -> None:
    held = Held()
    tokens = some_tokens(0, 2 * SIZE)
    first = held.add(tokens)
    second = held.add(tokens)
    assert held.find(tokens) == (first, -1, 0)
    assert len(held.index) == 2
    assert all(held.index.entry(block) is None for block in second)


def test_a_tail_gives_way_to_what_says_more() -> None:
    held = Held()
    tokens = some_tokens(0, SIZE)
    (short,) = held.add(tokens[:20])
    (longer,) = held.add(tokens[:30])
    assert held.find(tokens) == ([], longer, 30) and held.index.entry(short) is None
    (shorter,) = held.add(tokens[:25])
    assert held.index.entry(shorter) is None, "it says nothing new"
    (whole,) = held.add(tokens)
    assert held.find(tokens) == ([whole], -1, 0) and len(held.index) == 1


def test_a_block_that_fills_up_replaces_its_own_tail() -> None:
    held = Held()
    tokens = some_tokens(0, SIZE)
    root = held.index.root(None)
    (block,) = held.add(tokens[:20])
    data = token_bytes(tokens)
    held.index.insert_tail(block, root, token_bytes(tokens[:18]))
    assert held.index.n_tokens(block) == 20
    held.index.insert(block, root, held.index.digest(root, data), data)
    assert held.find(tokens) == ([block], -1, 0)
    held.index.insert_tail(block, root, token_bytes(tokens[:18]))
    assert held.find(tokens) == ([block], -1, 0)


def test_short_tails_are_not_worth_an_entry() -> None:
    held = Held()
    held.add(some_tokens(0, MIN_TAIL - 1))
    assert len(held.index) == 0


def test_no_number_of_siblings_displaces_one() -> None:
    """A block kept 8 children once: the ninth user of a system prompt made the first one's chat unfindable."""
    n = 1000
    held = Held(2 * n)
    tails = [some_tokens(seed, 20) for seed in range(n)]
    wholes = [some_tokens(seed, SIZE) for seed in range(n, 2 * n)]
    blocks = [held.add(tokens)[0] for tokens in tails + wholes]
    assert len(held.index) == 2 * n
    for tail, block in zip(tails, blocks[:n], strict=True):
        assert held.find(tail) == ([], block, 20)
    for whole, block in zip(wholes, blocks[n:], strict=True):
        assert held.find(whole) == ([block], -1, 0)
        assert held.find(whole, limit=SIZE - 1) == ([], block, SIZE - 1)


def test_a_search_compares_two_siblings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that someone has chosen so that all of them share all but their ends, too."""
    held = Held(500)
    tokens = some_tokens(0, SIZE)
    for i in range(500):
        tokens[SIZE - 1 - i % 8] = i
        held.add(tokens)
    compared: list[int] = []
    count = prefix._n_common

    def counted(a: bytes, b: bytes) -> int:
        compared.append(1)
        return count(a, b)

    monkeypatch.setattr(prefix, "_n_common", counted)
    assert held.find(tokens, limit=SIZE - 1)[2] == SIZE - 1
    assert 1 <= len(compared) <= 2


def common(a: I32Array, b: I32Array) -> int:
    n = min(len(a), len(b))
    return next((i for i in range(n) if a[i] != b[i]), n)


@settings(max_examples=150)
@given(data=st.data())
def test_the_best_of_all_siblings_is_found(data: st.DataObject) -> None:
    """Few different tokens, of either sign and byte order's every trap, so that beginnings are shared at any length."""
    alphabet = st.sampled_from([0, 1, 255, 256, 65536, -1, 2**31 - 1])
    piece = st.tuples(st.integers(0, SIZE), alphabet, alphabet).map(
        lambda it: np.array([it[1]] * it[0] + [it[2]] * (SIZE - it[0]), dtype=np.int32)
    )
    held = Held(64)
    added: list[I32Array] = []
    for tokens in data.draw(st.lists(piece, min_size=1, max_size=30)):
        cut = data.draw(st.integers(MIN_TAIL, SIZE))
        (block,) = held.add(tokens[:cut])
        if held.index.entry(block) is not None:
            added.append(tokens[:cut])
        if data.draw(st.booleans()):
            held.index.drop(data.draw(st.sampled_from(sorted(held.index._entries))))
            known = [entry.data for entry in held.index._entries.values()]
            added = [tokens for tokens in added if token_bytes(tokens) in known]
        wanted = data.draw(piece)[: SIZE - 1]
        best = max((common(wanted, tokens) for tokens in added), default=0)
        blocks, tail, n_tail = held.find(wanted)
        assert blocks == [] and n_tail == (best if best >= MIN_TAIL else 0)
        entry = held.index.entry(tail)
        assert entry is None or entry.data[: 4 * n_tail] == token_bytes(wanted[:n_tail])


def test_eviction_removes_the_entry_and_dropping_frees_the_block() -> None:
    pool = BlockPool(2, SIZE)
    index = PrefixIndex(pool)
    root = index.root(None)
    blocks, chunks = [], [some_tokens(seed, SIZE) for seed in range(2)]
    for chunk in chunks:
        pool.reserve(1)
        blocks.append(pool.allocate())
        data = token_bytes(chunk)
        index.insert(blocks[-1], root, index.digest(root, data), data)
        pool.release(blocks[-1])
    pool.reserve(1)
    assert pool.allocate() == blocks[0]
    assert index.chain(chunks[0], root, SIZE).blocks == [] and len(index) == 1
    index.drop(blocks[1])
    index.drop(blocks[1])
    assert len(index) == 0
    pool.reserve(1)
    assert pool.allocate() == blocks[1] and pool.n_evicted == 1


@pytest.mark.parametrize("dtype", [np.int64, np.int32])
def test_any_integer_array_means_the_same_tokens(dtype: npt.DTypeLike) -> None:
    held = Held()
    tokens = some_tokens(0, SIZE)
    blocks = held.add(tokens)
    strided = np.repeat(tokens, 2).astype(dtype)[::2]
    assert held.find(strided) == (blocks, -1, 0)
