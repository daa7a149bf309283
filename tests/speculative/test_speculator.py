"""Drafts in the engine's loop: what is counted, what is refused, and what happens to those that fail."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine.fakes import VOCAB, logits_of, make_engine
from safetensors.numpy import load_file, save_file
from speculative.guess import Guesser
from tiny_checkpoint import write_checkpoint

from pace import LLM, SamplingParams
from pace.config import EngineConfig
from pace.engine import loader
from pace.engine.core import Engine
from pace.engine.sequence import Sequence
from pace.engine.speculation import Target
from pace.errors import RequestError
from pace.outputs import RequestOutput, SpeculativeMetrics
from pace.speculative.cost import StepCost
from pace.speculative.drafter import Drafter
from pace.speculative.loader import Maker
from pace.speculative_config import SpeculativeConfig


def follow(seq: Sequence, history: list[int]) -> int:
    """What the fake model says next."""
    return int(logits_of(history).argmax())


def params(**options: Any) -> SamplingParams:
    return SamplingParams(**{"max_tokens": 21, "temperature": 0.0, "detokenize": False} | options)


def run(engine: Engine, n: int = 1, **options: Any) -> list[RequestOutput]:
    """Requests with different prompts, to their end."""
    for i in range(n):
        engine.add_request(str(i), [3 + i, 5, 8], params(**options))
    done: dict[str, RequestOutput] = {}
    while engine.has_unfinished:
        done.update((output.request_id, output) for output in engine.step())
    return [done[str(i)] for i in range(n)]


def tokens(outputs: list[RequestOutput]) -> list[list[int]]:
    return [list(output.outputs[0].token_ids) for output in outputs]


PLAIN = {n: tokens(run(make_engine()[0], n)) for n in (1, 3)}


@pytest.mark.parametrize("k", [1, 2, 4, 9])
def test_a_draft_that_is_always_right_makes_k_plus_1_tokens_a_round(k: int) -> None:
    engine, _ = make_engine(drafter=Guesser(follow, k))
    (output,) = run(engine)
    assert tokens([output]) == PLAIN[1]
    assert output.speculative is not None
    n_rounds, rest = divmod(20, k + 1)  # the first token comes of the prompt
    metrics = output.speculative
    # A last token alone is not a round; a shorter last draft is one.
    assert metrics.n_rounds == n_rounds + (rest > 1)
    assert metrics.n_tokens == 20 - (rest == 1)
    assert metrics.acceptance_rates == [1.0] * k
    stats = engine.stats()["speculative"]
    assert stats["mean_acceptance_length"] == metrics.mean_acceptance_length
    if not rest:
        assert stats["mean_acceptance_length"] == k + 1


def test_a_draft_that_is_never_right_makes_one_token_a_round() -> None:
    engine, _ = make_engine(drafter=Guesser(follow, 4, wrong=8))
    (output,) = run(engine)
    assert tokens([output]) == PLAIN[1]
    stats = engine.stats()["speculative"]
    assert stats["mean_acceptance_length"] == 1.0
    assert stats["n_accepted_tokens"] == 0 and set(stats["acceptance_rates"]) == {0.0}


def test_ids_that_the_target_has_not_end_a_proposal() -> None:
    engine, _ = make_engine(drafter=Guesser(follow, 8, wrong=9))
    assert tokens(run(engine, 3)) == PLAIN[3]
    assert engine.stats()["speculative"]["n_rounds"] > 0 and engine.stats()["n_repeated_steps"] == 0


@pytest.mark.parametrize("fails_after", [0, 1, 3])
def test_a_drafter_that_fails_is_asked_no_more_and_nothing_is_lost(
    caplog: pytest.LogCaptureFixture, fails_after: int
) -> None:
    drafter = Guesser(follow, 3, fails_after=fails_after)
    engine, _ = make_engine(drafter=drafter)
    with caplog.at_level(logging.WARNING, logger="pace"):
        assert tokens(run(engine, 3)) == PLAIN[3]
    (message,) = [record.getMessage() for record in caplog.records]
    assert "speculation is off" in message and "out of guesses" in message
    assert drafter.closed and engine.stats()["speculative"]["active"] is False
    assert tokens(run(engine, 3)) == PLAIN[3]


def test_a_step_that_fails_is_repeated_without_drafts() -> None:
    """The fault of a draft's rows ended the request that was alone in the step."""
    engine, plan = make_engine(drafter=Guesser(follow, 3))
    engine.add_request("a", [3, 5, 8], params())
    engine.step()
    plan.crash = ValueError("a row too many")
    done = []
    while engine.has_unfinished:
        done += engine.step()
    assert tokens(done) == PLAIN[1]


