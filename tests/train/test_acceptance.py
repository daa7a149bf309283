"""Counting rounds on outputs that are known."""

from __future__ import annotations

import numpy as np
import pytest

from pace.train.acceptance import count


def test_a_perfect_draft_commits_k_plus_one() -> None:
    acceptance = count([np.ones((45, 8), bool)], 8)
    assert acceptance.length == 9.0 and acceptance.n_rounds == 5
    assert acceptance.by_depth == [1.0] * 8


def test_a_wrong_draft_commits_the_targets_own_token() -> None:
    acceptance = count([np.zeros((7, 4), bool)], 4)
    assert acceptance.length == 1.0 and acceptance.by_depth == [0.0] * 4


def test_a_round_stops_at_the_first_wrong_guess_and_the_next_begins_behind_the_targets_token() -> None:
    right = np.zeros((6, 3), bool)
    right[0] = [True, False, True]  # commits 2: places 0 and 1
    right[1] = True  # is never asked
    right[2] = [True, True, True]  # commits 4
    acceptance = count([right], 3)
    assert acceptance.n_rounds == 2 and acceptance.length == 3.0
    assert acceptance.accepted.tolist() == [2, 1, 1] and acceptance.proposed.tolist() == [2, 2, 2]


def test_the_end_of_an_output_is_no_miss() -> None:
    right = np.ones((2, 4), bool)
    acceptance = count([right], 4)
    assert acceptance.n_rounds == 1 and acceptance.proposed.tolist() == [1, 1, 0, 0]
    assert acceptance.by_depth[:2] == [1.0, 1.0]


def test_fewer_guesses_than_were_made_can_be_counted() -> None:
    assert count([np.ones((30, 8), bool)], 2).length == pytest.approx(3.0)
