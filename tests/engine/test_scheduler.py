"""Who runs: budgets, order, admission."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pace.engine.scheduler import Scheduler
from pace.engine.sequence import Sequence, Status
from pace.kvcache import BlockTables
from pace.params import SamplingParams


def sequence(name: str, n_prompt: int, n_output: int) -> Sequence:
    return Sequence(name, np.zeros(n_prompt, dtype=np.int32), SamplingParams(), max_output=n_output)


def scheduler(n_blocks: int = 64, n_seqs: int = 4, budget: int = 16) -> Scheduler:
    return Scheduler(BlockTables(n_blocks, 16, n_seqs, 256, copy=lambda src, dst, n_tokens: None), budget)


def run(scheduler: Scheduler) -> list[tuple[str, int]]:
    """Schedule a step and pretend that it ran; sequences end when their output is full."""
    step = scheduler.schedule()
    assert step.n_tokens == sum(step.n_new) <= scheduler.max_num_batched_tokens
    for seq, n_new in zip(step.seqs, step.n_new, strict=True):
        assert n_new >= 1
        assert scheduler.tables._capacity[seq.row] >= seq.n_computed + n_new
        if seq.n_computed + n_new < seq.n_tokens:
            seq.n_computed += n_new
            continue
        seq.commit(7)
        if seq.n_output == seq.max_output:
            seq.finish("length", None, 0.0)
            scheduler.remove(seq)
    return [(seq.request_id, n_new) for seq, n_new in zip(step.seqs, step.n_new, strict=True)]


def test_decode_rows_come_first_and_prompts_share_the_rest_in_order() -> None:
    s = scheduler()
    s.add(sequence("a", 3, 9))
    assert run(s) == [("a", 3)]
    s.add(sequence("b", 20, 2))
    s.add(sequence("c", 5, 2))
    assert run(s) == [("a", 1), ("b", 15)]
    assert run(s) == [("a", 1), ("b", 5), ("c", 5)]
    assert run(s) == [("a", 1), ("b", 1), ("c", 1)]
    assert run(s) == [("a", 1)]


def test_the_head_of_the_queue_is_not_overtaken() -> None:
    s = scheduler(n_blocks=8)
    s.add(sequence("a", 10, 60))
    run(s)
    s.add(sequence("large", 40, 60))  # 7 blocks of the 3 that are left
    s.add(sequence("small", 4, 4))
    assert [name for name, _ in run(s)] == ["a"]
    after = [run(s) for _ in range(70)]
    assert next(names for names in after if names != [("a", 1)]) == [("large", 16)]


def test_a_finished_one_in_the_queue_is_skipped() -> None:
    s = scheduler(n_seqs=1)
    gone = sequence("gone", 4, 4)
    s.add(gone)
    s.add(sequence("next", 4, 4))
    gone.finish("abort", None, 0.0)
    s.remove(gone)
    assert run(s) == [("next", 4)]
    assert not s.waiting


@settings(max_examples=80, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=20),
    budget=st.integers(4, 50),
    n_blocks=st.integers(7, 20),
)
def test_everyone_finishes_in_order_of_arrival(
    sizes: list[tuple[int, int]], budget: int, n_blocks: int
) -> None:
    s = scheduler(n_blocks, 4, budget)
    sequences = [sequence(str(i), *size) for i, size in enumerate(sizes)]
    for seq in sequences:
        s.add(seq)
    started: list[str] = []
    for _ in range(sum(sum(size) for size in sizes) + 1):
        before = [seq.request_id for seq in s.running if seq.n_tokens - seq.n_computed == 1]
        ran = [name for name, _ in run(s)]
        assert set(before) <= set(ran)  # whoever decodes is never left out
        started += [name for name in ran if name not in started]
    assert started == [seq.request_id for seq in sequences]
    assert all(seq.status is Status.FINISHED and seq.n_output == seq.max_output for seq in sequences)
    assert s.tables.n_open == 0 and s.tables.pool.n_free == n_blocks and s.tables.pool.n_reserved == 0


def test_an_empty_step_means_nothing_to_do() -> None:
    assert scheduler().schedule().seqs == []
