"""Who runs: budgets, order, admission, preemption, sharing."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pace.engine.pacing import STRETCH
from pace.engine.scheduler import HOLD_TOKENS, Scheduler
from pace.engine.sequence import Sequence, Status
from pace.kvcache import make_tables
from pace.params import SamplingParams

_arrivals = iter(range(1 << 30))


def sequence(
    name: str, n_prompt: int, n_output: int, *, priority: int = 0, fill: int | None = None
) -> Sequence:
    """A request whose prompt is its own, or `fill` over and over."""
    arrival = next(_arrivals)
    prompt = np.full(n_prompt, arrival + 1000 if fill is None else fill, dtype=np.int32)
    seq = Sequence(name, prompt, SamplingParams(), max_output=n_output, priority=priority)
    seq.key = (priority, arrival, 0)
    return seq


def scheduler(
    n_blocks: int = 64, n_seqs: int = 4, budget: int = 16, *, reserve: bool = True, kind: str = "paged"
) -> Scheduler:
    tables = make_tables(kind, n_blocks, 16, n_seqs, 1024, copy=lambda *_: None, prefix_caching=True)
    return Scheduler(tables, budget, reserve=reserve)


def run(scheduler: Scheduler) -> list[tuple[str, int]]:
    """Schedule a step and pretend that it ran; sequences end when their output is full."""
    step = scheduler.schedule()
    assert step.n_tokens == sum(step.n_new) <= scheduler.max_num_batched_tokens
    assert all(n_new >= 1 for n_new in step.n_new)
    assert all(n_new == 1 for n_new in step.n_new[: step.n_decode])
    ends = [seq.n_computed + n_new == seq.n_tokens for seq, n_new in zip(step.seqs, step.n_new, strict=True)]
    scheduler.ran(step)
    for seq, at_end in zip(step.seqs, ends, strict=True):
        if at_end:
            seq.commit(7)
            if seq.n_output == seq.max_output:
                scheduler.remove(seq)
                seq.finish("length", None)
    return [(seq.request_id, n_new) for seq, n_new in zip(step.seqs, step.n_new, strict=True)]


def test_decode_rows_come_first_and_prompts_share_the_rest_in_order() -> None:
    s = scheduler()
    s.add(sequence("a", 3, 9))
    assert run(s) == [("a", 3)]
    s.add(sequence("b", 20, 3))
    s.add(sequence("c", 12, 2))
    assert run(s) == [("a", 1), ("b", 15)]
    assert run(s) == [("a", 1), ("b", 5), ("c", 10)]
    assert run(s) == [("a", 1), ("b", 1), ("c", 2)]
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
    assert next(names for names in after if names != [("a", 1)]) == [("small", 4), ("large", 12)]


def test_priority_comes_before_arrival() -> None:
    s = scheduler(n_seqs=1)
    for name, priority in (("late", 1), ("b", 0), ("first", -1), ("c", 0)):
        s.add(sequence(name, 2, 2, priority=priority))
    order = [name for _ in range(8) for name, _ in run(s)]
    assert order == ["first", "first", "b", "b", "c", "c", "late", "late"]


@pytest.mark.parametrize("is_watched", [False, True])
def test_a_better_priority_comes_before_a_prompt_that_is_being_read(is_watched: bool) -> None:
    """The running prompt took the whole budget before the queue was looked at: 8.8 s behind 7000 tokens."""
    s = scheduler(n_blocks=64, budget=64)
    stream = sequence("stream", 1, 9)
    stream.watched = is_watched
    s.add(stream)
    s.add(sequence("long", 700, 2))
    run(s)
    s.add(sequence("urgent", 20, 2, priority=-10))
    step = run(s)
    assert step[:2] == [("stream", 1), ("urgent", 20)] and step[2][0] == "long"
    assert step[2][1] == (21 if not is_watched else 12), "no more rows than the step has without the long one"


def test_short_prompts_pass_a_long_one_which_keeps_half_of_the_room() -> None:
    """In every step more short ones arrive than fit beside the long one, which still takes no more than twice its time."""
    s = scheduler(n_blocks=256, n_seqs=64, budget=40)
    s.add(sequence("long", 400, 1))
    assert run(s) == [("long", 40)]
    steps: list[dict[str, int]] = []
    for _ in range(17):
        for i in range(3):
            s.add(sequence(f"short {len(steps)} {i}", 10, 1))
        steps.append(dict(run(s)))
    assert [step["long"] for step in steps] == [20] * 16 + [40]
    assert [len(step) for step in steps] == [3] * 16 + [1]


def test_a_prompt_half_as_long_does_not_pass() -> None:
    """Each would have half of the room, which takes more from the first than it gives to the second."""
    s = scheduler(n_blocks=64, budget=40)
    s.add(sequence("first", 200, 1))
    s.add(sequence("second", 100, 1))
    assert run(s) == [("first", 40)]


def test_a_worse_priority_does_not_pass() -> None:
    s = scheduler(n_blocks=64, budget=40)
    s.add(sequence("running", 60, 1, priority=1))
    run(s)
    s.add(sequence("first", 200, 1))
    s.add(sequence("waiting", 4, 1, priority=1))
    assert run(s) == [("first", 40)]


def test_one_that_passes_leaves_a_row_and_blocks_for_the_head() -> None:
    for n_seqs, n_blocks, may_pass in ((2, 64, False), (3, 64, True), (4, 17, False), (4, 18, True)):
        s = scheduler(n_blocks=n_blocks, n_seqs=n_seqs, budget=32, reserve=False)
        s.add(sequence("first", 100, 1))  # 7 blocks
        s.add(sequence("head", 160, 1))  # 10 blocks
        s.add(sequence("short", 4, 1))
        assert ("short" in dict(run(s))) == may_pass


def test_who_comes_first_takes_the_rows_and_blocks_of_those_behind() -> None:
    s = scheduler(n_seqs=2, n_blocks=8, reserve=False)
    s.add(sequence("a", 4, 60))
    s.add(sequence("b", 4, 60, priority=1))
    run(s)
    s.add(sequence("rows", 4, 2, priority=-1))
    assert run(s) == [("a", 1), ("rows", 4)]
    assert s.n_preemptions == 1
    run(s)
    s.add(sequence("blocks", 110, 1, priority=-2))
    assert run(s) == [("blocks", 16)]
    assert s.n_preemptions == 2 and s.n_waiting == 2


def test_with_reservation_nothing_is_taken_back() -> None:
    s = scheduler(n_seqs=1)
    s.add(sequence("a", 4, 9))
    run(s)
    s.add(sequence("urgent", 4, 2, priority=-1))
    assert [run(s) for _ in range(8)] == [[("a", 1)]] * 8
    assert run(s) == [("urgent", 4)] and s.n_preemptions == 0


def test_nobody_is_held_for_a_worse_priority() -> None:
    s = scheduler(n_blocks=256, budget=64)
    s.add(sequence("worse", 400, 1, fill=1, priority=1))
    run(s)
    s.add(sequence("better", 400, 1, fill=1))
    assert run(s) == [("better", 64)]


@settings(max_examples=150)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 12), st.integers(1, 300), st.integers(1, 10), st.integers(-1, 1)),
        min_size=1,
        max_size=16,
    ),
    budget=st.integers(20, 70),
)
def test_nobody_waits_longer_than_its_fair_bound(
    arrivals: list[tuple[int, int, int, int]], budget: int
) -> None:
    """Where rows and blocks suffice: at least half of a step's room is for a prompt and those that come before it, but in
    steps that end the reading of a better priority's prompt."""
    n = len(arrivals)
    s = scheduler(n_blocks=1024, n_seqs=n, budget=budget)
    half = (budget - n + 2) // 2  # of the room of any step in which one does not decode
    requests = sorted(
        (tick, i, sequence(str(i), n_prompt, n_output, priority=priority))
        for i, (tick, n_prompt, n_output, priority) in enumerate(arrivals)
    )
    seqs = [seq for _, _, seq in requests]
    born: dict[Sequence, int] = {}
    ahead: dict[Sequence, int] = {}  # rows of it and of those that come before it, while it waits
    for tick in range(2000):
        for _, _, seq in requests:
            if seq not in born and arrivals[int(seq.request_id)][0] <= tick:
                s.add(seq)
                born[seq], ahead[seq] = tick, 0
        waiting = [seq for seq in born if seq.n_output == 0]
        if len(born) == n and not waiting:
            break
        before = {seq: seq.n_computed for seq in born}
        run(s)
        for seq in waiting:
            ahead[seq] += sum(
                min(other.n_computed, other.n_prompt) - min(before[other], other.n_prompt)
                for other in born
                if other.key <= seq.key
            )
            n_steps = tick + 1 - born[seq]
            n_better = sum(other.priority < seq.priority for other in born)
            assert n_steps <= -(-ahead[seq] // half) + n_better
            unread = sum(other.n_prompt for other in born if other.key <= seq.key)
            assert n_steps <= -(-unread // half) + n_better
    assert all(seq.n_output for seq in seqs)


def test_a_finished_sequence_in_the_queue_is_dropped() -> None:
    s = scheduler(n_seqs=1)
    seqs = [sequence(name, 2, 2) for name in "abc"]
    for seq in seqs:
        s.add(seq)
    run(s)
    s.remove(seqs[1])
    seqs[1].finish("abort", None)
    assert s.n_waiting == 1
    assert [name for _ in range(3) for name, _ in run(s)] == ["a", "c", "c"]


def test_the_last_one_gives_way_and_comes_back() -> None:
    s = scheduler(n_blocks=4, reserve=False)
    first, second = sequence("first", 20, 40), sequence("second", 20, 20)
    s.add(first)
    s.add(second)
    steps = [run(s) for _ in range(200)]
    assert s.n_preemptions >= 1
    assert first.status is second.status is Status.FINISHED
    # The first is never interrupted.
    rows = [i for i, step in enumerate(steps) if any(name == "first" for name, _ in step)]
    assert rows == list(range(len(rows)))
    assert s.tables.n_free == 4 and s.n_waiting == 0


def test_a_pool_that_just_suffices_is_filled() -> None:
    s = scheduler(n_blocks=8, n_seqs=8, budget=128, reserve=False)
    for i in range(8):
        s.add(sequence(str(i), 10, 6))
    assert len(run(s)) == 8


def test_a_promise_is_never_taken_back() -> None:
    s = scheduler(n_blocks=4, reserve=True)
    s.add(sequence("first", 20, 40))
    s.add(sequence("second", 20, 20))
    for _ in range(200):
        run(s)
    assert s.n_preemptions == 0 and s.tables.n_free == 4


def test_a_shared_prompt_is_read_once() -> None:
    s = scheduler(n_blocks=256, n_seqs=8, budget=400)
    n_shared = 200
    for i in range(8):
        seq = sequence(str(i), n_shared + 5, 3, fill=1)
        seq.tokens[n_shared:] = 50 + i
        s.add(seq)
    assert run(s) == [("0", n_shared + 5)]
    second = run(s)
    assert [name for name, _ in second] == [str(i) for i in range(8)]
    assert sum(n for _, n in second) <= 1 + 7 * 16
    assert all(n < HOLD_TOKENS for _, n in second)


def test_nobody_waits_for_what_the_index_has_lost() -> None:
    """A sequence waited to the end of a neighbour's long prompt, and then found nothing."""
    s = scheduler(n_blocks=256, budget=400)
    guilty, neighbour = sequence("guilty", 300, 3, fill=1), sequence("neighbour", 900, 3, fill=1)
    s.add(guilty)
    s.add(neighbour)
    assert run(s) == [("guilty", 300)]
    assert run(s) == [("guilty", 1), ("neighbour", 399)]
    s.remove(guilty, forget=True)  # what the neighbour has begun with is not found any more
    guilty.finish("error", "NaN")
    s.add(sequence("late", 300, 3, fill=1))
    (_, n_rest), (name, n_late) = run(s)
    assert name == "late" and n_late == min(300, 400 - n_rest)
    # But it does wait where the neighbour's next block will be found.
    s = scheduler(n_blocks=256, budget=400)
    s.add(sequence("neighbour", 600, 3, fill=1))
    assert run(s) == [("neighbour", 400)]
    s.add(sequence("late", 700, 3, fill=1))
    assert run(s) == [("neighbour", 200)]
    assert run(s) == [("neighbour", 1), ("late", 700 - 592)]


def test_completions_of_one_prompt_fork_without_an_index() -> None:
    tables = make_tables("slab", 64, 32, 4, 512, copy=lambda *_: None, prefix_caching=False)
    s = Scheduler(tables, 256, prefix_caching=False)
    arrival = next(_arrivals)
    for index in range(3):
        seq = Sequence("a", np.arange(100, dtype=np.int32), SamplingParams(), max_output=2, index=index)
        seq.key = (0, arrival, index)
        s.add(seq)
    assert run(s) == [("a", 100)]
    assert run(s) == [("a", 1), ("a", 1), ("a", 1)]


def watching() -> tuple[Scheduler, Sequence]:
    """A stream that somebody reads, and known times: 50 ms a step, 4 ms a row."""
    s = scheduler(n_blocks=256, budget=512)
    watched = sequence("watched", 4, 60)
    watched.watched = True
    s.add(watched)
    run(s)
    s.pacer.observe(1, 0, 0.05)
    s.pacer.observe(0, 100, 0.4)
    return s, watched


def test_watchers_bound_the_chunk() -> None:
    s, watched = watching()
    s.add(sequence("long", 300, 2))
    assert run(s) == [("watched", 1), ("long", s.pacer.allowance(1))]
    watched.watched = False
    assert run(s) == [("watched", 1), ("long", 300 - s.pacer.allowance(1))]


def test_every_waiting_prompt_has_rows_of_its_own() -> None:
    """A burst of prompts is not read as slowly as one: three stretch a step three times as much."""
    s, _ = watching()
    for name in "abc":
        s.add(sequence(name, 20, 2))
    three = s.pacer.allowance(1, 3)
    assert 40 <= three == int((1 + 3 * (STRETCH - 1)) * 0.05 / 0.004) - 1
    assert run(s) == [("watched", 1), ("a", 20), ("b", 20), ("c", three - 40)]


@settings(max_examples=100)
@given(
    arrivals=st.lists(
        st.tuples(st.integers(0, 15), st.integers(1, 60), st.integers(1, 40), st.integers(-1, 1)),
        min_size=1,
        max_size=25,
    ),
    n_blocks=st.integers(7, 20),
    n_seqs=st.integers(1, 5),
    budget=st.integers(5, 40),
    reserve=st.booleans(),
    kind=st.sampled_from(["paged", "contiguous"]),
)
def test_everybody_finishes(
    arrivals: list[tuple[int, int, int, int]],
    n_blocks: int,
    n_seqs: int,
    budget: int,
    reserve: bool,
    kind: str,
) -> None:
    s = scheduler(n_blocks, n_seqs, budget, reserve=reserve, kind=kind)
    waiting = sorted(
        (tick, i, sequence(str(i), n_prompt, n_output, priority=priority))
        for i, (tick, n_prompt, n_output, priority) in enumerate(arrivals)
    )
    seqs = [seq for _, _, seq in waiting]
    for tick in range(5000):
        while waiting and waiting[0][0] <= tick:
            s.add(waiting.pop(0)[2])
        if not run(s) and not waiting:
            break
    assert all(seq.status is Status.FINISHED for seq in seqs)
    assert s.tables.n_free == n_blocks and not s.running and s.n_waiting == 0
