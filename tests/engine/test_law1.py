"""Law 1 through the whole engine: tokens and log probabilities of a request are those of a solo run, to the last bit.

Every trial draws a model family, a KV cache, a scheduler and a crowd of requests that arrive at random, share
beginnings, are preempted, found in the prefix cache, forked and aborted. The truth of a request is the same request
alone, on one thread, in blocks of 16, without a prefix cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from engine import mixed
from engine.crowd import CROWDS, GOLDEN_MODELS, MODELS, N_OUTPUT, Ask, Lab
from ext.kit import Packed
from hypothesis import HealthCheck, given, settings

from pace import ops
from pace.outputs import CompletionOutput, Logprob


@pytest.fixture(scope="module")
def lab(packed_model: Callable[[str], Packed]) -> Iterator[Lab]:
    lab = Lab(packed_model)
    yield lab
    for team in lab.teams.values():
        team.close()


QUICK = settings(
    max_examples=25,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.mark.parametrize("model", [*mixed.MODELS, *mixed.FAMILIES])
@given(crowd=CROWDS)
@settings(QUICK, max_examples=12)
def test_a_crowd_changes_nobody_where_layers_differ(lab: Lab, model: str, crowd: dict[str, Any]) -> None:
    lab.check(model, **crowd)


@pytest.mark.parametrize("model", GOLDEN_MODELS)
@given(crowd=CROWDS)
@QUICK
def test_a_crowd_changes_nobody(lab: Lab, model: str, crowd: dict[str, Any]) -> None:
    lab.check(model, **crowd)


@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS)
@given(crowd=CROWDS)
@settings(QUICK, max_examples=400, derandomize=False)
def test_a_crowd_changes_nobody_long(lab: Lab, isa: str, model: str, crowd: dict[str, Any]) -> None:
    lab.check(model, **crowd)


def ask(**changes: Any) -> Ask:
    base = Ask(0, 4, False, 20, 0.0, 1, 0, False, 0, 0, None)
    return Ask(**{**{name: getattr(base, name) for name in base.__dataclass_fields__}, **changes})


OPTIONS: dict[str, Any] = {
    "cache": ("slab", 64),
    "kv_dtype": "bf16",
    "n_threads": 2,
    "n_full": 3,
    "max_num_seqs": 4,
    "max_tokens": 64,
    "reserve": False,
    "prefix_caching": True,
}


def test_the_trials_reach_what_they_claim_to(lab: Lab) -> None:
    """Preemption, prefix hits, partial blocks and forks do happen in such crowds."""
    engine = lab.check(
        "qwen3",
        [ask(n_prompt=3, arrival=i, own_end=i % 2 == 1, n_output=40) for i in range(6)],
        **OPTIONS | {"n_full": 1},
    )
    stats = engine.stats()
    assert stats["n_preemptions"] > 0 and stats["n_cached_tokens"] > 200
    engine = lab.check("qwen3", [ask(n=2, temperature=0.8)], **OPTIONS | {"prefix_caching": False})
    assert engine.stats()["kv_cache"]["copies"] > 0
    engine = lab.check("qwen3", [ask(), ask(stream=1)], **OPTIONS | {"cache": ("contiguous", 32)})
    assert engine.stats()["n_prompt_tokens"] == 400


@pytest.mark.parametrize("cache", [("slab", 32), ("paged", 16), ("contiguous", 32)])
@pytest.mark.parametrize("model", mixed.MODELS)
def test_layers_that_differ_share_come_back_and_slide(lab: Lab, model: str, cache: tuple[str, int]) -> None:
    """Prompts of many windows: found again with their head evicted, preempted, forked, moved."""
    asks = [ask(n_prompt=5, arrival=4 * i, own_end=i % 2 == 1, n_output=40, n=1 + i % 2) for i in range(5)]
    options = OPTIONS | {"cache": cache, "n_full": 2, "max_step": 40}
    engine = lab.check(model, [replace(a, temperature=0.8) for a in asks], **options)
    stats = engine.stats()
    if cache[0] == "contiguous":
        assert stats["kv_cache"]["moves"] > 0
    else:
        assert stats["n_cached_tokens"] > 200


DRAFTS: tuple[dict[str, Any], ...] = (
    {
        "max_tokens": 8,
        "wrong": 1,
        "ragged": True,
    },  # most are right, so that long rounds are rolled back in part
    {"max_tokens": 3, "draft": "same", "method": "draft_model"},
    {"max_tokens": 8, "draft": "mistral-window", "method": "pard"},
    {"max_tokens": 8, "draft": "same", "method": "hybrid"},
    {"max_tokens": 12, "method": "suffix"},
)


@pytest.mark.parametrize(
    ("cache", "kv_dtype"), [(("slab", 32), "int8"), (("paged", 16), "bf16"), (("contiguous", 32), "int8")]
)
@pytest.mark.parametrize("model", mixed.FAMILIES)
def test_drafts_change_nobody_while_requests_share_fork_and_give_way(
    lab: Lab, model: str, cache: tuple[str, int], kv_dtype: str
) -> None:
    """Every drafter over experts and over windows: n > 1, prefixes that are found, and too few blocks for all."""
    asks = [
        ask(
            stream=i // 2,
            n_prompt=3,
            arrival=2 * i,
            own_end=i % 2 == 1,
            n_output=40,
            n=1 + i % 2,
            style=i % 2,
        )
        for i in range(4)
    ]
    asks = [replace(a, temperature=0.8 if a.n > 1 else 0.0) for a in asks]
    for guesses in DRAFTS:
        options = OPTIONS | {"cache": cache, "kv_dtype": kv_dtype, "n_full": 1, "guesses": guesses}
        options |= {"max_num_seqs": 6}
        stats = lab.check(model, asks, **options).stats()
        assert stats["speculative"]["n_draft_tokens"] > 0 and stats["speculative"]["active"]
        if cache[0] == "slab":  # elsewhere they may all fit, or share nothing
            assert stats["n_preemptions"] > 0 and stats["n_cached_tokens"] > 200
        if "wrong" in guesses or guesses.get("draft") == "same":
            assert stats["speculative"]["n_accepted_tokens"] > 20


@pytest.mark.parametrize("caching", [False, True])
def test_a_fork_from_a_row_whose_window_has_moved_on(lab: Lab, caching: bool) -> None:
    """The second completion starts when the first is a group of keys ahead, and has freed what it would see."""
    asks = [ask(n_prompt=0, n_output=40), ask(n_prompt=3, n=2, temperature=0.8, n_output=40)]
    options = OPTIONS | {"cache": ("paged", 16), "max_num_seqs": 2, "prefix_caching": caching}
    lab.check("mistral-window", asks, **options)


def test_the_trials_can_fail(lab: Lab) -> None:
    """One bit of one logprob is noticed."""
    truth = lab.truth(ops.isa(), "qwen3", "bf16", 0, 2, False, 0.0, 1, False, 0).outputs[0]
    assert truth.logprobs is not None
    token, entry = next(iter(truth.logprobs[5].items()))
    changed = list(truth.logprobs)
    nudged = float(np.nextafter(np.float32(entry.logprob), np.float32(0)))
    changed[5] = truth.logprobs[5] | {token: Logprob(nudged, entry.rank, entry.decoded_token)}
    wrong = CompletionOutput(0, "", truth.token_ids, truth.cumulative_logprob, changed, "length")
    with pytest.raises(AssertionError):
        lab.compare(ask(n_output=N_OUTPUT), wrong, truth)
