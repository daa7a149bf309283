"""Extents: where they lie, how they grow, what is copied."""

from __future__ import annotations

import numpy as np
import pytest

from pace.errors import ConfigError
from pace.kvcache import BlockTables, ExtentTables, ReleasedError, make_tables
from pace.kvcache.holes import Holes

SIZE = 16


class Tables(ExtentTables):
    """25 blocks at most per row, grown in segments of 5; with a record of what was copied."""

    def __init__(self, n_blocks: int = 40, max_seqs: int = 4) -> None:
        self.copied: list[tuple[int, int, int]] = []
        super().__init__(
            n_blocks, SIZE, max_seqs, 25 * SIZE, copy=lambda src, dst, n: self.copied.append((src, dst, n))
        )

    def run(self, n_tokens: int, reserve: int = 0) -> int:
        row = self.open(reserve)
        assert row is not None and self.extend(row, n_tokens)
        return row

    def place(self, row: int) -> tuple[int, int]:
        """First block and length of an extent."""
        return int(self.array[row, 0]), self._capacity[row] // SIZE


def test_holes_split_and_join() -> None:
    holes = Holes(10)
    assert [holes.take(size) for size in (3, 3, 0, 5, 4)] == [0, 3, 0, None, 6]
    assert (holes.n_free, holes.largest) == (0, 0)
    for start, size in ((0, 3), (6, 4), (3, 3)):
        holes.give(start, size)
    assert (holes.n_free, holes.largest) == (10, 10)
    assert holes.take_at(4, 2) and not holes.take_at(5, 1) and not holes.take_at(3, 2)
    assert (holes.n_free, holes.largest) == (8, 4)
    assert holes.take(4) == 0
    for start in (0, 4, 5):
        with pytest.raises(RuntimeError, match="freed"):
            Holes(10).give(start, 1)
    with pytest.raises(RuntimeError, match="freed"):
        holes.give(5, 2)


def test_extents_grow_in_segments_and_in_place() -> None:
    tables = Tables()
    row = tables.run(1)
    assert tables.place(row) == (0, 5)
    assert tables.extend(row, 5 * SIZE) and tables.place(row) == (0, 5)
    assert tables.extend(row, 5 * SIZE + 1) and tables.place(row) == (0, 10)
    assert tables.extend(row, 24 * SIZE + 1) and tables.place(row) == (0, 25)
    assert tables.copied == [] and tables.stats()["moves"] == 0


def test_an_extent_takes_what_is_needed_where_no_segment_fits() -> None:
    tables = Tables(n_blocks=7)
    row = tables.run(5 * SIZE)
    assert tables.extend(row, 6 * SIZE) and tables.place(row) == (0, 6)
    assert not tables.extend(row, 8 * SIZE)
    assert tables.place(row) == (0, 6) and tables.n_free == 1


def test_an_extent_whose_end_is_taken_moves_with_its_tokens() -> None:
    tables = Tables()
    first, second = tables.run(2 * SIZE + 3), tables.run(1)
    assert tables.extend(first, 5 * SIZE + 1)
    assert tables.place(first) == (10, 10) and tables.place(second) == (5, 5)
    assert tables.copied == [(2, 12, 3), (1, 11, SIZE), (0, 10, SIZE)]
    assert tables.stats()["moves"] == 3 and tables.n_free == 25
    third = tables.run(1)
    assert tables.place(third) == (0, 5), "the first hole is taken"


def test_a_move_down_over_itself_copies_upwards() -> None:
    tables = Tables(n_blocks=16)
    first, second, third = tables.run(5 * SIZE), tables.run(5 * SIZE), tables.run(5 * SIZE)
    tables.close(first)
    assert tables.extend(second, 5 * SIZE + 1)
    assert tables.place(second) == (0, 10) and tables.place(third) == (10, 5)
    assert tables.copied == [(5 + i, i, SIZE) for i in range(5)]


def test_a_promised_extent_never_moves() -> None:
    tables = Tables(n_blocks=20)
    first = tables.run(1, reserve=12 * SIZE)
    assert tables.place(first) == (0, 12) and tables.n_available == 8
    assert tables.open(9 * SIZE) is None
    second = tables.run(1)
    assert tables.extend(first, 12 * SIZE) and tables.copied == []
    tables.truncate(first, 1)
    assert tables.place(first) == (0, 12)
    tables.close(second)
    tables.close(first)
    assert tables.n_free == 20


def test_truncate_keeps_whole_segments() -> None:
    tables = Tables()
    row = tables.run(12 * SIZE)
    tables.truncate(row, 6 * SIZE)
    assert tables.place(row) == (0, 10) and tables.n_free == 30
    tables.truncate(row, 0)
    assert tables.place(row) == (0, 0) and tables.n_free == 40
    assert tables.extend(row, 1)


def test_fork_copies_everything() -> None:
    tables = Tables()
    row = tables.run(2 * SIZE + 3)
    reuse = tables.fork(row, 2 * SIZE + 3)
    child = tables.open(0, reuse)
    assert child is not None and tables.place(child) == (5, 3)
    assert tables.copied == [(0, 5, SIZE), (1, 6, SIZE), (2, 7, 3)]
    assert tables.stats()["copies"] == 3
    with pytest.raises(RuntimeError, match="fork again"):
        tables.open(0, reuse)


