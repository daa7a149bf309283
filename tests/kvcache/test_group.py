"""What a query sees, against counting it out."""

from __future__ import annotations

import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace.kvcache import BlockTables, Reach, blocks_for

REACHES = st.builds(
    Reach, st.integers(1, 90), block_size=st.sampled_from([16, 32, 64, 128]), max_step=st.integers(1, 70)
)


def read_by(reach: Reach, position: int) -> set[int]:
    """Blocks that attention reads for a query at `position`: whole groups of 32 keys, as far as it sees."""
    assert reach.n_tokens is not None
    groups = {key // 32 for key in range(max(0, position - reach.n_tokens + 1), position + 1)}
    return {(group * 32 + i) // reach.block_size for group in groups for i in range(32)}


@settings(max_examples=200)
@given(reach=REACHES, position=st.integers(0, 400))
def test_unseen_blocks_are_those_before_what_is_read(reach: Reach, position: int) -> None:
    unseen = reach.unseen_blocks(position)
    assert unseen == min(read_by(reach, position))
    assert reach.position_beyond(unseen) > position
    assert reach.unseen_blocks(reach.position_beyond(unseen)) > unseen
    assert reach.unseen_blocks(reach.position_beyond(unseen) - 1) == unseen


@settings(max_examples=60)
@given(reach=REACHES, length=st.integers(1, 500))
def test_a_row_never_holds_more_at_once_than_it_is_said_to(reach: Reach, length: int) -> None:
    """And it does hold that much somewhere, where it is long enough."""
    most = reach.blocks_at_once(blocks_for(length, reach.block_size))
    held = [
        blocks_for(min(length, position + step), reach.block_size) - reach.unseen_blocks(position)
        for position in range(length)
        for step in {1, reach.max_step}
    ]
    assert max(held) <= most
    long = blocks_for(20 * reach.block_size + 500, reach.block_size)
    worst = max(
        blocks_for(position + reach.max_step, reach.block_size) - reach.unseen_blocks(position)
        for position in range(400, 400 + 2 * max(32, reach.block_size))
    )
    assert worst == reach.blocks_at_once(long)


def test_without_a_reach_all_is_seen() -> None:
    reach = Reach(None, 16, 100)
    assert (reach.unseen_blocks(10**6), reach.position_beyond(0)) == (0, sys.maxsize)
    assert reach.blocks_at_once(77) == 77


@pytest.mark.parametrize(("reach", "first", "later"), [(None, 1000, 1000), (40, 144, 208)])
def test_a_step_ends_where_what_may_be_held_ends(reach: int | None, first: int, later: int) -> None:
    """The first step of a prompt is longer: there is nothing yet that it must keep."""
    tables = BlockTables(64, 16, 1, 1000, copy=lambda *_: None, reach=reach, max_step=64)
    assert tables.step_end(0) == first and tables.step_end(119) == later
    row = tables.open(1000)
    assert row is not None
    at = 0
    while at < 1000:
        n_tokens = min(1000, tables.step_end(at))
        assert n_tokens >= min(1000, at + 64) and tables.extend(row, n_tokens)
        at = n_tokens
        tables.release_before(row, at)
    assert tables.n_used == (63 if reach is None else 3)
