"""Blocks are never lost, shared by mistake or freed twice."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pace.errors import ConfigError
from pace.kvcache import BlockPool, BlockTables, blocks_for, kv_block_bytes

N_BLOCKS, BLOCK, N_ROWS, MAX_LEN = 12, 16, 4, 100


class TablesMachine(RuleBasedStateMachine):
    """Rows come, grow, shrink and go; a block is held by one row or is free."""

    def __init__(self) -> None:
        super().__init__()
        self.pool = BlockPool(N_BLOCKS, BLOCK)
        self.tables = BlockTables(self.pool, N_ROWS, MAX_LEN)
        self.rows: dict[int, tuple[int, int]] = {}  # row -> tokens it may hold, tokens it holds

    @rule(max_tokens=st.integers(1, MAX_LEN))
    def open(self, max_tokens: int) -> None:
        promised = sum(blocks_for(most, BLOCK) for most, _ in self.rows.values())
        row = self.tables.open(max_tokens)
        fits = len(self.rows) < N_ROWS and promised + blocks_for(max_tokens, BLOCK) <= N_BLOCKS
        assert (row is not None) == fits
        if row is not None:
            assert row not in self.rows
            self.rows[row] = max_tokens, 0

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def extend(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.rows)))
        most, held = self.rows[row]
        n_tokens = data.draw(st.integers(held, most))
        self.tables.extend(row, n_tokens)
        self.rows[row] = most, n_tokens
        assert self.tables.capacity(row) >= n_tokens

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.rows)))
        most, held = self.rows[row]
        n_tokens = data.draw(st.integers(0, held))
        before = self.tables.array[row, : blocks_for(n_tokens, BLOCK)].copy()
        self.tables.truncate(row, n_tokens)
        assert (self.tables.array[row, : len(before)] == before).all()
        self.rows[row] = most, n_tokens

    @precondition(lambda self: self.rows)
    @rule(data=st.data())
    def close(self, data: st.DataObject) -> None:
        row = data.draw(st.sampled_from(sorted(self.rows)))
        del self.rows[row]
        self.tables.close(row)
        with pytest.raises(RuntimeError):
            self.tables.close(row)

    @invariant()
    def every_block_has_one_owner_or_none(self) -> None:
        held: Counter[int] = Counter()
        promised = 0
        for row, (most, _) in self.rows.items():
            n_blocks = self.tables.capacity(row) // BLOCK
            held.update(self.tables.array[row, :n_blocks].tolist())
            promised += blocks_for(most, BLOCK) - n_blocks
        assert all(0 <= block < N_BLOCKS and n == 1 for block, n in held.items())
        assert [self.pool.refcount(block) for block in range(N_BLOCKS)] == [held[b] for b in range(N_BLOCKS)]
        assert (self.pool.n_free, self.pool.n_reserved) == (N_BLOCKS - len(held), promised)
        assert self.tables.n_open == len(self.rows)


TablesMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestTables = TablesMachine.TestCase


def test_shared_blocks_live_until_the_last_holder() -> None:
    pool = BlockPool(2, 16)
    assert pool.reserve(1) and not pool.reserve(2)
    block = pool.allocate()
    pool.retain(block)
    assert not pool.release(block) and pool.n_free == 1
    assert pool.release(block) and pool.n_free == 2
    for operation in (pool.release, pool.retain):
        with pytest.raises(RuntimeError, match="free"):
            operation(block)


def test_a_row_keeps_within_its_reservation() -> None:
    pool = BlockPool(4, 16)
    tables = BlockTables(pool, 2, 64)
    row = tables.open(17)
    assert row is not None and pool.n_available == 2
    tables.extend(row, 32)
    with pytest.raises(RuntimeError, match="needs 3 blocks"):
        tables.extend(row, 33)
    pool.retain(int(tables.array[row, 1]))
    tables.truncate(row, 16)  # the second block stays with its other holder
    assert (pool.n_free, pool.n_reserved) == (2, 0)
    tables.close(row)
    assert pool.n_free == 3


def test_freed_blocks_are_reused_first() -> None:
    pool = BlockPool(8, 16)
    tables = BlockTables(pool, 2, 128)
    first = tables.open(48)
    assert first is not None
    tables.extend(first, 48)
    blocks = tables.array[first, :3].tolist()
    tables.close(first)
    second = tables.open(48)
    assert second is not None
    tables.extend(second, 48)
    assert tables.array[second, :3].tolist() == blocks


@pytest.mark.parametrize(("n_blocks", "block_size"), [(0, 16), (4, 8), (4, 24), (4, 0)])
def test_bad_sizes(n_blocks: int, block_size: int) -> None:
    with pytest.raises(ConfigError):
        BlockPool(n_blocks, block_size)


def test_sizes() -> None:
    assert [blocks_for(n, 16) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    # Llama-3.2-1B: 16 layers x 8 heads x 64 columns x K and V x bf16 = 32 KiB per token.
    assert kv_block_bytes(16, 8, 64, 256) == 256 * 32 * 1024