def test_fits_needs_a_run_that_is_long_enough() -> None:
    tables = Tables(n_blocks=20)
    rows = [tables.run(5 * SIZE) for _ in range(4)]
    tables.close(rows[0])
    tables.close(rows[2])
    assert tables.n_free == 10 and not tables.fits(6 * SIZE)
    assert tables.fits(5 * SIZE, [(SIZE, 2 * SIZE)] * 2)
    assert not tables.extend(rows[1], 16 * SIZE) and tables.place(rows[1]) == (5, 5)
    assert tables.extend(rows[1], 11 * SIZE), "into the holes on both sides"
    assert tables.place(rows[1]) == (0, 15)


def test_nothing_is_found_or_released() -> None:
    tables = Tables()
    row = tables.run(64)
    tokens = np.zeros(64, dtype=np.int32)
    tables.commit(row, tokens, 64)
    tables.remember_tail(row, tokens, 64)
    tables.release_before(row, 64)
    assert tables.match(tokens, None, 64) is None and tables.n_used == 5
    tables.close(row, tokens)


def test_an_extent_slides_to_what_is_seen() -> None:
    """10 blocks at once: 40 tokens that a query sees, 64 of a step, and what blocks and groups round up to."""
    copied: list[tuple[int, int, int]] = []
    tables = ExtentTables(
        40,
        SIZE,
        4,
        1000,
        copy=lambda src, dst, n: copied.append((src, dst, n)),
        reach=40,
        max_step=64,
    )
    below = tables.open(16)
    row = tables.open(1000)
    assert below is not None and row is not None and (tables.n_used, tables.array[row, 0]) == (10, 1)
    at = 0
    while at < 140:
        at += 1
        assert tables.extend(row, at)
        tables.release_before(row, at)
    assert copied == [] and tables.array[row, 0] == 1
    assert tables.extend(
        row, 145
    )  # entry 9 is one too many; a query at 140 sees 101 .., so 6 entries are unseen
    assert copied == [(7, 1, SIZE), (8, 2, SIZE), (9, 3, 12)]
    assert tables.array[row, 0] == 1 - 6 and tables.n_used == 10
    copied.clear()
    for at in range(146, 1001):
        assert tables.extend(row, at)
        tables.release_before(row, at)
    assert sum(n for _, _, n in copied) < 855, "a token is copied less than once, though 40 are seen"
    assert tables.n_used == 10 and tables.stats()["moves"] == 3 + len(copied)
    with pytest.raises(ReleasedError, match="released"):
        tables.truncate(row, 900)
    tables.truncate(row, 999)
    tables.close(row)
    tables.close(below)
    assert tables.n_free == 40


def test_an_extent_without_a_promise_grows_before_it_slides() -> None:
    tables = ExtentTables(40, SIZE, 4, 1000, copy=lambda *_: None, reach=40, max_step=64)
    row, wall = tables.open(0), None
    assert row is not None
    for at in range(1, 400):
        assert tables.extend(row, at)
        tables.release_before(row, at)
        if at == 20:
            wall = tables.open(16)  # it can't grow in place any more
    assert wall is not None and tables.n_used <= 10 and tables.stats()["moves"] > 0
    tables.close(row)


def test_misuse() -> None:
    tables = Tables()
    row = tables.run(1)
    for misuse in (
        lambda: tables.extend(row, 25 * SIZE + 1),
        lambda: tables.open(25 * SIZE + 1),
        lambda: tables.truncate(row, 5 * SIZE + 1),
        lambda: tables.fork(row, 5 * SIZE + 1),
        lambda: tables.close(-1),
    ):
        with pytest.raises(RuntimeError):
            misuse()
    tables.close(row)
    for misuse in (
        lambda: tables.close(row),
        lambda: tables.extend(row, 0),
        lambda: tables.truncate(row, 0),
        lambda: tables.fork(row, 0),
    ):
        with pytest.raises(RuntimeError, match="not open"):
            misuse()


def test_make_tables() -> None:
    def make(kind: str, block_size: int = 16, max_seqs: int = 2, window: int | None = None) -> object:
        return make_tables(
            kind,
            8,
            block_size,
            max_seqs,
            100,
            copy=lambda src, dst, n: None,
            prefix_caching=True,
            reach=window,
        )

    for kind in ("slab", "paged"):
        tables = make(kind, 32)
        assert isinstance(tables, BlockTables) and tables.array.shape == (2, 4)
        assert tables.index is not None and (tables.n_blocks, tables.block_size) == (8, 32)
    tables = make("contiguous")
    assert isinstance(tables, ExtentTables) and tables.array.shape == (2, 1)
    with pytest.raises(ConfigError, match="slab, paged, contiguous"):
        make("bmc")
    for kind in ("slab", "contiguous"):
        with pytest.raises(ConfigError, match="power of two"):
            make(kind, 24)
        with pytest.raises(ConfigError, match="at least 1"):
            make(kind, max_seqs=0)
        with pytest.raises(ConfigError, match="at least 1"):
            make(kind, window=0)
