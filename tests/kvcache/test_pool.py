"""Free, held, promised, cached: every block is one of these."""

from __future__ import annotations

import pytest

from pace.errors import ConfigError
from pace.kvcache import BlockPool, blocks_for, kv_block_bytes


def take(pool: BlockPool, n_blocks: int) -> list[int]:
    assert pool.reserve(n_blocks)
    return [pool.allocate() for _ in range(n_blocks)]


def test_shared_blocks_live_until_the_last_holder() -> None:
    pool = BlockPool(2, 16)
    assert pool.reserve(1) and not pool.reserve(2)
    block = pool.allocate()
    pool.retain(block)
    assert pool.refcount(block) == 2
    assert not pool.release(block) and pool.n_free == 1
    assert pool.release(block) and pool.n_free == 2
    for operation in (pool.release, pool.retain, pool.mark):
        with pytest.raises(RuntimeError, match="free"):
            operation(block)


def test_only_what_was_promised_is_taken() -> None:
    pool = BlockPool(2, 16)
    with pytest.raises(RuntimeError, match="reserved"):
        pool.allocate()
    assert pool.reserve(2) and pool.n_available == 0 and pool.n_free == 2
    with pytest.raises(RuntimeError, match=r"unreserve\(3\)"):
        pool.unreserve(3)
    pool.unreserve(1)
    assert pool.n_available == 1


def test_freed_blocks_are_reused_first() -> None:
    pool = BlockPool(8, 16)
    blocks = take(pool, 3)
    for block in reversed(blocks):
        pool.release(block)
    assert take(pool, 3) == blocks


def test_fresh_blocks_go_before_cached_ones_and_those_in_order_of_use() -> None:
    pool = BlockPool(4, 16)
    evicted: list[int] = []
    pool.on_evict = evicted.append
    blocks = take(pool, 3)
    for block in blocks:
        pool.mark(block)
        pool.release(block)
    assert pool.n_free == 4 and pool.n_evicted == 0
    pool.touch(blocks[0])
    assert take(pool, 3) == [3, blocks[1], blocks[2]]
    assert evicted == blocks[1:] and pool.n_evicted == 2
    pool.release(blocks[1])
    assert take(pool, 1) == [blocks[1]], "an evicted block has lost its mark"
    assert take(pool, 1) == [blocks[0]]


def test_a_cached_block_can_be_taken_back_unless_all_are_promised() -> None:
    pool = BlockPool(2, 16)
    (block,) = take(pool, 1)
    pool.mark(block)
    pool.release(block)
    pool.retain(block)
    assert pool.refcount(block) == 1 and pool.n_free == 1
    pool.release(block)
    assert pool.reserve(2)
    with pytest.raises(RuntimeError, match="promised"):
        pool.retain(block)


def test_an_unmarked_block_is_fresh_again() -> None:
    pool = BlockPool(2, 16)
    first, second = take(pool, 2)
    for block in (first, second):
        pool.mark(block)
        pool.release(block)
    pool.unmark(second)
    assert take(pool, 1) == [second] and pool.n_evicted == 0
    with pytest.raises(RuntimeError, match="free"):
        pool.mark(first)


@pytest.mark.parametrize(("n_blocks", "block_size"), [(0, 16), (-1, 16), (4, 8), (4, 24), (4, 0)])
def test_bad_sizes(n_blocks: int, block_size: int) -> None:
    with pytest.raises(ConfigError, match="expected"):
        BlockPool(n_blocks, block_size)


def test_sizes() -> None:
    assert [blocks_for(n, 16) for n in (0, 1, 16, 17)] == [0, 1, 1, 2]
    # Llama-3.2-1B: 16 layers x 8 heads x 64 columns x K and V x bf16 = 32 KiB per token.
    assert kv_block_bytes(16, 8, 64, 256) == 256 * 32 * 1024
    # int8: half of it, and two scales of 4 bytes per layer, head and token.
    assert kv_block_bytes(16, 8, 64, 256, "int8") == 256 * (16 * 1024 + 16 * 8 * 8)
    with pytest.raises(ConfigError, match="'fp8'"):
        kv_block_bytes(16, 8, 64, 256, "fp8")
