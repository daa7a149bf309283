"""How much of a prompt a step reads while somebody waits for tokens."""

from __future__ import annotations

import pytest

from pace.engine.pacing import FIRST_ROWS, MAX_READERS, MIN_ROWS, STRETCH, Pacer


def test_nothing_measured() -> None:
    assert Pacer().allowance(1) == FIRST_ROWS


@pytest.mark.parametrize(("plain_s", "row_s"), [(0.046, 0.0044), (0.2, 0.0044), (0.001, 0.00002)])
def test_steps_settle_at_the_stretch(plain_s: float, row_s: float) -> None:
    """A machine whose steps wait for the weights or for the multipliers, whichever takes longer."""
    pacer = Pacer()
    n_decode = 4
    for _ in range(5):
        pacer.observe(n_decode, 0, plain_s)
    seconds = 0.0
    for _ in range(40):
        n_prompt = pacer.allowance(n_decode)
        seconds = max(plain_s, (n_decode + n_prompt) * row_s)
        pacer.observe(n_decode, n_prompt, seconds)
    assert seconds <= 1.05 * max(STRETCH * plain_s, (n_decode + MIN_ROWS) * row_s)
    assert seconds >= 0.85 * STRETCH * plain_s


def test_a_slow_machine_still_reads() -> None:
    pacer = Pacer()
    pacer.observe(1, 0, 0.01)
    pacer.observe(1, 100, 10.0)
    assert pacer.allowance(1) == MIN_ROWS


def test_free_rows_teach_nothing() -> None:
    """Prompt rows in the shadow of the weights must not look like expensive ones."""
    pacer = Pacer()
    pacer.observe(1, 0, 0.05)
    pacer.observe(0, 200, 0.8)
    before = pacer.allowance(1)
    for _ in range(20):
        pacer.observe(1, 4, 0.05)
    assert pacer.allowance(1) == before


def test_more_prompts_stretch_a_step_further_and_not_without_end() -> None:
    pacer = Pacer()
    pacer.observe(0, 100, 0.4)
    pacer.observe(2, 0, 0.05)
    for n in (0, 1, 2, MAX_READERS, MAX_READERS + 1, 1000):
        stretch = 1 + (STRETCH - 1) * min(max(n, 1), MAX_READERS)
        assert pacer.allowance(2, n) == int(stretch * 0.05 / 0.004) - 2


def test_the_nearest_batch_size_stands_in() -> None:
    pacer = Pacer()
    pacer.observe(0, 100, 0.4)
    pacer.observe(2, 0, 0.05)
    pacer.observe(32, 0, 0.2)
    assert pacer.allowance(3) == int(STRETCH * 0.05 / 0.004) - 3
    assert pacer.allowance(40) == int(STRETCH * 0.2 / 0.004) - 40
