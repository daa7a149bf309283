"""Rows come, grow, are cut, forked, found again and go: what a row reads is always what it, or its like, has written.

Over one group of layers and over several, with and without a reach, in every type.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import Any

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

from pace.kvcache import (
    BlockReuse,
    BlockTables,
    ExtentTables,
    GroupTables,
    ReleasedError,
    Reuse,
    TokenTables,
    blocks_for,
    join_groups,
    make_tables,
)
from pace.kvcache.grouped import GroupedReuse
from pace.kvcache.prefix import MIN_TAIL, token_bytes
from pace.models.plan import I32Array

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
GROWING = st.tuples(st.integers(1, MAX_LEN), st.integers(1, MAX_LEN)).map(lambda pair: (min(pair), max(pair)))


@dataclass(frozen=True)
class Group:
    """Of one machine; n_blocks holds about two rows of full length, so that blocks are always short."""

    block_size: int
    n_blocks: int
    reach: int | None = None


@dataclass(frozen=True)
class Config:
    """Of one machine."""

    kind: str
    groups: tuple[Group, ...]
    caching: bool = True
    max_step: int | None = None


CONFIGS = {
    "paged-16": Config("paged", (Group(16, 20),)),
    "slab-32": Config("slab", (Group(32, 11),)),
    "slab-64": Config("slab", (Group(64, 5),)),
    "slab-32-window": Config("slab", (Group(32, 9, 20),), max_step=30),
    "paged-16-window": Config("paged", (Group(16, 12, 34),), max_step=20),
    "paged-16-uncached": Config("paged", (Group(16, 17),), caching=False),
    "contiguous-16": Config("contiguous", (Group(16, 20),)),
    "contiguous-32": Config("contiguous", (Group(32, 9),)),
    "contiguous-16-window": Config("contiguous", (Group(16, 14, 34),), max_step=24),
    "slab-full-and-window": Config("slab", (Group(64, 5), Group(16, 12, 20)), max_step=25),
    "slab-window-and-full": Config("slab", (Group(32, 7, 40), Group(32, 10)), max_step=17),
    "paged-three": Config("paged", (Group(16, 20), Group(16, 10, 1), Group(16, 16, 50)), max_step=30),
    "slab-windows-uncached": Config("slab", (Group(32, 8, 33), Group(64, 5, 70)), caching=False, max_step=40),
    "contiguous-full-and-window": Config("contiguous", (Group(16, 20), Group(32, 9, 33)), max_step=30),
}


def n_growing(tables: GroupTables, growing: list[tuple[int, int]]) -> int:
    """Of rows with so many tokens now and in the end: those that will hold more blocks than they do now."""
    assert isinstance(tables, TokenTables)

    def held(n_tokens: int) -> int:
        return min(tables.max_held, blocks_for(n_tokens, tables.block_size))

    return sum(held(end) > held(now) for now, end in growing)


@dataclass
class Row:
    """What a row must be.

    Attributes:
        salt: index of its salt.
        stream: where its further tokens come from.
        tokens: it holds these,
        values: and these are written in the cache for them.
        promise: tokens.
        at: the position before which everything unseen was released last; what may be promised is counted from here.
        held: of each group, blocks of its table, stale ones included.
        released: leading ones that are stale.
        is_sure: False where the promise may have been lost, because a shared block was dropped.
    """

    salt: int
    stream: int
    tokens: list[int]
    values: list[int]
    promise: int = 0
    at: int = 0
    held: list[int] = field(default_factory=list)
    released: list[int] = field(default_factory=list)
    is_sure: bool = True


def values_of(salt: int, tokens: list[int]) -> list[int]:
    """Stand-ins for keys: as these, each depends on everything before it, and on who may see it."""
    value, values = hash((salt, 17)), []
    for token in tokens:
        value = hash((value, token))
        values.append(value)
    return values


def unseen(group: Group, position: int) -> int:
    """Blocks that no query at `position` or later sees."""
    return 0 if group.reach is None else max(0, position - group.reach + 1) // 32 * 32 // group.block_size


def parts_of(reuse: Reuse) -> list[BlockReuse]:
    parts = reuse.parts if isinstance(reuse, GroupedReuse) else (reuse,)
    return [part for part in parts if isinstance(part, BlockReuse)]


class TablesMachine(RuleBasedStateMachine):
    """Tables over a memory of one number per token and group, which is read and written through them alone."""

    config: Config

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.config = config
        self.memory = [np.full((g.n_blocks, g.block_size), -1, dtype=np.int64) for g in config.groups]
        self.tables = join_groups(
            [
                make_tables(
                    config.kind,
                    group.n_blocks,
                    group.block_size,
                    N_ROWS,
                    MAX_LEN,
                    copy=partial(self.copy, memory),
                    prefix_caching=config.caching,
                    reach=group.reach,
                    max_step=config.max_step,
                )
                for group, memory in zip(config.groups, self.memory, strict=True)
            ]
        )
        self.groups = list(zip(config.groups, self.tables.groups, self.memory, strict=True))
        self.max_step = min(config.max_step or MAX_LEN, MAX_LEN)
        self.rows: dict[int, Row] = {}

    @staticmethod
    def copy(memory: np.ndarray, src: int, dst: int, n_tokens: int) -> None:
        n_blocks, size = memory.shape
        assert src != dst and 0 <= src < n_blocks and 0 <= dst < n_blocks
        assert 0 < n_tokens <= size
        memory[dst, :n_tokens] = memory[src, :n_tokens]
        memory[dst, n_tokens:] = -1

    def pick(self, which: int) -> tuple[int, Row]:
        number = sorted(self.rows)[which % len(self.rows)]
        return number, self.rows[number]

    def blocks(self, tables: GroupTables, number: int, start: int, end: int) -> list[int]:
        """Blocks of the row's entries start .. end - 1."""
        table = tables.array[number]
        if isinstance(tables, ExtentTables):
            return list(range(int(table[0]) + start, int(table[0]) + end))
        blocks: list[int] = table[start:end].tolist()
        return blocks

    def write(self, number: int, start: int, values: list[int]) -> None:
        for group, tables, memory in self.groups:
            size = group.block_size
            first = start // size
            blocks = self.blocks(tables, number, first, blocks_for(start + len(values), size))
            if isinstance(tables, BlockTables):
                assert all(tables.pool.refcount(block) == 1 for block in blocks), "a shared block is written"
            for i, value in enumerate(values, start):
                memory[blocks[i // size - first], i % size] = value

    def grow(self, number: int, n_tokens: int) -> bool:
        """Extend, and check that it works where it must and fails for a reason only."""
        row = self.rows[number]
        before = [(tables.n_available, tables.array.copy()) for _, tables, _ in self.groups]
        done = self.tables.extend(number, n_tokens)
        if done:
            row.held = [
                max(held, blocks_for(n_tokens, group.block_size))
                for held, group in zip(row.held, self.config.groups, strict=True)
            ]
            return True
        assert n_tokens > row.promise or n_tokens > self.tables.step_end(row.at) or not row.is_sure
        lacks = []
        for (group, tables, _), (n_available, array), held in zip(self.groups, before, row.held, strict=True):
            assert tables.n_available == n_available and (tables.array == array).all()
            n_new = blocks_for(n_tokens, group.block_size) - held
            # One more: a block cut while it was shared.
            lacks.append(isinstance(tables, ExtentTables) or n_available < n_new + 1)
        assert any(lacks)
        return False

    def tokens(self, row: Row) -> I32Array:
        return np.array(row.tokens, dtype=np.int32)

    def check_content(self, reuse: Reuse, values: list[int]) -> None:
        parts = parts_of(reuse)
        assert len(parts) == len(self.groups)
        for part, (group, _, memory) in zip(parts, self.groups, strict=True):
            size = group.block_size
            assert part.n_tokens == reuse.n_tokens == len(part.blocks) * size + part.n_tail
            assert part.n_released <= unseen(group, part.n_tokens)
            for i in range(part.n_released, len(part.blocks)):
                assert memory[part.blocks[i]].tolist() == values[i * size : (i + 1) * size]
            tail = values[len(part.blocks) * size : part.n_tokens]
            assert not tail or memory[part.tail, : part.n_tail].tolist() == tail

    def start(self, reserve: int, reuse: Reuse | None, row: Row) -> int | None:
        """Open, and check that it works exactly where it should."""
        before = [(tables.n_available, tables.n_free, tables.n_open) for _, tables, _ in self.groups]
        fits = self.tables.fits(reserve, (), reuse)
        number = self.tables.open(reserve, reuse, SALTS[row.salt])
        if number is None:
            after = [(tables.n_available, tables.n_free, tables.n_open) for _, tables, _ in self.groups]
            assert before == after and not fits
            n_tokens = max(reserve, len(row.tokens))
            assert len(self.rows) == N_ROWS or any(
                isinstance(tables, ExtentTables) or n_available < blocks_for(n_tokens, group.block_size)
                for (group, tables, _), (n_available, _, _) in zip(self.groups, before, strict=True)
            )
            return None
        assert fits and number not in self.rows
        row.promise, row.at = reserve, len(row.tokens)
        row.held = [blocks_for(len(row.tokens), group.block_size) for group in self.config.groups]
        row.released = [0] * len(self.groups) if reuse is None else [p.n_released for p in parts_of(reuse)]
        self.rows[number] = row
        return number

    def could_begin(self, salt: int, prompt: list[int], n_tokens: int) -> bool:
        """Whether every group's index knows all that a query behind n_tokens sees; by definition."""
        for group, tables, _ in self.groups:
            assert isinstance(tables, BlockTables) and tables.index is not None
            index, size = tables.index, group.block_size
            parent = index.root(SALTS[salt])
            for i in range(blocks_for(n_tokens, size)):
                piece = token_bytes(
                    np.array(prompt[i * size : min((i + 1) * size, n_tokens)], dtype=np.int32)
                )
                if i >= unseen(group, n_tokens):
                    children = [e for e in index._entries.values() if e.parent == parent]
                    if not any(entry.data.startswith(piece) for entry in children):
                        return False
                    whole = token_bytes(np.array(prompt[i * size : (i + 1) * size], dtype=np.int32))
                    if len(piece) < 4 * MIN_TAIL and not any(
                        entry.digest and entry.data == whole for entry in children
                    ):
                        return False  # too short to be looked for
                parent = index.digest(parent, piece)
        return True

    @staticmethod
    def n_spare(tables: GroupTables, salt: int, prompt: list[int]) -> int:
        """Free blocks beside those of the prompt. Where a tail is the only one, `open` takes it itself, in whole groups."""
        assert isinstance(tables, BlockTables) and tables.index is not None
        tokens = np.array(prompt, dtype=np.int32)
        known = tables.index.chain(tokens, tables.index.root(SALTS[salt]), len(prompt), gaps=True).blocks
        return tables.n_free - sum(block >= 0 and tables.pool.refcount(block) == 0 for block in known)

    @rule(
        stream=st.integers(0, 3),
        salt=st.sampled_from([0, 0, 0, 1, 2]),
        n_prompt=st.integers(1, MAX_LEN),
        reserve=st.sampled_from([0, 0, 1, 2]),
    )
    def open(self, stream: int, salt: int, n_prompt: int, reserve: int) -> None:
        """As the scheduler: what is cached is not written again, the rest of the prompt is, step by step."""
        prompt = STREAMS[stream][:n_prompt]
        reuse = self.tables.match(np.array(prompt, dtype=np.int32), SALTS[salt], n_prompt - 1)
        n_tokens = 0
        if reuse is not None:
            assert 0 < reuse.n_tokens < n_prompt
            self.check_content(reuse, values_of(salt, prompt))
            n_tokens = reuse.n_tokens
            assert self.could_begin(salt, prompt, n_tokens)
        if (
            self.config.caching
            and self.config.kind != "contiguous"
            and all(self.n_spare(tables, salt, prompt) > 1 for _, tables, _ in self.groups)
        ):
            longer = range(n_tokens + 1, n_prompt, 3)
            assert not any(self.could_begin(salt, prompt[: n_prompt - 1], n) for n in longer)
        row = Row(salt, stream, prompt[:n_tokens], values_of(salt, prompt[:n_tokens]))
        number = self.start((0, n_prompt, MAX_LEN)[reserve], reuse, row)
        while number is not None and len(row.tokens) < n_prompt:
            n_tokens = len(row.tokens)
            end = min(n_prompt, self.tables.step_end(n_tokens))
            assert end >= min(n_prompt, n_tokens + self.max_step)
            if not self.grow(number, end):
                break
            row.tokens, row.values = prompt[:end], values_of(salt, prompt[:end])
            self.write(number, n_tokens, row.values[n_tokens:])
            self.release(number, row)

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
    @rule(which=st.integers(0, 3), n_tokens=st.integers(0, MAX_LEN), little=st.booleans())
    def truncate(self, which: int, n_tokens: int, little: bool) -> None:
        number, row = self.pick(which)
        n_tokens = max(0, len(row.tokens) - n_tokens % 20) if little else min(n_tokens, len(row.tokens))
        if any(
            released > unseen(group, n_tokens)
            for group, released in zip(self.config.groups, row.released, strict=True)
        ):
            with pytest.raises(ReleasedError, match="released"):
                self.tables.truncate(number, n_tokens)
            return
        for i, (group, tables, _) in enumerate(self.groups):
            if isinstance(tables, BlockTables) and group.reach is None:
                refcount = tables.pool.refcount
                dropped = self.blocks(tables, number, n_tokens // group.block_size, row.held[i])
                row.is_sure = row.is_sure and all(refcount(block) <= 1 for block in dropped)
        self.tables.truncate(number, n_tokens)
        row.tokens, row.values = row.tokens[:n_tokens], row.values[:n_tokens]
        row.held = [blocks_for(n_tokens, group.block_size) for group in self.config.groups]

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
            target = max(len(tokens) - cut, n_tokens)
            if all(group.can_truncate(number, target) for group in self.tables.groups):
                self.tables.truncate(number, target)
        self.tables.close(number, forget=True)
        del self.rows[number]

    @precondition(lambda self: self.rows)
    @rule(which=st.integers(0, 3), share=st.integers(0, 8), reserve=st.booleans())
    def fork(self, which: int, share: int, reserve: bool) -> None:
        number, row = self.pick(which)
        n_tokens = len(row.tokens) * share // 8
        reuse = self.tables.fork(number, n_tokens)
        assert (reuse is None) == any(
            released > unseen(group, n_tokens)
            for group, released in zip(self.config.groups, row.released, strict=True)
        )
        if reuse is None:
            return
        assert reuse.n_tokens == n_tokens
        self.check_content(reuse, row.values)
        child = Row(row.salt, row.stream, row.tokens[:n_tokens], row.values[:n_tokens])
        self.start(MAX_LEN if reserve else 0, reuse, child)

    @precondition(lambda self: self.rows and self.config.max_step is not None)
    @rule(which=st.integers(0, 3))
    def release_before(self, which: int) -> None:
        self.release(*self.pick(which))

    def release(self, number: int, row: Row) -> None:
        row.at = len(row.tokens)
        self.tables.release_before(number, row.at)
        row.released = [
            max(released, unseen(group, row.at))
            for group, released in zip(self.config.groups, row.released, strict=True)
        ]

    @rule(n_tokens=st.integers(1, MAX_LEN), growing=st.lists(GROWING, max_size=3))
    def fits(self, n_tokens: int, growing: list[tuple[int, int]]) -> None:
        """It is asked, and then tried."""
        fits = self.tables.fits(n_tokens)
        with_growing = self.tables.fits(n_tokens, growing)
        n_before = [tables.n_available for _, tables, _ in self.groups]
        number = self.tables.open(n_tokens)
        assert (number is not None) == fits
        if number is not None:
            assert with_growing == all(
                tables.n_available >= min(n_growing(tables, growing), group.n_blocks // 8)
                for group, tables, _ in self.groups
            )
            self.tables.close(number)
        assert n_before == [tables.n_available for _, tables, _ in self.groups]

    @invariant()
    def every_row_reads_what_was_written(self) -> None:
        for number, row in self.rows.items():
            n_tokens = len(row.tokens)
            for (group, tables, memory), released in zip(self.groups, row.released, strict=True):
                start = min(released * group.block_size, n_tokens)
                end = blocks_for(n_tokens, group.block_size)
                blocks = self.blocks(tables, number, released, end)
                assert memory[blocks].reshape(-1)[: n_tokens - start].tolist() == row.values[start:]

    @invariant()
    def nobody_holds_what_nobody_sees(self) -> None:
        """Right after a release, a group with a reach holds that, and at most what it rounds up to."""
        for row in self.rows.values():
            if row.at == len(row.tokens):
                for group, held, released in zip(self.config.groups, row.held, row.released, strict=True):
                    if group.reach is not None and held == blocks_for(row.at, group.block_size):
                        ragged = max(group.block_size, 32) - 1
                        assert held - released <= blocks_for(ragged + group.reach - 1, group.block_size)

    @invariant()
    def every_block_is_accounted_for(self) -> None:
        tables = self.tables
        n_blocks = sum(group.n_blocks for group in self.config.groups)
        assert tables.n_open == len(self.rows) and tables.n_used + tables.n_free == n_blocks
        for i, (group, part, _) in enumerate(self.groups):
            assert part.n_open == len(self.rows) and 0 <= part.n_available <= part.n_free
            if isinstance(part, BlockTables):
                assert part.array.min() >= 0 and part.array.max() < group.n_blocks
                self.check_pool(i, group, part)
            elif isinstance(part, ExtentTables):
                self.check_holes(i, group, part)

    def check_pool(self, i: int, group: Group, tables: BlockTables) -> None:
        pool, index = tables.pool, tables.index
        holders: Counter[int] = Counter()
        n_reserved = 0
        for number, row in self.rows.items():
            state = tables._rows[number]
            assert state is not None
            assert (state.n_blocks, state.n_released) == (row.held[i], row.released[i])
            holders.update(self.blocks(tables, number, row.released[i], row.held[i]))
            n_reserved += state.owed
        if group.reach is not None:
            n_reserved += sum(n - 1 for n in holders.values())
        n_blocks = group.n_blocks
        assert [pool.refcount(block) for block in range(n_blocks)] == [holders[b] for b in range(n_blocks)]
        assert (pool.n_free, pool.n_reserved) == (n_blocks - len(holders), n_reserved)
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

    def check_holes(self, i: int, group: Group, tables: ExtentTables) -> None:
        holes = tables._holes
        runs = list(zip(holes._starts, holes._sizes, strict=True))
        assert all(size > 0 for _, size in runs) and holes.n_free == sum(size for _, size in runs)
        assert all(start + size < then for (start, size), (then, _) in pairwise(runs)), "holes touch"
        taken = [block for start, size in runs for block in range(start, start + size)]
        for number, row in self.rows.items():
            extent = tables._extents[number]
            assert extent is not None and extent.head <= extent.unseen == row.released[i]
            assert extent.head + extent.size >= row.held[i]
            taken += range(extent.start, extent.start + extent.size)
        assert sorted(taken) == list(range(group.n_blocks))

    def teardown(self) -> None:
        for number in self.rows:
            self.tables.close(number)
        for group, tables, _ in self.groups:
            n_blocks = group.n_blocks
            assert (tables.n_free, tables.n_available, tables.n_open) == (n_blocks, n_blocks, 0)
        self.rows.clear()
        self.every_block_is_accounted_for()


def explore(name: str, max_examples: int, n_steps: int) -> None:
    machine: Any = partial(TablesMachine, CONFIGS[name])  # any factory will do, but is declared as a class
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=n_steps,
            suppress_health_check=list(HealthCheck),
        ),
    )


@pytest.mark.parametrize("name", CONFIGS)
def test_tables(name: str) -> None:
    explore(name, 20, 40)


@pytest.mark.slow
@pytest.mark.parametrize("name", CONFIGS)
def test_tables_at_length(name: str) -> None:
    """14 configurations x 350 histories x up to 60 steps: 290 000 steps."""
    explore(name, 350, 60)
