"""Groups as one: found, opened, extended, cut and closed together, or not at all."""

from __future__ import annotations

import numpy as np
import pytest

from pace.kvcache import GroupedTables, GroupTables, ReleasedError, join_groups, make_tables
from pace.models.plan import I32Array

TOKENS: I32Array = np.random.default_rng(0).integers(0, 32000, 600).astype(np.int32)
OTHERS: I32Array = np.random.default_rng(1).integers(0, 32000, 600).astype(np.int32)


def group(
    n_blocks: int, block_size: int, reach: int | None = None, kind: str = "slab", max_step: int = 64
) -> GroupTables:
    return make_tables(
        kind,
        n_blocks,
        block_size,
        4,
        512,
        copy=lambda *_: None,
        prefix_caching=True,
        reach=reach,
        max_step=max_step,
    )


class Tables(GroupedTables):
    """A full group in slabs of 64 and a windowed one in blocks of 16, with short forms."""

    def __init__(self, n_full: int = 16, n_windowed: int = 24, reach: int = 40, kind: str = "slab") -> None:
        self.full, self.windowed = group(n_full, 64, kind=kind), group(n_windowed, 16, reach, kind)
        super().__init__([self.full, self.windowed])

    def run(self, n_tokens: int, tokens: I32Array = TOKENS, reserve: int | None = None) -> int:
        """A row that has read n_tokens as the engine does."""
        reuse = self.match(tokens, None, n_tokens - 1)
        row = self.open(n_tokens if reserve is None else reserve, reuse)
        assert row is not None
        at = 0 if reuse is None else reuse.n_tokens
        while at < n_tokens:
            at = min(n_tokens, self.step_end(at))
            assert self.extend(row, at)
            self.commit(row, tokens, at)
            self.release_before(row, at)
        self.remember_tail(row, tokens, n_tokens)
        return row

    def found(self, n_tokens: int, tokens: I32Array = TOKENS) -> int:
        reuse = self.match(tokens, None, n_tokens)
        return 0 if reuse is None else reuse.n_tokens


def test_one_group_is_used_as_it_is() -> None:
    only = group(4, 16)
    assert join_groups([only]) is only
    joined = join_groups([only, group(8, 64, 40)])
    assert (joined.n_blocks, joined.block_size, joined.max_step, joined.has_reach) == (12, 64, 64, True)


@pytest.mark.parametrize("kind", ["slab", "contiguous"])
def test_a_windowed_group_holds_its_window_beside_a_full_one(kind: str) -> None:
    tables = Tables(kind=kind)
    row = tables.run(500)
    assert tables.full.n_used == 8 and tables.usage == 0.5
    # 40 tokens from 460 on, from 448 in whole groups: 4 blocks. An extent keeps its length.
    assert tables.windowed.n_used == (4 if kind == "slab" else 9)
    assert tables.windowed.array[row, 0] < 0 or kind == "slab"
    tables.close(row)
    assert tables.n_free == tables.n_available == tables.n_blocks


def test_a_hit_needs_of_every_group_what_is_seen() -> None:
    tables = Tables(n_windowed=12)
    tables.close(tables.run(304), TOKENS[:304])
    assert tables.found(512) == 304
    # Another row takes the windowed group's free blocks, oldest first: the head of the prompt is gone, its end is not.
    tables.close(tables.run(60, OTHERS))
    assert [tables.found(n) for n in (304, 303, 200, 100)] == [304, 288, 0, 0]
    row = tables.open(400, tables.match(TOKENS, None, 350))
    assert row is not None and (tables.full.n_used, tables.windowed.n_used) == (5, 3)
    tables.close(row)
    # Where the full group has lost its end, nobody can begin there.
    for _ in range(4):
        tables.full.index.drop(int(tables.full.array[0, 3]))  # type: ignore[attr-defined]  # it is there, or the test fails
    assert tables.found(512) == 0


