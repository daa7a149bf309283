"""Rows come, grow, are cut, forked, found again and go: what a row reads is always what it, or its like, has written."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from pace.kvcache import BlockTables, ExtentTables, Reuse, blocks_for, make_tables

N_ROWS, MAX_LEN = 4, 130

_random = np.random.default_rng(7).integers(0, 1000, (3, MAX_LEN)).tolist()
# Prompts that part after 45 and after 100 tokens, within blocks of either size, and one of its own.
STREAMS = [
    _random[0],
    _random[0][:45] + _random[1][45:],
    _random[0][:100] + _random[2][100:],
    _random[1],
]
SALTS = [None, "", "tenant"]


@dataclass(frozen=True)
class Config:
    """Of one machine; `n_blocks` holds about two rows of full length, so that blocks are always short."""

    kind: str
    block_size: int
    n_blocks: int
    caching: bool = True
    window: int | None = None


CONFIGS = {
    "paged-16": Config("paged", 16, 20),
    "slab-32": Config("slab", 32, 11),
    "slab-64": Config("slab", 64, 5),
    "slab-32-window": Config("slab", 32, 11, window=20),
    "paged-16-window": Config("paged", 16, 17, window=34),
    "paged-16-uncached": Config("paged", 16, 17, caching=False),
    "contiguous-16": Config("contiguous", 16, 20),
    "contiguous-32": Config("contiguous", 32, 9),
}


@dataclass
class Row:
    """What a row must be.

    Attributes:
        salt: index of its salt.
        stream: where its further tokens come from.
        tokens: it holds these,
        values: and these are written in the cache for them.
        promise: blocks; 0 where the promise may have been lost, because a shared block was dropped.
        held: blocks of its table, stale ones included.
        released: leading ones that are stale.
    """

    salt: int
    stream: int
    tokens: list[int]
    values: list[int]
    promise: int
    held: int
    released: int = 0


def values_of(salt: int, tokens: list[int]) -> list[int]:
    """Stand-ins for keys: as these, each depends on everything before it, and on who may see it."""
    value, values = hash((salt, 17)), []
    for token in tokens:
        value = hash((value, token))
        values.append(value)
    return values


class TablesMachine(RuleBasedStateMachine):
    """Tables over a memory of one number per token, which is read and written through them alone."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.size = config.block_size
        self.memory = np.full((config.n_blocks, self.size), -1, dtype=np.int64)
        self.tables = make_tables(
            config.kind,
            config.n_blocks,
            self.size,
            N_ROWS,
            MAX_LEN,
            copy=self.copy,
            prefix_caching=config.caching,
            max_window=config.window,
        )
        self.rows: dict[int, Row] = {}

    def copy(self, src: int, dst: int, n_tokens: int) -> None:
        assert src != dst and 0 <= src < self.config.n_blocks and 0 <= dst < self.config.n_blocks
        assert 0 < n_tokens <= self.size
        self.memory[dst, :n_tokens] = self.memory[src, :n_tokens]
        self.memory[dst, n_tokens:] = -1

    def pick(self, which: int) -> tuple[int, Row]:
        number = sorted(self.rows)[which % len(self.rows)]
        return number, self.rows[number]

    def blocks(self, number: int, n_blocks: int) -> list[int]:
        """The row's first blocks, stale ones included."""
        table = self.tables.array[number]
        if isinstance(self.tables, ExtentTables):
            return list(range(int(table[0]), int(table[0]) + n_blocks))
        blocks: list[int] = table[:n_blocks].tolist()
        return blocks

    def write(self, number: int, start: int, values: list[int]) -> None:
        blocks = self.blocks(number, blocks_for(start + len(values), self.size))
        if isinstance(self.tables, BlockTables):
            for block in blocks[start // self.size :]:
                assert self.tables.pool.refcount(block) == 1, "a shared block is written"
        for i, value in enumerate(values, start):
            self.memory[blocks[i // self.size], i % self.size] = value

    def grow(self, number: int, n_tokens: int) -> bool:
        """Extend, and check that it works where it must and fails for a reason only."""
        row = self.rows[number]
        need = blocks_for(n_tokens, self.size)
        before = self.tables.n_available, self.tables.array.copy()
        done = self.tables.extend(number, n_tokens)
        if done:
            row.held = max(row.held, need)
        else:
            assert need > row.promise
            assert self.tables.n_available == before[0] and (self.tables.array == before[1]).all()
            if isinstance(self.tables, BlockTables):
                assert before[0] < need - row.held + 1  # one more: a block cut while it was shared
        return done

    def tokens(self, row: Row) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        return np.array(row.tokens, dtype=np.int32)

    def check_content(self, reuse: Reuse, values: list[int]) -> None:
        assert reuse.n_tokens == len(reuse.blocks) * self.size + reuse.n_tail
        for i, block in enumerate(reuse.blocks):
            if i >= reuse.n_released:
                assert self.memory[block].tolist() == values[i * self.size : (i + 1) * self.size]
        tail = values[len(reuse.blocks) * self.size : reuse.n_tokens]
        assert not tail or self.memory[reuse.tail, : reuse.n_tail].tolist() == tail

    def start(self, reserve: int, reuse: Reuse | None, row: Row) -> int | None:
        """Open, and check that it works exactly where it should."""
        free_rows = N_ROWS - len(self.rows)
        before = self.tables.n_available, self.tables.n_free, self.tables.n_open
        promise = blocks_for(reserve, self.size)
        fits = self.tables.fits(reserve, 0, reuse)
        number = self.tables.open(reserve, reuse, SALTS[row.salt])
        if number is None:
            assert before == (self.tables.n_available, self.tables.n_free, self.tables.n_open)
            assert not fits
            most = max(promise, blocks_for(len(row.tokens), self.size))
            assert free_rows == 0 or isinstance(self.tables, ExtentTables) or before[0] < most
            return None
        assert fits and number not in self.rows
        row.promise = promise
        row.held = blocks_for(len(row.tokens), self.size)
        row.released = 0 if reuse is None else reuse.n_released
        self.rows[number] = row
        return number

    @rule(
        stream=st.integers(0, 3),
        salt=st.sampled_from([0, 0, 0, 1, 2]),
        n_prompt=st.integers(1, MAX_LEN),
        reserve=st.sampled_from([0, 0, 1, 2]),
    )
    def open(self, stream: int, salt: int, n_prompt: int, reserve: int) -> None:
        """As the scheduler: what is cached is not written again, the rest of the prompt is."""
        prompt = STREAMS[stream][:n_prompt]
        reuse = self.tables.match(np.array(prompt, dtype=np.int32), SALTS[salt], n_prompt - 1)
        n_tokens = 0
        if reuse is not None:
            assert 0 < reuse.n_tokens < n_prompt
            assert reuse.n_tail == 0 or reuse.n_tail >= 16
            self.check_content(reuse, values_of(salt, prompt))
            n_tokens = reuse.n_tokens
        values = values_of(salt, prompt[:n_tokens])
        row = Row(salt, stream, prompt[:n_tokens], values, 0, 0)
        number = self.start((0, n_prompt, MAX_LEN)[reserve], reuse, row)
        if number is not None and self.grow(number, n_prompt):
            row.tokens, row.values = prompt, values_of(salt, prompt)
            self.write(number, n_tokens, row.values[n_tokens:])

    @precondition(lambda self: self.rows)
    @rule(which=st.integers(0, 3), n_new=st.integers(1, 50), own=st.booleans(), spare=st.integers(0, 8))
    def extend(self, which: int, n_new: int, own: bool, spare: int) -> None:
        """Tokens of the row's stream, or its own; `spare` more are written and then overwritten or left."""
        number, row = self.pick(which)
        n_tokens = len(row.tokens)
        n_new = min(n_new, MAX_LEN - n_tokens)
        spare = min(spare, MAX_LEN - n_tokens - n_new)
        if n_new == 0 or not self.grow(number, n_tokens + n_new + spare):
            return
        more = STREAMS[row.stream][n_tokens : n_tokens + n_new]
        if own:
            more = [2000 + (number + i) % 50 for i in range(n_new)]
        row.tokens = row.tokens + more
        row.values = values_of(row.salt, row.tokens)
        self.write(number, n_tokens, row.values[n_tokens:] + [-2] * spare)

    @precondition(lambda self: self.rows)
    @rule(which=st.integers(0, 3), tail=st.booleans(), share=st.integers(0, 8))
    def commit(self, which: int, tail: bool, share: int) -> None:
        number, row = self.pick(which)
        n_valid = len(row.tokens) * min(share + 4, 8) // 8
        (self.tables.remember_tail if tail else self.tables.commit)(number, self.tokens(row), n_valid)

    @precondition(lambda self: self.rows)
    @rule(which=st.integers(0, 3), n_tokens=st.integers(0, MAX_LEN))
    def truncate(self, which: int, n_tokens: int) -> None:
        number, row = self.pick(which)
        n_tokens = max(min(n_tokens, len(row.tokens)), row.released * self.size)
        keep = blocks_for(n_tokens, self.size)
        if isinstance(self.tables, BlockTables):
            refcount = self.tables.pool.refcount
            first = max(n_tokens // self.size, row.released)
            if any(refcount(block) > 1 for block in self.blocks(number, row.held)[first:]):
                row.promise = 0
        self.tables.truncate(number, n_tokens)
        row.tokens, row.values, row.held = row.tokens[:n_tokens], row.values[:n_tokens], keep

    @precondition(lambda self: self.rows)
    @rule(which=st.integers(0, 3), remember=st.booleans())
    def close(self, which: int, remember: bool) -> None:
        number, row = self.pick(which)
        self.tables.close(number, self.tokens(row) if remember else None)
        del self.rows[number]
        with pytest.raises(RuntimeError, match="not open"):
            self.tables.close(number)

    @precondition(lambda self: self.rows)
    @rule(which=st.integers(0, 3), n_new=st.integers(1, 70), cut=st.integers(0, 40))
    def poison(self, which: int, n_new: int, cut: int) -> None:
        """A row fills with NaN and is indexed before anybody notices: none of it may be found afterwards."""
        number, row = self.pick(which)
        n_tokens = len(row.tokens)
        n_new = min(n_new, MAX_LEN - n_tokens)
        if self.grow(number, n_tokens + n_new):
            tokens = self.tokens(row)
            tokens = np.append(tokens, STREAMS[row.stream][n_tokens : n_tokens + n_new]).astype(np.int32)
            self.write(number, n_tokens, [-3] * n_new)
            self.tables.remember_tail(number, tokens, len(tokens))
            self.tables.release_before(number, len(tokens))
            released = self.unseen(len(tokens))
            self.tables.truncate(number, max(released * self.size, len(tokens) - cut, n_tokens))
        self.tables.close(number, forget=True)
        del self.rows[number]

    @precondition(lambda self: self.rows)
    @rule(which=st.integers(0, 3), share=st.integers(0, 8), reserve=st.booleans())
    def fork(self, which: int, share: int, reserve: bool) -> None:
        number, row = self.pick(which)
        n_tokens = len(row.tokens) * share // 8
        reuse = self.tables.fork(number, n_tokens)
        assert (reuse is None) == (row.released > self.unseen(n_tokens))
        if reuse is None:
            return
        assert reuse.n_tokens == n_tokens
        self.check_content(reuse, row.values)
        child = Row(row.salt, row.stream, row.tokens[:n_tokens], row.values[:n_tokens], 0, 0)
        self.start(MAX_LEN if reserve else 0, reuse, child)

    def unseen(self, n_tokens: int) -> int:
        """Blocks that no query at n_tokens or later sees."""
        if self.config.window is None or self.config.kind == "contiguous":
            return 0
        return max(0, n_tokens - self.config.window + 1) // 32 * 32 // self.size

    @precondition(lambda self: self.rows and self.config.window is not None)
    @rule(which=st.integers(0, 3))
    def release_before(self, which: int) -> None:
        number, row = self.pick(which)
        self.tables.release_before(number, len(row.tokens))
        row.released = max(row.released, self.unseen(len(row.tokens)))

    @rule(n_tokens=st.integers(1, MAX_LEN), headroom=st.integers(0, 3))
    def fits(self, n_tokens: int, headroom: int) -> None:
        """It is asked, and then tried."""
        fits = self.tables.fits(n_tokens)
        with_headroom = self.tables.fits(n_tokens, headroom)
        before = self.tables.n_available
        number = self.tables.open(0)
        done = number is not None and self.tables.extend(number, n_tokens)
        assert done == fits
        need = blocks_for(n_tokens, self.size)
        assert with_headroom == (fits and before - need >= headroom)
        if number is not None:
            self.tables.close(number)

    @invariant()
    def every_row_reads_what_was_written(self) -> None:
        for number, row in self.rows.items():
            n_tokens = len(row.tokens)
            start = row.released * self.size
            blocks = self.blocks(number, blocks_for(n_tokens, self.size))[row.released :]
            assert self.memory[blocks].reshape(-1)[: n_tokens - start].tolist() == row.values[start:]

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        tables = self.tables
        assert tables.n_open == len(self.rows) and tables.n_used + tables.n_free == self.config.n_blocks
        assert 0 <= tables.n_available <= tables.n_free
        assert tables.array.min() >= 0 and tables.array.max() < self.config.n_blocks
        if isinstance(tables, BlockTables):
            self.check_pool(tables)
        elif isinstance(tables, ExtentTables):
            self.check_holes(tables)

    def check_pool(self, tables: BlockTables) -> None:
        pool, index = tables.pool, tables.index
        holders: Counter[int] = Counter()
        n_owed = 0
        for number, row in self.rows.items():
            state = tables._rows[number]
            assert state is not None and (state.n_blocks, state.n_released) == (row.held, row.released)
            assert state.owed >= row.promise - row.held
            holders.update(self.blocks(number, row.held)[row.released :])
            n_owed += state.owed
        n_blocks = self.config.n_blocks
        assert [pool.refcount(block) for block in range(n_blocks)] == [holders[b] for b in range(n_blocks)]
        assert (pool.n_free, pool.n_reserved) == (n_blocks - len(holders), n_owed)
        free = list(pool._fresh) + list(pool._cached)
        assert sorted([*free, *holders]) == list(range(n_blocks))
        known = {block for block in range(n_blocks) if index is not None and index.entry(block) is not None}
        assert {block for block in known if not holders[block]} == set(pool._cached)
        assert {block for block in range(n_blocks) if pool._marked[block]} == known
        if index is not None:
            listed = [entry.block for siblings in index._children.values() for entry in siblings]
            assert sorted(listed) == sorted(known) and set(index._by_digest.values()) <= known
            for siblings in index._children.values():
                pieces = [entry.data for entry in siblings]
                assert pieces and all(a < b and not b.startswith(a) for a, b in pairwise(pieces))

    def check_holes(self, tables: ExtentTables) -> None:
        holes = tables._holes
        runs = list(zip(holes._starts, holes._sizes, strict=True))
        assert all(size > 0 for _, size in runs) and holes.n_free == sum(size for _, size in runs)
        assert all(start + size < then for (start, size), (then, _) in pairwise(runs)), "holes touch"
        taken = [block for start, size in runs for block in range(start, start + size)]
        for number, row in self.rows.items():
            held = tables._capacity[number] // self.size
            assert held >= max(row.held, row.promise)
            taken += self.blocks(number, held)
        assert sorted(taken) == list(range(self.config.n_blocks))

    def teardown(self) -> None:
        for number in self.rows:
            self.tables.close(number)
        n_blocks = self.config.n_blocks
        assert (self.tables.n_free, self.tables.n_available, self.tables.n_open) == (n_blocks, n_blocks, 0)
        self.rows.clear()
        self.every_block_is_accounted_for()


def explore(name: str, max_examples: int, n_steps: int) -> None:
    run_state_machine_as_test(  # type: ignore[no-untyped-call]
        lambda: TablesMachine(CONFIGS[name]),
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=n_steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_tables(name: str) -> None:
    explore(name, 25, 50)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_tables_at_length(name: str) -> None:
    """8 configurations x 350 histories x up to 60 steps: 160 000 steps."""
    explore(name, 350, 60)
