"""Law 1 under speculation: whoever guesses, however far and however wrong, outputs and log probabilities of every request
of a crowd are those of the same request alone without a guess.

The long trials are 2400 crowds and 240 more of PARD-2: every drafter and K, greedy and sampled, penalties, biases, bans and
early ends, arrivals, aborts and preemption, every KV cache; dense models, windows, experts, and matrices of 8 and 4 bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from engine import mixed
from engine.crowd import CROWDS, GUESSES, MODELS, QUANTISED, K, Lab
from ext.kit import Packed
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

TRIALS = settings(
    max_examples=150,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
HEARING = st.fixed_dictionaries(
    {"max_tokens": st.sampled_from(K), "draft": st.just("same"), "method": st.just("pard2")}
)


@pytest.fixture(scope="module")
def lab(packed_model: Callable[[str], Packed]) -> Iterator[Lab]:
    lab = Lab(packed_model)
    yield lab
    for team in lab.teams.values():
        team.close()


@pytest.mark.parametrize("model", QUANTISED)
@given(crowd=CROWDS, guesses=GUESSES)
@settings(TRIALS, max_examples=6, derandomize=True)
def test_drafts_change_nobody_with_matrices_of_few_bits(
    lab: Lab, model: str, crowd: dict[str, Any], guesses: dict[str, Any]
) -> None:
    lab.check(model, **crowd | {"guesses": guesses})


@pytest.mark.parametrize("model", mixed.FAMILIES)
@given(crowd=CROWDS, guesses=HEARING)
@settings(TRIALS, max_examples=8, derandomize=True)
def test_a_draft_that_hears_the_target_changes_nobody(
    lab: Lab, model: str, crowd: dict[str, Any], guesses: dict[str, Any]
) -> None:
    lab.check(model, **crowd | {"guesses": guesses})


@pytest.mark.slow
@pytest.mark.parametrize("model", [*MODELS, *QUANTISED])
@given(crowd=CROWDS, guesses=GUESSES)
@TRIALS
def test_drafts_change_nobody_long(
    lab: Lab, isa: str, model: str, crowd: dict[str, Any], guesses: dict[str, Any]
) -> None:
    lab.check(model, **crowd | {"guesses": guesses})


@pytest.mark.slow
@pytest.mark.parametrize("model", mixed.FAMILIES)
@given(crowd=CROWDS, guesses=HEARING)
@settings(TRIALS, max_examples=120)
def test_a_draft_that_hears_the_target_changes_nobody_long(
    lab: Lab, model: str, crowd: dict[str, Any], guesses: dict[str, Any]
) -> None:
    lab.check(model, **crowd | {"guesses": guesses})
