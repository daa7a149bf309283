"""Rules of the slab and paged tables, one by one; `test_tables_machine` mixes them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from pace.kvcache import BlockReuse, BlockTables
from pace.models.plan import I32Array

SIZE = 32
TOKENS: I32Array = np.random.default_rng(0).integers(0, 32000, 1024).astype(np.int32)
OTHERS: I32Array = np.random.default_rng(1).integers(0, 32000, 1024).astype(np.int32)


class Tables(BlockTables):
    """With a record of what was copied, and short forms."""

    def __init__(
        self, n_blocks: int = 16, max_seqs: int = 4, caching: bool = True, reach: int | None = None
    ) -> None:
        self.copied: list[tuple[int, int, int]] = []
        super().__init__(
            n_blocks,
            SIZE,
            max_seqs,
            512,
            copy=lambda src, dst, n: self.copied.append((src, dst, n)),
            prefix_caching=caching,
            reach=reach,
        )

    def run(self, n_tokens: int, reserve: int = 0, tokens: I32Array = TOKENS) -> int:
        """A row whose n_tokens are computed and committed."""
        row = self.open(reserve)
        assert row is not None and self.extend(row, n_tokens)
        self.commit(row, tokens, n_tokens)
        return row

    def found(self, n_tokens: int, tokens: I32Array = TOKENS) -> int:
        """Tokens of a prompt that are cached."""
        reuse = self.match(tokens, None, n_tokens)
        return 0 if reuse is None else reuse.n_tokens

    def held(self, row: int, n_blocks: int) -> list[int]:
        """The first blocks of a row."""
        blocks: list[int] = self.array[row, :n_blocks].tolist()
        return blocks


def test_a_promise_is_kept_and_optimism_may_fail() -> None:
    tables = Tables(n_blocks=4)
    first = tables.open(3 * SIZE)
    assert first is not None and (tables.n_free, tables.n_available, tables.n_used) == (4, 1, 0)
    second = tables.open(0)
    assert second is not None
    assert not tables.extend(second, SIZE + 1) and tables.n_available == 1
    assert tables.extend(second, SIZE) and not tables.extend(second, SIZE + 1)
    assert tables.extend(first, 3 * SIZE) and tables.n_free == 0
    assert not tables.extend(first, 3 * SIZE + 1), "beyond the promise it is optimism again"
    tables.close(second)
    assert tables.extend(first, 4 * SIZE)


def test_open_needs_a_row_and_the_promised_blocks() -> None:
    tables = Tables(n_blocks=4, max_seqs=2)
    assert tables.open(5 * SIZE) is None and tables.n_open == 0
    assert tables.open(4 * SIZE) is not None
    assert tables.open(1) is None
    assert tables.open(0) is not None
    assert tables.open(0) is None and tables.n_open == 2


def test_shared_blocks_do_not_count_against_the_promise() -> None:
    tables = Tables(n_blocks=8)
    first = tables.run(4 * SIZE)
    reuse = tables.match(TOKENS, None, 4 * SIZE)
    second = tables.open(6 * SIZE, reuse)
    assert second is not None and tables.held(second, 4) == tables.held(first, 4)
    assert (tables.n_free, tables.n_available) == (4, 2)
    assert tables.extend(second, 6 * SIZE) and tables.n_available == 2
    tables.close(first)
    assert tables.n_free == 2
    tables.close(second)
    assert tables.n_free == 8


def test_cached_blocks_that_are_taken_back_leave_the_free_ones() -> None:
    tables = Tables(n_blocks=6)
    tables.close(tables.run(4 * SIZE))
    assert tables.n_free == 6
    promised = tables.open(3 * SIZE)
    reuse = tables.match(TOKENS, None, 4 * SIZE)
    assert reuse is not None and reuse.n_tokens == 4 * SIZE
    assert tables.open(0, reuse) is None, "three are promised to another"
    assert not tables.fits(0, (), reuse)
    assert promised is not None
    tables.close(promised)
    reuse = tables.match(TOKENS, None, 4 * SIZE)
    assert tables.fits(5 * SIZE, [(SIZE, 2 * SIZE)] * 2, reuse), "an eighth of 6 blocks is none"
    assert not tables.fits(7 * SIZE, (), reuse)
    row = tables.open(5 * SIZE, reuse)
    assert row is not None and (tables.n_free, tables.n_available) == (2, 1)


def test_the_part_of_a_block_is_copied_once() -> None:
    tables = Tables()
    first = tables.open(0)
    assert first is not None and tables.extend(first, 100)
    tables.remember_tail(first, TOKENS, 100)
    reuse = tables.match(TOKENS, None, 120)
    assert isinstance(reuse, BlockReuse) and (reuse.n_tokens, reuse.n_tail) == (100 // SIZE * SIZE, 0), (
        "4 tokens are too few"
    )
    assert tables.extend(first, 120)
    tables.remember_tail(first, TOKENS, 120)
    reuse = tables.match(TOKENS, None, 119)
    assert isinstance(reuse, BlockReuse) and (reuse.n_tokens, reuse.n_tail) == (119, 23)
    second = tables.open(0, reuse)
    assert second is not None
    assert tables.copied == [(tables.held(first, 4)[3], tables.held(second, 4)[3], 23)]
    assert tables.stats()["copies"] == 1


@pytest.mark.parametrize(("n_tail", "n_found"), [(20, 0), (32, 32), (63, 32)])
def test_the_only_free_block_is_taken_itself(n_tail: int, n_found: int) -> None:
    """Nothing runs, all is cached, and the prompt needs every block: it must not wait for ever."""
    copied: list[int] = []
    tables = BlockTables(2, 64, 1, 128, copy=lambda src, dst, n: copied.append(n), prefix_caching=True)
    row = tables.open(0)
    assert row is not None and tables.extend(row, 64 + n_tail)
    tables.close(row, TOKENS[: 64 + n_tail])
    reuse = tables.match(TOKENS, None, 128)
    assert isinstance(reuse, BlockReuse) and (reuse.n_tokens, reuse.n_tail) == (64 + n_found, n_found)
    row = tables.open(128, reuse)
    assert row is not None and tables.extend(row, 128) and tables.n_free == 0
    if n_found:
        assert tables.array[row].tolist() == [reuse.blocks[0], reuse.tail]
    assert copied == [] and tables.stats()["copies"] == 0
    tables.close(row)
    assert tables.match(TOKENS[:64], None, 64) is not None and tables.stats()["cached_blocks"] == 1


def test_the_source_of_a_copy_outlives_it() -> None:
    tables = Tables(n_blocks=4)
    tables.close(tables.run(20), TOKENS[:20])
    other = tables.run(3 * SIZE, tokens=OTHERS)
    tables.close(other)
    reuse = tables.match(TOKENS, None, 20)
    assert isinstance(reuse, BlockReuse) and reuse.n_tail == 20
    row = tables.open(0, reuse)
    assert row is not None and tables.copied[0][0] != tables.copied[0][1]
    assert tables.found(20) == 20, "another cached block was evicted, though this one was the oldest"


def test_what_found_is_good_for_one_state() -> None:
    tables = Tables()
    row = tables.run(2 * SIZE)
    reuse = tables.match(TOKENS, None, 2 * SIZE)
    tables.close(row)
    with pytest.raises(RuntimeError, match="match or fork again"):
        tables.open(0, reuse)
    assert tables.n_open == 0


def test_a_failed_open_changes_nothing_and_can_be_tried_again() -> None:
    tables = Tables(n_blocks=4)
    tables.close(tables.run(2 * SIZE))
    reuse = tables.match(TOKENS, None, 2 * SIZE)
    assert tables.open(5 * SIZE, reuse) is None
    row = tables.open(4 * SIZE, reuse)
    assert row is not None and tables.n_available == 0


def test_the_tail_of_a_chain_is_evicted_first() -> None:
    tables = Tables(n_blocks=4)
    tables.close(tables.run(4 * SIZE))
    for n_left in (3, 2, 1):
        row = tables.open(0)
        assert row is not None and tables.extend(row, (4 - n_left) * SIZE)
        assert tables.found(4 * SIZE) == n_left * SIZE
        tables.close(row)
    assert tables.stats()["evictions"] == 3


def test_content_survives_its_rows() -> None:
    tables = Tables()
    row = tables.run(100)
    assert tables.extend(row, 120)
    tables.close(row, TOKENS[:120])
    assert tables.n_free == 16 and tables.found(512) == 120
    assert tables.stats()["cached_blocks"] == 4
    assert tables.found(512, OTHERS) == 0


@pytest.mark.parametrize("n_chats", [8, 64, 1000])
@pytest.mark.parametrize("block_size", [256, 16])
def test_every_chat_on_a_system_prompt_finds_its_last_turn(block_size: int, n_chats: int) -> None:
    """64 chats found 300 of 457 tokens on slabs, where 8 chats found all: a block kept 8 children."""
    n_system, n_prompt, n_turn = 300, 400, 457
    tables = BlockTables(
        n_chats * 32 + 8, block_size, 8, 512, copy=lambda src, dst, n: None, prefix_caching=True
    )
    rng = np.random.default_rng(3)
    system = rng.integers(0, 32000, n_system)
    chats = [
        np.concatenate([system, rng.integers(0, 32000, 512 - n_system)]).astype(np.int32)
        for _ in range(n_chats)
    ]
    for tokens in chats:
        reuse = tables.match(tokens, None, n_prompt - 1)
        row = tables.open(0, reuse)
        assert row is not None and tables.extend(row, n_turn)
        tables.commit(row, tokens, n_prompt)
        tables.remember_tail(row, tokens, n_prompt)
        tables.close(row, tokens[:n_turn])
    for tokens in chats:
        reuse = tables.match(tokens, None, 477)
        assert reuse is not None and reuse.n_tokens == n_turn - (n_turn % 16 if block_size == 16 else 0)


def test_salts_separate_rows() -> None:
    tables = Tables()
    row = tables.open(0, salt="tenant")
    assert row is not None and tables.extend(row, 64)
    tables.commit(row, TOKENS, 64)
    assert tables.match(TOKENS, None, 64) is None and tables.match(TOKENS, "other", 64) is None
    reuse = tables.match(TOKENS, "tenant", 64)
    assert reuse is not None
    heir = tables.open(0, reuse)
    assert heir is not None and tables.extend(heir, 128)
    tables.commit(heir, TOKENS, 128)
    reuse = tables.match(TOKENS, "tenant", 128)
    assert reuse is not None and reuse.n_tokens == 128, "the heir's blocks have the salt of what it reused"


def test_truncate_into_own_content_forgets_what_will_be_overwritten() -> None:
    tables = Tables()
    row = tables.run(4 * SIZE)
    tables.truncate(row, 2 * SIZE + 5)
    assert tables.found(4 * SIZE) == 2 * SIZE, "a dropped block is cached, but nothing leads to it"
    assert tables.n_used == 3
    assert tables.extend(row, 4 * SIZE)
    tables.commit(row, OTHERS, 2 * SIZE)  # nothing is full since: the tokens are not looked at
    changed = TOKENS.copy()
    changed[2 * SIZE + 5 :] = OTHERS[2 * SIZE + 5 :]
    tables.commit(row, changed, 4 * SIZE)
    assert tables.found(4 * SIZE, changed) == 4 * SIZE
    assert tables.found(4 * SIZE) == 2 * SIZE, "5 common tokens are too few"
    assert tables.copied == []


def test_truncate_into_a_shared_block_copies_it_at_the_next_extend() -> None:
    tables = Tables(n_blocks=6)
    first = tables.run(4 * SIZE, reserve=4 * SIZE)
    second = tables.open(4 * SIZE, tables.match(TOKENS, None, 4 * SIZE))
    assert second is not None and tables.n_available == 2
    tables.truncate(second, 2 * SIZE + 5)
    assert tables.held(second, 3) == tables.held(first, 3) and tables.copied == []
    assert tables.n_available == 0, "one for the copy, one for the block that is gone"
    assert tables.extend(second, 2 * SIZE + 5) and tables.copied == []
    assert tables.extend(second, 2 * SIZE + 6)
    assert tables.copied == [(tables.held(first, 3)[2], tables.held(second, 3)[2], 5)]
    assert tables.held(second, 2) == tables.held(first, 2)
    assert tables.found(4 * SIZE) == 4 * SIZE, "the first row's content is as it was"
    assert tables.extend(second, 4 * SIZE)


def test_truncate_into_a_block_whose_other_holders_leave_takes_it_over() -> None:
    tables = Tables()
    first = tables.run(2 * SIZE)
    second = tables.open(0, tables.match(TOKENS, None, 2 * SIZE))
    assert second is not None
    block = tables.held(second, 2)[1]
    tables.truncate(second, SIZE + 20)
    tables.close(first)
    assert tables.found(2 * SIZE) == 2 * SIZE, "nothing is overwritten yet"
    assert tables.extend(second, SIZE + 21)
    assert tables.held(second, 2)[1] == block and tables.copied == []
    assert tables.found(2 * SIZE) == SIZE


def test_truncate_keeps_the_promise() -> None:
    tables = Tables(n_blocks=4, caching=False)
    row = tables.open(4 * SIZE)
    assert row is not None
    for n_tokens in (100, 10, 128, 0, 33):
        assert tables.extend(row, n_tokens)
        assert tables.n_available == 0
        tables.truncate(row, n_tokens // 2)
        assert tables.n_available == 0
    tables.close(row)
    assert tables.n_available == 4


def test_fork_shares_whole_blocks_and_copies_the_tail() -> None:
    for caching in (True, False):
        tables = Tables(caching=caching)
        row = tables.run(2 * SIZE + 3)
        reuse = tables.fork(row, 2 * SIZE + 3)
        assert reuse is not None and reuse.n_tokens == 2 * SIZE + 3
        child = tables.open(4 * SIZE, reuse)
        assert child is not None and tables.held(child, 2) == tables.held(row, 2)
        assert tables.copied == [(tables.held(row, 3)[2], tables.held(child, 3)[2], 3)]
        assert tables.n_used == 4 and tables.n_available == 11
        tables.close(row)
        assert tables.n_used == 3
        assert tables.stats()["queries"] == 0


def test_forget_leaves_what_others_have_added() -> None:
    tables = Tables()
    tables.close(tables.run(2 * SIZE))
    row = tables.open(0, tables.match(TOKENS, None, 2 * SIZE))
    assert row is not None and tables.extend(row, 5 * SIZE)
    tables.remember_tail(row, TOKENS, 4 * SIZE + 20)
    tables.truncate(row, 3 * SIZE)
    assert tables.found(512) == 4 * SIZE + 20
    tables.close(row, TOKENS[: 4 * SIZE], forget=True)
    assert tables.found(512) == 2 * SIZE and tables.n_free == 16
    assert tables.stats()["cached_blocks"] == 2


def test_forget_covers_what_was_written_behind_a_cut_prefix() -> None:
    tables = Tables()
    tables.close(tables.run(3 * SIZE))
    row = tables.open(0, tables.match(TOKENS, None, 3 * SIZE))
    assert row is not None
    tables.truncate(row, SIZE)
    changed = np.concatenate([TOKENS[:SIZE], OTHERS])
    assert tables.extend(row, 3 * SIZE)
    tables.commit(row, changed, 3 * SIZE)
    assert tables.found(3 * SIZE, changed) == 3 * SIZE
    tables.close(row, forget=True)
    assert tables.found(3 * SIZE, changed) == SIZE and tables.found(3 * SIZE) == 3 * SIZE


def test_forget_leaves_blocks_that_were_released_and_taken_by_others() -> None:
    tables = Tables(n_blocks=4, reach=32)
    row = tables.open(0)
    assert row is not None and tables.extend(row, 2 * SIZE)
    tables.release_before(row, 2 * SIZE)
    released = tables.held(row, 1)
    other = tables.run(SIZE, tokens=OTHERS)
    assert tables.held(other, 1) == released
    tables.close(row, forget=True)
    assert tables.found(SIZE, OTHERS) == SIZE


def test_windows_release_what_nobody_sees() -> None:
    tables = Tables(reach=40)
    row = tables.run(5 * SIZE, reserve=5 * SIZE)
    tables.release_before(row, 70)  # sees 31 ..
    assert tables.n_used == 5
    tables.release_before(row, 71)  # sees 32 ..
    assert tables.n_used == 4
    tables.release_before(row, 71)
    tables.release_before(row, 5 * SIZE)  # sees 121 ..
    assert tables.n_used == 2 and tables.found(512) == 5 * SIZE
    with pytest.raises(RuntimeError, match="truncate"):
        tables.truncate(row, 2 * SIZE)
    # It has gone on to 5 blocks and kept what is seen from there; a fork further back would see more.
    assert tables.fork(row, 2 * SIZE) is None and tables.fork(row, 4 * SIZE + 1) is None
    child = tables.open(0, tables.fork(row, 5 * SIZE - 1))
    assert child is not None and tables.n_used == 3
    assert tables.extend(row, 7 * SIZE)
    tables.commit(row, TOKENS, 7 * SIZE)
    assert tables.found(512) == 7 * SIZE
    tables.close(row, TOKENS[: 7 * SIZE])
    tables.close(child)
    assert tables.n_free == 16


def test_blocks_that_were_released_before_they_were_committed_are_not_indexed() -> None:
    tables = Tables(reach=32)
    row = tables.open(0)
    assert row is not None and tables.extend(row, 4 * SIZE)
    tables.release_before(row, 4 * SIZE)
    tables.commit(row, TOKENS, 4 * SIZE)
    assert tables.found(3 * SIZE) == 0 and tables.stats()["cached_blocks"] == 1
    assert tables.found(512) == 4 * SIZE, "a query there sees nothing of the others"


def test_a_prompt_is_found_whose_head_is_gone() -> None:
    tables = Tables(n_blocks=6, reach=40)
    row = tables.run(6 * SIZE)
    tables.release_before(row, 6 * SIZE)
    tables.close(row)
    other = tables.run(3 * SIZE, tokens=OTHERS)
    assert tables.held(other, 3) == [3, 2, 1], "released before the end, which closed last"
    reuse = tables.match(TOKENS, None, 512)
    assert reuse is not None and reuse.n_tokens == 6 * SIZE and tables.found(5 * SIZE - 1) == SIZE
    again = tables.open(0, reuse)
    assert again is not None and tables.n_used == 5 and tables.held(again, 6)[4:] == [4, 5]


def test_equal_rows_index_one_of_them() -> None:
    tables = Tables()
    first, second = tables.run(2 * SIZE + 20), tables.run(2 * SIZE + 20)
    tables.remember_tail(first, TOKENS, 2 * SIZE + 20)
    tables.remember_tail(second, TOKENS, 2 * SIZE + 20)
    assert tables.stats()["cached_blocks"] == 3
    reuse = tables.match(TOKENS, None, 512)
    assert isinstance(reuse, BlockReuse) and [*reuse.blocks, reuse.tail] == tables.held(first, 3)


def test_stats_count_a_query_when_its_row_opens() -> None:
    tables = Tables(n_blocks=4)
    tables.close(tables.run(2 * SIZE))
    for reserve in (5 * SIZE, 3 * SIZE):
        tables.open(reserve, tables.match(TOKENS, None, 70))
    tables.open(0, tables.match(OTHERS, None, 30))
    stats = tables.stats()
    assert (stats["queries"], stats["query_tokens"], stats["hit_tokens"]) == (2, 100, 64)


def test_without_an_index_nothing_is_found() -> None:
    tables = Tables(caching=False)
    row = tables.run(64)
    tables.close(row, TOKENS[:64])
    assert tables.match(TOKENS, None, 64) is None
    assert set(tables.stats().values()) == {0}


def test_misuse() -> None:
    tables = Tables()
    row = tables.open(0)
    assert row is not None and tables.extend(row, 64)
    of_open: list[tuple[Callable[[], object], str]] = [
        (lambda: tables.extend(row, 513), "can't hold 513"),
        (lambda: tables.open(513), "can't promise 513"),
        (lambda: tables.truncate(row, 65), "truncate of row"),
        (lambda: tables.fork(row, 65), "fork of row"),
        (lambda: tables.commit(row, TOKENS, 96), "can't have 96 valid"),
        (lambda: tables.commit(row, TOKENS[:10], 64), "10 were given"),
        (lambda: tables.match(TOKENS[:10], None, 11), "10 were given"),
    ]
    for misuse, message in of_open:
        with pytest.raises(RuntimeError, match=message):
            misuse()
    tables.close(row)
    of_closed: list[tuple[Callable[[], object], str]] = [
        (lambda: tables.close(row), "not open"),
        (lambda: tables.extend(row, 0), "not open"),
        (lambda: tables.truncate(row, 0), "not open"),
        (lambda: tables.commit(row, TOKENS, 0), "not open"),
        (lambda: tables.remember_tail(row, TOKENS, 0), "not open"),
        (lambda: tables.fork(row, 0), "not open"),
        (lambda: tables.close(-1), "not open"),
        (lambda: tables.close(99), "not open"),
    ]
    for misuse, message in of_closed:
        with pytest.raises(RuntimeError, match=message):
            misuse()