@pytest.mark.parametrize("asked", ["off", 0, 1, 3])
def test_a_request_chooses_how_much_is_guessed(asked: str | int) -> None:
    engine, _ = make_engine(drafter=Guesser(follow, 4))
    (output,) = run(engine, speculative=asked)
    assert tokens([output]) == PLAIN[1]
    if asked in ("off", 0):
        assert output.speculative is None and engine.stats()["speculative"]["n_rounds"] == 0
    else:
        assert output.speculative is not None and len(output.speculative.drafted_at) == asked


def test_more_than_the_engine_guesses_is_refused() -> None:
    engine, _ = make_engine(drafter=Guesser(follow, 4))
    with pytest.raises(RequestError, match="speculative is 5, expected at most 4"):
        engine.add_request("a", [1], params(speculative=5))
    with pytest.raises(RequestError, match="speculative is 33, expected an integer from 0 to 32"):
        params(speculative=33)
    with pytest.raises(RequestError, match='expected "auto", "off" or a number'):
        params(speculative="on")


def test_few_rows_are_shared_and_nobody_waits_for_a_draft() -> None:
    engine, plan = make_engine(drafter=Guesser(follow, 8), max_tokens=7, max_draft_rows=5)
    assert tokens(run(engine, 3)) == PLAIN[3]
    assert max(map(sum, plan.steps)) <= 7


def test_a_guess_that_is_nan_costs_the_draft_and_not_the_request() -> None:
    """Rows behind a guess with NaN lie in the cache and may reach others: the sequence runs again without."""

    def nan(seq: Sequence, history: list[int]) -> int:
        return 93 if len(history) == 9 else follow(seq, history)

    engine, plan = make_engine(drafter=Guesser(nan, 4))
    plan.nan_token = 93
    assert tokens(run(engine, 3)) == PLAIN[3]
    assert engine.scheduler.n_preemptions == 3


class TestMaker(Maker):
    """Any drafter in place of one that a config names."""

    __test__ = False

    def __init__(self, config: EngineConfig, drafter: Drafter) -> None:
        super().__init__(
            config,
            SpeculativeConfig(method="draft_model", model="-", num_speculative_tokens=drafter.max_tokens),
        )
        self._drafter = drafter

    def drafter(self, target: Target, cost: StepCost | None) -> Drafter:
        return self._drafter


def nan_model(directory: Path) -> Path:
    """A model whose token 9 has an embedding of NaN, though an LM head like any other."""
    write_checkpoint(directory)
    tensors = load_file(directory / "model.safetensors")
    embed = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embed.copy()
    embed[9] = np.nan
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": False}))
    return directory


def test_a_rejected_row_of_nan_reaches_nobody(tmp_path: Path) -> None:
    """Values of 0 * NaN: a query that does not see a key multiplies its value by 0, in groups of 32."""
    config = EngineConfig(str(nan_model(tmp_path)), max_model_len=128, max_num_seqs=2, n_threads=1)
    params = SamplingParams(
        max_tokens=24, temperature=0.0, logprobs=1, logit_bias={9: -100.0}, ignore_eos=True
    )
    outputs = []
    for drafter in (None, Guesser(lambda seq, history: 9 if len(history) % 7 == 0 else 1, 3)):
        maker = None if drafter is None else TestMaker(config, drafter)
        with LLM.from_loaded(config, loader.load(config, speculation=maker)) as llm:
            # Every guess is verified, also where "auto" would find that none pays.
            asked = params.clone(speculative="off" if drafter is None else 3)
            results = llm.generate([[1, 2, 3], [4] * 20], asked)
            outputs.append([(list(o.outputs[0].token_ids), o.outputs[0].logprobs) for o in results])
            if drafter is not None:
                assert llm.stats()["speculative"]["n_rounds"] > 0 and llm.stats()["n_preemptions"] > 0
    assert outputs[0] == outputs[1]


def test_metrics_add_up() -> None:
    a, b = SpeculativeMetrics(), SpeculativeMetrics()
    a.add(3, 2, 3)
    b.add(1, 1, 2)
    b.add(4, 0, 1)
    a.join(b)
    assert (a.n_rounds, a.n_draft_tokens, a.n_accepted_tokens, a.n_tokens) == (3, 8, 3, 6)
    assert a.drafted_at == [3, 2, 2, 1] and a.accepted_at == [2, 1, 0, 0]
    assert a.by_length == [[0], [0, 1], [0, 0, 0], [0, 0, 1, 0], [1, 0, 0, 0, 0]]
    assert a.mean_acceptance_length == 2.0 and SpeculativeMetrics().mean_acceptance_length == 0.0


def test_vocab_of_the_fake_is_what_tests_assume() -> None:
    assert VOCAB > 90
