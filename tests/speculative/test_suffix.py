"""The suffix drafter by itself: what it reads, keeps and forgets of the sequences that run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from engine.fakes import make_engine
from hypothesis import given
from hypothesis import strategies as st

from pace.engine.sequence import Sequence
from pace.errors import ConfigError
from pace.ops import SuffixIndex
from pace.params import SamplingParams
from pace.speculative import suffix
from pace.speculative.suffix import PastOutputs, SuffixDrafter
from pace.speculative_config import SpeculativeConfig

CODE = [5, 6, 7, 8, 9, 10, 11, 12]


def sequence(prompt: list[int], salt: str | None = None) -> Sequence:
    seq = Sequence("r", np.array(prompt, np.int32), SamplingParams(), max_output=500, cache_salt=salt)
    seq.start(0, 0)
    return seq


def say(seq: Sequence, *tokens: int) -> None:
    for token in tokens:
        seq.commit(token)


def guess(drafter: SuffixDrafter, seq: Sequence, n: int = 4) -> list[int]:
    proposal = drafter.propose({seq: n}).get(seq)
    return [] if proposal is None else proposal.token_ids


def test_it_goes_on_as_the_prompt_did() -> None:
    drafter = SuffixDrafter(8)
    seq = sequence([*CODE, 1, 2])
    assert guess(drafter, seq) == []
    say(seq, 5)
    assert guess(drafter, seq, 8) == [6, 7, 8, 9], "further tokens would be right with 1/6"
    say(seq, 6)
    assert guess(drafter, seq, 8) == [7, 8, 9, 10, 11, 12, 1, 2][:8]
    assert guess(drafter, seq, 2) == [7, 8]
    say(seq, 7, 8, 9)
    proposal = drafter.propose({seq: 3})[seq]
    assert proposal.token_ids == [10, 11, 12]
    assert proposal.confidences == pytest.approx([1 / (1 + 1 / n) for n in (5, 6, 7)])


def test_a_sequence_that_wants_nothing_is_read_all_the_same() -> None:
    drafter = SuffixDrafter(8)
    seq = sequence(CODE)
    assert drafter.propose({seq: 0}) == {}
    assert drafter.stats()["suffix_bytes"] > 0
    say(seq, 5, 6)
    assert guess(drafter, seq) == [7, 8, 9, 10]


def test_sequences_know_nothing_of_each_other() -> None:
    drafter = SuffixDrafter(8)
    seqs = [sequence([*CODE, 5, 6]), sequence([1, 5, 6])]
    found = drafter.propose(dict.fromkeys(seqs, 2))
    assert {seq: found[seq].token_ids for seq in found} == {seqs[0]: [7, 8]}


def test_a_long_prompt_is_read_over_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suffix, "READ_TOKENS", 7)
    drafter = SuffixDrafter(8)
    first, second = sequence([*CODE, 5, 6]), sequence([*CODE, 5, 6])
    found = [set(drafter.propose({first: 1, second: 1})) for _ in range(4)]
    assert found == [set(), {first}, {first, second}, {first, second}]


def test_a_preempted_sequence_is_read_again() -> None:
    drafter = SuffixDrafter(8, past_tokens=100)
    seq = sequence([*CODE, 5, 6])
    expected = guess(drafter, seq)
    seq.preempt()
    drafter.end(seq)
    assert drafter.stats()["past_tokens"] == 0, "its output is not whole"
    seq.start(1, 0)
    assert guess(drafter, seq) == expected == [7, 8, 9, 10]


def finished(
    drafter: SuffixDrafter, output: list[int], reason: str = "stop", salt: str | None = None
) -> None:
    """One request from prompt to end."""
    seq = sequence([1, 2], salt)
    guess(drafter, seq)
    say(seq, *output)
    seq.finish(reason, None)
    drafter.end(seq)


def test_past_outputs_are_guessed_from() -> None:
    drafter = SuffixDrafter(8, past_tokens=100)
    finished(drafter, CODE)
    assert guess(drafter, sequence([3, 5, 6])) == [7, 8, 9, 10]
    assert guess(SuffixDrafter(8), sequence([3, 5, 6])) == []
    assert drafter.stats()["past_tokens"] == len(CODE) + 1


@pytest.mark.parametrize("reason", ["abort", "error"])
def test_outputs_that_were_cut_off_are_not_kept(reason: str) -> None:
    drafter = SuffixDrafter(8, past_tokens=100)
    finished(drafter, CODE, reason)
    assert drafter.stats()["past_tokens"] == 0


def test_a_cache_salt_keeps_past_outputs_apart() -> None:
    drafter = SuffixDrafter(8, past_tokens=100)
    finished(drafter, CODE, salt="a")
    assert guess(drafter, sequence([3, 5, 6])) == [] == guess(drafter, sequence([3, 5, 6], "a"))
    finished(drafter, CODE)
    assert guess(drafter, sequence([3, 5, 6], "a")) == []


@given(lengths=st.lists(st.integers(0, 30), min_size=1, max_size=30), capacity=st.integers(4, 60))
def test_past_outputs_are_bounded_and_the_newest_half_stays(lengths: list[int], capacity: int) -> None:
    """Outputs of distinct tokens: of the newest half of the capacity each is guessed, and of what went none."""
    past = PastOutputs(capacity)
    kept: list[int] = []
    for i, n in enumerate(lengths):
        output = range(100 * i, 100 * i + n)
        past.add(np.array(output, np.int32))
        kept += [*output[-(capacity // 2 - 1) :], -1]
        assert past.n_tokens <= capacity
    for at in range(max(0, len(kept) - capacity // 2), len(kept) - 1):
        token, following = kept[at : at + 2]
        if token >= 0:
            known = past.propose(np.array([token], np.int32), 1).token_ids
            assert known == ([] if following < 0 else [following])
    gone = [token for token in kept[: -past.n_tokens] if token >= 0]
    assert not any(past.propose(np.array([token], np.int32), 1).token_ids for token in gone)


def test_its_memory_follows_what_runs() -> None:
    drafter = SuffixDrafter(8)
    empty = drafter.stats()
    seqs = [sequence(list(range(1000))) for _ in range(4)]
    drafter.propose(dict.fromkeys(seqs, 1))
    assert 4 * 60_000 < drafter.stats()["suffix_bytes"] < 4 * 250_000
    for seq in seqs:
        drafter.end(seq)
    drafter.end(seqs[0])  # an unknown one is ignored
    assert drafter.stats() == empty


steps = st.lists(
    st.tuples(
        st.sampled_from(["start", "say", "say", "say", "preempt", "finish", "abort"]), st.integers(0, 99)
    ),
    max_size=60,
)


@given(steps=steps, past=st.sampled_from([0, 20, 1000]), room=st.sampled_from([3, 100]))
def test_whatever_happens_proposals_are_those_of_the_text(steps: list[Any], past: int, room: int) -> None:
    """Arrivals, tokens, preemptions and ends in any order: each guess is what an index of that sequence's tokens says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(suffix, "READ_TOKENS", room)
        drafter = SuffixDrafter(6, past_tokens=past)
        running: list[Sequence] = []
        for what, number in steps:
            if what == "start":
                running.append(sequence([number % 3, number % 2, number % 5]))
                continue
            if not running:
                continue
            seq = running[number % len(running)]
            if what == "say":
                say(seq, *(number % m for m in (2, 3, 2)))
            elif what == "preempt":
                seq.preempt()
                drafter.end(seq)
                seq.start(0, 0)
            else:
                seq.finish("stop" if what == "finish" else "abort", None)
                drafter.end(seq)
                running.remove(seq)
            wanted = {one: (number + i) % 7 for i, one in enumerate(running)}
            for one, proposal in drafter.propose(wanted).items():
                assert 0 < len(proposal.token_ids) <= wanted[one]
                assert proposal.confidences is not None
                assert all(0 < c < 1 for c in proposal.confidences)
                if not past:
                    index = SuffixIndex()
                    index.add(one.tokens[: one.n_tokens])
                    assert proposal.token_ids == index.propose(wanted[one], least=suffix.LEAST).token_ids
        for seq in running:
            drafter.end(seq)
        assert not drafter._texts


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_an_engine_says_the_same_in_fewer_steps(temperature: float) -> None:
    """The same requests again: their outputs are known, and come several tokens a step."""
    prompts = [list(range(i, 20 + i)) for i in range(3)]
    params = [
        SamplingParams(temperature=temperature, seed=i, max_tokens=30, logprobs=1, detokenize=False)
        for i in range(3)
    ]
    results = []
    for drafter in (None, SuffixDrafter(8, past_tokens=1000)):
        engine, _ = make_engine(drafter=drafter, max_tokens=64, n_blocks=32)
        for turn in range(2):
            n_steps = engine.stats()["n_steps"]
            outputs = []
            for i, prompt in enumerate(prompts):
                engine.add_request(f"{turn} {i}", prompt, params[i])
            while engine.has_unfinished:
                outputs += engine.step()
            done = {output.request_id[2:]: output.outputs[0] for output in outputs}
            results.append([(done[key].token_ids, done[key].logprobs) for key in sorted(done)])
            n_steps = engine.stats()["n_steps"] - n_steps
            assert n_steps < 12 if drafter is not None and turn else n_steps > 25
    assert all(result == results[0] for result in results)
    stats = engine.stats()["speculative"]
    assert stats["method"] == "suffix" and stats["mean_acceptance_length"] > 3 and stats["past_tokens"] > 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "suffix", "model": "demo-draft"}, "suffix has no draft model, so model means nothing"),
        ({"method": "hybrid"}, "hybrid needs a draft"),
        (
            {"method": "suffix", "past_output_tokens": -1},
            "past_output_tokens is -1, expected an integer from 0",
        ),
        (
            {"method": "pard", "model": "demo-draft", "past_output_tokens": 5},
            "pard reads no outputs, so past_output_tokens means nothing",
        ),
    ],
)
def test_what_the_methods_do_not_take_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SpeculativeConfig.read(given)
