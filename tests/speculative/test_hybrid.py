"""The hybrid drafter: who is asked, whose guess is taken, and who hears what became of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from pace.engine.sequence import Sequence
from pace.params import SamplingParams
from pace.speculative.controller import Controller
from pace.speculative.cost import StepCost
from pace.speculative.drafter import Drafter, Proposal
from pace.speculative.hybrid import HybridDrafter
from pace.speculative.suffix import SuffixDrafter


class Model(Drafter):
    """Guesses 40, 41, ... unless told to be silent; remembers what it was told."""

    name = "pard"
    max_tokens = 4  # of which 1.33 are thought to be right

    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.silent = False
        self.n_rows = 0

    @property
    def n_run(self) -> tuple[int, int]:
        return len(self.heard), self.n_rows

    def propose(self, wanted: Mapping[Sequence, int]) -> dict[Sequence, Proposal]:
        self.heard.append(list(wanted.values()))
        self.n_rows += sum(wanted.values())
        return {} if self.silent else {s: Proposal(list(range(40, 40 + n))) for s, n in wanted.items() if n}

    def observe(self, seq: Sequence, n_verified: int, n_accepted: int) -> None:
        self.heard.append(("observed", n_verified, n_accepted))

    def end(self, seq: Sequence) -> None:
        self.heard.append("ended")

    def close(self) -> None:
        self.heard.append("closed")

    def stats(self) -> dict[str, Any]:
        return {"draft_rows": 7}


def sequence(*tokens: int) -> Sequence:
    seq = Sequence("r", np.array(tokens, np.int32), SamplingParams(), max_output=100)
    seq.start(0, 0)
    return seq


LONG = (*range(10), 30, *range(6))  # 6 tokens of context promise 2.5 right ones of 3
SHORT = (*range(10), 30, *range(2))  # 2 promise 1.5, of which 0.8 are thought to be kept
NONE = (*range(10), 30)


def propose(drafter: HybridDrafter, *seqs: Sequence, n: int = 3) -> list[list[int]]:
    found = drafter.propose(dict.fromkeys(seqs, n))
    return [found[seq].token_ids if seq in found else [] for seq in seqs]


def test_a_long_match_overrides_the_model() -> None:
    model = Model()
    drafter = HybridDrafter(model, SuffixDrafter(4))
    long, short, none = seqs = [sequence(*tokens) for tokens in (LONG, SHORT, NONE)]
    assert propose(drafter, *seqs) == [[6, 7, 8], [40, 41, 42], [40, 41, 42]]
    assert model.heard == [[0, 3, 3]], "who has a long match costs the model nothing"
    drafter.observe(long, 3, 2)
    drafter.observe(short, 2, 1)
    assert model.heard[1:] == [("observed", 2, 1)]
    assert drafter.stats()["n_proposals"] == {"suffix": 1, "pard": 2}
    assert drafter.stats()["draft_rows"] == 7 and drafter.stats()["suffix_bytes"] > 0
    drafter.end(none)
    drafter.close()
    assert model.heard[2:] == ["ended", "closed"]


def test_how_long_a_match_must_be_depends_on_how_good_the_model_is() -> None:
    """For this sequence: others begin with what is usual."""
    drafter = HybridDrafter(Model(), SuffixDrafter(4))
    short, long = sequence(*SHORT), sequence(*LONG)
    assert propose(drafter, short) == [[40, 41, 42]]
    for _ in range(4):
        drafter.observe(short, 3, 0)
    assert propose(drafter, short) == [[2, 3, 4]], "it is never right"
    drafter.observe(short, 3, 2)
    for _ in range(20):
        one = sequence(*NONE)
        propose(drafter, one)
        drafter.observe(one, 3, 3)
        drafter.end(one)
    assert propose(drafter, long) == [[40, 41, 42]], "it is always right"
    assert propose(drafter, short) == [[2, 3, 4]], "but not for everybody"


def test_promises_that_are_not_kept_are_believed_no_more() -> None:
    drafter = HybridDrafter(Model(), SuffixDrafter(4))
    seq = sequence(*LONG)
    guesses = []
    for _ in range(12):
        guesses.append(propose(drafter, seq)[0][0])
        drafter.observe(seq, 3, 1 if guesses[-1] == 40 else 0)
    assert guesses[0] == 6 and guesses[-1] == 40


def test_a_short_match_is_better_than_no_guess() -> None:
    model = Model()
    model.silent = True
    drafter = HybridDrafter(model, SuffixDrafter(4))
    seqs = [sequence(*tokens) for tokens in (LONG, SHORT, NONE)]
    assert propose(drafter, *seqs) == [[6, 7, 8], [2, 3, 4], []]
    drafter.observe(seqs[1], 3, 1)
    assert model.heard == [[0, 3, 3]]


def test_who_wants_nothing_gets_nothing() -> None:
    drafter = HybridDrafter(Model(), SuffixDrafter(4))
    assert drafter.propose({sequence(*LONG): 0, sequence(*NONE): 0}) == {}


def test_where_the_model_does_not_pay_the_text_guesses_alone() -> None:
    """The engine's controller is not told of the model's time, and so goes on asking."""
    cost, model = StepCost(), Model()
    gate = Controller(4, cost, "one")
    drafter = HybridDrafter(model, SuffixDrafter(4), gate)
    seqs = [sequence(*tokens) for tokens in (LONG, SHORT, NONE)]
    assert propose(drafter, *seqs) == [[6, 7, 8], [2, 3, 4], []], (
        "first it must be known what plain steps cost"
    )
    for _ in range(9):
        cost.observe(3, 0.001)
    assert propose(drafter, *seqs) == [[6, 7, 8], [40, 41], [40, 41]], "of a model not known yet few guesses"
    assert drafter.decided_s > 0
    for _ in range(9):
        gate.drafted(2, 1, 4, 0.05)
    asked = list(model.heard)
    assert propose(drafter, *seqs) == [[6, 7, 8], [2, 3, 4], []]
    assert drafter.decided_s == 0 and model.heard == asked
    assert drafter.stats()["model_pays"] is False


def test_a_prompt_is_read_beside_the_target_while_the_model_pays() -> None:
    model = Model()
    drafter = HybridDrafter(model, SuffixDrafter(4), Controller(4, StepCost(), "one"))
    assert drafter.propose({sequence(*NONE): 0}) == {}
    assert model.heard == [[0]]