def test_the_groups_agree_on_a_length_that_all_have() -> None:
    """The full group has 473 tokens; the windowed one's tail of 9 was too short to be indexed."""
    tables = Tables()
    tables.close(tables.run(473), TOKENS[:473])
    assert tables.full.match(TOKENS, None, 500).n_tokens == 473  # type: ignore[union-attr]  # it is there, or the test fails
    assert tables.found(500) == 464
    assert tables.stats()["queries"] == 1
    assert tables.open(0, tables.match(TOKENS, None, 500)) is not None
    assert tables.stats() | {"copies": 0} == tables.stats() | {
        "copies": 0,
        "queries": 2,
        "query_tokens": 472 + 500,
        "hit_tokens": 464,
    }


def test_room_is_left_only_in_the_groups_in_which_a_row_grows() -> None:
    tables = Tables(n_full=8, n_windowed=32)
    for n_tokens, tokens in ((64, TOKENS), (192, OTHERS), (192, OTHERS[::-1])):
        tables.run(n_tokens, tokens)
    assert tables.full.n_available == 1
    assert tables.fits(10, [(150, 190)] * 3), (
        "they grow in the windowed group only, and there are blocks for it"
    )
    assert not tables.fits(10, [(150, 193)]), "that one takes the block"


def test_nothing_happens_where_one_group_lacks_blocks() -> None:
    tables = Tables(n_full=8, n_windowed=10)
    row = tables.run(200)
    before = tables.n_available
    assert not tables.fits(300) and tables.open(300) is None, "the windowed group has 7 blocks left"
    assert tables.full.fits(250) and not tables.has_room([250]) and tables.has_room([250], [200])
    other = tables.open(0)
    assert other is not None and not tables.extend(other, 120)
    assert tables.n_available == before and tables.full.room(other) == tables.windowed.room(other) == 0
    assert tables.extend(other, 70)
    tables.close(other)
    assert tables.extend(row, 260) and tables.n_open == 1


@pytest.mark.parametrize("kind", ["slab", "contiguous"])
def test_a_row_is_not_cut_to_where_a_group_has_let_go(kind: str) -> None:
    """It was believed: a query there read what had become somebody else's."""
    tables = Tables(kind=kind)
    row = tables.run(300)
    before = tables.n_available
    with pytest.raises(ReleasedError, match="to 270 tokens"):
        tables.truncate(row, 270)
    with pytest.raises(ReleasedError, match="the first 256 are released"):
        tables.windowed.truncate(row, 270)
    assert tables.n_available == before and tables.full.room(row) >= 300
    tables.truncate(row, 296)  # sees 257 ..
    assert tables.extend(row, 320)
    assert tables.fork(row, 290) is None and tables.fork(row, 297) is not None
    tables.close(row)


def test_a_promise_lasts_however_long_the_row_and_whoever_shares_its_window() -> None:
    """Two rows hold the same blocks; when one lets go of them they are not free for the next one."""
    tables = Tables(n_full=64, n_windowed=18)  # what two rows hold at once
    first = tables.run(300, reserve=512)
    reuse = tables.match(TOKENS, None, 299)
    second = tables.open(512, reuse)
    assert second is not None and tables.windowed.n_available == 0 < tables.windowed.n_free
    for at in range(300, 512):
        for row in (first, second):
            assert tables.extend(row, at + 1)
            tables.release_before(row, at + 1)
    assert tables.windowed.n_used == 2 * 4


def test_rows_and_prefixes_belong_to_all_groups() -> None:
    tables = Tables()
    tables.full.open(0)
    with pytest.raises(RuntimeError, match="a group was used by itself"):
        tables.open(0)
    tables = Tables()
    tables.run(100)
    with pytest.raises(RuntimeError, match="match or fork all"):
        tables.open(0, tables.full.match(TOKENS, None, 64))
    stale = tables.match(TOKENS, None, 99)
    tables.run(50, OTHERS)
    with pytest.raises(RuntimeError, match="match or fork again"):
        tables.open(0, stale)
